"""Measure how far bfloat16 moves log-probabilities, choices and metrics of a model.

    python scripts/benchmarks/scoring_precision.py --model FOLDER [--limit 400] [--json FILE]

Scores the same items under Q and Q+IF with the weights in float32 and in bfloat16, and prints a row
per experiment and condition: distances of the options' log-probabilities in nats, how many items
change their most likely option, and the headline metrics with their 95 % intervals. CPU seconds
include packing in the first precision only, whose packs the second one uses again.
"""
# ruff: noqa: TID253  -- a benchmark: torch is all it is about

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from selfcorrect.evaluate.experiments import EXPERIMENTS
from selfcorrect.evaluate.experiments.wording import load_stimuli
from selfcorrect.evaluate.measuring.measure import measure
from selfcorrect.evaluate.measuring.plan import EvaluationPlan, plan_evaluation
from selfcorrect.evaluate.results import summarise
from selfcorrect.evaluate.scoring.load_model import load_model
from selfcorrect.evaluate.scoring.token_trie import PackingCache
from selfcorrect.scripts.benchmarks.random_models import save_figures
from selfcorrect.scripts.commands.data_folder import default_data_dir

DTYPES = ("float32", "bfloat16")
CONDITIONS = ("Q", "Q+IF")


def measured(
    plan: EvaluationPlan, model: str, dtype: str, folder: Path, packings: PackingCache
) -> tuple[dict[str, pd.DataFrame], pd.DataFrame, float]:
    """Return the items of each cell by file name, the table of metrics, and CPU seconds."""
    loaded, tokenizer = load_model(model, dtype=dtype, device="cpu")
    started = time.process_time()
    paths = measure(plan, loaded, tokenizer, folder, packings=packings)
    seconds = time.process_time() - started
    items = {path.name: pd.read_parquet(path) for path in paths}
    return items, summarise(folder, dtype), seconds


def differences(first: pd.DataFrame, second: pd.DataFrame) -> dict[str, Any]:
    """Return how far log-probabilities and choices of the same items differ."""
    assert list(first["item"]) == list(second["item"])
    pairs = list(zip(first["logprobs"], second["logprobs"], strict=True))
    distances = np.abs(np.concatenate([np.subtract(a, b) for a, b in pairs]))
    flips = [int(np.argmax(a) != np.argmax(b)) for a, b in pairs]
    return {
        "items": len(pairs),
        "mean_nats": float(distances.mean()),
        "largest_nats": float(distances.max()),
        "flips": sum(flips),
    }


def headline(table: pd.DataFrame, experiment: str, condition: str) -> list[dict[str, Any]]:
    """Return value and interval of the experiment's headline metric over all its items."""
    metric = EXPERIMENTS[experiment].headline
    rows = table[
        (table["experiment"] == experiment) & (table["condition"] == condition)
        & (table["metric"] == metric) & (table["category"] == "overall")
    ]  # fmt: skip
    return [
        {"metric": metric, **{key: float(row[key]) for key in ("value", "low", "high")}}
        for _, row in rows.iterrows()
    ][:1]


def main() -> None:
    """Measure both precisions and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--limit", type=int, default=400, help="BBQ items")
    parser.add_argument("--students", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data-dir", type=Path, default=default_data_dir())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    limits = {"bbq": arguments.limit, "winogender": None, "law_school": arguments.students}
    plan = EvaluationPlan(
        [
            cell
            for experiment, limit in limits.items()
            for cell in plan_evaluation(
                arguments.data_dir, load_stimuli(), [experiment], list(CONDITIONS), limit=limit
            ).cells
        ]
    )
    packings, results = PackingCache(), {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in DTYPES:
            results[dtype] = measured(plan, arguments.model, dtype, Path(folder) / dtype, packings)
    columns = ("experiment", "condition", "items", "mean, nats", "largest, nats", "other choice",
               "metric", *DTYPES)  # fmt: skip
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    figures: dict[str, Any] = {"cpu_seconds": {d: results[d][2] for d in DTYPES}, "cells": {}}
    for cell in plan.cells:
        items = [results[dtype][0][cell.file_name] for dtype in DTYPES]
        row = differences(*items)
        metrics = [headline(results[d][1], cell.experiment, cell.condition) for d in DTYPES]
        figures["cells"][cell.name] = {**row, "metrics": metrics}
        values = [f"{m['value']:.4f} [{m['low']:.4f}, {m['high']:.4f}]" for [m] in metrics]
        cells = [cell.experiment, cell.condition, row["items"], f"{row['mean_nats']:.4f}",
                 f"{row['largest_nats']:.3f}", f"{row['flips']} of {row['items']}",
                 metrics[0][0]["metric"], *values]  # fmt: skip
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    print({dtype: round(results[dtype][2], 1) for dtype in DTYPES}, "CPU s")
    save_figures(arguments.json, figures)


if __name__ == "__main__":
    main()
