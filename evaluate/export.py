"""Export results as lm-eval's files, or as metadata of a Hugging Face model card.

lm-eval's files are `results_<date>.json` and `samples_<task>_<date>.jsonl`, with the names and keys
of lm_eval/loggers/evaluation_tracker.py (0.4.13). Facts that an evaluation file lacks are null:
whether an option was the greedy choice, and the prompt's text and hash in files of older versions.
"""

import hashlib
import html
import json
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from selfcorrect.evaluate.experiments import get_experiment
from selfcorrect.evaluate.experiments.tally import OVERALL, option_order
from selfcorrect.evaluate.measuring.cell_files import read_settings, read_table
from selfcorrect.evaluate.measuring.prompt_files import read_prompts
from selfcorrect.evaluate.statistics.bootstrap import CONFIDENCE, Draws, Estimate, standard_error
from selfcorrect.evaluate.statistics.cells import MeasuredCell, measure_folder
from selfcorrect.evaluate.statistics.formatting import number, with_interval
from selfcorrect.recipes.foundation.atomic_files import atomic_file, write_json, write_text
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.foundation.printable import escape_controls

_ANSWER = {"options", "logprobs", "probabilities", "mass", "samples", "truncated", "prompt"}


def write_lm_eval(folder: Path, name: str, out: Path) -> list[Path]:
    """Write one model's evaluation files in lm-eval's format into out/<model>; return the paths.

    `_stderr` is the standard deviation of the resamples, "N/A" where there is none; intervals,
    which lm-eval lacks, are under `intervals`.
    """
    cells = {
        (cell.experiment, cell.condition): cell
        for cell in measure_folder(folder, folder.name, name, None, Draws())
    }
    now = datetime.now()
    date = now.isoformat().replace(":", "-")
    model_folder = out / re.sub(r"[^A-Za-z0-9.@-]+", "__", name)
    results: dict[str, dict[str, Any]] = {}
    intervals: dict[str, dict[str, Any]] = {}
    configs, counts, hashes, sample_files = {}, {}, {}, []
    for path in sorted(folder.glob("*.parquet")):
        settings = read_settings(path)
        experiment, condition = settings["experiment"], settings["condition"]
        # File names are unique. lm-eval finds the task name in its own file names by a pattern.
        task = re.sub(r"[^A-Za-z0-9+-]+", "_", path.stem)
        results[task], intervals[task] = {"alias": task}, {}
        for metric, estimate, error in _estimates(cells[experiment, condition]):
            results[task][f"{metric},none"] = _number(estimate.value)
            results[task][f"{metric}_stderr,none"] = "N/A" if np.isnan(error) else error
            intervals[task][metric] = [_number(estimate.low), _number(estimate.high)]
        configs[task] = {
            "task": task,
            "output_type": "multiple_choice",
            "num_fewshot": 0,
            "metadata": settings,
        }
        sample_file = model_folder / f"samples_{task}_{date}.jsonl"
        digest, num_items = hashlib.sha256(), 0
        with atomic_file(sample_file) as temporary, temporary.open("w", encoding="utf-8") as handle:
            for sample in _samples(path):
                digest.update((sample["doc_hash"] + sample["target_hash"]).encode())
                handle.write(json.dumps(sample, allow_nan=False, ensure_ascii=False) + "\n")
                num_items = max(num_items, sample["doc_id"] + 1)
        counts[task] = {"original": num_items, "effective": num_items}
        hashes[task] = digest.hexdigest()
        sample_files.append(sample_file)
    results_file = model_folder / f"results_{date}.json"
    write_json(
        results_file,
        {
            "results": results,
            "intervals": intervals,
            "group_subtasks": {task: [] for task in results},
            "configs": configs,
            "versions": dict.fromkeys(results, 0),
            "n-shot": dict.fromkeys(results, 0),
            "n-samples": counts,
            "config": {"model": "selfcorrect", "model_args": {"pretrained": name}},
            "git_hash": None,
            "date": now.timestamp(),
            "model_name": name,
            "model_name_sanitized": model_folder.name,
            "task_hashes": hashes,
        },
    )
    return [results_file, *sample_files]


def _estimates(cell: MeasuredCell) -> Iterator[tuple[str, Estimate, float]]:
    """Yield each metric over all items, with its standard error (NaN: none)."""
    for metric, estimate in cell.bootstrap.estimates[OVERALL].items():
        yield metric, estimate, standard_error(cell.bootstrap.replicates.metrics[metric])


def _samples(path: Path) -> Iterator[dict[str, Any]]:
    """Yield a sample per row; the orders and draws of an item share its `doc_id`.

    `target` is the position at which the row shows the right option, as `resps` are in that order.
    """
    prompts = read_prompts(path)
    batches = read_table(path, None).to_batches(max_chunksize=1024)
    rows = (row for batch in batches for row in batch.to_pylist())
    doc_ids: dict[str, int] = {}
    for row in rows:
        prompt = row.get("prompt") or prompts.get((row["item"], row["order"]))
        doc = {key: _number(value) for key, value in row.items() if key not in _ANSWER}
        target, logprobs = row.get("label"), row["logprobs"]
        scores = [[str(value), str(None)] for value in logprobs]
        accuracy = {}
        if isinstance(target, int):  # the index of an option
            target = option_order(row["order"], len(logprobs)).index(target)
            if row["probabilities"] is not None:  # null where there is no answer
                accuracy["acc"] = float(logprobs.index(max(logprobs)) == target)
        yield {
            "doc_id": doc_ids.setdefault(row["item"], len(doc_ids)),
            "doc": doc,
            "target": str(target),
            "arguments": {
                f"gen_args_{i}": {"arg_0": prompt, "arg_1": option}
                for i, option in enumerate(row.get("options") or [])
            },
            "resps": [[score] for score in scores],
            "filtered_resps": scores,
            "filter": "none",
            "metrics": list(accuracy),
            "doc_hash": _hash(json.dumps(doc, indent=2, ensure_ascii=False)),
            "prompt_hash": None if prompt is None else _hash(prompt),
            "target_hash": _hash(str(target)),
            **accuracy,
        }


def _number(value: Any) -> Any:
    """Return a value for JSON, in which an undefined number is null."""
    return None if pd.api.types.is_scalar(value) and pd.isna(value) else value


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_model_card(folder: Path, name: str, path: Path) -> Path:
    """Write a README.md with each headline metric under each condition.

    `folder` holds the evaluation files of one model. `model-index` has no field for intervals and
    standard errors, so they are in the metric's `args`, and in a table below. Undefined values are
    left out.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    results, lines = [], []
    for cell in measure_folder(folder, folder.name, name, None, Draws()):
        experiment, num_items = get_experiment(cell.experiment), cell.counts[OVERALL][0]
        for metric, estimate, error in _estimates(cell):
            if metric != experiment.headline or np.isnan(estimate.value):
                continue
            uncertainty = {"low": estimate.low, "high": estimate.high, "standard_error": error}
            known = {key: value for key, value in uncertainty.items() if not np.isnan(value)}
            label = experiment.headline_metric.label
            results.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=experiment.name,
                    dataset_name=experiment.title,
                    dataset_config=cell.condition,
                    metric_type=metric,
                    metric_name=label,
                    metric_value=estimate.value,
                    metric_args={"confidence": CONFIDENCE, "items": num_items, **known},
                )
            )
            value = with_interval(estimate._asdict())
            entries = (experiment.title, label, cell.condition, value, number(error), num_items)
            lines.append(f"| {' | '.join(map(_entry, entries))} |")
    if not results:
        raise InputError(f"{name}: no headline metric is defined, so there is nothing to export")
    data = ModelCardData(model_name=name, eval_results=results)
    head = [
        f"# {_entry(name)}",
        "",
        "Percentile bootstrap over clusters of items within categories, by selfcorrect.",
        "",
        f"| experiment | metric | condition | value [{CONFIDENCE:.0%} interval] | standard error "
        "| items |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    write_text(
        path, str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(head + lines) + "\n"))
    )
    return path


def _entry(value: object) -> str:
    """Return a value as an entry of a Markdown table: one line, without markup."""
    text = " ".join(escape_controls(value).split())
    return html.escape(text, quote=False).replace("|", "\\|")
