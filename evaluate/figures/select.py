"""Which rows of the tidy table a figure shows, and the words for what is missing."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from selfcorrect.evaluate.experiments import EXPERIMENTS, get_experiment
from selfcorrect.evaluate.experiments.tally import OVERALL
from selfcorrect.evaluate.results import ALL_ORDERS
from selfcorrect.recipes.foundation.errors import InputError

_PLACE = ["model", "seed", "step", "experiment", "condition", "category", "metric"]


class NothingToDraw(InputError):
    """The table lacks what the figure shows; the message says what."""


def drawable(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of checkpoints, all orders of the options together.

    Raises NothingToDraw where one model and seed stands there twice: a line through the values of
    two runs would be neither's.
    """
    data = frame[frame["step"].notna()]
    if "order" in data:
        data = data[data["order"] == ALL_ORDERS]
    twice = data[data.duplicated(_PLACE)]
    if len(twice):
        first = twice.iloc[0]
        runs = list(dict.fromkeys(frame["run"]))
        remedy = "draw one run at a time, or lay them side by side with run_figures.py"
        if len(runs) == 1:
            remedy = "two run folders have this name: rename one"
        where = f"{first['model']}, seed {first['seed']}"
        raise NothingToDraw(f"{where} stands twice in the table of {', '.join(runs)}; {remedy}")
    return data


def overall(frame: pd.DataFrame) -> pd.DataFrame:
    """The overall rows of checkpoints, without the single categories."""
    return drawable(frame[frame["category"] == OVERALL])


def headlines(data: pd.DataFrame) -> pd.DataFrame:
    """The rows of each experiment's headline metric."""
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


def experiments_in(data: pd.DataFrame) -> list[str]:
    """The experiments of the rows, in the usual order."""
    present = set(data["experiment"])
    return [name for name in EXPERIMENTS if name in present]


def common_steps(data: pd.DataFrame) -> list[int]:
    """The steps at which every model was evaluated, or all steps when none is shared."""
    held = [set(rows["step"]) for _, rows in data.groupby("model")]
    shared = set.intersection(*held) if held else set()
    return sorted(int(step) for step in shared or set(data["step"]))


def models_in(data: pd.DataFrame) -> list[str]:
    """The models from small to large."""
    return list(dict.fromkeys(data.sort_values("parameters", kind="stable")["model"]))


def chosen_model(data: pd.DataFrame, model: str | None) -> str:
    """`model`, or the largest there is; NothingToDraw for one that is not in the table."""
    models = models_in(data)
    if not models:
        raise NothingToDraw("no checkpoint of this has been measured")
    if model is not None and model not in models:
        raise NothingToDraw(f"model {model!r}: not in the table; there are {', '.join(models)}")
    return model or models[-1]


def chosen_experiment(data: pd.DataFrame, experiment: str) -> pd.DataFrame:
    """The experiment's rows; NothingToDraw where there are none."""
    get_experiment(experiment)
    rows = data[data["experiment"] == experiment]
    if rows.empty:
        raise NothingToDraw(f"{experiment}: not measured at any checkpoint")
    return rows


def chosen_steps(data: pd.DataFrame, steps: Sequence[int]) -> list[int]:
    """`steps`, or the last one that all models have; NothingToDraw for one nobody has."""
    if not steps:
        return common_steps(data)[-1:]
    present = sorted({int(step) for step in data["step"]})
    for step in steps:
        if step not in present:
            known = ", ".join(map(str, present)) or "none"
            raise NothingToDraw(f"step {step}: nothing was measured there; there are {known}")
    return sorted(set(steps))
