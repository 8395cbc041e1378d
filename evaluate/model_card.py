"""Results as Hugging Face model-card metadata (`model-index`)."""

from pathlib import Path

import pandas as pd

from selfcorrect.evaluate.experiments import get_experiment
from selfcorrect.evaluate.experiments.tally import OVERALL
from selfcorrect.evaluate.statistics.bootstrap import CONFIDENCE
from selfcorrect.recipes.foundation.atomic_files import write_text
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.foundation.printable import escape_controls


def write_model_card(frame: pd.DataFrame, name: str, path: Path) -> Path:
    """Write a README.md whose metadata hold each experiment's headline under each condition.

    `frame` is the tidy table of results.py for one model. The interval stands in the metric's
    `args`, since `model-index` knows no interval. Undefined values are left out.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    found = []
    for row in frame[frame["category"] == OVERALL].to_dict("records"):
        definition = get_experiment(str(row["experiment"]))
        if row["metric"] != definition.headline or pd.isna(row["value"]):
            continue
        interval = {"confidence": CONFIDENCE, "items": int(row["num_items"])}
        if not pd.isna(row["low"]):
            interval |= {"low": float(row["low"]), "high": float(row["high"])}
        found.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=str(row["experiment"]),
                dataset_name=get_experiment(str(row["experiment"])).title,
                dataset_config=str(row["condition"]),
                metric_type=str(row["metric"]),
                metric_name=module.headline_metric.label,
                metric_value=float(row["value"]),
                metric_args=interval,
            )
        )
    if not found:
        raise InputError(f"{name}: no headline metric is defined, so there is nothing to export")
    data = ModelCardData(model_name=name, eval_results=found)
    write_text(path, str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {escape_controls(name)}\n")))
    return path
