"""Measure the statistics: resampling a whole checkpoint, and reading items lazily.

    python scripts/benchmarks/bootstrap.py [--data-dir FOLDER] [--resamples 10000] [--rows 10000000]

The data folder needs the published files of BBQ, Winogender and law school. Answers are random,
with the same noise for an item in all conditions. Two parts, each with the peak memory so far:

- checkpoint: all items of the three experiments under four conditions: CPU seconds to read the
  files, to sum over clusters, and to resample (including the draws)
- items: a run of at least --rows rows: seconds to open it, to average one column of all rows, to
  read one cell, to read five columns of all rows, and to write all rows into one file
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

from selfcorrect.evaluate.experiments import get_experiment
from selfcorrect.evaluate.experiments.wording import load_stimuli
from selfcorrect.evaluate.measuring.cell_files import METADATA_KEY, read_settings, read_table
from selfcorrect.evaluate.measuring.plan import PlannedCell, plan_evaluation
from selfcorrect.evaluate.results import items_dataset, write_items
from selfcorrect.evaluate.run_folder import CheckpointRecord
from selfcorrect.evaluate.statistics.bootstrap import Draws, bootstrap
from selfcorrect.scripts.benchmarks.random_models import save_figures
from selfcorrect.scripts.commands.data_folder import default_data_dir

EXPERIMENTS = ("bbq", "winogender", "law_school")
CONDITIONS = ("Q", "Q+IF", "Q+neutral", "Q+inverted")


def write_checkpoint(data_dir: Path, folder: Path) -> list[Path]:
    """Write the evaluation files of a whole checkpoint with random answers."""
    plan = plan_evaluation(data_dir, load_stimuli(), EXPERIMENTS, CONDITIONS)
    return [write_cell(folder / cell.file_name, cell) for cell in plan.cells]


def write_cell(path: Path, cell: PlannedCell) -> Path:
    """Write one cell: normal scores, the same in all conditions, shifted by condition."""
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
    settings = {
        "experiment": cell.experiment,
        "condition": cell.condition,
        "left_out": cell.loaded.left_out,
    }
    table = pa.table(columns).replace_schema_metadata({METADATA_KEY: json.dumps(settings)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd")
    return path


def bench_checkpoint(paths: Sequence[Path], num_resamples: int) -> dict[str, float]:
    """Return CPU seconds of each part over all cells; conditions share the draws."""
    spent = {"read": 0.0, "sum": 0.0, "resample": 0.0}
    draws = Draws(num_resamples)
    for path in paths:
        experiment = get_experiment(read_settings(path)["experiment"])
        times = [time.process_time()]
        frame = read_table(path, None).to_pandas()
        times.append(time.process_time())
        tally = experiment.tally(frame)
        times.append(time.process_time())
        bootstrap(tally, experiment.compute, experiment.overall_categories(tally.categories), draws)
        times.append(time.process_time())
        for name, seconds in zip(spent, np.diff(times), strict=True):
            spent[name] += float(seconds)
    return spent


def write_run(run: Path, paths: Sequence[Path], num_rows: int) -> int:
    """Write a run of checkpoints with copies of `paths`, at least `num_rows` rows in all."""
    rows_per_checkpoint = sum(pq.read_metadata(path).num_rows for path in paths)
    run.mkdir()
    (run / "recipe.yaml").write_text("name: made-up\n", encoding="utf-8")
    num_checkpoints = -(-num_rows // rows_per_checkpoint)
    for step in range(num_checkpoints):
        folder = run / "made-up" / "seed-0" / "ppo" / f"checkpoint-{step}"
        (folder / "evaluation").mkdir(parents=True)
        counts = dict.fromkeys(("step", "episodes", "tokens", "optimizer_updates"), step)
        record = CheckpointRecord(
            model="made-up", parameters=1, seed=0, **counts, kl=None, reward=None,
            recipe_digest="0" * 64, versions={},
        )  # fmt: skip
        record.write(folder)
        for path in paths:
            shutil.copyfile(path, folder / "evaluation" / path.name)
    return rows_per_checkpoint * num_checkpoints


def bench_items(run: Path) -> dict[str, float]:
    """Return wall-clock seconds of common operations on items."""
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
    cell = (
        (pc.field("step") == 1) & (pc.field("condition") == "Q") & (pc.field("experiment") == "bbq")
    )
    timed("one cell", lambda: dataset.to_table(filter=cell).to_pandas())
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
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = write_checkpoint(arguments.data_dir, Path(folder) / "checkpoint")
        np.quantile(np.zeros((2, 3)), [0.1], axis=1)  # loads modules at its first call
        figures: dict[str, Any] = {"resamples": arguments.resamples}
        figures["checkpoint_cpu_seconds"] = bench_checkpoint(paths, arguments.resamples)
        figures["checkpoint_peak_gb"] = peak_gb()
        run = Path(folder) / "run"
        figures["rows"] = write_run(run, paths, arguments.rows)
        figures["items_seconds"] = bench_items(run)
        figures["items_peak_gb"] = peak_gb()
    print(json.dumps(figures, indent=2))
    save_figures(arguments.json, figures)


def peak_gb() -> float:
    """Return the peak resident memory of this process so far, in 10^9 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
