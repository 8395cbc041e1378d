"""Parts of all figures: style, panels, lines with bands, axes and legends."""
# ruff: noqa: TID253 - all of this file is matplotlib; it is itself imported only where needed.

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from selfcorrect.evaluate.experiments import get_experiment
from selfcorrect.evaluate.experiments.base import condition_rank
from selfcorrect.evaluate.figures.paper import CITATION, Published
from selfcorrect.evaluate.figures.select import conditions_in, models_in
from selfcorrect.evaluate.statistics.formatting import size_name

STYLE = Path(__file__).with_name("selfcorrect.mplstyle")
PAGE_WIDTH = 7.2  # inches
COLUMN_WIDTH = 3.3  # of a page with two columns

# Okabe and Ito's colours are distinguishable with common colour blindness; markers repeat them.
LOOKS: dict[str, dict[str, Any]] = {
    "Q": {"color": "#D55E00", "marker": "o", "linestyle": "-"},
    "Q+IF": {"color": "#0072B2", "marker": "s", "linestyle": (0, (5, 1.5))},
    "Q+IF+CoT": {
        "color": "#009E73",
        "marker": "^",
        "markersize": 5.4,
        "linestyle": (0, (6, 1.5, 1.2, 1.5)),
    },
    "Match stats": {"color": "#CC79A7", "marker": "D", "linestyle": (0, (1.2, 1.2))},
}
OTHER_COLORS = ("#56B4E9", "#E69F00", "#000000", "#8C8C8C", "#8C510A")
OTHER_MARKERS = "vPX<>*hd"
OTHER_LINES = ((0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
MARKERS = "osD^vP*X"
STATED = f"{CITATION},\n175B (proprietary)"
ABOUT = "about, read off\nthe paper's figures"


@contextmanager
def style() -> Iterator[None]:
    """Use this project's matplotlib style; needed while drawing and while saving."""
    with matplotlib.rc_context(fname=str(STYLE)):
        yield


def panels(count: int, height: float, in_column: bool = False) -> tuple[Figure, list[Axes]]:
    """Return a figure and `count` panels: page-wide with three per row, column-wide with two."""
    columns = min(count, 2 if in_column else 3)
    rows = -(-count // columns)
    width = COLUMN_WIDTH if in_column else PAGE_WIDTH if columns > 1 else PAGE_WIDTH * 0.6
    figure = Figure(figsize=(width, height * rows + 0.25), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[count:]:
        ax.remove()
    return figure, list(axes[:count])


def condition_looks(conditions: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return colour, marker and dash per condition: fixed for the paper's, distinct for others."""
    names = sorted(set(conditions), key=condition_rank)
    others = [name for name in names if name not in LOOKS]
    return {name: LOOKS[name] for name in names if name in LOOKS} | {
        name: {"color": color, "marker": marker, "linestyle": line}
        for name, color, marker, line in zip(
            others, cycle(OTHER_COLORS), cycle(OTHER_MARKERS), cycle(OTHER_LINES), strict=False
        )
    }


def condition_lines(ax: Axes, data: pd.DataFrame, looks: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw a line and a band per condition, over the steps of all conditions."""
    steps = sorted(set(data["step"]))
    for condition in conditions_in(data):
        of_condition = data[data["condition"] == condition]
        line(ax, of_condition, "step", steps, looks[condition], condition)
    if steps:
        step_axis(ax, data["step"])


def line(
    ax: Axes,
    data: pd.DataFrame,
    x: str,
    positions: Sequence[float],
    look: Mapping[str, Any],
    label: str,
) -> None:
    """Draw one line over `positions`; a position without a defined value is a gap."""
    series = over_seeds(data, x).reindex(list(positions))
    x_values = np.asarray(positions, dtype=float)
    middle, low, high = (series[name].to_numpy(dtype=float) for name in ("value", "low", "high"))
    ax.fill_between(x_values, low, high, color=look["color"], alpha=0.13, linewidth=0)
    ax.plot(x_values, middle, label=label, markeredgecolor="white", clip_on=False, **look)


def over_seeds(data: pd.DataFrame, x: str) -> pd.DataFrame:
    """Return the values of one seed, or mean and range of several where all have a value."""
    columns = ["value", "low", "high"]
    data = data.assign(**{name: data[name].astype(float) for name in columns})
    num_seeds = data["seed"].nunique()
    if num_seeds < 2:
        return data.set_index(x)[columns]
    grouped = data.groupby(x)["value"]
    table = pd.DataFrame({"value": grouped.mean(), "low": grouped.min(), "high": grouped.max()})
    return table.where(grouped.count() == num_seeds)


def size_lines(ax: Axes, data: pd.DataFrame, looks: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw a line per condition over log parameters, with error bars slightly offset."""
    conditions = conditions_in(data)
    sizes = sorted(set(data["parameters"].astype(float)))
    for index, condition in enumerate(conditions):
        look = looks[condition]
        of_condition = data[data["condition"] == condition].astype({"parameters": float})
        series = over_seeds(of_condition, "parameters").reindex(sizes)
        offset = (sizes[-1] / sizes[0]) ** (0.018 * (index - (len(conditions) - 1) / 2))
        x_values = np.asarray(sizes) * offset
        middle, low, high = (series[name].to_numpy() for name in ("value", "low", "high"))
        ax.plot(x_values, middle, label=condition, markeredgecolor="white", **look)
        ax.vlines(x_values, low, high, color=look["color"], linewidth=1.1, alpha=0.8)
    size_axis(ax, sizes)


def size_axis(ax: Axes, sizes: Sequence[float]) -> None:
    """Set a logarithmic x axis of parameters with a tick per size."""
    ax.set_xscale("log")
    named_ticks(ax, sizes, [size_name(size) for size in sizes])
    ax.margins(x=0.08)


def step_axis(ax: Axes, steps: pd.Series) -> None:
    """Set a tick per step; logarithmic from the first positive step if steps span decades."""
    values = sorted({float(step) for step in steps})
    positive = [step for step in values if step > 0]
    if len(positive) > 2 and positive[-1] / positive[0] > 25:
        ax.set_xscale("symlog", linthresh=positive[0], linscale=0.35)
    ax.set_xlim(values[0], values[-1] if len(values) > 1 else values[0] + 1)
    ax.margins(x=0.03)
    named_ticks(ax, values, [f"{step:.0f}" for step in values])


def named_ticks(ax: Axes, values: Sequence[float], names: Sequence[str]) -> None:
    """Set a tick at every value, and names where they fit: the ends first, then from the left."""
    pixels = ax.transData.transform([(value, 0.0) for value in values])[:, 0]
    points = ax.figure.dpi / 72
    kept: list[int] = []
    for index in dict.fromkeys([0, len(values) - 1, *range(len(values))]):
        halves = [(len(names[index]) + len(names[other])) / 2 + 1.2 for other in kept]
        gaps = [abs(pixels[index] - pixels[other]) / points for other in kept]
        if all(gap > 4.6 * half for gap, half in zip(gaps, halves, strict=True)):
            kept.append(index)
    ax.xaxis.set_major_locator(FixedLocator(list(values)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticklabels([name if i in kept else "" for i, name in enumerate(names)])


def value_axis(
    ax: Axes, data: pd.DataFrame, experiment: str, metric: str, published: Sequence[Published] = ()
) -> None:
    """Set label, unbiased line and a common span of all models, so that figures are comparable."""
    described = get_experiment(experiment).metrics[metric]
    unbiased = described.unbiased
    ax.set_ylabel(described.axis or textwrap.fill(described.label, 30))
    shown = [row.value for row in published] + ([] if unbiased is None else [unbiased])
    span_all_values(ax, data, shown)
    if unbiased is not None:
        ax.axhline(unbiased, color="#333333", linewidth=0.9, zorder=1)


def span_all_values(ax: Axes, data: pd.DataFrame, more: Sequence[float] = ()) -> None:
    """Set a y axis over all values, intervals and 0, with a span of at least 0.2."""
    values = data[["value", "low", "high"]].astype(float).to_numpy().ravel()
    values = np.append(values[np.isfinite(values)], [0.0, *more])
    low, high = values.min(), values.max()
    pad = max(0.06 * (high - low), (0.2 - (high - low)) / 2)
    ax.set_ylim(low - pad, high + pad)
    ax.locator_params(axis="y", nbins=6)


def size_looks(data: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Return a colour and marker per model, from light (small) to dark (large)."""
    models = models_in(data)
    shades = matplotlib.colormaps["viridis_r"](np.linspace(0.2, 0.95, len(models)))
    return {
        model: {"color": matplotlib.colors.to_hex(shade), "marker": marker, "linestyle": "-"}
        for model, shade, marker in zip(models, shades, cycle(MARKERS), strict=False)
    }


def model_title(data: pd.DataFrame, line_break: bool = False) -> str:
    """Return the model's name and size, as in "small (23k)"."""
    if data.empty:
        return ""
    name, parameters = data.iloc[0]["model"], data.iloc[0]["parameters"]
    if pd.isna(parameters):
        return str(name)
    return f"{name}{chr(10) if line_break else ' '}({size_name(float(parameters))})"


def shared_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Draw one legend under all panels, with each label once."""
    handles: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    for label in (STATED, ABOUT):  # after all lines
        if label in handles:
            handles[label] = handles.pop(label)
    if handles:
        # As many columns as fit the page: at this size a letter takes about 0.06 inches.
        longest = max(len(line) for label in handles for line in label.split("\n"))
        columns = int(figure.get_figwidth() / (0.5 + 0.06 * longest))
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside lower center",
            ncols=max(1, min(len(handles), columns)),
            columnspacing=1.2,
            handlelength=2.6,
            handletextpad=0.5,
        )
