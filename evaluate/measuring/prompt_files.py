"""Write and read the tables of prompts: the texts with which the items of a cell were asked.

All checkpoints of a run share one table per experiment, condition and way of rendering, in
<run>/prompts; a model without a run has its tables beside its cells, in prompts/. A table has a row
per item and order of its options. In a condition in which the model writes itself, the table holds
the prompt of the first text, and the cell's column `prompt` the prompt after which options were
scored.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from selfcorrect.evaluate.measuring.cell_files import METADATA_KEY, read_settings, table_writer
from selfcorrect.evaluate.measuring.plan import PlannedCell, Question
from selfcorrect.evaluate.prompts.dialogue import beginning_ids, style_of
from selfcorrect.recipes.foundation.atomic_files import atomic_file
from selfcorrect.recipes.foundation.checksums import (
    CHECKSUM_PLACEHOLDER,
    file_has_valid_checksum,
    insert_file_checksum,
)
from selfcorrect.recipes.foundation.errors import InputError

FOLDER = "prompts"
_SLICE_ITEMS = 2048  # rendered at once
_SCHEMA = pa.schema([(name, pa.string()) for name in ("item", "order", "prompt")])


def prompts_folder(evaluation: Path) -> Path:
    """Return the folder of the tables for the cells of `evaluation`."""
    parents = evaluation.absolute().parents  # checkpoint, method, seed, model, run
    if len(parents) > 4 and (parents[4] / "recipe.yaml").is_file():
        return parents[4] / FOLDER
    return evaluation / FOLDER


def prompts_file_name(cell: PlannedCell, tokenizer: Any) -> str:
    """Return the name of a cell's table; it holds a digest of all that decides the texts."""
    rendering = {
        **_facts(cell, tokenizer),
        "chat_template": getattr(tokenizer, "chat_template", None),
        "special_tokens": getattr(tokenizer, "special_tokens_map", None),
        "beginning": beginning_ids(tokenizer),
    }
    text = json.dumps(rendering, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{cell.file_name.removesuffix('.parquet')}.{digest[:16]}.parquet"


def _facts(cell: PlannedCell, tokenizer: Any) -> dict[str, Any]:
    return {
        "experiment": cell.experiment,
        "condition": cell.condition,
        "settings_digest": cell.settings_digest,
        "style": style_of(tokenizer, cell.style),
        "arguments": dict(cell.style.arguments),
        "date": cell.style.date,
        **({} if cell.style.thinking is None else {"thinking": asdict(cell.style.thinking)}),
    }


def write_prompts(
    evaluation: Path, cell: PlannedCell, tokenizer: Any, prompt: Callable[[Question], str]
) -> None:
    """Write the table of a cell's prompts, unless it exists."""
    path = prompts_folder(evaluation) / prompts_file_name(cell, tokenizer)
    if path.is_file():
        return
    facts = {"checksum": CHECKSUM_PLACEHOLDER, **_facts(cell, tokenizer)}
    schema = _SCHEMA.with_metadata({METADATA_KEY: json.dumps(facts).encode()})
    with atomic_file(path) as temporary:
        with table_writer(temporary, schema) as file:
            for first in range(0, len(cell.items), _SLICE_ITEMS):
                rows = [
                    {
                        "item": question.item.id,
                        "order": question.order,
                        "prompt": prompt(question),
                    }
                    for question in cell.questions(slice(first, first + _SLICE_ITEMS))
                ]
                file.write_table(pa.Table.from_pylist(rows, schema=schema))
        insert_file_checksum(temporary)


def read_prompts(cell_file: Path, item: str | None = None) -> dict[tuple[str, str], str]:
    """Return a cell's prompts by item and order, all of them or those of one item.

    Empty for a cell that names no table (older versions). Raises InputError for a table that is
    missing or damaged.
    """
    name = read_settings(cell_file).get("prompts")
    if name is None:
        return {}
    path = prompts_folder(cell_file.parent) / Path(str(name)).name
    try:
        if not file_has_valid_checksum(path):
            raise ValueError("checksum mismatch")
        only = None if item is None else [("item", "=", item)]
        rows = pq.read_table(path, filters=only).to_pylist()
        return {(row["item"], row["order"]): row["prompt"] for row in rows}
    except (pa.ArrowException, OSError, ValueError, KeyError):
        raise InputError(
            f"{path}: missing or damaged; delete it and {cell_file}, and run "
            "`selfcorrect evaluate` again"
        ) from None
