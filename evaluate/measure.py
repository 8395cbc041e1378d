"""From a model and its tokenizer to evaluation files: one parquet per experiment and condition.

    cells = plan(data_dir, load_stimuli(), ["bbq"], ["Q", "Q+IF"], limit=200, ...)
    measure(cells, model, tokenizer, folder)

A cell whose file is there already, with the same settings, is not measured again.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from selfcorrect.evaluate.cells import METADATA_KEY, read_settings, read_table
from selfcorrect.evaluate.dialogue import (
    before_sample,
    render,
    stop_text,
    with_sample,
)
from selfcorrect.evaluate.items import Item
from selfcorrect.evaluate.plan import EvaluationPlan, PlannedCell
from selfcorrect.evaluate.stimuli import Turn
from selfcorrect.recipes.errors import InputError, RunFailure
from selfcorrect.recipes.whole_files import whole_file

if TYPE_CHECKING:
    from selfcorrect.evaluate.sampling import Sample
    from selfcorrect.evaluate.scoring import Scorer

Progress = Callable[[str, int, int], None]
"""Called with (cell's name, prompts done, prompts in the cell) after every slice."""

_SLICE = 256  # prompts between two calls of the progress function
_COLUMNS = pa.schema(
    [
        ("item", pa.string()),
        ("cluster", pa.string()),
        ("category", pa.string()),
        ("weight", pa.float64()),
        ("order", pa.string()),
        ("options", pa.list_(pa.string())),
        ("logprobs", pa.list_(pa.float64())),
        ("probabilities", pa.list_(pa.float64())),
        ("mass", pa.float64()),
        ("sample", pa.string()),
        ("truncated", pa.bool_()),
    ]
)


def measure(
    plan: EvaluationPlan,
    model: Any,
    tokenizer: Any,
    folder: Path,
    progress: Progress | None = None,
) -> list[Path]:
    """Measure every cell that `folder` does not hold yet; returns the files of all cells.

    Each file appears whole, as soon as its cell is done: interrupted and called again, the work
    goes on with the next cell. `model` must be in eval mode (`callback.measure_undisturbed` sees
    to that for a model in training).

    Raises InputError for prompts that do not fit the model, RunFailure for NaN logits.
    """
    from selfcorrect.evaluate.scoring import Scorer

    if model.training:
        raise ValueError("measure a model in eval mode, or call measure_undisturbed")
    scorer = Scorer(model, tokenizer)
    paths = []
    for cell in plan.cells:
        path = folder / cell.file_name
        if not is_measured(path, cell):
            _write(path, cell, _rows(cell, scorer, progress or _silent))
        paths.append(path)
    return paths


def is_measured(path: Path, cell: PlannedCell) -> bool:
    """Whether `path` is an undamaged file of this very cell."""
    if not path.is_file():
        return False
    try:
        _, metadata = read_cell(path)
    except InputError:
        return False
    return metadata.get("settings_digest") == cell.settings_digest


def read_cell(path: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The rows of an evaluation file, and what it says of itself.

    Raises InputError when the file is missing, damaged, or not an evaluation file.
    """
    metadata = read_settings(path)
    return read_table(path, None).to_pandas(), metadata


def _rows(cell: PlannedCell, scorer: "Scorer", progress: Progress) -> list[dict[str, Any]]:
    """One row per item: its scores, its sample, its facts."""
    progress(cell.name, 0, len(cell.items))
    if cell.sampling is not None:
        _check_room(cell, scorer)
    rows: list[dict[str, Any]] = []
    for part in _slices(len(cell.items)):
        items, dialogues = cell.items[part], cell.dialogues[part]
        with _Naming(cell, items):
            samples = _samples(cell, items, dialogues, scorer)
            prompts = [
                _prompt(cell, scorer, with_sample(scorer.tokenizer, turns, sample.text))
                if sample is not None
                else _prompt(cell, scorer, turns)
                for turns, sample in zip(dialogues, samples, strict=True)
            ]
            scores = scorer.score(
                [(prompt, item.options) for prompt, item in zip(prompts, items, strict=True)]
            )
        rows += [_row(*answer) for answer in zip(items, scores, samples, strict=True)]
        progress(cell.name, len(rows), len(cell.items))
    return rows


def _samples(
    cell: PlannedCell, items: Sequence[Item], dialogues: Sequence[list[Turn]], scorer: "Scorer"
) -> Sequence["Sample | None"]:
    if cell.sampling is None:
        return [None] * len(items)
    return scorer.sample(
        [_prompt(cell, scorer, before_sample(turns)) for turns in dialogues],
        # The same noise for an item at every checkpoint: differences are the model's own.
        [f"{cell.experiment}|{cell.condition}|{item.id}" for item in items],
        max_new_tokens=cell.sampling.max_new_tokens,
        temperature=cell.sampling.temperature,
        seed=cell.sampling.seed,
        stop=stop_text(scorer.tokenizer, cell.style),
    )


def _prompt(cell: PlannedCell, scorer: "Scorer", turns: Sequence[Turn]) -> str:
    return render(scorer.tokenizer, turns, cell.style)


def _check_room(cell: PlannedCell, scorer: "Scorer") -> None:
    """Refuse a plan whose final questions can outgrow the context, before anything is sampled."""
    assert cell.sampling is not None
    for part in _slices(len(cell.items)):
        with _Naming(cell, cell.items[part]):
            finals = [with_sample(scorer.tokenizer, turns, "") for turns in cell.dialogues[part]]
            prompts = [_prompt(cell, scorer, turns) for turns in finals]
            scorer.check_room(prompts, cell.sampling.max_new_tokens)


def _row(item: Item, logprobs: list[float], sample: "Sample | None") -> dict[str, Any]:
    if clash := set(item.facts) & set(_COLUMNS.names):
        raise ValueError(f"item {item.id}: facts named like columns: {sorted(clash)}")
    mass = math.fsum(math.exp(value) for value in logprobs)
    top = max(logprobs)
    shares = [math.exp(value - top) for value in logprobs] if top > -math.inf else None
    return {
        "item": item.id,
        "cluster": item.cluster,
        "category": item.category,
        "weight": item.weight,
        "order": "".join(str(index) for index in range(len(item.options))),
        "options": list(item.options),
        "logprobs": logprobs,
        # Undefined, hence null, when the model gives no option any probability.
        "probabilities": shares and [share / math.fsum(shares) for share in shares],
        "mass": mass,
        "sample": None if sample is None else sample.text,
        "truncated": None if sample is None else sample.truncated,
        **item.facts,
    }


def _write(path: Path, cell: PlannedCell, rows: list[dict[str, Any]]) -> None:
    """Write the cell's file, whole or not at all."""
    metadata = {
        "experiment": cell.experiment,
        "condition": cell.condition,
        "settings_digest": cell.settings_digest,
        "num_items": len(cell.items),
        "left_out": cell.left_out,
    }
    facts = list(dict.fromkeys(name for item in cell.items for name in item.facts))
    columns = {
        field.name: pa.array([row[field.name] for row in rows], field.type) for field in _COLUMNS
    }
    columns |= {name: pa.array([row.get(name) for row in rows]) for name in facts}
    table = pa.table(columns).replace_schema_metadata({METADATA_KEY: json.dumps(metadata).encode()})
    with whole_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


class _Naming:
    """Puts the cell, and the item where one is to blame, into the scorer's errors."""

    def __init__(self, cell: PlannedCell, items: Sequence[Item]) -> None:
        self.cell = cell
        self.items = items

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from selfcorrect.evaluate.scoring import PromptTooLong

        where = self.cell.name
        if isinstance(error, PromptTooLong):
            remedy = "use a model with a longer context"
            if self.cell.sampling is not None:
                remedy += f", or lower max_new_tokens ({self.cell.sampling.max_new_tokens})"
            item = self.items[error.index].id
            raise InputError(f"{where}, item {item}: {error}; {remedy}") from None
        if isinstance(error, InputError):
            raise InputError(f"{where}: {error}") from None
        if isinstance(error, RunFailure):
            raise RunFailure(f"{where}: {error}") from None


def _slices(number: int) -> Iterator[slice]:
    return (slice(first, first + _SLICE) for first in range(0, number, _SLICE))


def _silent(name: str, done: int, total: int) -> None:
    """No progress shown."""
