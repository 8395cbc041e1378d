"""A run's results as one tidy table, its statistics, and its single items.

`load` returns a row per metric of every cell (checkpoint x experiment x condition) by category and
order of options; `write_results` writes it as results.parquet, with statistics.json. COLUMNS
documents the table, docs/reference/statistics.md documents both. `items_dataset` reads the scored
items, lazily.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import chain
from operator import and_
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow import fs

from selfcorrect.evaluate.experiments.tally import OVERALL
from selfcorrect.evaluate.measuring.cell_files import read_settings
from selfcorrect.evaluate.run_folder import find_checkpoints, model_folders
from selfcorrect.evaluate.statistics.bootstrap import NUM_RESAMPLES, Draws, Estimate
from selfcorrect.evaluate.statistics.cells import (
    ALL_ORDERS,
    MeasuredCell,
    evaluated_cells,
    measure_folder,
    measure_run,
    run_name,
)
from selfcorrect.evaluate.statistics.files import COLUMNS as COLUMNS
from selfcorrect.evaluate.statistics.files import checkpoints_digest, write_statistics, write_table
from selfcorrect.evaluate.statistics.summary import (
    compare_cells,
    record_facts,
    statistics_of,
)
from selfcorrect.evaluate.statistics.thresholds import NOT_REACHED
from selfcorrect.recipes.foundation.atomic_files import atomic_file
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.foundation.garbage import garbage_collection_off

# Columns that `items_dataset` adds before those of the evaluation files.
ITEM_FACTS = [
    pa.field("run", pa.string()),
    pa.field("model", pa.string()),
    pa.field("parameters", pa.int64()),
    pa.field("seed", pa.int64()),
    pa.field("step", pa.int64()),
    pa.field("experiment", pa.string()),
    pa.field("condition", pa.string()),
]


def load(*runs: Path, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """Return the tidy table of one or several runs, computed from their evaluation files.

    Raises InputError for a folder that is not a run, and for a damaged file.
    """
    _check_names(runs)
    draws = Draws(num_resamples, seed)
    with garbage_collection_off():
        cells = []
        for group in chain.from_iterable(measure_run(run, draws) for run in runs):
            for cell in group:
                cell.bootstrap.replicates.keep([])
            cells += group
        return tidy(cells)


def summarise(
    folder: Path, label: str, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> pd.DataFrame:
    """Return the tidy table of a stand-alone model: a folder of <experiment>.<condition>.parquet.

    `label` fills the column `model`; step, seed and parameters are null.
    """
    cells = measure_folder(folder, folder.name, label, None, Draws(num_resamples, seed))
    if not cells:
        raise InputError(f"{folder}: no evaluation files (*.parquet) here")
    return tidy(cells)


def results_of(
    *runs: Path,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    thresholds: Mapping[str, float] | None = None,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the tidy table of one or several runs, and the content of statistics.json.

    Several runs' lists are joined. `thresholds` overrides, by experiment, the unbiased value of the
    headline metric. Raises InputError as `load`, and for a run without evaluations.
    """
    _check_names(runs)
    draws = Draws(num_resamples, seed)
    cells: list[MeasuredCell] = []
    joined: dict[str, Any] = {}
    with garbage_collection_off():
        for run in runs:
            of_run, comparisons = compare_cells(evaluated_cells(run, draws))
            cells += of_run
            checkpoints = find_checkpoints(run)
            statistics = statistics_of(
                of_run, comparisons, checkpoints, num_resamples, seed, thresholds
            )
            for name, content in statistics.items():
                if isinstance(content, list):
                    content = [*joined.get(name, []), *content]
                joined[name] = content
        return tidy(cells), joined


def _check_names(runs: Sequence[Path]) -> None:
    """Raise InputError for two runs that the column `run` could not tell apart."""
    folders: dict[str, Path] = {}
    for run in runs:
        other = folders.setdefault(run_name(run), run)
        if other is not run:
            raise InputError(
                f"{run}: has the name of {other}, and the column run holds names; "
                "give a run once, and rename one of two folders"
            )


def rows(statistics: Mapping[str, Any], name: str) -> pd.DataFrame:
    """Return a list of statistics.json (effects, growth, trends, ...) as a dataframe.

    Undefined is NaN; a threshold that is not reached is infinity.
    """
    frame = pd.DataFrame(statistics[name])
    if name == "thresholds" and len(frame):
        for column in ("value", "low", "high"):
            frame[column] = frame[column].replace(NOT_REACHED, np.inf).astype(float)
    return frame


def write_results(
    run: Path, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Write results.parquet and statistics.json into `run`, each atomically, and return both.

    `run` may be a folder of stand-alone models. Raises InputError for a folder that is neither, a
    damaged file, or a run without evaluations.
    """
    frame, statistics = results_of(run, num_resamples=num_resamples, seed=seed)
    made_from = {} if model_folders(run) else {"made_from": checkpoints_digest(run)}
    write_table(run / "results.parquet", frame, made_from)
    write_statistics(run / "statistics.json", {**made_from, **statistics})
    return frame, statistics


# --- item by item ------------------------------------------------------------------------------


def items_dataset(
    *runs: Path, experiment: str | None = None, condition: str | None = None
) -> ds.Dataset:
    """Return every scored prompt of every checkpoint as a pyarrow dataset, without reading rows.

    Columns are ITEM_FACTS and those of the evaluation files; columns that an experiment lacks are
    null. A filter on ITEM_FACTS opens only the files it needs, and only selected columns are read:
    `items_dataset(run).to_table(columns=["item", "mass"], filter=field("step") == 40)`.
    Raises InputError for a folder that is not a run, a damaged file, or if nothing was evaluated.
    """
    _check_names(runs)
    files = _item_files(runs, experiment, condition)
    if not files:
        selection = " under ".join(name for name in (experiment, condition) if name)
        raise InputError(f"{', '.join(map(str, runs))}: nothing evaluated {selection}".rstrip())
    return _dataset(files)


def load_items(
    run: Path,
    experiment: str | None = None,
    condition: str | None = None,
    columns: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Return a row per scored prompt of every checkpoint, in memory.

    `columns` limits what is read from the files; a column that an experiment lacks is null. For
    many rows, `items_dataset` reads lazily.
    """
    facts = [field.name for field in ITEM_FACTS if field.name != "parameters"]
    files = _item_files([run], experiment, condition)
    if not files:
        return pd.DataFrame(columns=facts)
    dataset = _dataset(files)
    names = dataset.schema.names[len(ITEM_FACTS) :]
    if columns is not None:
        names = [name for name in columns if name in names]
    try:
        return dataset.to_table(columns=[*facts, *names]).to_pandas()
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{run}: an evaluation file is damaged ({reason}); delete it and evaluate again"
        ) from None


def write_items(
    path: Path, *runs: Path, experiment: str | None = None, condition: str | None = None
) -> int:
    """Write the rows of `items_dataset` to one parquet file, and return their number.

    The columns are numbers, strings and lists of them, which DuckDB and R's arrow can read.
    """
    dataset = items_dataset(*runs, experiment=experiment, condition=condition)
    number = 0
    with (
        atomic_file(path) as temporary,
        pq.ParquetWriter(temporary, dataset.schema, compression="zstd") as writer,
    ):
        for batch in dataset.to_batches():
            writer.write_batch(batch)
            number += len(batch)
    return number


def _item_files(
    runs: Sequence[Path], experiment: str | None, condition: str | None
) -> list[tuple[Path, list[Any]]]:
    """Return the evaluation files, each with its ITEM_FACTS."""
    files: list[tuple[Path, list[Any]]] = []
    for run in runs:
        for checkpoint in find_checkpoints(run):
            record = checkpoint.record
            facts = [run_name(run), record.model, record.parameters, record.seed, record.step]
            for path in sorted(checkpoint.evaluation.glob("*.parquet")):
                settings = read_settings(path)
                cell = settings["experiment"], settings["condition"]
                if experiment in (None, cell[0]) and condition in (None, cell[1]):
                    files.append((path, [*facts, *cell]))
    return files


def _dataset(files: Sequence[tuple[Path, list[Any]]]) -> ds.Dataset:
    schemas = [pq.read_schema(path).remove_metadata() for path, _ in files]
    columns = pa.unify_schemas(schemas, promote_options="permissive")
    return ds.FileSystemDataset.from_paths(
        [str(path) for path, _ in files],
        schema=pa.schema([*ITEM_FACTS, *columns]),
        format=ds.ParquetFileFormat(),
        filesystem=fs.LocalFileSystem(),
        partitions=[
            reduce(and_, (ds.field(f.name) == x for f, x in zip(ITEM_FACTS, facts, strict=True)))
            for _, facts in files
        ],
    )


# --- the table -----------------------------------------------------------------------------------


def tidy(cells: Sequence[MeasuredCell]) -> pd.DataFrame:
    """Return one row per cell, category, order and metric; see COLUMNS."""
    blocks: list[list[Any]] = []  # what the metrics of a cell, order and category share
    lengths: list[int] = []
    metrics: list[str] = []
    estimates: list[Estimate] = []
    for cell in cells:
        facts = [cell.run, cell.model, *record_facts(cell.record).values()]
        results = {ALL_ORDERS: (cell.bootstrap.estimates, cell.counts), **cell.by_order}
        for order, (by_category, counts) in results.items():
            for category, of_category in by_category.items():
                blocks.append(
                    [*facts, cell.experiment, cell.condition, category, order, *counts[category]]
                )
                lengths.append(len(of_category))
                metrics += of_category
                estimates += of_category.values()
        if cell.rounds:
            counts_of_all = cell.counts[OVERALL]
            blocks.append(
                [*facts, cell.experiment, cell.condition, OVERALL, ALL_ORDERS, *counts_of_all]
            )
            lengths.append(len(cell.rounds))
            metrics += cell.rounds
            estimates += cell.rounds.values()
    numbers = np.fromiter(chain.from_iterable(estimates), float, 3 * len(estimates)).reshape(-1, 3)
    own: dict[str, Any] = {
        "metric": metrics,
        "value": numbers[:, 0],
        "low": numbers[:, 1],
        "high": numbers[:, 2],
    }
    types = {name: kind for name, (kind, _) in COLUMNS.items()}
    shared = [name for name in COLUMNS if name not in own]
    frame = pd.DataFrame(blocks, columns=shared).astype({name: types[name] for name in shared})
    frame = frame.take(np.repeat(np.arange(len(blocks)), lengths)).reset_index(drop=True)
    return frame.assign(**own)[list(COLUMNS)].astype(types)
