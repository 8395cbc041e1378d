"""Markdown files name what exists: links, files in backticks, commands with their options."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from selfcorrect.recipes.load import load_measured, recipe_path
from selfcorrect.scripts.commands.__main__ import app
from tests.support import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE_SPAN = re.compile(r"`([^`\n]+)`")
PATH_OF_OURS = re.compile(r"(recipes|evaluate|train|scripts|tests|docs)(/[\w.-]+)+/?")
OPTION = re.compile(r"(?<=\s)--[a-z][a-z-]+")
COMMAND: Any = typer.main.get_command(app)


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(path: Path) -> str:
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def heading_anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def shell_commands(path: Path) -> Iterator[list[str]]:
    """Yield the words of every `selfcorrect ...` line in the page's shell blocks."""
    for language, block in FENCE.findall(path.read_text(encoding="utf-8")):
        if language == "sh":
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["selfcorrect"]:
                    yield words[1:]


def resolve(words: list[str]) -> tuple[Any, list[str]]:
    """Return the command that the first words name, and the words left for it."""
    command = COMMAND
    while hasattr(command, "commands") and words:
        assert words[0] in command.commands, f"no command {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


def test_there_are_pages_and_commands_to_check() -> None:
    assert len(PAGES) > 25
    assert sum(len(list(shell_commands(path))) for path in PAGES) > 25


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_relative_links_resolve(path: Path) -> None:
    for target in LINK.findall(prose(path)):
        if ":" in target:
            continue
        name, _, anchor = target.partition("#")
        page = (path.parent / name).resolve() if name else path
        assert page.exists(), target
        if anchor and page.suffix == ".md":
            assert anchor in heading_anchors(page), target


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_files_named_in_backticks_exist(path: Path) -> None:
    for span in CODE_SPAN.findall(prose(path)):
        if PATH_OF_OURS.fullmatch(span):
            assert (ROOT / span).exists(), span


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_python_files_named_in_commands_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for script in re.findall(r"\bpython (scripts/\S+\.py)", text):
        assert (ROOT / script).is_file(), script
    for module in re.findall(r"\bpython -m (tests\.[\w.]+)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), module


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_options_named_in_backticks_exist(path: Path) -> None:
    for span in CODE_SPAN.findall(prose(path)):
        if span.startswith("selfcorrect ") and "|" not in span:
            command, _ = resolve(span.split()[1:])
            known = {option for parameter in command.params for option in parameter.opts}
            assert set(OPTION.findall(span)) <= known, span


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_commands_in_shell_blocks_parse(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each option is one of the command's, and each override fits the recipe."""
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("from: quickstart\nname: my\n", encoding="utf-8")
    for words in shell_commands(path):
        command, arguments = resolve(words)
        given = command.make_context(command.name, list(arguments)).params
        recipe = given.get("recipe")
        if recipe is not None and recipe_path(recipe).is_file():
            load_measured(recipe, given.get("overrides") or [])


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_recipes_in_yaml_blocks_load(path: Path, tmp_path: Path) -> None:
    for language, block in FENCE.findall(path.read_text(encoding="utf-8")):
        if language == "yaml" and (block.startswith("from:") or "\ncheckpoints:" in block):
            (tmp_path / "recipe.yaml").write_text(block, encoding="utf-8")
            load_measured(str(tmp_path / "recipe.yaml"))
