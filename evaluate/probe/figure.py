"""Draw the probes' held-out accuracy against layer: a line per step, a panel per condition."""
# ruff: noqa: TID253 - all of this file is matplotlib; it is itself imported only where needed.

from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfcorrect.evaluate.experiments.tally import OVERALL
from selfcorrect.evaluate.figures.panels import (
    MARKERS,
    PAGE_WIDTH,
    line,
    model_title,
    shared_legend,
    style,
)
from selfcorrect.evaluate.probe.linear_probe import CATEGORY, TEMPLATE

_TITLES = {TEMPLATE: "Held-out templates", CATEGORY: "Held-out categories"}
_BASELINE: dict[str, Any] = {"color": "#777777", "linewidth": 1.0, "linestyle": (0, (1, 1.5))}


def accuracy_by_layer(frame: pd.DataFrame, model: str) -> Figure:
    """Draw the probes of one model: a column per condition, a row per kind of held-out group.

    `frame` has the columns of probe.parquet. Each condition's own probes are followed by the probes
    trained on the first condition and applied to another. A thin line marks chance, one half; a
    dotted line is the mean over the steps of probes on swapped labels.
    """
    data = frame[(frame["model"] == model) & (frame["category"] == OVERALL)]
    data = data.assign(value=data["accuracy"])
    conditions = list(dict.fromkeys(data["condition"]))
    columns = [(name, name) for name in conditions]
    columns += [(conditions[0], name) for name in conditions[1:]]
    rows = [name for name in _TITLES if (data["held_out"] == name).any()]
    with style():
        size = (max(PAGE_WIDTH, 2.4 * len(columns)), 0.9 + 1.9 * len(rows))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(rows), len(columns), sharex=True, sharey=True, squeeze=False)
        for held_out, row in zip(rows, axes, strict=True):
            for (trained_on, condition), ax in zip(columns, row, strict=True):
                of_panel = (
                    (data["held_out"] == held_out)
                    & (data["trained_on"] == trained_on)
                    & (data["condition"] == condition)
                )
                _draw_panel(ax, data[of_panel])
                title = condition if trained_on == condition else f"{trained_on} to {condition}"
                ax.set_label(f"{_TITLES[held_out]}, {title}")
                if held_out == rows[0]:
                    ax.set_title(title)
                if held_out == rows[-1]:
                    ax.set_xlabel("Layer (0: embeddings)")
            row[0].set_ylabel(f"{_TITLES[held_out]}:\naccuracy")
        low, high = _span(data)
        axes[0, 0].set_ylim(low, high)
        figure.suptitle(f"Linear probes of the stereotype, {model_title(data)}", x=0.01, ha="left")
        shared_legend(figure, list(axes.ravel()))
    return figure


def _draw_panel(ax: Axes, data: pd.DataFrame) -> None:
    layers = sorted(set(data["layer"]))
    steps = sorted(set(data["step"].dropna()))
    ax.axhline(0.5, color="#333333", linewidth=0.9, zorder=1)
    lines = [(data[data["step"] == step], f"step {step:.0f}") for step in steps]
    lines = lines or [(data, "accuracy")]
    shades = matplotlib.colormaps["viridis_r"](np.linspace(0.15, 0.95, len(lines)))
    for index, (of_step, label) in enumerate(lines):
        color = matplotlib.colors.to_hex(shades[index] if steps else "#0072B2")
        look = {"color": color, "marker": MARKERS[index % len(MARKERS)], "markersize": 3.2}
        line(ax, of_step, "layer", layers, look, label)
    baseline = data.groupby("layer")["baseline_accuracy"].mean().reindex(layers)
    ax.plot(layers, baseline.to_numpy(), label="labels exchanged at random", **_BASELINE)
    ax.locator_params(axis="x", integer=True, nbins=8)


def _span(data: pd.DataFrame) -> tuple[float, float]:
    """Return limits over every value, interval and one half, at least 0.2 apart."""
    values = data[["value", "low", "high", "baseline_accuracy"]].to_numpy(dtype=float).ravel()
    values = np.append(values[np.isfinite(values)], 0.5)
    low, high = float(values.min()), float(values.max())
    pad = max(0.05 * (high - low), (0.2 - (high - low)) / 2)
    return low - pad, high + pad
