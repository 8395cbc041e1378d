"""The paper's published values as open markers beside our own."""

# ruff: noqa: TID253 - matplotlib is what it draws with; imported only where figures are drawn.

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from selfcorrect.evaluate.experiments import get_experiment
from selfcorrect.evaluate.figures.panels import ABOUT, LOOKS, STATED
from selfcorrect.evaluate.figures.paper import Published
from selfcorrect.evaluate.statistics.formatting import size_name

PUBLISHED = "_published: "  # starts the label of a published point; the underscore: no legend


def published_points(ax: Axes, published: Sequence[Published], x: str) -> None:
    """The paper's values as open markers, at their `x`: "steps" or "parameters".

    What lies beyond our axis stands in a strip of its own to the right, with its own ticks, so
    that ours is not squashed; the strip's title says the other of the two. Call it last: the
    strip copies the panel's span.
    """
    low, high = ax.get_xlim()
    inside = [row for row in published if low <= getattr(row, x) <= high]
    beyond = [row for row in published if row not in inside]
    _open_markers(ax, inside, [float(getattr(row, x)) for row in inside])
    if beyond:
        places = sorted({getattr(row, x) for row in beyond})
        at = [float(places.index(getattr(row, x))) for row in beyond]
        names = [size_name(place) if x == "parameters" else str(place) for place in places]
        _open_markers(_strip(ax, beyond[0], x, names), beyond, at)
    for label, exact in ((STATED, True), (ABOUT, False)):
        if any(row.exact is exact for row in published):
            ax.plot([], [], label=label, **_open("o", "#333333", exact))


def _open_markers(ax: Axes, published: Sequence[Published], at: Sequence[float]) -> None:
    for place, row in zip(at, published, strict=True):
        look = LOOKS[row.condition]
        drawn = _open(look["marker"], look["color"], row.exact)
        label = PUBLISHED + row.in_words
        ax.plot([place], [row.value], label=label, zorder=3, clip_on=False, **drawn)


def _open(marker: str, color: str, exact: bool) -> dict[str, Any]:
    return {
        "marker": marker,
        "linestyle": "none",
        "markerfacecolor": "none",
        "markeredgecolor": color,
        "markeredgewidth": 1.3 if exact else 0.7,
        "markersize": 6.0 if exact else 4.2,
    }


def _strip(ax: Axes, first: Published, x: str, names: Sequence[str]) -> Axes:
    """A narrow panel right of `ax` with one place per name, for what lies beyond its x axis."""
    strip: Axes = ax.inset_axes((1.05, 0, min(0.12 + 0.055 * (len(names) - 1), 0.42), 1))
    strip.set_facecolor("#f3f3f3")
    strip.spines["left"].set_visible(False)
    strip.set_xlim(-0.7, len(names) - 0.3)
    strip.set_xticks(range(len(names)), names, rotation=90, fontsize=6.5)
    strip.set_ylim(ax.get_ylim())
    strip.locator_params(axis="y", nbins=6)  # the grid goes on where the panel's is
    strip.tick_params(labelleft=False)
    no_bias = get_experiment(first.experiment).metrics[first.metric].unbiased
    if no_bias is not None:
        strip.axhline(no_bias, color="#333333", linewidth=0.9, zorder=1)
    other = size_name(first.parameters) if x == "steps" else f"{first.steps} steps"
    place: dict[str, Any] = {
        "transform": strip.transAxes,
        "rotation": 270,
        "ha": "left",
        "va": "top",
    }
    strip.text(1.03, 1, f"paper, {other}", fontsize=6.5, color="#555555", **place)
    return strip
