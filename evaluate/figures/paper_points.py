"""Draw the paper's published values as open markers beside ours."""

# ruff: noqa: TID253 - matplotlib is what it draws with; imported only where figures are drawn.

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from selfcorrect.evaluate.experiments import get_experiment
from selfcorrect.evaluate.figures.panels import ABOUT, LOOKS, STATED
from selfcorrect.evaluate.figures.paper import Published
from selfcorrect.evaluate.statistics.formatting import size_name

PUBLISHED = "_published: "  # prefix of a published point's label; "_" keeps it out of the legend


def published_points(ax: Axes, published: Sequence[Published], x: str) -> None:
    """Draw the paper's values as open markers at their `x`, "steps" or "parameters".

    Values beyond our axis are drawn in a strip on the right with its own ticks, so that our axis is
    not compressed; the strip's title names the steps or the parameters. Call this last, because
    the strip copies the panel's span.
    """
    low, high = ax.get_xlim()
    inside = [row for row in published if low <= getattr(row, x) <= high]
    beyond = [row for row in published if row not in inside]
    _open_markers(ax, inside, [float(getattr(row, x)) for row in inside])
    if beyond:
        ticks = sorted({getattr(row, x) for row in beyond})
        positions = [float(ticks.index(getattr(row, x))) for row in beyond]
        names = [size_name(tick) if x == "parameters" else str(tick) for tick in ticks]
        _open_markers(_strip(ax, beyond[0], x, names), beyond, positions)
    for label, exact in ((STATED, True), (ABOUT, False)):
        if any(row.exact is exact for row in published):
            ax.plot([], [], label=label, **_open("o", "#333333", exact))


def _open_markers(ax: Axes, published: Sequence[Published], positions: Sequence[float]) -> None:
    for position, row in zip(positions, published, strict=True):
        look = LOOKS[row.condition]
        open_look = _open(look["marker"], look["color"], row.exact)
        label = PUBLISHED + row.in_words
        ax.plot([position], [row.value], label=label, zorder=3, clip_on=False, **open_look)


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
    """Add a narrow panel right of `ax`, with a tick per name, for values beyond its x axis."""
    strip: Axes = ax.inset_axes((1.05, 0, min(0.12 + 0.055 * (len(names) - 1), 0.42), 1))
    strip.set_facecolor("#f3f3f3")
    strip.spines["left"].set_visible(False)
    strip.set_xlim(-0.7, len(names) - 0.3)
    strip.set_xticks(range(len(names)), names, rotation=90, fontsize=6.5)
    strip.set_ylim(ax.get_ylim())
    strip.locator_params(axis="y", nbins=6)  # so that its grid continues the panel's
    strip.tick_params(labelleft=False)
    unbiased = get_experiment(first.experiment).metrics[first.metric].unbiased
    if unbiased is not None:
        strip.axhline(unbiased, color="#333333", linewidth=0.9, zorder=1)
    other = size_name(first.parameters) if x == "steps" else f"{first.steps} steps"
    text_look: dict[str, Any] = {
        "transform": strip.transAxes,
        "rotation": 270,
        "ha": "left",
        "va": "top",
    }
    strip.text(1.03, 1, f"paper, {other}", fontsize=6.5, color="#555555", **text_look)
    return strip
