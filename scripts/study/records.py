"""What the study's pages share: records read from JSON, and Markdown: tables and prose."""

import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """Return the record in a JSON file."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def wrapped(text: str) -> str:
    """Wrap prose at 116 columns; keep tables, code, lists, headings and figures."""
    blocks = []
    for block in re.split(r"\n{2,}", text.strip()):
        is_prose = not block.startswith(("|", "    ", "- ", "#", "!"))
        joined = " ".join(line.strip() for line in block.splitlines())
        blocks.append(textwrap.fill(joined, 116, break_on_hyphens=False) if is_prose else block)
    return "\n\n".join(blocks) + "\n"
