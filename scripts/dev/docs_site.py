"""MkDocs hooks: fill in recipe keys, glossary and PPO's diagram; show links into the code as names.

The recipe keys come from the pydantic schema, the glossary from CONTRIBUTING.md and the diagram
from the trainer's docstring, so none is kept twice. Pages link to source files for readers of the
repository; the site has no such files.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
RECIPE_KEYS = "<!-- recipe keys -->"
SERIES_KEYS = "<!-- series keys -->"
GLOSSARY = "<!-- glossary -->"
PPO_STEP = "<!-- ppo step -->"
TYPES = {"integer": "whole number", "number": "number", "string": "text",
         "boolean": "true or false", "array": "list", "object": "mapping"}  # fmt: skip
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_startup(**_: Any) -> None:
    """Link the packages under build/typing, where mkdocstrings looks for them."""
    subprocess.run([sys.executable, ROOT / "scripts/dev/link_packages_for_typing.py"], check=True)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the page with its placeholders filled in and links out of docs/ made plain text."""
    if RECIPE_KEYS in markdown:
        markdown = markdown.replace(RECIPE_KEYS, recipe_tables())
    if SERIES_KEYS in markdown:
        markdown = markdown.replace(SERIES_KEYS, series_tables())
    if GLOSSARY in markdown:
        markdown = markdown.replace(GLOSSARY, glossary())
    if PPO_STEP in markdown:
        markdown = markdown.replace(PPO_STEP, ppo_diagram())
    folder = (DOCS / page.file.src_uri).parent

    def keep_or_name(link: re.Match[str]) -> str:
        target = link[2]
        inside = ":" in target or (folder / target).resolve().is_relative_to(DOCS)
        return link[0] if inside else link[1]

    return LINK.sub(keep_or_name, markdown)


def glossary() -> str:
    """Return the section "Glossary" of CONTRIBUTING.md, without its heading."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return text.split("\n## Glossary\n", 1)[1].split("\n## ", 1)[0].strip()


def ppo_diagram() -> str:
    """Return the Mermaid diagram in the docstring of train/ppo/trainer.py."""
    source = (ROOT / "train" / "ppo" / "trainer.py").read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(source)) or ""
    return "```mermaid" + docstring.split("```mermaid", 1)[1].split("```", 1)[0] + "```"


def recipe_tables() -> str:
    """Return a heading and a table of keys for each section of a recipe, from its JSON schema."""
    from selfcorrect.recipes.schema import Recipe

    return _tables("Top level", Recipe.model_json_schema(), {})


def series_tables() -> str:
    """Return the same of a series; the sections that it shares with a recipe stand there."""
    from selfcorrect.recipes.series import Series

    shared = {"Evaluate": "evaluate", "Launch": "launch", "SocietySettings": "data.society"}
    return _tables("A series", Series.model_json_schema(), shared)


def _tables(title: str, schema: dict[str, Any], path_of: dict[str, str]) -> str:
    """Return the tables; `path_of` has the sections whose tables stand elsewhere, by name."""
    sections = schema["$defs"]
    parts: list[str] = []

    def write(title: str, prefix: str, section: dict[str, Any]) -> None:
        rows, inner = [], []
        for key, value in section["properties"].items():
            names = [name for name in _referenced(value) if "properties" in sections[name]]
            path = f"{prefix}.{key}" if prefix else key
            path += "[]" if value.get("type") == "array" else ""
            inner += [(path, name) for name in names if name not in path_of]
            for name in names:
                path_of.setdefault(name, path)
            needed = "required" if key in section.get("required", ()) else _default(value)
            text = value.get("description", "")
            if names:
                text = f"{text} See `{path_of[names[0]]}`.".strip()
            rows.append(f"| `{key}` | {_type(value, sections)} | {needed} | {_cell(text)} |")
        about = section.get("description", "").split("\n\n")[0].replace("\n", " ")
        parts.append(
            f"## {title}\n\n{about}\n\n| key | type | default | meaning |\n"
            "| --- | --- | --- | --- |\n" + "\n".join(rows)
        )
        for path, name in inner:
            write(f"`{path}`", path.replace("[]", ""), sections[name])

    write(title, "", schema)
    return "\n\n".join(parts)


def _referenced(value: Any) -> list[str]:
    """Return the names of the sections that a property may hold."""
    return list(dict.fromkeys(re.findall(r"'\$ref': '#/\$defs/(\w+)'", str(value))))


def _type(value: dict[str, Any], sections: dict[str, Any]) -> str:
    """Return a property's type in words a YAML author knows."""
    if "$ref" in value:
        target = sections[value["$ref"].rpartition("/")[2]]
        return "section" if "properties" in target else _type(target, sections)
    if "enum" in value:
        return ", ".join(f"`{choice}`" for choice in value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    kinds = value.get("anyOf") or value.get("oneOf")
    if isinstance(value.get("type"), list):
        kinds = [{"type": kind} for kind in value["type"]]
    if kinds:
        words = [_type(kind, sections) for kind in kinds if kind.get("type") != "null"]
        return " or ".join(dict.fromkeys(words))
    if value.get("type") == "array" and value.get("items"):
        return f"list ({_type(value['items'], sections)})"
    if set(value.get("properties", ())) == {"every"}:
        return "`{every: n}`"
    return TYPES.get(value.get("type", ""), "any")


def _default(value: dict[str, Any]) -> str:
    default = value.get("default")
    if default is None or default in ("", [], {}) or _referenced(value):
        return "–"
    return f"`{_cell(json.dumps(default) if not isinstance(default, str) else default)}`"


def _cell(text: str) -> str:
    """Return text that fits into one cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
