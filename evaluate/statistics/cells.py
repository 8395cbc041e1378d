"""Evaluation files into measured cells: one checkpoint x experiment x condition each."""

from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Measured:
    """One cell: what was scored, its estimates, and where it belongs.

    `num_texts` dialogues hold text of the model's own, of which `num_truncated` were cut off at
    the length limit before the model ended by itself. `by_order` is empty where every item was
    asked in one order.
    """

    run: str
    model: str
    record: CheckpointRecord | None
    experiment: str
    condition: str
    left_out: dict[str, int]
    bootstrap: Bootstrap
    counts: dict[str, tuple[int, int]]  # category -> (items, clusters)
    num_texts: int
    num_truncated: int
    by_order: dict[str, "OrderResult"] = field(default_factory=dict)


@dataclass(frozen=True)
class OrderResult:
    """What a cell's rows in one order of the options say, where items were asked in several."""

    estimates: dict[str, dict[str, Estimate]]
    counts: dict[str, tuple[int, int]]


def measure_run(run: Path, draws: Draws) -> list[Measured]:
    """Every evaluated cell of a run, ordered by size, model, seed, step, experiment, condition."""
    cells: list[Measured] = []
    for checkpoint in find_checkpoints(run):
        record = checkpoint.record
        cells += measure_folder(checkpoint.evaluation, run_name(run), record.model, record, draws)
    return cells


def measure_folder(
    folder: Path, run: str, model: str, record: CheckpointRecord | None, draws: Draws
) -> list[Measured]:
    """Every cell of one folder of parquet files."""
    cells = [_measure(path, run, model, record, draws) for path in sorted(folder.glob("*.parquet"))]
    order = list(EXPERIMENTS)
    return sorted(
        cells, key=lambda cell: (order.index(cell.experiment), condition_rank(cell.condition))
    )


def _measure(
    path: Path, run: str, model: str, record: CheckpointRecord | None, draws: Draws
) -> Measured:
    settings = read_settings(path)
    _check_origin(path, settings, record)
    experiment = get_experiment(settings["experiment"])
    frame = read_table(path, None).to_pandas()
    try:
        truncated = frame["truncated"]
        boot, counts = _resampled(experiment, frame, draws)
        orders = _orders(frame)
        by_order = {
            order: OrderResult(one.estimates, sizes)
            for order in orders
            for one, sizes in [_resampled(experiment, frame[frame["order"] == order], draws)]
        }
    except (KeyError, TypeError, IndexError):
        raise damaged_cell(path) from None
    return Measured(
        run=run,
        model=model,
        record=record,
        experiment=settings["experiment"],
        condition=settings["condition"],
        left_out={str(k): int(v) for k, v in (settings.get("left_out") or {}).items()},
        bootstrap=boot,
        counts=counts,
        num_texts=int(truncated.notna().sum()),
        num_truncated=int(truncated.eq(True).sum()),
        by_order=by_order,
    )


def _check_origin(path: Path, settings: dict[str, Any], record: CheckpointRecord | None) -> None:
    origin = settings.get("origin")
    weights = origin.get("weights") if isinstance(origin, dict) else None
    if (
        record is not None
        and record.weights_digest
        and weights not in (None, record.weights_digest)
    ):
        raise InputError(
            f"{path}: holds the answers of other weights than its checkpoint.json speaks of; run "
            "`selfcorrect evaluate` again, or copy the checkpoint here again"
        )


def _resampled(
    experiment: Experiment, frame: pd.DataFrame, draws: Draws
) -> tuple[Bootstrap, dict[str, tuple[int, int]]]:
    """Estimates of a cell's rows, and how many rows and clusters are behind each category."""
    tally = experiment.tally(frame)
    pooled = experiment.overall_categories(tally.categories)
    items = frame["category"].value_counts().to_dict()
    clusters = np.bincount(tally.strata, minlength=len(tally.categories))
    counts = {
        category: (int(items.get(category, 0)), int(clusters[index]))
        for index, category in enumerate(tally.categories)
    }
    of_pooled = [counts[category] for category in pooled if category in counts]
    counts[OVERALL] = (sum(c[0] for c in of_pooled), sum(c[1] for c in of_pooled))
    return bootstrap(tally, experiment.compute, pooled, draws), counts


def _orders(frame: pd.DataFrame) -> list[str]:
    """The orders of options, sorted, where an item was asked in more than one; else none."""
    orders = sorted(frame["order"].unique())
    if len(orders) < 2 or (frame.groupby("item")["order"].nunique() < 2).all():
        return []
    return orders


def run_name(run: Path) -> str:
    """What the column `run` says: the folder's own name."""
    return run.resolve().name
