"""Draw maps of model size by RLHF steps: a cell per checkpoint, a panel per condition.

A cell shows exactly the value measured at that size and step, without interpolation. Checkpoints
that were not measured are hatched, undefined values are crossed, and the legend says so. With
several seeds a cell is their mean, if every seed has a value.
"""
# ruff: noqa: TID253 - all of this file is matplotlib; it is itself imported only where needed.

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from selfcorrect.evaluate.experiments import get_experiment
from selfcorrect.evaluate.figures.panels import PAGE_WIDTH, model_title, named_ticks, style
from selfcorrect.evaluate.figures.select import (
    NothingToDraw,
    chosen_experiment,
    conditions_in,
    headlines,
    judged_effects,
    models_in,
    overall,
)
from selfcorrect.evaluate.statistics.formatting import number, size_name

COLUMNS = 4  # panels per row
NOT_MEASURED = {"hatch": "/////", "facecolor": "#f2f2f2", "edgecolor": "#a0a0a0", "linewidth": 0}
UNDEFINED = {"hatch": "xxxx", "facecolor": "#ffffff", "edgecolor": "#a0a0a0", "linewidth": 0}


def size_by_steps(frame: pd.DataFrame, experiment: str) -> Figure:
    """Draw a headline metric as colour over steps and sizes, with a panel per condition."""
    data = chosen_experiment(headlines(overall(frame)), experiment)
    definition = get_experiment(experiment)
    metric = definition.headline_metric
    title = f"{definition.title}: {metric.label.lower()}"
    return _maps(data, title, metric.label, metric.unbiased, "")


def effects_by_size_and_step(effects: Sequence[Mapping[str, Any]], experiment: str) -> Figure:
    """Draw metric(Q) - metric(condition) as colour over steps and sizes, a panel per condition.

    `effects` is the list of statistics.json. A dot marks a 95 % interval that excludes zero.
    """
    data = chosen_experiment(judged_effects(effects), experiment)
    title = f"{get_experiment(experiment).title}: effect of the instruction on the headline metric"
    return _maps(data, title, "Effect", 0.0, "Q − ")


def _maps(
    data: pd.DataFrame, title: str, label: str, unbiased: float | None, prefix: str
) -> Figure:
    models = models_in(data)
    steps = sorted({int(step) for step in data["step"]})
    if len(models) < 2 or len(steps) < 2:
        raise NothingToDraw("a map of size by steps needs two sizes and two steps or more")
    conditions = conditions_in(data)
    grids = {c: _grid(data[data["condition"] == c], models, steps) for c in conditions}
    values = np.concatenate([grid.ravel() for grid, _ in grids.values()])
    look = _colormap(values[np.isfinite(values)], unbiased)
    columns = min(len(conditions), COLUMNS)
    rows = -(-len(conditions) // columns)
    height = 0.75 + rows * (0.55 + 0.2 * len(models))
    width = PAGE_WIDTH if columns > 2 else PAGE_WIDTH * 0.75
    seeds = data["seed"].nunique()
    with style():
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        words, kinds = [f"{title}. Colours from first to last step."], set[str]()
        mesh: Any = None
        for index, (ax, condition) in enumerate(zip(axes.flat, conditions, strict=False)):
            grid, present = grids[condition]
            # pcolormesh draws vector cells; some SVG viewers blur an image of few pixels.
            shown = np.ma.masked_invalid(grid)
            mesh = ax.pcolormesh(shown, edgecolors="white", linewidth=0.5, **look)
            kinds |= _mark_gaps(ax, grid, present)
            if "excludes_zero" in data and seeds == 1:
                of_condition = data[data["condition"] == condition]
                clear = of_condition[of_condition["excludes_zero"] == True]  # noqa: E712 - may be null
                kinds |= _mark_clear(ax, clear, models, steps)
            ax.set_title(textwrap.fill(f"{prefix}{condition}", 21))
            ax.grid(False)
            if index // columns == rows - 1 or index + columns >= len(conditions):
                ax.set_xlabel("RLHF steps")
                ax.tick_params(labelbottom=True)
            words.append(f"{prefix}{condition}: {_in_words(grid, data, models)}.")
        for ax in list(axes.flat)[len(conditions) :]:
            ax.remove()
        used = list(axes.flat)[: len(conditions)]
        _name_cells(used, axes, data, models, steps)
        figure.colorbar(mesh, ax=used, label=label, aspect=10 * rows, pad=0.015)
        figure.suptitle(title, x=0.01, ha="left")
        _legend(figure, kinds)
        figure.set_label(" ".join(words))
    return figure


def _grid(
    data: pd.DataFrame, models: Sequence[str], steps: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return values, and whether every seed was measured, each of shape (models, steps)."""
    grid = np.full((len(models), len(steps)), np.nan)
    present = np.zeros(grid.shape, dtype=bool)
    for row, model in enumerate(models):
        of_model = data[data["model"] == model]
        num_seeds = of_model["seed"].nunique()
        for column, step in enumerate(steps):
            values = of_model[of_model["step"] == step]["value"].to_numpy(dtype=float)
            present[row, column] = len(values) > 0 and len(values) == num_seeds
            if present[row, column]:
                grid[row, column] = values.mean()  # NaN where a seed has no defined value
    return grid, present


def _colormap(values: np.ndarray, unbiased: float | None) -> dict[str, Any]:
    """Return a diverging colormap centred on `unbiased`; a sequential one if that is None."""
    if unbiased is None:
        low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
        return {"cmap": "cividis", "vmin": low, "vmax": high}
    reach = max([0.05, *np.abs(values - unbiased)])
    return {"cmap": "PuOr_r", "norm": CenteredNorm(unbiased, halfrange=reach)}


def _mark_gaps(ax: Axes, grid: np.ndarray, present: np.ndarray) -> set[str]:
    kinds = set()
    for row, column in np.argwhere(~np.isfinite(grid)):
        kind = "undefined" if present[row, column] else "not measured"
        kinds.add(kind)
        ax.add_patch(Rectangle((column, row), 1, 1, **_gap(kind)))
    return kinds


def _mark_clear(
    ax: Axes, clear: pd.DataFrame, models: Sequence[str], steps: Sequence[int]
) -> set[str]:
    if clear.empty:
        return set()
    x = [steps.index(int(step)) + 0.5 for step in clear["step"]]
    y = [models.index(model) + 0.5 for model in clear["model"]]
    ax.plot(x, y, label="_clear", **_DOT)
    return {"clear"}


_DOT: dict[str, Any] = {
    "marker": "o",
    "linestyle": "none",
    "markersize": 2.6,
    "markerfacecolor": "black",
    "markeredgecolor": "white",
    "markeredgewidth": 0.5,
}


def _gap(kind: str) -> dict[str, Any]:
    return UNDEFINED if kind == "undefined" else NOT_MEASURED


def _name_cells(
    used: Sequence[Axes],
    axes: np.ndarray,
    data: pd.DataFrame,
    models: Sequence[str],
    steps: Sequence[int],
) -> None:
    """Label steps below and sizes at the left; models of equal size by name."""
    sizes = [float(data[data["model"] == model]["parameters"].iloc[0]) for model in models]
    names = [size_name(size) for size in sizes]
    if len(set(names)) < len(names):
        names = [model_title(data[data["model"] == model]) for model in models]
    for ax in used:
        named_ticks(ax, [i + 0.5 for i in range(len(steps))], [str(step) for step in steps])
    for row in axes:
        row[0].set_yticks([i + 0.5 for i in range(len(models))], names)
        row[0].set_ylabel("Parameters")


def _legend(figure: Figure, kinds: set[str]) -> None:
    handles: list[Any] = [Patch(label=kind, **_gap(kind)) for kind in sorted(kinds - {"clear"})]
    if "clear" in kinds:
        handles.append(Line2D([], [], label="95 % interval excludes zero", **_DOT))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def _in_words(grid: np.ndarray, data: pd.DataFrame, models: Sequence[str]) -> str:
    parts = []
    for model, row in zip(models, grid, strict=True):
        first, last = (None if np.isnan(value) else float(value) for value in (row[0], row[-1]))
        title = model_title(data[data["model"] == model])
        parts.append(f"{title} {number(first)} to {number(last)}")
    return "; ".join(parts)
