"""Figures of one experiment in detail: metrics beside the headline, categories, single clusters."""
# ruff: noqa: TID253 - all of this file is matplotlib; it is itself imported only where needed.

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfcorrect.evaluate.experiments import get_experiment
from selfcorrect.evaluate.experiments.base import Metric, Scatter
from selfcorrect.evaluate.experiments.tally import OVERALL, log_probabilities, probabilities
from selfcorrect.evaluate.figures.panels import (
    PAGE_WIDTH,
    condition_lines,
    condition_looks,
    model_title,
    panels,
    shared_legend,
    span_all_values,
    style,
    value_axis,
)
from selfcorrect.evaluate.figures.select import (
    NothingToDraw,
    chosen_experiment,
    chosen_model,
    chosen_steps,
    common_steps,
    conditions_in,
    drawable,
    headlines,
    models_in,
    overall,
)
from selfcorrect.evaluate.statistics.formatting import number
from selfcorrect.recipes.foundation.printable import escape_controls


def beside_the_bias(frame: pd.DataFrame, experiment: str) -> Figure:
    """Draw the experiment's `beside` metrics against step: a row per model, a column per metric."""
    definition = get_experiment(experiment)
    data = chosen_experiment(overall(frame), experiment)
    defined = set(data[data["value"].notna()]["metric"])
    metrics = {name: definition.metrics[name] for name in definition.beside if name in defined}
    if not metrics or data["step"].nunique() < 2:
        raise NothingToDraw(f"{experiment}: metrics beside the bias need two steps or more")
    models = models_in(data)
    last_with_chance = [name for name, metric in metrics.items() if metric.chance is not None][-1:]
    with style():
        figure = Figure(figsize=(PAGE_WIDTH, 0.9 + 1.45 * len(models)), layout="constrained")
        grid = figure.subplots(len(models), len(metrics), sharex=True, sharey="col", squeeze=False)
        for axes, model in zip(grid, models, strict=True):
            of_model = data[data["model"] == model]
            for ax, (name, metric) in zip(axes, metrics.items(), strict=True):
                panel = of_model[of_model["metric"] == name]
                condition_lines(ax, panel, condition_looks(data["condition"]))
                _span(ax, data[data["metric"] == name], metric)
                ax.set_label(f"{model}, {metric.label}")
            axes[0].set_ylabel(model_title(of_model, line_break=True))
        for ax, (name, metric) in zip(grid[0], metrics.items(), strict=True):
            if name in last_with_chance and metric.chance is not None:
                look = {"transform": ax.get_yaxis_transform(), "ha": "right", "va": "bottom"}
                height = round(metric.chance, 2) + 0.01
                ax.text(1, height, "chance", color="#666666", fontsize=6.5, **look)
            ax.set_title(textwrap.fill(metric.label, 15))
        for ax in grid[-1]:
            ax.set_xlabel("RLHF steps")
        shared_legend(figure, list(grid.ravel()))
    return figure


def _span(ax: Axes, data: pd.DataFrame, metric: Metric) -> None:
    """Set the y axis: shares from 0 to 1, other metrics over their values; mark chance and no bias.

    A metric without an unbiased value is a share.
    """
    if metric.unbiased is None:
        ax.set_ylim(-0.03, 1.03)
    else:
        span_all_values(ax, data, [metric.unbiased])
        ax.locator_params(axis="y", nbins=5)
        ax.axhline(metric.unbiased, color="#333333", linewidth=0.9, zorder=1)
    if metric.chance is not None:
        ax.axhline(metric.chance, color="#777777", linewidth=0.8, linestyle=(0, (1, 2)))


def by_category(frame: pd.DataFrame, experiment: str, model: str | None = None) -> Figure:
    """Draw one model's headline metric (default: the largest's) against step, by category."""
    data = chosen_experiment(headlines(drawable(frame)), experiment)
    data = data[data["category"] != OVERALL]
    model = chosen_model(data, model)
    of_model = data[data["model"] == model]
    categories = sorted(set(of_model["category"]))
    if len(categories) < 2 or of_model["step"].nunique() < 2:
        raise NothingToDraw(f"{experiment}, {model}: needs two categories and two steps")
    definition = get_experiment(experiment)
    pooled = set(definition.overall_categories(categories))
    with style():
        figure, axes = panels(len(categories), height=1.9)
        for index, (ax, category) in enumerate(zip(axes, categories, strict=True)):
            panel = of_model[of_model["category"] == category]
            condition_lines(ax, panel, condition_looks(data["condition"]))
            value_axis(ax, of_model, experiment, definition.headline)
            label = textwrap.fill(definition.headline_metric.label, 16)
            ax.set_ylabel("" if index % 3 else label)
            note = "" if category in pooled else "\n(not in overall)"
            ax.set_title(textwrap.fill(escape_controls(category), 28) + note)
            if index + 3 >= len(categories):
                ax.set_xlabel("RLHF steps")
        figure.suptitle(f"{definition.title}, {model_title(of_model)}", x=0.01, ha="left")
        shared_legend(figure, axes)
    return figure


# --- single clusters ---------------------------------------------------------------------------


def scatter_columns(experiment: str) -> list[str]:
    """Return the item columns that `clusters_against_fact` needs."""
    return ["cluster", "logprobs", _scatter_of(experiment).fact]


def _scatter_of(experiment: str) -> Scatter:
    scatter = get_experiment(experiment).scatter
    if scatter is None:
        raise NothingToDraw(f"{experiment}: has no figure of single clusters")
    return scatter


def clusters_against_fact(
    frame: pd.DataFrame,
    items: pd.DataFrame,
    experiment: str,
    model: str | None = None,
    steps: Sequence[int] = (),
) -> Figure:
    """Draw the experiment's `scatter`: a dot a cluster, a row a step, a panel a condition.

    `items` are the experiment's item rows (results.load_items with `scatter_columns`); the headline
    metric and its interval are the table's. `model` defaults to the largest, `steps` to the first
    and the last. With several seeds the first is drawn, and named.
    """
    definition, scatter = get_experiment(experiment), _scatter_of(experiment)
    data = headlines(chosen_experiment(overall(frame), experiment))
    model = chosen_model(data, model)
    data = data[data["model"] == model]
    several_seeds = data["seed"].nunique() > 1
    seed = data["seed"].min()
    data = data[data["seed"] == seed]
    shared = common_steps(data)
    shown = chosen_steps(data, steps) if steps else sorted({shared[0], shared[-1]})
    conditions = conditions_in(data)
    items = items[(items["model"] == model) & (items["seed"] == seed)]
    if items.empty:
        raise NothingToDraw(f"{experiment}, {model}: no rows of single {scatter.cluster}s")
    columns = min(len(conditions), 4)
    rows_per_step = -(-len(conditions) // columns)
    looks, words = condition_looks(data["condition"]), []
    size = (max(1.75 * columns, 3.5), 0.4 + 1.85 * rows_per_step * len(shown))
    with style():
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(
            rows_per_step * len(shown), columns, sharex=True, sharey=True, squeeze=False
        )
        used = set()
        for block, step in enumerate(shown):
            for index, condition in enumerate(conditions):
                position = (block * rows_per_step + index // columns, index % columns)
                used.add(position)
                panel = items[(items["step"] == step) & (items["condition"] == condition)]
                row = data[(data["step"] == step) & (data["condition"] == condition)]
                content = _draw_scatter(grid[position], panel, row, scatter, looks[condition])
                grid[position].set_title(f"{condition}, step {step}")
                words.append(f"{condition}, step {step}: {content}.")
        for position in np.ndindex(grid.shape):
            if position not in used:
                grid[position].remove()
            elif (position[0] + 1, position[1]) not in used:
                grid[position].tick_params(labelbottom=True)
        figure.supxlabel(scatter.x_label, fontsize=8)
        figure.supylabel(scatter.y_label, fontsize=8)
        title = (
            f"{definition.title}, {model_title(data)}{f', seed {seed}' if several_seeds else ''}"
        )
        figure.suptitle(title, x=0.01, ha="left")
        x_label = scatter.x_label[:1].lower() + scatter.x_label[1:]
        figure.set_label(f"{title}: {scatter.y_label} against {x_label}. {' '.join(words)}")
    return figure


def _draw_scatter(
    ax: Axes, items: pd.DataFrame, row: pd.DataFrame, scatter: Scatter, look: dict[str, Any]
) -> str:
    """Draw a dot a cluster and the line of equality; return the panel's content in words."""
    start, end = scatter.x_range
    margin = 0.03 * (end - start)
    ax.plot([start, end], [0, 1], color="#999999", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    ax.set_xlim(start - margin, end + margin)
    ax.set_ylim(-0.03, 1.12)
    ax.set_xticks([start, (start + end) / 2, end])
    ax.set_yticks([0, 0.5, 1])
    if items.empty:
        ax.text((start + end) / 2, 0.5, "not measured", ha="center", color="#555555")
        return "not measured"
    num_options = len(items["logprobs"].iloc[0])
    chosen = probabilities(log_probabilities(items, num_options))[:, scatter.option]
    clusters = items.assign(y=chosen).groupby("cluster")[[scatter.fact, "y"]].mean()
    marks = {"color": look["color"], "marker": look["marker"], "markersize": 3.4}
    ax.plot(clusters[scatter.fact], clusters["y"], linestyle="none", alpha=0.75,
            markeredgecolor="white", markeredgewidth=0.4, **marks)  # fmt: skip
    headline = _headline_in_words(row, scatter.symbol)
    ax.text(0.03, 0.98, headline, transform=ax.transAxes, va="top", fontsize=7)
    return f"{headline}, {int(clusters['y'].notna().sum())} {scatter.cluster}s"


def _headline_in_words(row: pd.DataFrame, symbol: str) -> str:
    """Return "r = 0.41 [0.30, 0.52]" for the table's one row, or "r undefined"."""
    ends = row[["value", "low", "high"]].to_numpy(dtype=float).ravel()
    if not len(ends) or np.isnan(ends[0]):
        return f"{symbol} undefined"
    text, *interval = (number(end, 2) for end in ends if not np.isnan(end))
    return f"{symbol} = {text} [{', '.join(interval)}]" if interval else f"{symbol} = {text}"
