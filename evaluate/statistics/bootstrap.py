"""Percentile intervals from resampled clusters.

Items that share a template (an occupation, a student) get similar answers, so clusters are
resampled, within their category: categories are fixed by the benchmark, templates are a sample of
the templates that could have been written. Every metric is a function of sums over clusters
(see experiments/tally.py), so all resamples of a cell are one matrix product per category.

A resample of a category with n sampling units draws n - 1 of them and counts each n / (n - 1)
times (Rao and Wu 1988, "Resampling inference with complex survey data", JASA 83): with few
templates per category, drawing n of n gives intervals that are too narrow by sqrt((n - 1) / n).
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, NamedTuple

import numpy as np

from selfcorrect.evaluate.experiments.tally import OVERALL, Tally

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
# With more undefined resamples than this, the interval would describe a selection of them.
LARGEST_UNDEFINED_SHARE = 0.05
# Numbers whose relative spread is smaller than this are equal up to rounding.
ROUNDING = 1e-12
# Numbers of a metric that are computed at once: more would not fit the processor's cache.
_NUMBERS_TOGETHER = 32_768
_TAILS = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]

Metrics = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


class Estimate(NamedTuple):
    """A value and its percentile interval; NaN where undefined."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool | None:
        """Return whether zero lies outside the interval; None when there is no interval.

        An end that is zero up to rounding is zero: differences of equal counts are common.
        """
        if np.isnan(self.low) or np.isnan(self.high):
            return None
        return self.low > ROUNDING or self.high < -ROUNDING


UNDEFINED = Estimate(np.nan, np.nan, np.nan)


@dataclass(frozen=True)
class Replicates:
    """One cell's overall metrics, each of shape (1 + R,): the value of the data, then R resamples.

    `population` names the clusters and their units. Cells of equal population were resampled with
    the same draws, so their replicates may be subtracted one by one. `degrees` are the degrees of
    freedom of their spread: sampling units less one for each pooled category.
    """

    population: bytes
    metrics: dict[str, np.ndarray]
    degrees: int = 0


@dataclass(frozen=True)
class Bootstrap:
    """One cell's estimates by category and metric, and the replicates behind the overall ones."""

    estimates: dict[str, dict[str, Estimate]]
    replicates: Replicates


class Draws:
    """Bootstrap weights, the same for every cell over the same clusters.

    The draws of a category depend on the seed, its name and the units of its clusters, never on the
    order of files or rows: this pairs conditions and checkpoints. They are cached, because all
    checkpoints of a ladder need the same ones.
    """

    def __init__(self, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> None:
        self.num_resamples = num_resamples
        self.seed = seed
        self._cache: dict[tuple[str, bytes], np.ndarray] = {}

    def weights(self, category: str, units: np.ndarray) -> np.ndarray:
        """Return weights of shape (1 + R, C): row 0 is the data, then R resamples.

        A cluster that stands for u units is drawn like u equal units. A category of a single unit
        has no spread to resample: its resamples are NaN.
        """
        key = (category, units.tobytes())
        if key not in self._cache:
            self._cache[key] = self._draw(category, units)
        return self._cache[key]

    def _draw(self, category: str, units: np.ndarray) -> np.ndarray:
        total = round(float(units.sum()))
        if total < 2:
            weights = np.full((1 + self.num_resamples, len(units)), np.nan)
            weights[0] = units
            return weights
        generator = np.random.default_rng([self.seed, zlib.crc32(category.encode())])
        weights = np.empty((len(units), 1 + self.num_resamples)).T
        weights[0] = units
        counts = generator.multinomial(total - 1, units / units.sum(), self.num_resamples)
        np.multiply(counts, total / (total - 1), out=weights[1:])
        return weights


def bootstrap(
    tally: Tally, metrics: Metrics, pooled: Sequence[str] | None = None, draws: Draws | None = None
) -> Bootstrap:
    """Return values and 95 % intervals of every metric, for each category and overall.

    `pooled` names the categories behind the overall value (default: all). Point values are the
    metrics of the sums over the data, without resampling.
    """
    pooled = tally.categories if pooled is None else pooled
    return bootstrap_together([tally], metrics, [pooled], draws or Draws())[0]


def bootstrap_together(
    tallies: Sequence[Tally], metrics: Metrics, pooled: Sequence[Sequence[str]], draws: Draws
) -> list[Bootstrap]:
    """Return `bootstrap` of several cells of one experiment; `pooled` has an entry per cell.

    Cells over the same clusters go through the matrix products and the metrics together.
    """
    groups: dict[tuple[Any, ...], list[tuple[int, _Population]]] = {}
    for index, (tally, names) in enumerate(zip(tallies, pooled, strict=True)):
        population = _population(tally)
        chosen = tuple(name for name in tally.categories if name in names)
        key = (population.name, chosen, tuple(tally.sums))
        groups.setdefault(key, []).append((index, population))
    results: dict[int, Bootstrap] = {}
    together = max(1, _NUMBERS_TOGETHER // (1 + draws.num_resamples))
    for (_, chosen, _), cells in groups.items():
        for first in range(0, len(cells), together):
            part = cells[first : first + together]
            members = [tallies[index] for index, _ in part]
            found = _bootstrap_part(members, [p for _, p in part], metrics, chosen, draws)
            results.update(zip((index for index, _ in part), found, strict=True))
    return [results[index] for index in range(len(tallies))]


@dataclass(frozen=True)
class _Population:
    """The clusters of a tally in an order of their own, category by category.

    `order` are their indices in the tally, `units` their sizes, `spans` each category's slice.
    """

    name: bytes
    order: np.ndarray
    units: np.ndarray
    spans: dict[str, slice]


def _population(tally: Tally) -> _Population:
    labels = np.array(tally.clusters, dtype=object)
    rows: list[str] = []
    parts, spans = [], {}
    for index, category in sorted(enumerate(tally.categories), key=lambda pair: pair[1]):
        members = np.flatnonzero(tally.strata == index)
        if not len(members):
            continue
        members = members[np.argsort(labels[members], kind="stable")]
        spans[category] = slice(len(rows), len(rows) + len(members))
        rows += [f"{category}\t{labels[i]}\t{tally.units[i]:g}" for i in members]
        parts.append(members)
    order = np.concatenate(parts) if parts else np.empty(0, dtype=int)
    units = np.asarray(tally.units, dtype=float)[order]
    return _Population("\n".join(rows).encode(), order, units, spans)


def _bootstrap_part(
    tallies: Sequence[Tally],
    populations: Sequence[_Population],
    metrics: Metrics,
    chosen: Sequence[str],
    draws: Draws,
) -> list[Bootstrap]:
    """Bootstrap M cells of one population whose tallies have the same sums."""
    spans, units = populations[0].spans, populations[0].units
    num_cells, width = len(tallies), 1 + draws.num_resamples
    names = list(tallies[0].sums)
    table = np.array(
        [
            [np.asarray(t.sums[name], dtype=float)[p.order] for name in names]
            for t, p in zip(tallies, populations, strict=True)
        ]
    ).swapaxes(0, 1)  # sums x cells x clusters
    sums = {}
    for category, span in spans.items():
        weights = draws.weights(category, units[span])
        products = table[:, :, span].reshape(len(names) * num_cells, -1) @ weights.T
        sums[category] = dict(zip(names, products.reshape(len(names), -1), strict=True))
    overall = _replicates(metrics, [sums[name] for name in chosen if name in sums])
    # The overall value of a single category is that category's value.
    apart = [category for category in spans if list(chosen) != [category]]
    stacked = {
        name: np.concatenate([sums[category][name] for category in apart])
        for name in (names if apart else ())
    }
    by_category = _replicates(metrics, [stacked] if apart else [])
    cells_overall = _by_cell(overall, num_cells, width)
    cells_apart = _by_cell(by_category, len(apart) * num_cells, width)
    estimates_overall = _estimates(cells_overall, num_cells)
    estimates_apart = _estimates(cells_apart, len(apart) * num_cells)
    degrees = sum(
        max(round(float(units[spans[name]].sum())) - 1, 0) for name in chosen if name in spans
    )
    results = []
    for cell in range(num_cells):
        estimates = {OVERALL: estimates_overall[cell]}
        for category in tallies[cell].categories:
            if category in apart:
                row = apart.index(category) * num_cells + cell
                estimates[category] = estimates_apart[row]
            else:
                estimates[category] = estimates_overall[cell] if category in spans else {}
        replicates = {name: values[cell] for name, values in cells_overall.items()}
        results.append(Bootstrap(estimates, Replicates(populations[0].name, replicates, degrees)))
    return results


def _by_cell(
    replicates: Mapping[str, np.ndarray], num_cells: int, width: int
) -> dict[str, np.ndarray]:
    """Return metrics of shape (cells * (1 + R),) in the shape (cells, 1 + R)."""
    return {name: values.reshape(num_cells, width) for name, values in replicates.items()}


def _replicates(
    metrics: Metrics, categories: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Return the metrics of the categories' sums together; none without a category."""
    if not categories:
        return {}
    if len(categories) == 1:
        table = {name: values[:, None] for name, values in categories[0].items()}
    else:
        table = {
            # Category by category in memory, so that sums over categories add whole columns.
            name: np.array([category[name] for category in categories]).T
            for name in categories[0]
        }
    replicates = metrics(table)
    # A category of a single unit has no resamples. Metrics that skip NaN must not hide that.
    absent = np.isnan(next(iter(table.values()))).any(axis=1)
    if not absent.any():
        return replicates
    return {name: np.where(absent, np.nan, values) for name, values in replicates.items()}


def estimate(replicates: Mapping[str, np.ndarray]) -> dict[str, Estimate]:
    """Return values (entry 0) and percentile intervals (the other entries) of several metrics."""
    return _estimates({name: values[None] for name, values in replicates.items()}, 1)[0]


def _estimates(replicates: Mapping[str, np.ndarray], num_cells: int) -> list[dict[str, Estimate]]:
    """Return each cell's estimates from metrics of shape (cells, 1 + R)."""
    if not replicates:
        return [{} for _ in range(num_cells)]
    names, same = _distinct(replicates)
    table = np.stack([replicates[name] for name in names])
    values = table[:, :, 0].tolist()
    ends = _intervals(table[:, :, 1:].reshape(len(names) * num_cells, -1))
    lows, highs = (end.reshape(len(names), num_cells).tolist() for end in ends.T)
    by_name = {
        name: [
            Estimate(value, low, high) if isfinite(value) else UNDEFINED
            for value, low, high in zip(*columns, strict=True)
        ]
        for name, *columns in zip(names, values, lows, highs, strict=True)
    }
    columns = {name: by_name[same[name]] for name in replicates}
    return [dict(zip(columns, cell, strict=True)) for cell in zip(*columns.values(), strict=True)]


def _intervals(resamples: np.ndarray) -> np.ndarray:
    """Return the ends of the interval of each row of resamples, shape (rows, 2)."""
    intervals = np.full((len(resamples), 2), np.nan)
    num_defined = np.isfinite(resamples).sum(axis=1)
    complete = num_defined == resamples.shape[1]
    if complete.any():
        rows = resamples if complete.all() else resamples[complete]
        intervals[complete] = np.quantile(rows, _TAILS, axis=1).T
    enough = num_defined >= (1 - LARGEST_UNDEFINED_SHARE) * resamples.shape[1]
    for row in np.flatnonzero(enough & ~complete):
        intervals[row] = np.quantile(resamples[row][np.isfinite(resamples[row])], _TAILS)
    return intervals


def _distinct(replicates: Mapping[str, np.ndarray]) -> tuple[list[str], dict[str, str]]:
    """Return the names of the distinct arrays, and the distinct name that each name equals.

    Quantiles are slow, and equal arrays are common: within a single category, a mean over
    categories is the metric itself.
    """
    candidates: dict[bytes, list[str]] = {}
    same = {}
    for name, values in replicates.items():
        alike = candidates.setdefault(values[:, :2].tobytes(), [])
        bits = values.view(np.int64)
        equal = (other for other in alike if np.array_equal(replicates[other].view(np.int64), bits))
        same[name] = next(equal, name)
        if same[name] == name:
            alike.append(name)
    return list(dict.fromkeys(same.values())), same


def standard_error(replicates: np.ndarray) -> float:
    """Return the standard deviation of the resamples; 0 if they agree, NaN if undefined."""
    resamples = replicates[1:][np.isfinite(replicates[1:])]
    if len(resamples) < 2 or not np.isfinite(replicates[0]):
        return float("nan")
    spread = float(resamples.std(ddof=1))
    return 0.0 if spread <= ROUNDING * max(1.0, abs(float(replicates[0]))) else spread


def number_or_none(value: float) -> float | None:
    """Return the number for JSON: None (null) for NaN."""
    return None if np.isnan(value) else float(value)
