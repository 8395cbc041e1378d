"""Load evaluation files as measured cells: one checkpoint x experiment x condition each."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from selfcorrect.evaluate.experiments import EXPERIMENTS, get_experiment
from selfcorrect.evaluate.experiments.base import Experiment, condition_rank
from selfcorrect.evaluate.experiments.tally import OVERALL, Tally
from selfcorrect.evaluate.measuring.cell_files import (
    damaged_cell,
    read_cell_table,
    read_footer,
    read_table,
)
from selfcorrect.evaluate.run_folder import CheckpointRecord, find_checkpoints, model_folders
from selfcorrect.evaluate.statistics.bootstrap import Bootstrap, Draws, Estimate, bootstrap_together
from selfcorrect.evaluate.statistics.rounds import round_answers, round_estimates
from selfcorrect.recipes.foundation.errors import InputError

ALL_ORDERS = "all"  # all orders of the options together

# Most of a file, and no metric needs them.
_UNUSED = ("options", "samples", "prompt", "probabilities")
_ANSWERS = ("logprobs", "mass", "truncated")
# Rows of several cells that are added up at once: more would not fit the processor's cache.
_ROWS_TOGETHER = 20_000
Counts = dict[str, tuple[int, int]]  # category -> (items, clusters)
# The rows that cells share, without their answers, by experiment, condition and settings' digest.
Questions = dict[tuple[Any, ...], pd.DataFrame]


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


def measure_run(run: Path, draws: Draws) -> Iterator[list[MeasuredCell]]:
    """Yield the evaluated cells of each model and training seed, by size, model and seed.

    They are ordered by step, experiment and condition. Of a folder of stand-alone models, the cells
    have no record. A large run has more resamples than fit into memory (`Replicates.keep`).
    """
    name = run_name(run)
    questions: Questions = {}
    for model, folder in model_folders(run).items():
        yield _measure(_cell_files(folder, name, model, None), draws, questions)
    checkpoints = find_checkpoints(run)
    for (model, _), of_seed in groupby(checkpoints, lambda c: (c.record.model, c.record.seed)):
        files: list[_CellFile] = []
        for checkpoint in of_seed:
            files += _cell_files(checkpoint.evaluation, name, model, checkpoint.record)
        yield _measure(files, draws, questions)


def evaluated_cells(run: Path, draws: Draws) -> Iterator[list[MeasuredCell]]:
    """Yield the cells of a run as `measure_run`; raises InputError where there are none."""
    is_empty = True
    for cells in measure_run(run, draws):
        is_empty = is_empty and not cells
        yield cells
    if is_empty:
        raise InputError(
            f"{run}: no checkpoint has been evaluated; run `selfcorrect evaluate {run}`"
        )


def measure_folder(
    folder: Path, run: str, model: str, record: CheckpointRecord | None, draws: Draws
) -> list[MeasuredCell]:
    """Return every cell of one folder of parquet files, by experiment and condition."""
    return _measure(_cell_files(folder, run, model, record), draws, {})


@dataclass(frozen=True)
class _CellFile:
    """A cell's file, of which only the settings have been read."""

    path: Path
    run: str
    model: str
    record: CheckpointRecord | None
    settings: dict[str, Any]
    footer: pq.FileMetaData

    @property
    def checkpoint(self) -> tuple[Any, ...]:
        """What the cells of one checkpoint and experiment share."""
        record = self.record
        trained = None if record is None else (record.seed, record.step)
        return self.run, self.model, trained, self.settings["experiment"]


@dataclass(frozen=True)
class _Answers:
    """One cell's answers added up: `parts` by order of the options, ALL_ORDERS first."""

    parts: dict[str, tuple[Tally, list[str], Counts]]
    num_texts: int
    num_truncated: int


def _cell_files(
    folder: Path, run: str, model: str, record: CheckpointRecord | None
) -> list[_CellFile]:
    """Return the files of a folder's cells, by experiment and condition."""
    files = []
    for path in sorted(folder.glob("*.parquet")):
        settings, footer = read_footer(path)
        _check_origin(path, settings, record)
        get_experiment(settings["experiment"])
        files.append(_CellFile(path, run, model, record, settings, footer))
    order = list(EXPERIMENTS)
    return sorted(
        files,
        key=lambda file: (
            order.index(file.settings["experiment"]),
            condition_rank(file.settings["condition"]),
        ),
    )


def _read(files: Sequence[_CellFile], questions: Questions) -> list[_Answers]:
    """Return the answers of the cells.

    Cells of equal settings have the same rows but for the answers: what was asked is read once, and
    kept in `questions`.
    """
    groups: dict[Any, list[int]] = {}
    for index, file in enumerate(files):
        cell = file.settings["experiment"], file.settings["condition"]
        digest = file.settings.get("settings_digest") or file.path
        groups.setdefault((*cell, digest), []).append(index)
    found: dict[int, _Answers] = {}
    for key, members in groups.items():
        first_file = files[members[0]]
        frame = questions.get(key)
        if frame is None:
            table = read_table(first_file.path, None, leave_out=[*_UNUSED, *_ANSWERS])
            frame = table.to_pandas(use_threads=False)
            if "settings_digest" in first_file.settings:
                questions[key] = frame
        together = max(1, _ROWS_TOGETHER // max(1, len(frame)))
        for first in range(0, len(members), together):
            part = members[first : first + together]
            found.update(zip(part, _add_up([files[i] for i in part], frame), strict=True))
    return [found[index] for index in range(len(files))]


def _add_up(files: Sequence[_CellFile], asked: pd.DataFrame) -> list[_Answers]:
    """Return the answers of cells whose rows were asked the same, `asked`."""
    try:
        tables = [read_table(file.path, _ANSWERS, footer=file.footer) for file in files]
        parts = _parts(get_experiment(files[0].settings["experiment"]), asked, tables)
    except (KeyError, TypeError, IndexError, ValueError, pa.ArrowException):
        if len(files) == 1:
            raise damaged_cell(files[0].path) from None
        return [answers for file in files for answers in _add_up([file], asked)]
    return [
        _Answers(part, *_count_texts(table["truncated"]))
        for part, table in zip(parts, tables, strict=True)
    ]


def _parts(
    experiment: Experiment, asked: pd.DataFrame, tables: Sequence[pa.Table]
) -> list[dict[str, tuple[Tally, list[str], Counts]]]:
    """Return the parts of `_Answers` of each cell, from its answers."""
    lengths = {len(table) for table in tables}
    if lengths != {len(asked)}:
        raise IndexError
    mass = np.array([table["mass"].to_numpy() for table in tables], dtype=float)
    options = {tuple(np.unique(pc.list_value_length(t["logprobs"]).to_numpy())) for t in tables}
    parts: list[dict[str, tuple[Tally, list[str], Counts]]] = [{} for _ in tables]
    for order, rows in {ALL_ORDERS: np.ones(len(asked), dtype=bool), **_orders(asked)}.items():
        frame = asked[rows]
        if len(options) == 1 and len(*options) == 1:
            logprobs = np.array([pc.list_flatten(t["logprobs"]).to_numpy() for t in tables])
            logprobs = logprobs.reshape(*mass.shape, -1)
            tallies = experiment.tally_together(frame, logprobs[:, rows], mass[:, rows])
        else:  # items differ in their number of options
            tallies = [
                experiment.tally(asked.assign(logprobs=t["logprobs"].to_pandas(), mass=m)[rows])
                for t, m in zip(tables, mass, strict=True)
            ]
        counts = None
        for part, tally in zip(parts, tallies, strict=True):
            pooled = experiment.overall_categories(tally.categories)
            counts = counts or _count(frame, tally, pooled)
            part[order] = tally, pooled, counts
    return parts


def _count_texts(truncated: pa.ChunkedArray) -> tuple[int, int]:
    """Return how many texts the model wrote, and how many of them were cut off."""
    num_truncated = pc.sum(truncated).as_py() if pa.types.is_boolean(truncated.type) else 0
    return len(truncated) - truncated.null_count, num_truncated or 0


def _measure(files: Sequence[_CellFile], draws: Draws, questions: Questions) -> list[MeasuredCell]:
    """Return the cells with their estimates; the cells of an experiment are resampled together."""
    answers = _read(files, questions)
    bootstraps: dict[tuple[int, str], Bootstrap] = {}
    for name in dict.fromkeys(file.settings["experiment"] for file in files):
        parts = {
            (index, order): part
            for index, (file, cell) in enumerate(zip(files, answers, strict=True))
            if file.settings["experiment"] == name
            for order, part in cell.parts.items()
        }
        tallies, pooled, _ = zip(*parts.values(), strict=True)
        experiment = get_experiment(name)
        resampled = bootstrap_together(
            tallies, experiment.compute, pooled, draws, experiment.category_means
        )
        bootstraps.update(zip(parts, resampled, strict=True))
    rounds = _round_estimates(files, draws)
    return [
        MeasuredCell(
            run=file.run,
            model=file.model,
            record=file.record,
            experiment=file.settings["experiment"],
            condition=file.settings["condition"],
            left_out={str(why): int(n) for why, n in (file.settings.get("left_out") or {}).items()},
            bootstrap=bootstraps[index, ALL_ORDERS],
            counts=cell.parts[ALL_ORDERS][2],
            judged=bool(file.settings["judged"]),
            dtype=_dtype_of(file.settings.get("origin")),
            num_texts=cell.num_texts,
            num_truncated=cell.num_truncated,
            continues=file.settings["continues"] if index in rounds else None,
            rounds=rounds.get(index, {}),
            thoughts=bool(file.settings.get("thoughts")),
            by_order={
                order: (bootstraps[index, order].estimates, counts)
                for order, (_, _, counts) in cell.parts.items()
                if order != ALL_ORDERS
            },
        )
        for index, (file, cell) in enumerate(zip(files, answers, strict=True))
    ]


def _round_estimates(files: Sequence[_CellFile], draws: Draws) -> dict[int, dict[str, Estimate]]:
    """Return the quantities of rounds.py by the index of the cell that continues another."""
    cells = {(*cell.checkpoint, cell.settings["condition"]): cell for cell in files}
    rows: dict[Path, pd.DataFrame] = {}
    estimates = {}
    for index, cell in enumerate(files):
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


def _count(frame: pd.DataFrame, tally: Tally, pooled: Sequence[str]) -> Counts:
    """Return the items and clusters of each category, and of the pooled ones as OVERALL."""
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
    return counts


def _orders(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    """Return the rows (a mask) of each order where items were asked in several orders, else {}."""
    orders = sorted(set(frame["order"].to_numpy()))
    if len(orders) < 2 or (frame.groupby("item")["order"].nunique() < 2).all():
        return {}
    return {order: (frame["order"] == order).to_numpy() for order in orders}


def run_name(run: Path) -> str:
    """Return the value of the column `run`: the folder's name."""
    return run.resolve().name
