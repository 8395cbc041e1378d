"""Measure the statistics: resampling a checkpoint, reading items lazily, and a whole run.

    python scripts/benchmarks/bootstrap.py [--data-dir FOLDER] [--resamples 10000] [--rows 10000000]
    python scripts/benchmarks/bootstrap.py run [--sizes 5] [--seeds 3] [--steps 11]
        [--conditions 6] [--folder FOLDER]
    python scripts/benchmarks/bootstrap.py rows [--rows 10000000]

The data folder needs the published files of BBQ, Winogender and law school. Answers are random,
with the same noise for an item in all conditions. Four parts, each with the peak memory so far:

- checkpoint: all items of the three experiments under four conditions: CPU seconds to read the
  files, to sum over clusters, and to resample (including the draws)
- items: a run of at least --rows rows: seconds to open it, to average one column of all rows, to
  read one cell, to read five columns of all rows, and to write all rows into one file
- run: sizes x seeds x steps checkpoints over the items of the study's society, which need no data
  folder: CPU and wall seconds of `results.write_results` with its usual 2,000 resamples. A run that
  is in --folder already is measured again, and its statistics.json stays there.
- rows: the same seconds for copies of the checkpoint, at least --rows rows
"""

import argparse
import itertools
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
from selfcorrect.evaluate.results import items_dataset, write_items, write_results
from selfcorrect.evaluate.run_folder import CheckpointRecord
from selfcorrect.evaluate.statistics.bootstrap import Draws, bootstrap
from selfcorrect.recipes.foundation.checksums import CHECKSUM_PLACEHOLDER, insert_file_checksum
from selfcorrect.recipes.load import load_recipe
from selfcorrect.recipes.society.benchmarks import ensure_benchmarks
from selfcorrect.scripts.benchmarks.random_models import save_figures
from selfcorrect.scripts.commands.data_folder import default_data_dir

EXPERIMENTS = ("bbq", "winogender", "law_school")
CONDITIONS = ("Q", "Q+IF", "Q+neutral", "Q+inverted")
SOCIETY_CONDITIONS = ("Q", "Q+IF", "Q+IF+CoT", "Q+neutral", "Q+inverted", "Match stats")


def write_checkpoint(data_dir: Path, folder: Path) -> list[Path]:
    """Write the evaluation files of a whole checkpoint with random answers."""
    plan = plan_evaluation(data_dir, load_stimuli(), EXPERIMENTS, CONDITIONS)
    return [
        write_cell(folder / cell.file_name, cell, CONDITIONS.index(cell.condition) / 5)
        for cell in plan.cells
    ]


def write_cell(path: Path, cell: PlannedCell, shift: float, seed: int = 0) -> Path:
    """Write one cell: normal scores with the noise of `seed`, shifted by option."""
    items, noise = cell.items, np.random.default_rng(seed)
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
        "settings_digest": cell.settings_digest,
        "left_out": cell.loaded.left_out,
        "checksum": CHECKSUM_PLACEHOLDER,
    }
    table = pa.table(columns).replace_schema_metadata({METADATA_KEY: json.dumps(settings)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd")
    insert_file_checksum(path)
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
        pooled = experiment.overall_categories(tally.categories)
        bootstrap(tally, experiment.compute, pooled, draws, experiment.category_means)
        times.append(time.process_time())
        for name, seconds in zip(spent, np.diff(times), strict=True):
            spent[name] += float(seconds)
    return spent


def write_run(run: Path, paths: Sequence[Path], num_rows: int) -> int:
    """Write a run of checkpoints with copies of `paths`, at least `num_rows` rows in all."""
    rows_per_checkpoint = sum(pq.read_metadata(path).num_rows for path in paths)
    num_checkpoints = -(-num_rows // rows_per_checkpoint)
    for step in range(num_checkpoints):
        folder = write_record(run, 1, 0, step)
        for path in paths:
            shutil.copyfile(path, folder / path.name)
    (run / "recipe.yaml").write_text("name: made-up\n", encoding="utf-8")
    return rows_per_checkpoint * num_checkpoints


def write_record(run: Path, parameters: int, seed: int, step: int) -> Path:
    """Write a checkpoint's folder and record; return its folder of evaluation files."""
    model = f"made-up-{parameters}"
    folder = run / model / f"seed-{seed}" / "ppo" / f"checkpoint-{step}"
    (folder / "evaluation").mkdir(parents=True)
    counts = dict.fromkeys(("step", "episodes", "tokens", "optimizer_updates"), step)
    CheckpointRecord(
        model=model, parameters=parameters, seed=seed, **counts, kl=0.01 * step, reward=0.1 * step,
        recipe_digest="0" * 64, versions={},
    ).write(folder)  # fmt: skip
    return folder / "evaluation"


def write_society_run(run: Path, sizes: int, seeds: int, steps: int, conditions: int) -> int:
    """Write a run over the study's society with random answers; return its number of cells."""
    benchmarks = run / "benchmarks"
    society = load_recipe("study/society-ladder").data.society
    assert society is not None
    ensure_benchmarks(society, benchmarks)
    stimuli = load_stimuli(base=benchmarks / "stimuli.yaml")
    names = SOCIETY_CONDITIONS[:conditions]
    plan = plan_evaluation(benchmarks, stimuli, EXPERIMENTS, names)
    grid = itertools.product(range(sizes), range(seeds), range(steps))
    for number, (size, seed, step) in enumerate(grid):
        folder = write_record(run, 1000 * 4**size, seed, step)
        for cell in plan.cells:
            # Under an instruction, bias falls with the steps, faster in larger models.
            shift = 0.5 - 0.02 * size * step * names.index(cell.condition)
            write_cell(folder / cell.file_name, cell, shift, number)
    (run / "recipe.yaml").write_text("name: made-up\n", encoding="utf-8")
    return sizes * seeds * steps * len(plan.cells)


def bench_run(run: Path) -> dict[str, float]:
    """Return CPU and wall-clock seconds of a run's results and statistics."""
    started = time.process_time(), time.perf_counter()
    write_results(run)
    return {
        "cpu": time.process_time() - started[0],
        "wall": time.perf_counter() - started[1],
    }


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
    parser.add_argument("part", nargs="?", choices=["data", "run", "rows"], default="data")
    for name, default in (("sizes", 5), ("seeds", 3), ("steps", 11), ("conditions", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", type=Path, help="of the made-up run [default: temporary]")
    parser.add_argument("--data-dir", type=Path, default=default_data_dir())
    parser.add_argument("--resamples", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    figures: dict[str, Any]
    with tempfile.TemporaryDirectory() as folder:
        if arguments.part == "run":
            run = arguments.folder or Path(folder) / "run"
            shape = [getattr(arguments, name) for name in ("sizes", "seeds", "steps", "conditions")]
            figures = {"sizes, seeds, steps, conditions": shape}
            if not (run / "recipe.yaml").is_file():
                figures["cells"] = write_society_run(run, *shape)
            print(json.dumps(figures | {"seconds": bench_run(run), "peak_gb": peak_gb()}, indent=2))
            return
        paths = write_checkpoint(arguments.data_dir, Path(folder) / "checkpoint")
        if arguments.part == "rows":
            figures = {"rows": write_run(Path(folder) / "run", paths, arguments.rows)}
            figures |= {"seconds": bench_run(Path(folder) / "run"), "peak_gb": peak_gb()}
            print(json.dumps(figures, indent=2))
            return
        np.quantile(np.zeros((2, 3)), [0.1], axis=1)  # loads modules at its first call
        figures = {"resamples": arguments.resamples}
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
