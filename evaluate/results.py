"""From the parquet files of a run to one tidy table, its statistics, and its items.

`load` gives one row per metric of every cell (checkpoint x experiment x condition x category x
order of options); `write_results` keeps that as results.parquet beside statistics.json. COLUMNS
documents the table, docs/reference/statistics.md both. `items_dataset` reads what lies behind it,
lazily.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import and_
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow import fs

from selfcorrect.evaluate.measuring.cell_files import read_settings
from selfcorrect.evaluate.run_folder import find_checkpoints
from selfcorrect.evaluate.statistics.bootstrap import NUM_RESAMPLES, Draws
from selfcorrect.evaluate.statistics.cells import (
    MeasuredCell,
    measure_folder,
    measure_run,
    run_name,
)
from selfcorrect.evaluate.statistics.files import COLUMNS as COLUMNS
from selfcorrect.evaluate.statistics.files import checkpoints_digest, write_table
from selfcorrect.evaluate.statistics.summary import record_facts
from selfcorrect.evaluate.statistics.summary import statistics_of as statistics_of
from selfcorrect.evaluate.statistics.thresholds import NOT_REACHED
from selfcorrect.recipes.foundation.atomic_files import atomic_file
from selfcorrect.recipes.foundation.checksums import write_record
from selfcorrect.recipes.foundation.errors import InputError

ALL_ORDERS = "all"

# What `items_dataset` puts before the columns of the evaluation files.
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
    """The tidy table of one or several runs, computed from their evaluation files.

    Raises InputError for a folder that is no run, and for a damaged file (with the remedy).
    """
    draws = Draws(num_resamples, seed)
    return tidy([cell for run in runs for cell in measure_run(run, draws)])


def summarise(
    folder: Path, label: str, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> pd.DataFrame:
    """The tidy table of one stand-alone model: a folder of <experiment>.<condition>.parquet.

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
    """The tidy table of one or several runs, and what statistics.json holds, of all joined.

    `thresholds` names, by experiment, the value of the headline metric to be reached, in place of
    no bias. Raises InputError as `load`, and for a run of which nothing has been evaluated.
    """
    draws = Draws(num_resamples, seed)
    cells: list[MeasuredCell] = []
    joined: dict[str, Any] = {}
    for run in runs:
        found = measure_run(run, draws)
        if not found:
            raise InputError(
                f"{run}: no checkpoint has been evaluated; run `selfcorrect evaluate {run}`"
            )
        cells += found
        one = statistics_of(found, find_checkpoints(run), num_resamples, seed, thresholds)
        for name, content in one.items():
            if isinstance(content, list):
                content = [*joined.get(name, []), *content]
            joined[name] = content
    return tidy(cells), joined


def rows(statistics: Mapping[str, Any], name: str) -> pd.DataFrame:
    """A list of statistics.json as a dataframe: effects, growth, changes, over_seeds, trends, ...

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
    """Write results.parquet and statistics.json into `run`, each whole or not at all.

    Raises InputError for a folder that is no run, a damaged file, or a run of which nothing has
    been evaluated.
    """
    frame, statistics = results_of(run, num_resamples=num_resamples, seed=seed)
    made_from = {"made_from": checkpoints_digest(run)}
    write_table(run / "results.parquet", frame, made_from)
    write_record(run / "statistics.json", {**made_from, **statistics})
    return frame, statistics


# --- item by item ------------------------------------------------------------------------------


def items_dataset(
    *runs: Path, experiment: str | None = None, condition: str | None = None
) -> ds.Dataset:
    """Every prompt scored at every checkpoint, as a pyarrow dataset: no row is read yet.

    Columns are ITEM_FACTS and those of the evaluation files; an experiment's own are null in the
    others. A filter on the facts opens only the files it needs, and only columns that are asked for
    are read: `items_dataset(run).to_table(columns=["item", "mass"], filter=field("step") == 40)`.
    Raises InputError for a folder that is no run, a damaged file, or where nothing was evaluated.
    """
    files = _item_files(runs, experiment, condition)
    if not files:
        wanted = " under ".join(name for name in (experiment, condition) if name)
        raise InputError(f"{', '.join(map(str, runs))}: nothing evaluated {wanted}".rstrip())
    return _dataset(files)


def load_items(
    run: Path,
    experiment: str | None = None,
    condition: str | None = None,
    columns: Sequence[str] | None = None,
) -> pd.DataFrame:
    """One row per prompt scored at every checkpoint, in memory, with what was asked beside it.

    `columns` limits what is read from the files; a column that an experiment lacks is null. For
    many rows, `items_dataset` reads lazily.
    """
    facts = [field.name for field in ITEM_FACTS if field.name != "parameters"]
    files = _item_files([run], experiment, condition)
    if not files:
        return pd.DataFrame(columns=facts)
    dataset = _dataset(files)
    own = dataset.schema.names[len(ITEM_FACTS) :]
    wanted = own if columns is None else [name for name in columns if name in own]
    try:
        return dataset.to_table(columns=[*facts, *wanted]).to_pandas()
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{run}: an evaluation file is damaged ({reason}); delete it and evaluate again"
        ) from None


def write_items(
    path: Path, *runs: Path, experiment: str | None = None, condition: str | None = None
) -> int:
    """Write the rows of `items_dataset` as one parquet file, batch by batch; returns their number.

    Plain types only (numbers, strings, lists of them): DuckDB and R's arrow read them.
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
    """The evaluation files, each with its ITEM_FACTS."""
    files: list[tuple[Path, list[Any]]] = []
    for run in runs:
        for checkpoint in find_checkpoints(run):
            record = checkpoint.record
            of_model = [run_name(run), record.model, record.parameters, record.seed, record.step]
            for path in sorted(checkpoint.evaluation.glob("*.parquet")):
                settings = read_settings(path)
                named = settings["experiment"], settings["condition"]
                if experiment in (None, named[0]) and condition in (None, named[1]):
                    files.append((path, [*of_model, *named]))
    return files


def _dataset(files: Sequence[tuple[Path, list[Any]]]) -> ds.Dataset:
    schemas = [pq.read_schema(path).remove_metadata() for path, _ in files]
    own = pa.unify_schemas(schemas, promote_options="permissive")
    return ds.FileSystemDataset.from_paths(
        [str(path) for path, _ in files],
        schema=pa.schema([*ITEM_FACTS, *own]),
        format=ds.ParquetFileFormat(),
        filesystem=fs.LocalFileSystem(),
        partitions=[
            reduce(and_, (ds.field(f.name) == x for f, x in zip(ITEM_FACTS, facts, strict=True)))
            for _, facts in files
        ],
    )


# --- the table -----------------------------------------------------------------------------------


def tidy(cells: Sequence[MeasuredCell]) -> pd.DataFrame:
    """One row per cell, category, order and metric; see COLUMNS."""
    found = []
    for cell in cells:
        results = {ALL_ORDERS: (cell.bootstrap.estimates, cell.counts)} | {
            order: (one.estimates, one.counts) for order, one in cell.by_order.items()
        }
        found += [
            {
                "run": cell.run,
                "model": cell.model,
                **record_facts(cell.record),
                "experiment": cell.experiment,
                "condition": cell.condition,
                "category": category,
                "order": order,
                "metric": metric,
                "value": estimate.value,
                "low": estimate.low,
                "high": estimate.high,
                "num_items": counts[category][0],
                "num_clusters": counts[category][1],
            }
            for order, (of_category, counts) in results.items()
            for category, estimates in of_category.items()
            for metric, estimate in estimates.items()
        ]
    frame = pd.DataFrame(found, columns=list(COLUMNS))
    return frame.astype({name: kind for name, (kind, _) in COLUMNS.items()})
