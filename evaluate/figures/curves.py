"""Draw the results: metric against RLHF step and against model size, effects, and training.

Every function takes the tidy table of results.py (or the lists of statistics.json) of one run and
returns a matplotlib Figure, or raises NothingToDraw with a sentence that says which data is
missing. An undefined value is a gap in its line. With one seed a band is the 95 % interval over
items; with several, the line is their mean and the band reaches from the lowest to the highest
seed. Beside these: maps.py (size by steps), experiment_figures.py (one experiment in detail),
run_figures.py (several runs); drawings.py draws what a report shows.
"""
# ruff: noqa: TID253 - all of this file is matplotlib; it is itself imported only where needed.

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from selfcorrect.evaluate.experiments import EXPERIMENTS, get_experiment
from selfcorrect.evaluate.experiments.base import condition_rank
from selfcorrect.evaluate.figures.panels import (
    condition_lines,
    condition_looks,
    line,
    model_title,
    panels,
    shared_legend,
    size_lines,
    size_looks,
    step_axis,
    style,
    value_axis,
    whole_span,
)
from selfcorrect.evaluate.figures.paper import (
    CITATION,
    published_against_size,
    published_against_steps,
)
from selfcorrect.evaluate.figures.paper_points import PUBLISHED, published_points
from selfcorrect.evaluate.figures.select import (
    NothingToDraw,
    chosen_experiment,
    chosen_model,
    chosen_steps,
    experiments_in,
    headlines,
    judged_effects,
    models_in,
    overall,
)
from selfcorrect.evaluate.statistics.formatting import number
from selfcorrect.recipes.foundation.atomic_files import atomic_file

STEP_LABEL = "RLHF steps (PPO updates)"


def against_steps(frame: pd.DataFrame, model: str | None = None, paper: bool = False) -> Figure:
    """Headline metric of one model (default: the largest) against RLHF step, a panel an experiment.

    With `paper`, the paper's values of the conditions drawn stand beside as open markers.
    """
    data = headlines(overall(frame))
    model = chosen_model(data, model)
    mine = data[data["model"] == model]
    experiments = experiments_in(mine)
    if mine["step"].nunique() < 2:
        raise NothingToDraw(f"{model}: metric against steps needs evaluations at two steps or more")
    with style():
        figure, axes = panels(len(experiments), height=2.75)
        for ax, experiment in zip(axes, experiments, strict=True):
            headline = get_experiment(experiment).headline
            panel = mine[mine["experiment"] == experiment]
            condition_lines(ax, panel, condition_looks(data["condition"]))
            theirs = published_against_steps(experiment, headline) if paper else []
            theirs = [row for row in theirs if row.condition in set(panel["condition"])]
            everyone = data[data["experiment"] == experiment]
            value_axis(ax, everyone, experiment, headline, theirs)
            ax.set_title(get_experiment(experiment).title)
            ax.set_xlabel(STEP_LABEL)
            published_points(ax, theirs, "steps")
        figure.suptitle(model_title(mine), x=0.01, ha="left")
        shared_legend(figure, axes)
    return figure


def steps_by_size(frame: pd.DataFrame, experiment: str) -> Figure:
    """Headline metric of one experiment against RLHF step: a panel a size, a line a condition."""
    data = chosen_experiment(headlines(overall(frame)), experiment)
    if data["step"].nunique() < 2:
        raise NothingToDraw(f"{experiment}: metric against steps needs two steps or more")
    models = models_in(data)
    with style():
        figure, axes = panels(len(models), height=2.3)
        for number, (ax, model) in enumerate(zip(axes, models, strict=True)):
            mine = data[data["model"] == model]
            condition_lines(ax, mine, condition_looks(data["condition"]))
            value_axis(ax, data, experiment, get_experiment(experiment).headline)
            if number % 3:  # the first panel of a row says it for all of the row
                ax.set_ylabel("")
            ax.set_title(model_title(mine))
            ax.set_xlabel(STEP_LABEL)
        figure.suptitle(get_experiment(experiment).title, x=0.01, ha="left")
        shared_legend(figure, axes)
    return figure


def against_size(frame: pd.DataFrame, *steps: int, paper: bool = False) -> Figure:
    """Headline metric against parameters (log axis), a panel per step and experiment.

    Without `steps`, the last step that all models have. With `paper`, the paper's values of the
    conditions drawn stand beside as open markers.
    """
    data = headlines(overall(frame))
    sizes = data[["model", "parameters"]].drop_duplicates()
    if len(sizes) < 2:
        raise NothingToDraw("metric against model size needs two sizes or more")
    if sizes["parameters"].duplicated().any():
        same = ", ".join(sizes[sizes["parameters"].duplicated(keep=False)]["model"])
        raise NothingToDraw(f"metric against model size: {same} have the same number of parameters")
    shown = chosen_steps(data, steps)
    data = data[data["step"].isin(shown)]
    experiments = experiments_in(data)
    places = [(step, experiment) for step in shown for experiment in experiments]
    with style():
        figure, axes = panels(len(places), height=2.75 if len(shown) == 1 else 2.4)
        for ax, (step, experiment) in zip(axes, places, strict=True):
            headline = get_experiment(experiment).headline
            of_experiment = data[data["experiment"] == experiment]
            panel = of_experiment[of_experiment["step"] == step]
            size_lines(ax, panel, condition_looks(data["condition"]))
            theirs = published_against_size(experiment, headline) if paper else []
            theirs = [row for row in theirs if row.condition in set(panel["condition"])]
            value_axis(ax, of_experiment, experiment, headline, theirs)
            title = get_experiment(experiment).title
            ax.set_title(title if len(shown) == 1 else f"{title.split()[0]}, step {step}")
            ax.set_xlabel("Model parameters")
            published_points(ax, theirs, "parameters")
        after = " and ".join(map(str, shown))
        figure.suptitle(f"After {after} RLHF steps", x=0.01, ha="left")
        shared_legend(figure, axes)
    return figure


def instruction_effects(effects: Sequence[Mapping[str, Any]]) -> Figure:
    """metric(Q) - metric(condition) against step, a panel per condition and experiment."""
    data = judged_effects(effects)
    if data["step"].nunique() < 2:
        raise NothingToDraw("instruction effects need Q and an instructed condition at two steps")
    pairs = sorted(
        set(zip(data["condition"], data["experiment"], strict=True)),
        key=lambda pair: (condition_rank(pair[0]), list(EXPERIMENTS).index(pair[1])),
    )
    with style():
        figure, axes = panels(len(pairs), height=2.3)
        for ax, (condition, experiment) in zip(axes, pairs, strict=True):
            here = data[(data["experiment"] == experiment) & (data["condition"] == condition)]
            for model, look in size_looks(data).items():
                mine = here[here["model"] == model]
                line(ax, mine, "step", sorted(set(here["step"])), look, model_title(mine))
            step_axis(ax, here["step"])
            whole_span(ax, here)
            ax.axhline(0, color="#333333", linewidth=0.9, zorder=1)
            ax.set_title(get_experiment(experiment).title)
            ax.set_ylabel(f"Q minus {condition}")
            ax.set_xlabel(STEP_LABEL)
        figure.suptitle("Headline metric without minus with the instruction", x=0.01, ha="left")
        shared_legend(figure, axes)
    return figure


def training_curves(frame: pd.DataFrame) -> Figure:
    """Reward and KL to the initial policy against step, and reward against the root of the KL.

    A line per model. Bai et al. 2022 (arXiv 2204.05862) found the reward to grow about linearly in
    sqrt(KL); an estimate of the KL below 0 has no root and is a gap there.
    """
    data = training_table(frame)
    looks = size_looks(data)
    with style():
        figure, axes = panels(3, height=2.5)
        for model, look in looks.items():
            mine = data[data["model"] == model]
            title = model_title(mine)
            for ax, column in zip(axes, ("reward", "kl"), strict=False):
                line(ax, mine.assign(value=mine[column]), "step", sorted(set(data["step"])), look,
                     title)  # fmt: skip
            root_line(axes[2], mine, look, title)
        training_axes(axes, data["step"])
        shared_legend(figure, axes)
    return figure


def training_table(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a checkpoint, with its KL and reward; NothingToDraw where none records them."""
    columns = ["run", "model", "parameters", "seed", "step", "kl", "reward"]
    data = frame[frame["step"].notna()][columns]
    data = data.drop_duplicates(["run", "model", "seed", "step"])
    if data[["kl", "reward"]].notna().sum().max() < 2:
        raise NothingToDraw("reward and KL: the checkpoints record neither at two steps or more")
    return data.assign(low=np.nan, high=np.nan)


def root_line(ax: Any, data: pd.DataFrame, look: Mapping[str, Any], label: str) -> None:
    """Mean reward against the mean sqrt(KL) of the seeds, in the order of the steps."""
    root = np.sqrt(data["kl"].where(data["kl"] >= 0).astype(float))
    points = data.assign(root=root).groupby("step")[["root", "reward"]]
    mean = points.mean().where(points.count() == data["seed"].nunique())
    ax.plot(mean["root"], mean["reward"], label=label, markeredgecolor="white", **look)


def training_axes(axes: Sequence[Any], steps: pd.Series) -> None:
    """Titles and labels of the three panels on training."""
    score, kl = "Mean reward-model score", "KL to the initial policy"
    for ax, title, label in zip(axes, ("Reward", "KL"), (score, f"{kl} (nats)"), strict=False):
        step_axis(ax, steps)
        ax.set_title(title)
        ax.set_ylabel(label)
        ax.set_xlabel(STEP_LABEL)
    axes[2].set_title("Reward against √KL")
    axes[2].set_ylabel(score)
    axes[2].set_xlabel(f"√({kl} in nats)")


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write <name>.png and <name>.svg, each whole or not at all; same data, same bytes."""
    with style():
        figure.draw_without_rendering()
        figure.set_layout_engine(None)  # the layout is found once; it takes half the time
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            with atomic_file(folder / f"{name}.{kind}") as path:
                figure.savefig(path, format=kind, metadata=metadata)


def in_words(figure: Figure) -> str:
    """Alternative text: what the figure's own label says, or each line's first and last value."""
    if figure.get_label():
        return str(figure.get_label())
    parts = ["Lines with their first and last value, from left to right."]
    for ax in figure.axes:
        lines, published = [], []
        for drawn in (drawn for place in (ax, *ax.child_axes) for drawn in place.get_lines()):
            label = str(drawn.get_label())
            y = np.asarray(drawn.get_ydata(), dtype=float)
            y = y[np.isfinite(y)]
            if label.startswith(PUBLISHED):
                published.append(label.removeprefix(PUBLISHED))
            elif len(y) and not label.startswith("_"):
                lines.append(f"{label} {number(y[0], 2)} to {number(y[-1], 2)}")
        name = ax.get_label() or f"{ax.get_title(loc='left')}, {ax.get_ylabel()}"
        parts.append(f"{' '.join(str(name).split())}: {'; '.join(lines) or 'no defined value'}.")
        if published:
            parts.append(f"Published by {CITATION}: {'; '.join(published)}.")
    return " ".join(parts)
