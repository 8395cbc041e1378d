"""Draw several runs side by side, with a line per value of the table's column `run`.

Runs share a panel if they have the same model (name and size). Models that only one run has share
one row, each with its own line.
"""
# ruff: noqa: TID253 - all of this file is matplotlib; it is itself imported only where needed.

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfcorrect.evaluate.experiments import get_experiment
from selfcorrect.evaluate.figures.curves import root_line, training_axes, training_table
from selfcorrect.evaluate.figures.panels import (
    PAGE_WIDTH,
    line,
    over_seeds,
    panels,
    shared_legend,
    size_axis,
    span_all_values,
    step_axis,
    style,
    value_axis,
)
from selfcorrect.evaluate.figures.select import (
    NothingToDraw,
    chosen_experiment,
    common_steps,
    conditions_in,
    effects_over_steps,
    experiments_in,
    headlines,
    models_in,
    overall,
)
from selfcorrect.evaluate.statistics.formatting import size_name

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX*"
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
ALONE = "in one run only"


def looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return a colour, marker and dash for each line."""
    return {
        name: {
            "color": COLORS[index % len(COLORS)],
            "marker": MARKERS[index % len(MARKERS)],
            "linestyle": LINES[(index + index // len(COLORS)) % len(LINES)],
        }
        for index, name in enumerate(dict.fromkeys(names))
    }


def steps_by_run(frame: pd.DataFrame, experiment: str) -> Figure:
    """Draw a headline metric against step: a row per model, a panel per condition."""
    data = pd.concat([overall(of_run) for _, of_run in frame.groupby("run", sort=False)])
    data = chosen_experiment(headlines(data), experiment)
    if data["step"].nunique() < 2:
        raise NothingToDraw(f"{experiment}: metric against steps needs two steps or more")
    definition = get_experiment(experiment)
    unbiased = definition.headline_metric.unbiased
    label = definition.headline_metric.label
    return _grid(data, f"{definition.title}: {label.lower()}", "", unbiased)


def effects_by_run(effects: Sequence[Mapping[str, Any]], experiment: str) -> Figure:
    """Draw metric(Q) - metric(condition) against step: a row per model, a panel per condition."""
    data = chosen_experiment(effects_over_steps(effects), experiment)
    title = f"{get_experiment(experiment).title}: effect of the instruction"
    return _grid(data, title, "Q − ", 0.0)


def _grid(data: pd.DataFrame, title: str, prefix: str, unbiased: float | None) -> Figure:
    data = _rows(data)
    looks_by_name = looks(list(data["line"]))
    rows = list(dict.fromkeys(data.sort_values("size", kind="stable")["row"]))
    conditions = conditions_in(data)
    columns = min(len(conditions), 4)
    rows_per_model = -(-len(conditions) // columns)
    size = (max(PAGE_WIDTH * columns / 4, 4.2), 0.9 + 1.65 * rows_per_model * len(rows))
    with style():
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(rows_per_model * len(rows), columns, sharex=True, sharey=True,
                               squeeze=False)  # fmt: skip
        used = {}
        for number, row in enumerate(rows):
            for index, condition in enumerate(conditions):
                ax = grid[number * rows_per_model + index // columns, index % columns]
                panel = data[(data["row"] == row) & (data["condition"] == condition)]
                _lines(ax, panel, looks_by_name)
                ax.set_title(f"{prefix}{condition}")
                ax.set_label(f"{row}, {prefix}{condition}")
                if index % columns == 0:
                    ax.set_ylabel(row)
                used[ax] = index
        step_axis(grid[0, 0], data["step"])
        span_all_values(grid[0, 0], data, [] if unbiased is None else [unbiased])
        for ax in grid.flat:
            if ax not in used:
                ax.remove()
                continue
            if unbiased is not None:
                ax.axhline(unbiased, color="#333333", linewidth=0.9, zorder=1)
            if ax.get_subplotspec().is_last_row():
                ax.set_xlabel("RLHF steps")
        figure.suptitle(title, x=0.01, ha="left")
        shared_legend(figure, list(used))
    return figure


def _rows(data: pd.DataFrame) -> pd.DataFrame:
    """Add the columns `row` (the model, or ALONE), `size` and `line` (the legend's label)."""
    names = data["model"] + "\n(" + data["parameters"].astype(float).map(size_name) + ")"
    held = data.groupby(names)["run"].nunique()
    shared = names.map(held) > 1
    alone = data["run"] + ": " + names.str.replace("\n", " ")
    return data.assign(
        row=names.where(shared, ALONE),
        size=data["parameters"].astype(float).where(shared, float("inf")),
        line=data["run"].where(shared, alone),
    )


def _lines(ax: Axes, data: pd.DataFrame, looks_by_name: Mapping[str, Mapping[str, Any]]) -> None:
    for name in dict.fromkeys(data["line"]):
        of_line = data[data["line"] == name]
        # Only the line's own steps: a step that another run kept is no gap in this run.
        line(ax, of_line, "step", sorted(set(of_line["step"])), looks_by_name[name], name)


def size_by_run(frame: pd.DataFrame) -> Figure:
    """Draw headline metrics against parameters: a panel per experiment and condition.

    Each run is drawn at the last step that all its models have; the legend names the step.
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
    for name, of_line in data.groupby("line"):
        models = of_line[["model", "parameters"]].drop_duplicates()
        if models["parameters"].duplicated().any():
            raise NothingToDraw(f"{name}: two models have the same number of parameters")
    facets = [
        (experiment, condition)
        for experiment in experiments_in(data)
        for condition in conditions_in(data[data["experiment"] == experiment])
    ]
    looks_by_name = looks(list(data["line"]))
    sizes = sorted(set(data["parameters"].astype(float)))
    with style():
        figure, axes = panels(len(facets), height=2.1)
        for ax, (experiment, condition) in zip(axes, facets, strict=True):
            of_experiment = data[data["experiment"] == experiment]
            panel = of_experiment[of_experiment["condition"] == condition]
            for name in dict.fromkeys(panel["line"]):
                of_line = panel[panel["line"] == name].astype({"parameters": float})
                series = over_seeds(of_line, "parameters").sort_index()
                ax.plot(series.index, series["value"], label=name, markeredgecolor="white",
                        **looks_by_name[name])  # fmt: skip
                ax.vlines(series.index, series["low"], series["high"], linewidth=1.1, alpha=0.8,
                          color=looks_by_name[name]["color"])  # fmt: skip
            size_axis(ax, sizes)
            value_axis(ax, of_experiment, experiment, get_experiment(experiment).headline)
            ax.set_title(f"{get_experiment(experiment).title.split()[0]}, {condition}")
            ax.set_xlabel("Model parameters")
        shared_legend(figure, axes)
    return figure


def training_by_run(frame: pd.DataFrame) -> Figure:
    """Draw reward and KL against step, and reward against sqrt(KL).

    There is a line per run and model: the colour shows the run, marker and dash the model.
    """
    data = training_table(frame)
    runs, models = looks(list(data["run"])), looks(models_in(data))
    with style():
        figure, axes = panels(3, height=2.5)
        for run, model in dict.fromkeys(zip(data["run"], data["model"], strict=True)):
            of_line = data[(data["run"] == run) & (data["model"] == model)]
            look, name = models[model] | {"color": runs[run]["color"]}, f"{run}: {model}"
            for ax, column in zip(axes, ("reward", "kl"), strict=False):
                values = of_line.assign(value=of_line[column])
                line(ax, values, "step", sorted(set(of_line["step"])), look, name)
            root_line(axes[2], of_line, look, name)
        training_axes(axes, data["step"])
        shared_legend(figure, axes)
    return figure
