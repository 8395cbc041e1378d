"""Export results in the format of Every Eval Ever, schema 0.3.0 (https://evalevalai.com).

    data/<experiment>/<organization>/<model>/<id>.json             scores of all conditions
    data/<experiment>/<organization>/<model>/<id>_samples.jsonl    single answers

The id is a digest of the cells, so a second export of the same answers replaces the first. The
format asks of every answer whether it is right, so experiments whose items have no right answer
(Winogender, law school) have no file of single answers.
"""

import hashlib
import json
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from selfcorrect.evaluate.experiments import get_experiment
from selfcorrect.evaluate.experiments.base import Metric
from selfcorrect.evaluate.experiments.tally import OVERALL
from selfcorrect.evaluate.measuring.cell_files import read_settings, read_table
from selfcorrect.evaluate.measuring.prompt_files import read_prompts
from selfcorrect.evaluate.run_folder import CheckpointRecord
from selfcorrect.evaluate.statistics.bootstrap import (
    CONFIDENCE,
    NUM_RESAMPLES,
    Draws,
    standard_error,
)
from selfcorrect.evaluate.statistics.cells import MeasuredCell, measure_folder
from selfcorrect.recipes.foundation.atomic_files import atomic_file, write_json

SCHEMA_VERSION = "0.3.0"
INTERVAL = "percentile bootstrap over clusters within categories (Rao and Wu 1988)"


def write_every_eval_ever(
    folder: Path, name: str, record: CheckpointRecord | None, organization: str, out: Path
) -> list[Path]:
    """Write one model's evaluation files below out/data; return the paths.

    `name` is the model's, safe as a file name. `organization` names who trained and measured it.
    """
    developer = _file_name(organization)
    written = []
    paths = {}
    for path in sorted(folder.glob("*.parquet")):
        settings = read_settings(path)
        paths[settings["experiment"], settings["condition"]] = path
    cells = measure_folder(folder, folder.name, name, record, Draws())
    for experiment in dict.fromkeys(cell.experiment for cell in cells):
        of_experiment = [cell for cell in cells if cell.experiment == experiment]
        files = {cell.condition: paths[experiment, cell.condition] for cell in of_experiment}
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in files.values()))
        identity = str(uuid.UUID(digest.hexdigest()[:32], version=4))
        target = out / "data" / experiment / developer / name
        facts = _facts(experiment, name, developer, organization, record)
        samples = target / f"{identity}_samples.jsonl"
        num_rows = _write_samples(samples, files, facts)
        if num_rows:
            facts["detailed_evaluation_results"] = {
                "format": "jsonl",
                "file_path": samples.relative_to(out).as_posix(),
                "hash_algorithm": "sha256",
                "checksum": hashlib.sha256(samples.read_bytes()).hexdigest(),
                "total_rows": num_rows,
            }
            written.append(samples)
        facts["evaluation_results"] = [
            result
            for cell in of_experiment
            for result in _results(cell, read_settings(files[cell.condition]))
        ]
        write_json(target / f"{identity}.json", facts)
        written.append(target / f"{identity}.json")
    return written


def _facts(
    experiment: str,
    name: str,
    developer: str,
    organization: str,
    record: CheckpointRecord | None,
) -> dict[str, Any]:
    now = f"{time.time():.0f}"
    details = {"deployment_type": "self_deployed", "model_availability": "unknown"}
    if record is not None:
        facts = ("model", "parameters", "seed", "step", "episodes", "kl", "reward")
        details |= {fact: str(getattr(record, fact)) for fact in facts}
    return {
        "schema_version": SCHEMA_VERSION,
        "evaluation_id": f"{experiment}/{developer}/{name}/{now}",
        "retrieved_timestamp": now,
        "source_metadata": {
            "source_name": "selfcorrect",
            "source_type": "evaluation_run",
            "source_organization_name": organization,
            "evaluator_relationship": "other" if record is None else "first_party",
        },
        "eval_library": {"name": "selfcorrect", "version": version("selfcorrect")},
        "model_info": {
            "name": name,
            "id": f"{developer}/{name}",
            "developer": organization,
            "additional_details": details,
        },
        "evaluation_results": [],
    }


def _results(cell: MeasuredCell, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the defined metrics of a cell over all items."""
    experiment = get_experiment(cell.experiment)
    num_items, num_clusters = cell.counts[OVERALL]
    for name, estimate in cell.bootstrap.estimates[OVERALL].items():
        if np.isnan(estimate.value):
            continue
        metric = experiment.metrics[name]
        uncertainty: dict[str, Any] = {
            "num_samples": num_items,
            "num_bootstrap_samples": NUM_RESAMPLES,
        }
        error = standard_error(cell.bootstrap.replicates.metrics[name])
        if not np.isnan(error):
            uncertainty["standard_error"] = {"value": error, "method": "bootstrap"}
        if not np.isnan(estimate.low):
            uncertainty["confidence_interval"] = {
                "lower": estimate.low,
                "upper": estimate.high,
                "confidence_level": CONFIDENCE,
                "method": INTERVAL,
            }
        yield {
            "evaluation_result_id": f"{cell.experiment}/{cell.condition}/{name}",
            "evaluation_name": f"{cell.experiment} {cell.condition}",
            "source_data": {"dataset_name": experiment.title, "source_type": "other"},
            "metric_config": {
                "metric_id": name,
                "metric_name": metric.label,
                "evaluation_description": metric.meaning,
                "lower_is_better": _lower_is_better(name, metric),
                "additional_details": {"without_bias": str(metric.unbiased)},
            },
            "score_details": {
                "score": estimate.value,
                "details": {"num_items": str(num_items), "num_clusters": str(num_clusters)},
                "uncertainty": uncertainty,
            },
            "generation_config": {
                "additional_details": {
                    "condition": cell.condition,
                    "settings_digest": str(settings.get("settings_digest")),
                    "engine": _engine(settings.get("origin") or {}),
                }
            },
        }


def _engine(origin: dict[str, Any]) -> str:
    """Return the name of an engine, with the version of its library if it has one."""
    return " ".join(str(part) for part in (origin.get("engine"), origin.get("version")) if part)


def _lower_is_better(name: str, metric: Metric) -> bool:
    """Return what the format requires; for a bias, nearer to `without_bias` is less biased."""
    return metric.unbiased is not None or name == "share_unparsed" or "error" in name


def _write_samples(path: Path, files: Mapping[str, Path], facts: Mapping[str, Any]) -> int:
    """Write the single answers that can be right or wrong; return their number."""
    number = 0
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as handle:
        for condition, file in files.items():
            prompts = read_prompts(file)
            for row in read_table(file, None).to_pylist():
                if row.get("label") is None:
                    continue
                sample = _sample(row, condition, prompts, facts)
                handle.write(json.dumps(sample, allow_nan=False, ensure_ascii=False) + "\n")
                number += 1
    if not number:
        path.unlink()
    return number


def _sample(
    row: Mapping[str, Any],
    condition: str,
    prompts: Mapping[tuple[str, str], str],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    experiment = facts["evaluation_id"].partition("/")[0]
    options: Sequence[str] = row["options"]
    order = _order(row["order"])
    right = options[order.index(row["label"])]
    chosen = options[int(np.argmax(row["logprobs"]))]
    prompt = row.get("prompt") or prompts.get((row["item"], row["order"]))
    raw = "" if prompt is None else prompt
    digest = hashlib.sha256((raw + right).encode()).hexdigest()
    return {
        "schema_version": SCHEMA_VERSION,
        "evaluation_id": facts["evaluation_id"],
        "model_id": facts["model_info"]["id"],
        "evaluation_name": f"{experiment} {condition}",
        "sample_id": f"{row['item']}/{row['order']}/{row['draw']}",
        "sample_hash": digest,
        "interaction_type": "single_turn",
        "input": {
            "raw": raw,
            "formatted": prompt,
            "reference": [right],
            "choices": list(options),
        },
        "output": {"raw": [chosen], "reasoning_trace": row.get("samples")},
        "answer_attribution": [
            {
                "turn_idx": 0,
                "source": "output.raw",
                "extracted_value": chosen,
                "extraction_method": "option of the highest log-probability",
                "is_terminal": True,
            }
        ],
        "evaluation": {"score": float(chosen == right), "is_correct": chosen == right},
        "metadata": {
            "category": row["category"],
            "cluster": row["cluster"],
            "order": row["order"],
            "log_probabilities": json.dumps(row["logprobs"]),
            "mass": str(row["mass"]),
        },
    }


def _order(spelling: str) -> list[int]:
    return [int(part) for part in (spelling.split(",") if "," in spelling else spelling)]


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.@_-]+", "-", text).strip("-.") or "unknown"
