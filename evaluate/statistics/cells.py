"""Load evaluation files as measured cells: one checkpoint x experiment x condition each."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from selfcorrect.evaluate.experiments import EXPERIMENTS, get_experiment
from selfcorrect.evaluate.experiments.base import Experiment, condition_rank
from selfcorrect.evaluate.experiments.tally import OVERALL
from selfcorrect.evaluate.measuring.cell_files import damaged_cell, read_settings, read_table
from selfcorrect.evaluate.run_folder import CheckpointRecord, find_checkpoints
from selfcorrect.evaluate.statistics.bootstrap import Bootstrap, Draws, Estimate, bootstrap
from selfcorrect.recipes.foundation.errors import InputError

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


def measure_run(run: Path, draws: Draws) -> list[MeasuredCell]:
    """Return every evaluated cell of a run, by size, model, seed, step, experiment, condition."""
    cells: list[MeasuredCell] = []
    for checkpoint in find_checkpoints(run):
        record = checkpoint.record
        cells += measure_folder(checkpoint.evaluation, run_name(run), record.model, record, draws)
    return cells


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
    cells = [_measure(path, run, model, record, draws) for path in sorted(folder.glob("*.parquet"))]
    order = list(EXPERIMENTS)
    return sorted(
        cells, key=lambda cell: (order.index(cell.experiment), condition_rank(cell.condition))
    )


def _measure(
    path: Path, run: str, model: str, record: CheckpointRecord | None, draws: Draws
) -> MeasuredCell:
    settings = read_settings(path)
    _check_origin(path, settings, record)
    experiment = get_experiment(settings["experiment"])
    frame = read_table(path, None).to_pandas()
    try:
        truncated = frame["truncated"]
        resampled, counts = _resample(experiment, frame, draws)
        by_order = {}
        for order in _orders(frame):
            part, part_counts = _resample(experiment, frame[frame["order"] == order], draws)
            by_order[order] = part.estimates, part_counts
    except (KeyError, TypeError, IndexError):
        raise damaged_cell(path) from None
    return MeasuredCell(
        run=run,
        model=model,
        record=record,
        experiment=settings["experiment"],
        condition=settings["condition"],
        left_out={str(why): int(n) for why, n in (settings.get("left_out") or {}).items()},
        bootstrap=resampled,
        counts=counts,
        judged=bool(settings["judged"]),
        num_texts=int(truncated.notna().sum()),
        num_truncated=int(truncated.eq(True).sum()),
        by_order=by_order,
    )


def _check_origin(path: Path, settings: dict[str, Any], record: CheckpointRecord | None) -> None:
    origin = settings.get("origin")
    weights = origin.get("weights") if isinstance(origin, dict) else None
    known = None if record is None else record.weights_digest
    if known and weights not in (None, known):
        raise InputError(
            f"{path}: its answers come from other weights than checkpoint.json records; run "
            "`selfcorrect evaluate` again, or copy the checkpoint here again"
        )


def _resample(
    experiment: Experiment, frame: pd.DataFrame, draws: Draws
) -> tuple[Bootstrap, Counts]:
    """Return the estimates of a cell's rows, and each category's number of items and clusters."""
    tally = experiment.tally(frame)
    pooled = experiment.overall_categories(tally.categories)
    items = frame.groupby("category")["item"].nunique().to_dict()
    clusters = np.bincount(tally.strata, minlength=len(tally.categories))
    counts = {
        category: (int(items.get(category, 0)), int(clusters[index]))
        for index, category in enumerate(tally.categories)
    }
    parts = [counts[category] for category in pooled if category in counts]
    counts[OVERALL] = (sum(num for num, _ in parts), sum(num for _, num in parts))
    return bootstrap(tally, experiment.compute, pooled, draws), counts


def _orders(frame: pd.DataFrame) -> list[str]:
    """Return the sorted orders of the options where an item was asked in several, else []."""
    orders = sorted(frame["order"].unique())
    if len(orders) < 2 or (frame.groupby("item")["order"].nunique() < 2).all():
        return []
    return orders


def run_name(run: Path) -> str:
    """Return the value of the column `run`: the folder's name."""
    return run.resolve().name
