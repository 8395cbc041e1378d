"""Several runs side by side: a line per run, told apart by the table's column `run`.

Runs are laid beside one another where they hold the same model (name and size); the models that
only one run holds share a row, each with its own line.
"""
# ruff: noqa: TID253 - all of this file is matplotlib; it is itself imported only where needed.

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfcorrect.evaluate.experiments import get_experiment
from selfcorrect.evaluate.experiments.base import condition_rank
from selfcorrect.evaluate.figures.curves import root_line, training_axes, training_table
from selfcorrect.evaluate.figures.panels import (
    PAGE_WIDTH,
    line,
    over_seeds,
    panels,
    shared_legend,
    size_axis,
    step_axis,
    style,
    value_axis,
    whole_span,
)
from selfcorrect.evaluate.figures.select import (
    NothingToDraw,
    chosen_experiment,
    common_steps,
    experiments_in,
    headlines,
    judged_effects,
    models_in,
    overall,
)
from selfcorrect.evaluate.statistics.formatting import size_name

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX*"
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
ALONE = "in one run only"


def looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour, marker and dash for each of several lines."""
    return {
        name: {
            "color": COLORS[index % len(COLORS)],
            "marker": MARKERS[index % len(MARKERS)],
            "linestyle": LINES[(index + index // len(COLORS)) % len(LINES)],
        }
        for index, name in enumerate(dict.fromkeys(names))
    }


def steps_by_run(frame: pd.DataFrame, experiment: str) -> Figure:
    """Headline metric of one experiment against step: a row a model, a panel a condition."""
    data = pd.concat([overall(of_run) for _, of_run in frame.groupby("run", sort=False)])
    data = chosen_experiment(headlines(data), experiment)
    if data["step"].nunique() < 2:
        raise NothingToDraw(f"{experiment}: metric against steps needs two steps or more")
    definition = get_experiment(experiment)
    no_bias = definition.headline_metric.unbiased
    label = definition.headline_metric.label
    return _grid(data, f"{get_experiment(experiment).title}: {label.lower()}", "", no_bias)


def effects_by_run(effects: Sequence[Mapping[str, Any]], experiment: str) -> Figure:
    """metric(Q) - metric(condition) against step: a row a model, a panel a condition."""
    data = judged_effects(effects)
    if data["step"].nunique() < 2:
        raise NothingToDraw("instruction effects need Q and an instructed condition at two steps")
    data = chosen_experiment(data, experiment)
    return _grid(
        data, f"{get_experiment(experiment).title}: effect of the instruction", "Q − ", 0.0
    )


def _grid(data: pd.DataFrame, title: str, before: str, no_bias: float | None) -> Figure:
    data = _rows(data)
    colours = looks(list(data["line"]))
    rows = list(dict.fromkeys(data.sort_values("place", kind="stable")["row"]))
    conditions = sorted(set(data["condition"]), key=condition_rank)
    columns = min(len(conditions), 4)
    of_a_row = -(-len(conditions) // columns)
    size = (max(PAGE_WIDTH * columns / 4, 4.2), 0.9 + 1.65 * of_a_row * len(rows))
    with style():
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(of_a_row * len(rows), columns, sharex=True, sharey=True,
                               squeeze=False)  # fmt: skip
        used = {}
        for number, row in enumerate(rows):
            for place, condition in enumerate(conditions):
                ax = grid[number * of_a_row + place // columns, place % columns]
                here = data[(data["row"] == row) & (data["condition"] == condition)]
                _lines(ax, here, colours)
                ax.set_title(f"{before}{condition}")
                ax.set_label(f"{row}, {before}{condition}")
                if place % columns == 0:
                    ax.set_ylabel(row)
                used[ax] = place
        step_axis(grid[0, 0], data["step"])
        whole_span(grid[0, 0], data, [] if no_bias is None else [no_bias])
        for ax in grid.flat:
            if ax not in used:
                ax.remove()
                continue
            if no_bias is not None:
                ax.axhline(no_bias, color="#333333", linewidth=0.9, zorder=1)
            if ax.get_subplotspec().is_last_row():
                ax.set_xlabel("RLHF steps")
        figure.suptitle(title, x=0.01, ha="left")
        shared_legend(figure, list(used))
    return figure


def _rows(data: pd.DataFrame) -> pd.DataFrame:
    """Adds `row` (the model, or ALONE), `place` (its size) and `line` (what the legend says)."""
    names = data["model"] + "\n(" + data["parameters"].astype(float).map(size_name) + ")"
    held = data.groupby(names)["run"].nunique()
    shared = names.map(held) > 1
    alone = data["run"] + ": " + names.str.replace("\n", " ")
    return data.assign(
        row=names.where(shared, ALONE),
        place=data["parameters"].astype(float).where(shared, float("inf")),
        line=data["run"].where(shared, alone),
    )


def _lines(ax: Axes, data: pd.DataFrame, colours: Mapping[str, Mapping[str, Any]]) -> None:
    for name in dict.fromkeys(data["line"]):
        mine = data[data["line"] == name]
        # Its own steps alone: what another run kept besides is no gap in this one.
        line(ax, mine, "step", sorted(set(mine["step"])), colours[name], name)


def size_by_run(frame: pd.DataFrame) -> Figure:
    """Headline metric against parameters, a panel per experiment and condition, a line a run.

    Each run at the last step that all its models have; the legend names it.
    """
    ends = []
    for run, of_run in frame.groupby("run", sort=False):
        data = headlines(overall(of_run))
        if len(data):
            step = common_steps(data)[-1]
            ends.append(data[data["step"] == step].assign(line=f"{run} (step {step})"))
    data = pd.concat(ends) if ends else frame[:0].assign(line="")
    if data["parameters"].nunique() < 2:
        raise NothingToDraw("metric against model size needs two sizes or more")
    for name, mine in data.groupby("line"):
        models = mine[["model", "parameters"]].drop_duplicates()
        if models["parameters"].duplicated().any():
            raise NothingToDraw(f"{name}: two models have the same number of parameters")
    places = [
        (experiment, condition)
        for experiment in experiments_in(data)
        for condition in sorted(
            set(data[data["experiment"] == experiment]["condition"]), key=condition_rank
        )
    ]
    colours = looks(list(data["line"]))
    sizes = sorted(set(data["parameters"].astype(float)))
    with style():
        figure, axes = panels(len(places), height=2.1)
        for ax, (experiment, condition) in zip(axes, places, strict=True):
            of_experiment = data[data["experiment"] == experiment]
            here = of_experiment[of_experiment["condition"] == condition]
            for name in dict.fromkeys(here["line"]):
                mine = here[here["line"] == name]
                mine = mine.assign(parameters=mine["parameters"].astype(float))
                series = over_seeds(mine, "parameters").sort_index()
                ax.plot(series.index, series["value"], label=name, markeredgecolor="white",
                        **colours[name])  # fmt: skip
                ax.vlines(series.index, series["low"], series["high"], linewidth=1.1, alpha=0.8,
                          color=colours[name]["color"])  # fmt: skip
            size_axis(ax, sizes)
            value_axis(ax, of_experiment, experiment, get_experiment(experiment).headline)
            ax.set_title(f"{get_experiment(experiment).title.split()[0]}, {condition}")
            ax.set_xlabel("Model parameters")
        shared_legend(figure, axes)
    return figure


def training_by_run(frame: pd.DataFrame) -> Figure:
    """Reward and KL against step, and reward against sqrt(KL).

    A line per run and model: the colour is the run's, marker and dash are the model's.
    """
    data = training_table(frame)
    runs, models = looks(list(data["run"])), looks(models_in(data))
    with style():
        figure, axes = panels(3, height=2.5)
        for run, model in dict.fromkeys(zip(data["run"], data["model"], strict=True)):
            mine = data[(data["run"] == run) & (data["model"] == model)]
            look, name = models[model] | {"color": runs[run]["color"]}, f"{run}: {model}"
            for ax, column in zip(axes, ("reward", "kl"), strict=False):
                values = mine.assign(value=mine[column])
                line(ax, values, "step", sorted(set(mine["step"])), look, name)
            root_line(axes[2], mine, look, name)
        training_axes(axes, data["step"])
        shared_legend(figure, axes)
    return figure
