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

from selfcorrect.evaluate.figures.panels import (
    model_title,
    panels,
    shared_legend,
    size_looks,
    style,
)
from selfcorrect.evaluate.figures.select import NothingToDraw
from selfcorrect.evaluate.run_folder import find_checkpoints

PANELS = {
    "score": ("Reward model", "Score, change"),
    "utility": ("What raters want", "Utility in log-odds, change"),
}


def answer_table(run: Path) -> pd.DataFrame:
    """Return one row per checkpoint that records its answers' worth, sorted by step.

    `score_change` and `utility_change` are relative to the first such checkpoint of the model and
    seed: a reward model's scores have no zero of their own. `root` is sqrt(KL), an estimate below 0
    counting as 0.
    """
    records = [checkpoint.record for checkpoint in find_checkpoints(run)]
    rows = [
        {
            **{key: getattr(record, key) for key in ("model", "parameters", "seed", "step")},
            "root": float(np.sqrt(max(0.0, record.answers.kl))),
            "score": record.answers.score,
            "utility": record.answers.utility,
        }
        for record in records
        if record.answers is not None
    ]
    data = pd.DataFrame(rows)
    if data.empty or data["step"].nunique() < 2:
        raise NothingToDraw(
            "what answers are worth to raters: fewer than two steps record it, as runs in the "
            "synthetic society do"
        )
    data = data.sort_values(["parameters", "model", "seed", "step"], ignore_index=True)
    by_job = data.groupby(["model", "seed"])
    for name in PANELS:
        data[f"{name}_change"] = data[name] - by_job[name].transform("first")
    return data


def overoptimisation(run: Path) -> Figure:
    """Draw score and utility of a run's answers over sqrt(KL), a line per model over its steps.

    A line is the mean over seeds, with each seed's checkpoints as dots behind it.
    """
    data = answer_table(run)
    with style():
        figure, axes = panels(len(PANELS), height=2.6)
        for model, look in size_looks(data).items():
            of_model = data[data["model"] == model]
            mean = of_model.groupby("step")[["root", "score_change", "utility_change"]].mean()
            for ax, name in zip(axes, PANELS, strict=True):
                change = f"{name}_change"
                if of_model["seed"].nunique() > 1:
                    ax.plot(
                        of_model["root"], of_model[change], linestyle="none", marker=".",
                        markersize=2, alpha=0.4, color=look["color"], label="_seeds",
                    )  # fmt: skip
                ax.plot(
                    mean["root"], mean[change], label=model_title(of_model),
                    markeredgecolor="white", **look,
                )  # fmt: skip
        for ax, (title, label) in zip(axes, PANELS.values(), strict=True):
            ax.set_title(title)
            ax.set_ylabel(label)
            ax.set_xlabel("√(KL to the initial policy in nats)")
            ax.axhline(0, color="#333333", linewidth=0.9, zorder=1)
        shared_legend(figure, axes)
    return figure
