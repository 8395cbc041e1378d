"""Draw metrics against RLHF steps and model size, effects of instructions, and training curves.

Every function takes the tidy table of results.py (or a list of statistics.json) of one run and
returns a matplotlib Figure, or raises NothingToDraw naming the missing data. An undefined value is
a gap in its line. With one seed the band is the 95 % interval over items; with several seeds the
line is their mean and the band their range. See also maps.py (size by steps), details.py (one
experiment), runs.py (several runs) and gallery.py (all figures of a report).
"""
# ruff: noqa: TID253 - all of this file is matplotlib; it is itself imported only where needed.

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from selfcorrect.evaluate.experiments import EXPERIMENTS, get_experiment
from selfcorrect.evaluate.experiments.base import condition_rank
from selfcorrect.evaluate.experiments.tally import OVERALL
from selfcorrect.evaluate.figures.panels import (
    condition_lines,
    condition_looks,
    line,
    model_title,
    panels,
    shared_legend,
    size_lines,
    size_looks,
    span_all_values,
    step_axis,
    style,
    value_axis,
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
    conditions_in,
    effects_over_steps,
    experiments_in,
    headlines,
    models_in,
    overall,
)
from selfcorrect.evaluate.figures.training_log import smoothed
from selfcorrect.evaluate.run_folder import RLHF_STEPS
from selfcorrect.evaluate.statistics.cells import ALL_ORDERS
from selfcorrect.evaluate.statistics.formatting import number
from selfcorrect.recipes.foundation.atomic_files import atomic_file

STEP_LABEL = f"{RLHF_STEPS} (PPO updates)"


def name_steps(figure: Figure, steps: str) -> None:
    """Write what the steps of other checkpoints are where figures say RLHF steps."""
    if steps != RLHF_STEPS:
        for text in figure.findobj(Text):
            words = text.get_text()
            text.set_text(words.replace(STEP_LABEL, steps).replace(RLHF_STEPS, steps))


def against_steps(frame: pd.DataFrame, model: str | None = None, paper: bool = False) -> Figure:
    """Draw headline metrics of one model (default: the largest) against step, by experiment.

    With `paper`, the paper's values of the same conditions are added as open markers.
    """
    data = headlines(overall(frame))
    model = chosen_model(data, model)
    of_model = data[data["model"] == model]
    experiments = experiments_in(of_model)
    if of_model["step"].nunique() < 2:
        raise NothingToDraw(f"{model}: metric against steps needs evaluations at two steps or more")
    with style():
        figure, axes = panels(len(experiments), height=2.75)
        for ax, experiment in zip(axes, experiments, strict=True):
            headline = get_experiment(experiment).headline
            panel = of_model[of_model["experiment"] == experiment]
            condition_lines(ax, panel, condition_looks(data["condition"]))
            published = published_against_steps(experiment, headline) if paper else []
            published = [row for row in published if row.condition in set(panel["condition"])]
            of_experiment = data[data["experiment"] == experiment]
            value_axis(ax, of_experiment, experiment, headline, published)
            ax.set_title(get_experiment(experiment).title)
            ax.set_xlabel(STEP_LABEL)
            published_points(ax, published, "steps")
        figure.suptitle(model_title(of_model), x=0.01, ha="left")
        shared_legend(figure, axes)
    return figure


def steps_by_size(frame: pd.DataFrame, experiment: str, in_column: bool = False) -> Figure:
    """Draw one experiment's headline metric against step, with a panel per size.

    The figure is as wide as a page, or with `in_column` as a column of a page with two.
    """
    data = chosen_experiment(headlines(overall(frame)), experiment)
    if data["step"].nunique() < 2:
        raise NothingToDraw(f"{experiment}: metric against steps needs two steps or more")
    models = models_in(data)
    with style():
        figure, axes = panels(len(models), height=1.55 if in_column else 2.3, in_column=in_column)
        for number, (ax, model) in enumerate(zip(axes, models, strict=True)):
            panel = data[data["model"] == model]
            condition_lines(ax, panel, condition_looks(data["condition"]))
            value_axis(ax, data, experiment, get_experiment(experiment).headline)
            if number % (2 if in_column else 3):  # the first of a row has the label for all
                ax.set_ylabel("")
            ax.set_title(model_title(panel))
            ax.set_xlabel("RLHF steps" if in_column else STEP_LABEL)
        figure.suptitle(get_experiment(experiment).title, x=0.01, ha="left")
        shared_legend(figure, axes)
    return figure


def against_size(frame: pd.DataFrame, *steps: int, paper: bool = False) -> Figure:
    """Draw headline metrics against parameters (log axis), with a panel per step and experiment.

    `steps` defaults to the last step that all models have. With `paper`, the paper's values of the
    same conditions are added as open markers.
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
    facets = [(step, experiment) for step in shown for experiment in experiments]
    with style():
        figure, axes = panels(len(facets), height=2.75 if len(shown) == 1 else 2.4)
        for ax, (step, experiment) in zip(axes, facets, strict=True):
            headline = get_experiment(experiment).headline
            of_experiment = data[data["experiment"] == experiment]
            panel = of_experiment[of_experiment["step"] == step]
            size_lines(ax, panel, condition_looks(data["condition"]))
            published = published_against_size(experiment, headline) if paper else []
            published = [row for row in published if row.condition in set(panel["condition"])]
            value_axis(ax, of_experiment, experiment, headline, published)
            title = get_experiment(experiment).title
            ax.set_title(title if len(shown) == 1 else f"{title.split()[0]}, step {step}")
            ax.set_xlabel("Model parameters")
            published_points(ax, published, "parameters")
        after = " and ".join(map(str, shown))
        figure.suptitle(f"After {after} RLHF steps", x=0.01, ha="left")
        shared_legend(figure, axes)
    return figure


def without_training(frame: pd.DataFrame) -> Figure:
    """Draw headline metrics of stand-alone models by condition, a panel per experiment."""
    is_shown = (frame["category"] == OVERALL) & (frame["order"] == ALL_ORDERS)
    data = headlines(frame[is_shown & frame["step"].isna()])
    if data.empty:
        raise NothingToDraw("no model has been measured over all items")
    experiments, looks = experiments_in(data), size_looks(data)
    words = []
    with style():
        figure, axes = panels(len(experiments), height=2.75)
        for ax, experiment in zip(axes, experiments, strict=True):
            panel = data[data["experiment"] == experiment]
            conditions = conditions_in(panel)
            for index, (model, look) in enumerate(looks.items()):
                rows = panel[panel["model"] == model].set_index("condition").reindex(conditions)
                middle, low, high = (
                    rows[name].to_numpy(dtype=float) for name in ("value", "low", "high")
                )
                aside = (index - (len(looks) - 1) / 2) * min(0.15, 0.7 / len(looks))
                x_values = np.arange(len(conditions)) + aside
                points = {**look, "linestyle": "none"}
                ax.plot(x_values, middle, label=model, markeredgecolor="white", **points)
                ax.vlines(x_values, low, high, color=look["color"], linewidth=1.1, alpha=0.8)
                values = [f"{c} {number(v, 2)}" for c, v in zip(conditions, middle, strict=True)]
                words.append(f"{get_experiment(experiment).title}, {model}: {'; '.join(values)}.")
            value_axis(ax, panel, experiment, get_experiment(experiment).headline)
            ax.set_xticks(range(len(conditions)), conditions, rotation=20, ha="right")
            ax.set_xlim(-0.5, len(conditions) - 0.5)
            ax.set_title(get_experiment(experiment).title)
        shared_legend(figure, axes)
    figure.set_label(" ".join(words))
    return figure


def instruction_effects(effects: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw metric(Q) - metric(condition) against step, a panel per condition and experiment."""
    data = effects_over_steps(effects)
    pairs = sorted(
        set(zip(data["condition"], data["experiment"], strict=True)),
        key=lambda pair: (condition_rank(pair[0]), list(EXPERIMENTS).index(pair[1])),
    )
    with style():
        figure, axes = panels(len(pairs), height=2.3)
        for ax, (condition, experiment) in zip(axes, pairs, strict=True):
            panel = data[(data["experiment"] == experiment) & (data["condition"] == condition)]
            for model, look in size_looks(data).items():
                of_model = panel[panel["model"] == model]
                line(ax, of_model, "step", sorted(set(panel["step"])), look, model_title(of_model))
            step_axis(ax, panel["step"])
            span_all_values(ax, panel)
            ax.axhline(0, color="#333333", linewidth=0.9, zorder=1)
            ax.set_title(get_experiment(experiment).title)
            ax.set_ylabel(f"Q minus {condition}")
            ax.set_xlabel(STEP_LABEL)
        figure.suptitle("Headline metric without minus with the instruction", x=0.01, ha="left")
        shared_legend(figure, axes)
    return figure


def training_curves(frame: pd.DataFrame, log: pd.DataFrame | None = None) -> Figure:
    """Draw reward and KL to the initial policy against step, and reward against sqrt(KL).

    There is a line per model. With the `log` of training_log.py, a line is the seeds' mean of the
    smoothed log, with every logged step of every seed as a dot behind it; without, it joins the
    batches of the kept checkpoints. Bai et al. 2022 (arXiv 2204.05862) found the reward to grow
    about linearly in sqrt(KL). A KL estimate below 0 has no root and is a gap.
    """
    data = training_table(frame)
    looks = size_looks(data)
    with style():
        figure, axes = panels(3, height=2.5)
        for model, look in looks.items():
            of_model = data[data["model"] == model]
            title = model_title(of_model)
            logged = None if log is None else log[log["model"] == model]
            if logged is not None and len(logged) > len(of_model):
                _logged_lines(axes, logged, look, title)
                continue
            for ax, column in zip(axes, ("reward", "kl"), strict=False):
                values = of_model.assign(value=of_model[column])
                line(ax, values, "step", sorted(set(data["step"])), look, title)
            root_line(axes[2], of_model, look, title)
        training_axes(axes, data["step"])
        shared_legend(figure, axes)
    return figure


def _logged_lines(
    axes: Sequence[Axes], log: pd.DataFrame, look: Mapping[str, Any], label: str
) -> None:
    """Draw the raw log of one model as dots, and the seeds' mean of its smoothed log as lines."""
    root = np.sqrt(log["kl"].where(log["kl"] >= 0))
    dots = {"marker": ".", "linestyle": "none", "markersize": 2, "alpha": 0.35,
            "color": look["color"], "markeredgewidth": 0}  # fmt: skip
    for ax, x, y in zip(axes, (log["step"], log["step"], root), ("reward", "kl", "reward"),
                        strict=True):  # fmt: skip
        ax.plot(x, log[y], label="_raw", **dots)
    by_seed = [rows.sort_values("step") for _, rows in log.groupby("seed")]
    smooth = [
        rows.assign(reward=smoothed(rows["reward"]), kl=smoothed(rows["kl"])) for rows in by_seed
    ]
    mean = pd.concat(smooth).groupby("step")[["reward", "kl"]].mean()
    plain = {"color": look["color"], "linestyle": look["linestyle"]}
    for ax, column in zip(axes, ("reward", "kl"), strict=False):
        ax.plot(mean.index, mean[column], label=label, **plain)
    axes[2].plot(np.sqrt(mean["kl"].where(mean["kl"] >= 0)), mean["reward"], label=label, **plain)


def training_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Return KL and reward by checkpoint; raises NothingToDraw if fewer than two have them."""
    columns = ["run", "model", "parameters", "seed", "step", "kl", "reward"]
    data = frame[frame["step"].notna()][columns]
    data = data.drop_duplicates(["run", "model", "seed", "step"])
    if data[["kl", "reward"]].notna().sum().max() < 2:
        raise NothingToDraw("reward and KL: the checkpoints record neither at two steps or more")
    return data.assign(low=np.nan, high=np.nan)


def root_line(ax: Any, data: pd.DataFrame, look: Mapping[str, Any], label: str) -> None:
    """Draw the seeds' mean reward against their mean sqrt(KL), in the order of the steps."""
    root = np.sqrt(data["kl"].where(data["kl"] >= 0).astype(float))
    points = data.assign(root=root).groupby("step")[["root", "reward"]]
    mean = points.mean().where(points.count() == data["seed"].nunique())
    ax.plot(mean["root"], mean["reward"], label=label, markeredgecolor="white", **look)


def training_axes(axes: Sequence[Any], steps: pd.Series) -> None:
    """Set titles and labels of the three training panels."""
    score, kl = "Mean reward-model score", "KL to the initial policy"
    for ax, title, label in zip(axes, ("Reward", "KL"), (score, f"{kl} (nats)"), strict=False):
        step_axis(ax, steps)
        ax.set_title(title)
        ax.set_ylabel(label)
        ax.set_xlabel(STEP_LABEL)
    axes[2].set_title("Reward against √KL")
    axes[2].set_ylabel(score)
    axes[2].set_xlabel(f"√({kl} in nats)")


def save(figure: Figure, folder: Path, name: str, kinds: Sequence[str] = ("png", "svg")) -> None:
    """Write <name>.png and <name>.svg atomically; equal data gives equal bytes."""
    no_date = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with style():
        if (layout := figure.get_layout_engine()) is not None:
            layout.execute(figure)
        figure.set_layout_engine(None)  # compute the layout once: it takes half the time
        for kind in kinds:
            with atomic_file(folder / f"{name}.{kind}") as path:
                figure.savefig(path, format=kind, metadata=no_date[kind])


def in_words(figure: Figure) -> str:
    """Return alternative text: the figure's label, or each line's first and last value."""
    if figure.get_label():
        return str(figure.get_label())
    parts = ["Lines with their first and last value, from left to right."]
    for ax in figure.axes:
        lines, published = [], []
        for drawn in (drawn for child in (ax, *ax.child_axes) for drawn in child.get_lines()):
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
