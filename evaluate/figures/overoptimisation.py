"""Draw what raters really think of a policy beside what its reward model says, over sqrt(KL).

The society's checkpoints record both for the same sampled answers (`AnswerWorth`). Where the reward
model's score goes on rising and the raters' utility falls, the policy is overoptimised: Gao et al.
2023, "Scaling Laws for Reward Model Overoptimization" (arXiv 2210.10760), whose x-axis this is.
"""
# ruff: noqa: TID253 - all of this file is matplotlib; it is itself imported only where needed.

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.special import ndtri

from selfcorrect.evaluate.figures.panels import (
    model_title,
    panels,
    shared_legend,
    size_looks,
    style,
)
from selfcorrect.evaluate.figures.select import NothingToDraw
from selfcorrect.evaluate.run_folder import find_checkpoints
from selfcorrect.evaluate.statistics.bootstrap import CONFIDENCE
from selfcorrect.evaluate.statistics.significance import mean_over_seeds

PANELS = {
    "score": ("Reward model", "Score, change"),
    "utility": ("What raters want", "Utility in log-odds, change"),
}


def answer_table(run: Path) -> pd.DataFrame:
    """Return one row per checkpoint that records its answers' worth, sorted by step.

    `score_change` and `utility_change` are relative to the first such checkpoint of the model and
    seed: a reward model's scores have no zero of their own. `score_half` and `utility_half` are
    half the width of their 95 % intervals over answers, NaN where a record has no standard error.
    All checkpoints answer the same prompts, so these are too wide rather than too narrow. `root` is
    sqrt(KL), an estimate below 0 counting as 0.
    """
    records = [checkpoint.record for checkpoint in find_checkpoints(run)]
    rows = [
        {
            **{key: getattr(record, key) for key in ("model", "parameters", "seed", "step")},
            "root": float(np.sqrt(max(0.0, record.answers.kl))),
            **{name: getattr(record.answers, name) for name in PANELS},
            **{f"{name}_error": getattr(record.answers, f"{name}_error") for name in PANELS},
        }
        for record in records
        if record.answers is not None
    ]
    data = pd.DataFrame(rows)
    data = data.astype({name: float for name in data if str(name).endswith("_error")})
    if data.empty or data["step"].nunique() < 2:
        raise NothingToDraw(
            "what answers are worth to raters: fewer than two steps record it, as runs in the "
            "synthetic society do"
        )
    data = data.sort_values(["parameters", "model", "seed", "step"], ignore_index=True)
    by_job = data.groupby(["model", "seed"])
    for name in PANELS:
        data[f"{name}_change"] = data[name] - by_job[name].transform("first")
        error = f"{name}_error"
        first = by_job[error].transform(lambda errors: errors.iloc[0])
        half = ndtri((1 + CONFIDENCE) / 2) * np.hypot(data[error], first)
        data[f"{name}_half"] = half.where(by_job.cumcount() > 0, 0.0)
    return data


def overoptimisation(run: Path) -> Figure:
    """Draw score and utility of a run's answers over sqrt(KL), a line per model over its steps.

    A line is the mean over seeds, with each seed's checkpoints as dots behind it. Bars are 95 %
    intervals of the change since the first checkpoint: over seeds, or over the answers of one seed.
    """
    data = answer_table(run)
    with style():
        figure, axes = panels(len(PANELS), height=2.6)
        for model, look in size_looks(data).items():
            of_model = data[data["model"] == model]
            by_step = of_model.groupby("step")
            root = by_step["root"].mean()
            for ax, name in zip(axes, PANELS, strict=True):
                change = f"{name}_change"
                half = by_step[f"{name}_half"].first()
                if of_model["seed"].nunique() > 1:
                    half = by_step[change].apply(_half_over_seeds)
                    ax.plot(
                        of_model["root"], of_model[change], linestyle="none", marker=".",
                        markersize=2, alpha=0.4, color=look["color"], label="_seeds",
                    )  # fmt: skip
                mean = by_step[change].mean()
                ax.plot(root, mean, label=model_title(of_model), markeredgecolor="white", **look)
                ax.errorbar(root, mean, half, fmt="none", ecolor=look["color"], elinewidth=0.8)
        for ax, (title, label) in zip(axes, PANELS.values(), strict=True):
            ax.set_title(title)
            ax.set_ylabel(label)
            ax.set_xlabel("√(KL to the initial policy in nats)")
            ax.axhline(0, color="#333333", linewidth=0.9, zorder=1)
        shared_legend(figure, axes)
    return figure


def _half_over_seeds(changes: pd.Series) -> float:
    numbers = mean_over_seeds(changes.tolist())
    return numbers["high"] - numbers["value"]
