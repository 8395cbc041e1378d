"""What the statistics cost: resampling a whole checkpoint, and reading items lazily.

    python scripts/benchmarks/bootstrap.py [--data-dir FOLDER] [--resamples 10000] [--rows 10000000]
                                       [--json FILE]

Needs the published files of BBQ, Winogender and law school in the data folder. Answers are made up,
with one noise for an item everywhere. Two parts, then the peak memory of the process:

- checkpoint: every item of the three experiments under Q and three conditions: CPU seconds to read
  the files, to sum over clusters, and to resample (the draws themselves included)
- items: a run of at least as many rows as asked for: seconds to open it, for an average over one
  column of all rows, for one cell, for some columns of all rows in memory, and for one file of all
"""

import argparse
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from selfcorrect.evaluate.experiments.wording import load_stimuli
from selfcorrect.evaluate.measuring.plan import PlannedCell, plan
from selfcorrect.evaluate.results import items_dataset, write_items
from selfcorrect.evaluate.run_folder import CheckpointRecord
from selfcorrect.evaluate.statistics.bootstrap import Draws, bootstrap
from selfcorrect.evaluate.statistics.cells import (
    METADATA_KEY,
    experiment_named,
    read_settings,
    read_table,
)
from selfcorrect.scripts.commands.evaluate import default_data_dir

EXPERIMENTS = ("bbq", "winogender", "law_school")
CONDITIONS = ("Q", "Q+IF", "Q+neutral", "Q+inverted")


def write_checkpoint(data_dir: Path, folder: Path) -> list[Path]:
    """Evaluation files of a whole checkpoint with made-up answers."""
    planned = plan(data_dir, load_stimuli(), EXPERIMENTS, CONDITIONS)
    return [write_cell(folder / cell.file_name, cell) for cell in planned.cells]


def write_cell(path: Path, cell: PlannedCell) -> Path:
    """One file: normal scores, the same for an item everywhere, and a shift by condition."""
    items, noise = cell.items, np.random.default_rng(0)
    shift = CONDITIONS.index(cell.condition) / 5
    scores = [
        noise.normal(size=len(item.options)) + shift * np.arange(len(item.options))
        for item in items
    ]
    logprobs = [row - np.log(np.exp(row).sum()) + np.log(0.9) for row in scores]
    columns = {
        "item": [item.id for item in items],
        "cluster": [item.cluster for item in items],
        "category": [item.category for item in items],
        "weight": [item.weight for item in items],
        "order": ["".join(str(i) for i in range(len(row))) for row in scores],
        "options": [list(item.options) for item in items],
        "logprobs": logprobs,
        "probabilities": [np.exp(row) / 0.9 for row in logprobs],
        "mass": np.full(len(items), 0.9),
        "draw": np.zeros(len(items), dtype=int),
        "samples": pa.nulls(len(items), pa.list_(pa.string())),
        "truncated": pa.nulls(len(items), pa.bool_()),
        **{name: [item.facts.get(name) for item in items] for name in items[0].facts},
    }
    said = {"experiment": cell.experiment, "condition": cell.condition, "left_out": cell.left_out}
    table = pa.table(columns).replace_schema_metadata({METADATA_KEY: json.dumps(said)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd")
    return path


def bench_checkpoint(paths: Sequence[Path], num_resamples: int) -> dict[str, float]:
    """CPU seconds of each part, over all cells; the draws are shared by the conditions."""
    spent = {"read": 0.0, "sum": 0.0, "resample": 0.0}
    draws = Draws(num_resamples)
    for path in paths:
        experiment = experiment_named(read_settings(path)["experiment"])
        times = [time.process_time()]
        frame = read_table(path, None).to_pandas()
        times.append(time.process_time())
        tally = experiment.tally(frame)
        times.append(time.process_time())
        bootstrap(tally, experiment.metrics, experiment.overall(tally.categories), draws)
        times.append(time.process_time())
        for name, seconds in zip(spent, np.diff(times), strict=True):
            spent[name] += float(seconds)
    return spent


def write_run(run: Path, paths: Sequence[Path], num_rows: int) -> int:
    """A run whose checkpoints each hold copies of `paths`, until there are `num_rows` rows."""
    rows_each = sum(pq.read_metadata(path).num_rows for path in paths)
    run.mkdir()
    (run / "recipe.yaml").write_text("name: made-up\n", encoding="utf-8")
    num_checkpoints = -(-num_rows // rows_each)
    for step in range(num_checkpoints):
        folder = run / "made-up" / "seed-0" / "ppo" / f"checkpoint-{step}"
        (folder / "evaluation").mkdir(parents=True)
        record = CheckpointRecord(
            model="made-up",
            parameters=1,
            seed=0,
            step=step,
            episodes=step,
            tokens=step,
            optimizer_updates=step,
            kl=None,
            reward=None,
            recipe_digest="0" * 64,
            versions={},
        )
        record.write(folder)
        for path in paths:
            shutil.copyfile(path, folder / "evaluation" / path.name)
    return rows_each * num_checkpoints


def bench_items(run: Path) -> dict[str, float]:
    """Seconds (wall clock) of what one does with items."""
    spent: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        spent[name] = time.perf_counter() - start
        return result

    dataset = timed("open", lambda: items_dataset(run))
    timed(
        "mean of a column by step",
        lambda: (
            dataset.to_table(columns=["step", "mass"])
            .group_by("step")
            .aggregate([("mass", "mean")])
        ),
    )
    one = (
        (pc.field("step") == 1) & (pc.field("condition") == "Q") & (pc.field("experiment") == "bbq")
    )
    timed("one cell", lambda: dataset.to_table(filter=one).to_pandas())
    columns = ["step", "condition", "item", "category", "mass"]
    timed("five columns of all rows", lambda: dataset.to_table(columns=columns))
    timed("one file of all rows", lambda: write_items(run / "items.parquet", run))
    return spent


def main() -> None:
    """Measure both parts and print them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=Path, default=default_data_dir())
    parser.add_argument("--resamples", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        paths = write_checkpoint(asked.data_dir, Path(place) / "checkpoint")
        np.quantile(np.zeros((2, 3)), [0.1], axis=1)  # what is loaded at the first call
        found: dict[str, Any] = {"resamples": asked.resamples}
        found["checkpoint_cpu_seconds"] = bench_checkpoint(paths, asked.resamples)
        found["checkpoint_peak_gb"] = peak_gb()
        run = Path(place) / "run"
        found["rows"] = write_run(run, paths, asked.rows)
        found["items_seconds"] = bench_items(run)
        found["items_peak_gb"] = peak_gb()
    print(json.dumps(found, indent=2))
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def peak_gb() -> float:
    """Largest resident memory of this process so far, in 10^9 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
