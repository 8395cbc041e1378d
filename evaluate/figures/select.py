"""Select the rows of the tidy table that a figure shows; say what is missing."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from selfcorrect.evaluate.experiments import EXPERIMENTS, get_experiment
from selfcorrect.evaluate.experiments.base import condition_rank
from selfcorrect.evaluate.experiments.tally import OVERALL
from selfcorrect.evaluate.statistics.cells import ALL_ORDERS
from selfcorrect.recipes.foundation.errors import InputError

_KEYS = ["model", "seed", "step", "experiment", "condition", "category", "metric"]


class NothingToDraw(InputError):
    """The table lacks the data of the figure; the message says which."""


def drawable(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of checkpoints, over all orders of the options.

    Raises NothingToDraw if a model and seed appears twice, because one line would mix two runs.
    """
    data = frame[frame["step"].notna()]
    if "order" in data:
        data = data[data["order"] == ALL_ORDERS]
    duplicates = data[data.duplicated(_KEYS)]
    if len(duplicates):
        first = duplicates.iloc[0]
        runs = list(dict.fromkeys(frame["run"]))
        remedy = "draw one run at a time, or draw them side by side with figures/runs.py"
        if len(runs) == 1:
            remedy = "two run folders have this name; rename one"
        where = f"{first['model']}, seed {first['seed']}"
        raise NothingToDraw(f"{where} appears twice in the table of {', '.join(runs)}; {remedy}")
    return data


def overall(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the overall rows of checkpoints, without single categories."""
    return drawable(frame[frame["category"] == OVERALL])


def headlines(data: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of each experiment's headline metric."""
    names = {name: get_experiment(name).headline for name in set(data["experiment"])}
    return data[data["metric"] == data["experiment"].map(names)]


def judged_effects(effects: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return the headline effects of the conditions that are judged against a bias.

    `effects` is the list of statistics.json.
    """
    data = pd.DataFrame(effects)
    if data.empty:
        raise NothingToDraw("the effect of an instruction needs Q beside an instructed condition")
    return headlines(data[data["judged"]] if "judged" in data else data)


def effects_over_steps(effects: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return `judged_effects`; raises NothingToDraw if they are of one step only."""
    data = judged_effects(effects)
    if data["step"].nunique() < 2:
        raise NothingToDraw("instruction effects need Q and an instructed condition at two steps")
    return data


def experiments_in(data: pd.DataFrame) -> list[str]:
    """Return the experiments of the rows, in the order of EXPERIMENTS."""
    present = set(data["experiment"])
    return [name for name in EXPERIMENTS if name in present]


def conditions_in(data: pd.DataFrame) -> list[str]:
    """Return the conditions of the rows, the paper's first."""
    return sorted(set(data["condition"]), key=condition_rank)


def common_steps(data: pd.DataFrame) -> list[int]:
    """Return the steps that all models share, or all steps if they share none."""
    steps = [set(rows["step"]) for _, rows in data.groupby("model")]
    shared = set.intersection(*steps) if steps else set()
    return sorted(int(step) for step in shared or set(data["step"]))


def models_in(data: pd.DataFrame) -> list[str]:
    """Return the models from small to large."""
    return list(dict.fromkeys(data.sort_values("parameters", kind="stable")["model"]))


def chosen_model(data: pd.DataFrame, model: str | None) -> str:
    """Return `model`, or the largest model; raises NothingToDraw if it is not in the table."""
    models = models_in(data)
    if not models:
        raise NothingToDraw("no checkpoint has been measured for this figure")
    if model is not None and model not in models:
        raise NothingToDraw(f"model {model!r}: not in the table; choose from {', '.join(models)}")
    return model or models[-1]


def chosen_experiment(data: pd.DataFrame, experiment: str) -> pd.DataFrame:
    """Return the experiment's rows; raises NothingToDraw if there are none."""
    get_experiment(experiment)
    rows = data[data["experiment"] == experiment]
    if rows.empty:
        raise NothingToDraw(f"{experiment}: not measured at any checkpoint")
    return rows


def chosen_steps(data: pd.DataFrame, steps: Sequence[int]) -> list[int]:
    """Return `steps`, or the last common step; raises NothingToDraw for a step not measured."""
    if not steps:
        return common_steps(data)[-1:]
    present = sorted({int(step) for step in data["step"]})
    for step in steps:
        if step not in present:
            known = ", ".join(map(str, present)) or "none"
            raise NothingToDraw(f"step {step}: not measured; choose from {known}")
    return sorted(set(steps))
