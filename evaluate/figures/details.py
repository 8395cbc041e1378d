"""One experiment in detail: what stands beside its headline metric, categories, occupations."""
# ruff: noqa: TID253 - all of this file is matplotlib; it is itself imported only where needed.

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfcorrect.evaluate.experiments import get_experiment
from selfcorrect.evaluate.experiments.base import condition_rank
from selfcorrect.evaluate.experiments.tally import OVERALL, log_probabilities, probabilities
from selfcorrect.evaluate.figures.panels import (
    PAGE_WIDTH,
    condition_lines,
    condition_looks,
    model_title,
    panels,
    shared_legend,
    style,
    value_axis,
    whole_span,
)
from selfcorrect.evaluate.figures.select import (
    NothingToDraw,
    chosen_experiment,
    chosen_model,
    chosen_steps,
    common_steps,
    drawable,
    headlines,
    models_in,
    overall,
)
from selfcorrect.evaluate.statistics.formatting import number
from selfcorrect.recipes.foundation.printable import escape_controls

# What to look at beside the headline metric, which an unable model can have without being fair.
BESIDE = {
    "bbq": (
        "bias_ambiguous",
        "accuracy_ambiguous",
        "accuracy_disambiguated",
        "share_unknown_disambiguated",
        "option_mass",
    ),
    "winogender": ("correlation", "mean_female", "share_neutral", "option_mass"),
    "law_school": (
        "difference",
        "difference_sex_1",
        "difference_sex_2",
        "base_rate",
        "option_mass",
    ),
}
CHANCE = {"accuracy_ambiguous": 1 / 3, "accuracy_disambiguated": 1 / 3}
_SHARES = ("accuracy", "share", "option_mass", "base_rate", "mean_female")  # from 0 to 1
# The columns of the item rows that `female_against_share` needs.
PRONOUN_COLUMNS = ["cluster", "percent_female", "logprobs"]


def beside_the_bias(frame: pd.DataFrame, experiment: str) -> Figure:
    """The headline metric and what stands beside it (BESIDE) against step: a row per model."""
    data = chosen_experiment(overall(frame), experiment)
    defined = set(data[data["value"].notna()]["metric"])
    metrics = [name for name in BESIDE[experiment] if name in defined]
    if not metrics or data["step"].nunique() < 2:
        raise NothingToDraw(f"{experiment}: what stands beside the metric needs two steps or more")
    models = models_in(data)
    descriptions = get_experiment(experiment).metrics
    with style():
        figure = Figure(figsize=(PAGE_WIDTH, 0.9 + 1.45 * len(models)), layout="constrained")
        grid = figure.subplots(len(models), len(metrics), sharex=True, sharey="col", squeeze=False)
        for row, model in zip(grid, models, strict=True):
            for ax, metric in zip(row, metrics, strict=True):
                mine = data[(data["model"] == model) & (data["metric"] == metric)]
                condition_lines(ax, mine, condition_looks(data["condition"]))
                _span(ax, data[data["metric"] == metric], metric, descriptions[metric].unbiased)
                ax.set_label(f"{model}, {descriptions[metric].label}")
            row[0].set_ylabel(model_title(data[data["model"] == model], line_break=True))
        for ax, metric in zip(grid[0], metrics, strict=True):
            if metric == "accuracy_disambiguated":
                place = {"transform": ax.get_yaxis_transform(), "ha": "right", "va": "bottom"}
                ax.text(1, 0.34, "chance", color="#666666", fontsize=6.5, **place)
            ax.set_title(textwrap.fill(descriptions[metric].label, 15))
        for ax in grid[-1]:
            ax.set_xlabel("RLHF steps")
        shared_legend(figure, list(grid.ravel()))
    return figure


def _span(ax: Axes, data: pd.DataFrame, metric: str, no_bias: float | None) -> None:
    """Shares from 0 to 1, other metrics as far as they reach; lines at chance and at no bias."""
    if metric.startswith(_SHARES):
        ax.set_ylim(-0.03, 1.03)
    else:
        whole_span(ax, data, [] if no_bias is None else [no_bias])
        ax.locator_params(axis="y", nbins=5)
    if no_bias is not None:
        ax.axhline(no_bias, color="#333333", linewidth=0.9, zorder=1)
    if metric in CHANCE:
        ax.axhline(CHANCE[metric], color="#777777", linewidth=0.8, linestyle=(0, (1, 2)))


def by_category(frame: pd.DataFrame, experiment: str, model: str | None = None) -> Figure:
    """Headline metric of one model (default: the largest) against step, a panel a category."""
    data = chosen_experiment(headlines(drawable(frame)), experiment)
    data = data[data["category"] != OVERALL]
    model = chosen_model(data, model)
    mine = data[data["model"] == model]
    categories = sorted(set(mine["category"]))
    if len(categories) < 2 or mine["step"].nunique() < 2:
        raise NothingToDraw(f"{experiment}, {model}: categories need two of them and two steps")
    definition = get_experiment(experiment)
    pooled = set(definition.overall_categories(categories))
    with style():
        figure, axes = panels(len(categories), height=1.9)
        for place, (ax, category) in enumerate(zip(axes, categories, strict=True)):
            here = mine[mine["category"] == category]
            condition_lines(ax, here, condition_looks(data["condition"]))
            value_axis(ax, mine, experiment, definition.headline)
            if place % 3:
                ax.set_ylabel("")
            else:
                ax.set_ylabel(textwrap.fill(definition.headline_metric.label, 16))
            apart = "" if category in pooled else "\n(not in overall)"
            ax.set_title(textwrap.fill(escape_controls(category), 28) + apart)
            if place + 3 >= len(categories):
                ax.set_xlabel("RLHF steps")
        figure.suptitle(
            f"{get_experiment(experiment).title}, {model_title(mine)}", x=0.01, ha="left"
        )
        shared_legend(figure, axes)
    return figure


# --- Winogender, occupation by occupation -------------------------------------------------------


def female_against_share(
    frame: pd.DataFrame, pronouns: pd.DataFrame, model: str | None = None, steps: Sequence[int] = ()
) -> Figure:
    """p(female pronoun) against the share of women in the job: a dot an occupation.

    `pronouns` are the item rows of Winogender (results.load_items with PRONOUN_COLUMNS); r and its
    interval are the table's. A row a step (default: the first and the last), a panel a condition.
    With several seeds the first is drawn, and named.
    """
    data = chosen_experiment(overall(frame), "winogender")
    data = data[data["metric"] == "correlation"]
    model = chosen_model(data, model)
    data = data[data["model"] == model]
    several = data["seed"].nunique() > 1
    data = data[data["seed"] == data["seed"].min()]
    shared = common_steps(data)
    shown = chosen_steps(data, steps) if steps else sorted({shared[0], shared[-1]})
    conditions = sorted(set(data["condition"]), key=condition_rank)
    mine = pronouns[(pronouns["model"] == model) & (pronouns["seed"] == data["seed"].min())]
    if mine.empty:
        raise NothingToDraw(f"winogender, {model}: there are no rows of single occupations")
    columns = min(len(conditions), 4)
    of_a_step = -(-len(conditions) // columns)
    looks, words = condition_looks(data["condition"]), []
    size = (max(1.75 * columns, 3.5), 0.4 + 1.85 * of_a_step * len(shown))
    with style():
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(
            of_a_step * len(shown), columns, sharex=True, sharey=True, squeeze=False
        )
        used = set()
        for number_of, step in enumerate(shown):
            for place, condition in enumerate(conditions):
                at = (number_of * of_a_step + place // columns, place % columns)
                used.add(at)
                here = mine[(mine["step"] == step) & (mine["condition"] == condition)]
                row = data[(data["step"] == step) & (data["condition"] == condition)]
                said = _scatter(grid[at], here, row, looks[condition])
                grid[at].set_title(f"{condition}, step {step}")
                words.append(f"{condition}, step {step}: {said}.")
        for at in np.ndindex(grid.shape):
            if at not in used:
                grid[at].remove()
            elif (at[0] + 1, at[1]) not in used:
                grid[at].tick_params(labelbottom=True)
        figure.supxlabel("Women among those who do the job, percent", fontsize=8)
        figure.supylabel("p(female pronoun)", fontsize=8)
        seed = f", seed {data['seed'].min()}" if several else ""
        title = f"Winogender, {model_title(data)}{seed}"
        figure.suptitle(title, x=0.01, ha="left")
        figure.set_label(f"{title}: p(female) against the share of women. {' '.join(words)}")
    return figure


def _scatter(ax: Axes, items: pd.DataFrame, row: pd.DataFrame, look: dict[str, Any]) -> str:
    """One panel: a dot an occupation, the line of equality, and the table's r in words."""
    ax.plot([0, 100], [0, 1], color="#999999", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    ax.set_xlim(-3, 103)
    ax.set_ylim(-0.03, 1.12)
    ax.set_xticks([0, 50, 100])
    ax.set_yticks([0, 0.5, 1])
    if items.empty:
        ax.text(50, 0.5, "not measured", ha="center", color="#555555")
        return "not measured"
    female = probabilities(log_probabilities(items, 3))[:, 1]
    jobs = items.assign(female=female).groupby("cluster")[["percent_female", "female"]].mean()
    marks = {"color": look["color"], "marker": look["marker"], "markersize": 3.4}
    ax.plot(jobs["percent_female"], jobs["female"], linestyle="none", alpha=0.75,
            markeredgecolor="white", markeredgewidth=0.4, **marks)  # fmt: skip
    r = _correlation(row)
    ax.text(0.03, 0.98, r, transform=ax.transAxes, va="top", fontsize=7)
    return f"{r}, {int(jobs['female'].notna().sum())} occupations"


def _correlation(row: pd.DataFrame) -> str:
    value, low, high = (
        (float(row.iloc[0][name]) for name in ("value", "low", "high"))
        if len(row)
        else [np.nan] * 3
    )
    if np.isnan(value):
        return "r undefined"
    r, *ends = (number(end, 2) for end in (value, low, high) if not np.isnan(end))
    return f"r = {r} [{', '.join(ends)}]" if ends else f"r = {r}"
