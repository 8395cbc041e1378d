"""Results in lm-eval's files: `results_<date>.json` and `samples_<task>_<date>.jsonl`.

Names and keys are those of lm_eval/loggers/evaluation_tracker.py (0.4.13). What an evaluation file
does not hold is null: the prompt's text and hash, and whether an option was the greedy choice.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from selfcorrect.evaluate.statistics.bootstrap import OVERALL
from selfcorrect.evaluate.statistics.cells import read_settings, read_table
from selfcorrect.recipes.foundation.atomic_files import whole_file, write_json

_ANSWER = {"options", "logprobs", "probabilities", "mass", "samples", "truncated"}


def write_lm_eval(folder: Path, frame: pd.DataFrame, name: str, out: Path) -> list[Path]:
    """Write one model's evaluation files in lm-eval's form into out/<model>; returns the paths.

    `frame` is the tidy table of `folder` (results.summarise). Intervals are no standard errors:
    `_stderr` is "N/A", as lm-eval has it, and they stand under `intervals`.
    """
    now = datetime.now()
    date = now.isoformat().replace(":", "-")
    place = out / re.sub(r"[^A-Za-z0-9.@-]+", "__", name)
    results: dict[str, dict[str, Any]] = {}
    intervals: dict[str, dict[str, Any]] = {}
    configs, counts, hashes, written = {}, {}, {}, []
    for path in sorted(folder.glob("*.parquet")):
        settings = read_settings(path)
        experiment, condition = settings["experiment"], settings["condition"]
        # From the file's name, which is one of a kind; "+" and blanks are no part of task names.
        task = re.sub(r"[^A-Za-z0-9+-]+", "_", path.stem)
        mine = frame[
            (frame["experiment"] == experiment)
            & (frame["condition"] == condition)
            & (frame["category"] == OVERALL)
        ].to_dict("records")
        results[task] = {"alias": task}
        for row in mine:
            results[task][f"{row['metric']},none"] = _number(row["value"])
            results[task][f"{row['metric']}_stderr,none"] = "N/A"
        intervals[task] = {
            row["metric"]: [_number(row["low"]), _number(row["high"])] for row in mine
        }
        configs[task] = {
            "task": task,
            "output_type": "multiple_choice",
            "num_fewshot": 0,
            "metadata": settings,
        }
        target = place / f"samples_{task}_{date}.jsonl"
        digest, number = hashlib.sha256(), 0
        with whole_file(target) as temporary, temporary.open("w", encoding="utf-8") as handle:
            for sample in _samples(path):
                digest.update((sample["doc_hash"] + sample["target_hash"]).encode())
                handle.write(json.dumps(sample, allow_nan=False, ensure_ascii=False) + "\n")
                number += 1
        counts[task] = {"original": number, "effective": number}
        hashes[task] = digest.hexdigest()
        written.append(target)
    whole = place / f"results_{date}.json"
    write_json(
        whole,
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
            "model_name_sanitized": place.name,
            "task_hashes": hashes,
        },
    )
    return [whole, *written]


def _samples(path: Path) -> Iterator[dict[str, Any]]:
    doc_id = 0
    for batch in read_table(path, None).to_batches(max_chunksize=1024):
        for row in batch.to_pylist():
            doc = {key: _number(value) for key, value in row.items() if key not in _ANSWER}
            target, logprobs = row.get("label"), row["logprobs"]
            scores = [[str(value), str(None)] for value in logprobs]
            own = {} if target is None else {"acc": float(logprobs.index(max(logprobs)) == target)}
            yield {
                "doc_id": doc_id,
                "doc": doc,
                "target": str(target),
                "arguments": {
                    f"gen_args_{i}": {"arg_0": None, "arg_1": option}
                    for i, option in enumerate(row.get("options") or [])
                },
                "resps": [[score] for score in scores],
                "filtered_resps": scores,
                "filter": "none",
                "metrics": list(own),
                "doc_hash": _hash(json.dumps(doc, indent=2, ensure_ascii=False)),
                "prompt_hash": None,
                "target_hash": _hash(str(target)),
                **own,
            }
            doc_id += 1


def _number(value: Any) -> Any:
    """JSON has no NaN: undefined is null."""
    return None if pd.api.types.is_scalar(value) and pd.isna(value) else value


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
