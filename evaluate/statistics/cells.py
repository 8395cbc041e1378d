"""Load evaluation files as measured cells: one checkpoint x experiment x condition each."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from selfcorrect.evaluate.experiments import EXPERIMENTS, get_experiment
from selfcorrect.evaluate.experiments.base import Experiment, condition_rank
from selfcorrect.evaluate.experiments.tally import OVERALL, Tally
from selfcorrect.evaluate.measuring.cell_files import damaged_cell, read_cell_table
from selfcorrect.evaluate.run_folder import CheckpointRecord, find_checkpoints, model_folders
from selfcorrect.evaluate.statistics.bootstrap import Bootstrap, Draws, Estimate, bootstrap_together
from selfcorrect.evaluate.statistics.rounds import round_answers, round_estimates
from selfcorrect.recipes.foundation.errors import InputError

ALL_ORDERS = "all"  # all orders of the options together

# Most of a file, and no metric needs them.
_UNUSED = ("options", "samples", "prompt", "probabilities")
Counts = dict[str, tuple[int, int]]  # category -> (items, clusters)


@dataclass(frozen=True)
class MeasuredCell:
    """One cell with its estimates.

    `record` is None for a stand-alone model. `num_texts` dialogues contain text that the model
    wrote, of which `num_truncated` were cut off at the length limit. `by_order` holds estimates and
    counts by order of the options; it is empty where every item was asked in one order.
    """

    run: str
    model: str
    record: CheckpointRecord | None
    experiment: str
    condition: str
    left_out: dict[str, int]
    bootstrap: Bootstrap
    counts: Counts
    judged: bool
    num_texts: int
    num_truncated: int
    by_order: dict[str, tuple[dict[str, dict[str, Estimate]], Counts]]
    continues: str | None = None  # the condition of the round before, if it is measured
    rounds: dict[str, Estimate] = field(default_factory=dict)  # see rounds.py; empty without it
    thoughts: bool = False  # whether the texts are thoughts in a block of their own
    dtype: str | None = None  # of the weights while they were measured, if the file says so


def measure_run(run: Path, draws: Draws) -> list[MeasuredCell]:
    """Return every evaluated cell of a run, by size, model, seed, step, experiment, condition.

    Of a folder of stand-alone models, the cells have no record.
    """
    name = run_name(run)
    answers: list[_Answers] = []
    for model, folder in model_folders(run).items():
        answers += _read_folder(folder, name, model, None)
    for checkpoint in find_checkpoints(run):
        record = checkpoint.record
        answers += _read_folder(checkpoint.evaluation, name, record.model, record)
    return _measure(answers, draws)


def evaluated_cells(run: Path, draws: Draws) -> list[MeasuredCell]:
    """Return the cells of a run as `measure_run`; raises InputError where there are none."""
    cells = measure_run(run, draws)
    if not cells:
        raise InputError(
            f"{run}: no checkpoint has been evaluated; run `selfcorrect evaluate {run}`"
        )
    return cells


def measure_folder(
    folder: Path, run: str, model: str, record: CheckpointRecord | None, draws: Draws
) -> list[MeasuredCell]:
    """Return every cell of one folder of parquet files, by experiment and condition."""
    return _measure(_read_folder(folder, run, model, record), draws)


@dataclass(frozen=True)
class _Answers:
    """One cell's answers added up: `parts` by order of the options, ALL_ORDERS first."""

    run: str
    model: str
    record: CheckpointRecord | None
    settings: dict[str, Any]
    parts: dict[str, tuple[Tally, list[str], Counts]]
    num_texts: int
    num_truncated: int
    path: Path

    @property
    def checkpoint(self) -> tuple[Any, ...]:
        """What the cells of one checkpoint and experiment share."""
        record = self.record
        trained = None if record is None else (record.seed, record.step)
        return self.run, self.model, trained, self.settings["experiment"]


def _read_folder(
    folder: Path, run: str, model: str, record: CheckpointRecord | None
) -> list[_Answers]:
    """Return the answers of a folder's cells, by experiment and condition."""
    answers = [_read(path, run, model, record) for path in sorted(folder.glob("*.parquet"))]
    order = list(EXPERIMENTS)
    return sorted(
        answers,
        key=lambda cell: (
            order.index(cell.settings["experiment"]),
            condition_rank(cell.settings["condition"]),
        ),
    )


def _read(path: Path, run: str, model: str, record: CheckpointRecord | None) -> _Answers:
    table, settings = read_cell_table(path, leave_out=_UNUSED)
    _check_origin(path, settings, record)
    experiment = get_experiment(settings["experiment"])
    try:
        truncated = table["truncated"]
        frame = table.drop_columns("truncated").to_pandas(use_threads=False)
        parts = {ALL_ORDERS: _add_up(experiment, frame)}
        for order in _orders(frame):
            parts[order] = _add_up(experiment, frame[frame["order"] == order])
    except (KeyError, TypeError, IndexError):
        raise damaged_cell(path) from None
    num_truncated = pc.sum(truncated).as_py() if pa.types.is_boolean(truncated.type) else 0
    return _Answers(
        run,
        model,
        record,
        settings,
        parts,
        num_texts=len(truncated) - truncated.null_count,
        num_truncated=num_truncated or 0,
        path=path,
    )


def _measure(answers: Sequence[_Answers], draws: Draws) -> list[MeasuredCell]:
    """Return the cells with their estimates; the cells of an experiment are resampled together."""
    bootstraps: dict[tuple[int, str], Bootstrap] = {}
    for name in dict.fromkeys(cell.settings["experiment"] for cell in answers):
        parts = {
            (index, order): part
            for index, cell in enumerate(answers)
            if cell.settings["experiment"] == name
            for order, part in cell.parts.items()
        }
        tallies, pooled, _ = zip(*parts.values(), strict=True)
        compute = get_experiment(name).compute
        resampled = bootstrap_together(tallies, compute, pooled, draws)
        bootstraps.update(zip(parts, resampled, strict=True))
    rounds = _round_estimates(answers, draws)
    return [
        MeasuredCell(
            run=cell.run,
            model=cell.model,
            record=cell.record,
            experiment=cell.settings["experiment"],
            condition=cell.settings["condition"],
            left_out={str(why): int(n) for why, n in (cell.settings.get("left_out") or {}).items()},
            bootstrap=bootstraps[index, ALL_ORDERS],
            counts=cell.parts[ALL_ORDERS][2],
            judged=bool(cell.settings["judged"]),
            dtype=_dtype_of(cell.settings.get("origin")),
            num_texts=cell.num_texts,
            num_truncated=cell.num_truncated,
            continues=cell.settings["continues"] if index in rounds else None,
            rounds=rounds.get(index, {}),
            thoughts=bool(cell.settings.get("thoughts")),
            by_order={
                order: (bootstraps[index, order].estimates, counts)
                for order, (_, _, counts) in cell.parts.items()
                if order != ALL_ORDERS
            },
        )
        for index, cell in enumerate(answers)
    ]


def _round_estimates(answers: Sequence[_Answers], draws: Draws) -> dict[int, dict[str, Estimate]]:
    """Return the quantities of rounds.py by the index of the cell that continues another."""
    cells = {(*cell.checkpoint, cell.settings["condition"]): cell for cell in answers}
    rows: dict[Path, pd.DataFrame] = {}
    estimates = {}
    for index, cell in enumerate(answers):
        before = cells.get((*cell.checkpoint, cell.settings.get("continues")))
        if before is None:
            continue
        experiment = get_experiment(cell.settings["experiment"])
        for path in (before.path, cell.path):
            if path not in rows:
                frame = read_cell_table(path, leave_out=_UNUSED)[0].to_pandas()
                rows[path] = round_answers(experiment, frame)
        estimates[index] = round_estimates(experiment, rows[before.path], rows[cell.path], draws)
    return estimates


def _dtype_of(origin: Any) -> str | None:
    """Return the type of the weights by a file's origin; older files of ours are float32."""
    if not isinstance(origin, dict):
        return None
    is_packed = origin.get("engine", "packed") == "packed"
    return origin.get("dtype") or ("float32" if is_packed else None)


def _check_origin(path: Path, settings: dict[str, Any], record: CheckpointRecord | None) -> None:
    origin = settings.get("origin")
    weights = origin.get("weights") if isinstance(origin, dict) else None
    known = None if record is None else record.weights_digest
    if known and weights not in (None, known):
        raise InputError(
            f"{path}: its answers come from other weights than checkpoint.json records; run "
            "`selfcorrect evaluate` again, or copy the checkpoint here again"
        )


def _add_up(experiment: Experiment, frame: pd.DataFrame) -> tuple[Tally, list[str], Counts]:
    """Return the tally of a cell's rows, the pooled categories, and their items and clusters."""
    tally = experiment.tally(frame)
    pooled = experiment.overall_categories(tally.categories)
    category = frame["category"]
    if not frame["item"].is_unique:
        category = category[~frame["item"].duplicated()]
    items = Counter(category.to_numpy())
    clusters = np.bincount(tally.strata, minlength=len(tally.categories))
    counts = {
        category: (items[category], int(clusters[index]))
        for index, category in enumerate(tally.categories)
    }
    parts = [counts[category] for category in pooled if category in counts]
    counts[OVERALL] = (sum(num for num, _ in parts), sum(num for _, num in parts))
    return tally, pooled, counts


def _orders(frame: pd.DataFrame) -> list[str]:
    """Return the sorted orders of the options where an item was asked in several, else []."""
    orders = sorted(set(frame["order"].to_numpy()))
    if len(orders) < 2 or (frame.groupby("item")["order"].nunique() < 2).all():
        return []
    return orders


def run_name(run: Path) -> str:
    """Return the value of the column `run`: the folder's name."""
    return run.resolve().name
