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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import isnan, prod
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import ThreadpoolController

from selfcorrect.evaluate.experiments.tally import OVERALL, Tally, mean_over_categories

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
# With more undefined resamples than this, the interval would describe a selection of them.
LARGEST_UNDEFINED_SHARE = 0.05
# Numbers whose relative spread is smaller than this are equal up to rounding.
ROUNDING = 1e-12
# Numbers of a metric, and rows of resamples, that are computed at once: more would not fit the
# processor's cache.
_NUMBERS_TOGETHER = 24_576
_ROWS_TOGETHER = 64
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
        if isnan(self.low) or isnan(self.high):
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

    def keep(self, metrics: Collection[str]) -> None:
        """Forget all other metrics, which take some 700 kB a cell."""
        for name in self.metrics.keys() - set(metrics):
            del self.metrics[name]


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
    tally: Tally,
    metrics: Metrics,
    pooled: Sequence[str] | None = None,
    draws: Draws | None = None,
    category_means: Mapping[str, str] | None = None,
) -> Bootstrap:
    """Return values and 95 % intervals of every metric, for each category and overall.

    `pooled` names the categories behind the overall value (default: all), and `category_means` is
    `Experiment.category_means`. Point values are the metrics of the sums over the data, without
    resampling.
    """
    pooled = tally.categories if pooled is None else pooled
    return bootstrap_together([tally], metrics, [pooled], draws or Draws(), category_means or {})[0]


def bootstrap_together(
    tallies: Sequence[Tally],
    metrics: Metrics,
    pooled: Sequence[Sequence[str]],
    draws: Draws,
    category_means: Mapping[str, str],
) -> list[Bootstrap]:
    """Return `bootstrap` of several cells of one experiment; `pooled` has an entry per cell.

    Cells over the same clusters go through the matrix products and the metrics together.
    """
    groups: dict[tuple[Any, ...], list[tuple[int, _Population]]] = {}
    populations: dict[tuple[int, int, bytes], _Population] = {}
    for index, (tally, names) in enumerate(zip(tallies, pooled, strict=True)):
        # Tallies of the same items share these objects (`find_clusters`).
        same = (id(tally.clusters), id(tally.strata), np.asarray(tally.units).tobytes())
        population = populations.get(same) or populations.setdefault(same, _population(tally))
        chosen = tuple(name for name in tally.categories if name in names)
        key = (population.name, chosen, tuple(tally.sums))
        groups.setdefault(key, []).append((index, population))
    results: dict[int, Bootstrap] = {}
    together = max(1, _NUMBERS_TOGETHER // (1 + draws.num_resamples))
    for (_, chosen, names), cells in groups.items():
        # Memory that is used again is much faster than new memory, which has to be cleared.
        buffer = np.empty(2 * len(names) * min(together, len(cells)) * (1 + draws.num_resamples))
        for first in range(0, len(cells), together):
            part = cells[first : first + together]
            members = [tallies[index] for index, _ in part]
            # The products are small: several threads would spend their time waiting for each other.
            with _blas().limit(limits=1, user_api="blas"):
                found = _bootstrap_part(
                    members, [p for _, p in part], metrics, category_means, chosen, draws, buffer
                )
            results.update(zip((index for index, _ in part), found, strict=True))
    return [results[index] for index in range(len(tallies))]


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


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
    category_means: Mapping[str, str],
    chosen: Sequence[str],
    draws: Draws,
    buffer: np.ndarray,
) -> list[Bootstrap]:
    """Bootstrap M cells of one population whose tallies have the same sums.

    `buffer` is overwritten with the sums of all resamples; no result refers to it.
    """
    spans, units = populations[0].spans, populations[0].units
    num_cells, width = len(tallies), 1 + draws.num_resamples
    names = list(tallies[0].sums)
    table = np.array(
        [
            [np.asarray(t.sums[name], dtype=float)[p.order] for name in names]
            for t, p in zip(tallies, populations, strict=True)
        ]
    ).swapaxes(0, 1)  # sums x cells x clusters
    shape = 2, len(names), num_cells * width
    sums, pooled_sums = buffer[: prod(shape)].reshape(shape)

    def replicates(sums: np.ndarray, means: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the metrics of the sums, and `means`, each of shape (M, 1 + R)."""
        values = metrics(dict(zip(names, sums, strict=True)))
        values |= {name: mean.reshape(-1) for name, mean in means.items()}
        # A category of a single unit has no resamples. Metrics that skip NaN must not hide that.
        absent = np.isnan(sums[0])
        if absent.any():
            values = {name: np.where(absent, np.nan, column) for name, column in values.items()}
        arrays = {
            id(column): (column.copy() if np.may_share_memory(column, buffer) else column).reshape(
                num_cells, width
            )
            for column in values.values()
        }
        return {name: arrays[id(column)] for name, column in values.items()}

    estimates: dict[str, list[dict[str, Estimate]]] = {}
    pooled = [category for category in spans if category in chosen]
    overall: dict[str, np.ndarray] = {}
    of_categories: dict[str, list[np.ndarray]] = {}  # the values behind each mean over categories
    pooled_sums[:] = 0
    # Category by category: the sums of all would not fit the processor's cache.
    for category, span in spans.items():
        weights = draws.weights(category, units[span])
        rows = table[:, :, span].reshape(len(names) * num_cells, -1)
        np.matmul(rows, weights.T, out=sums.reshape(len(rows), width))
        values = replicates(sums, {})
        # The mean over a single category is its metric.
        means = {category_means[name]: values[name] for name in values if name in category_means}
        estimates[category] = _estimates(values | means, num_cells)
        if pooled == [category]:
            overall = values | means
        elif category in pooled:
            pooled_sums += sums
            for mean, column in means.items():
                of_categories.setdefault(mean, []).append(column)
    if len(pooled) > 1:
        means = {mean: mean_over_categories(columns) for mean, columns in of_categories.items()}
        overall = replicates(pooled_sums, means)
    estimates[OVERALL] = (
        estimates[pooled[0]] if len(pooled) == 1 else _estimates(overall, num_cells)
    )
    degrees = sum(max(round(float(units[spans[name]].sum())) - 1, 0) for name in pooled)
    return [
        Bootstrap(
            {
                category: estimates[category][cell] if category in estimates else {}
                for category in (OVERALL, *tally.categories)
            },
            Replicates(
                populations[0].name,
                {name: values[cell] for name, values in overall.items()},
                degrees,
            ),
        )
        for cell, tally in enumerate(tallies)
    ]


def estimate(replicates: Mapping[str, np.ndarray]) -> dict[str, Estimate]:
    """Return values (entry 0) and percentile intervals (the other entries) of several metrics."""
    return _estimates({name: values[None] for name, values in replicates.items()}, 1)[0]


def _estimates(replicates: Mapping[str, np.ndarray], num_cells: int) -> list[dict[str, Estimate]]:
    """Return each cell's estimates from metrics of shape (cells, 1 + R)."""
    if not replicates:
        return [{} for _ in range(num_cells)]
    # Quantiles are slow, and some names share an array: within a single category, a mean over
    # categories is the metric itself.
    arrays = {id(values): values for values in replicates.values()}
    estimates = list(map(Estimate._make, _numbers(list(arrays.values())).tolist()))
    of_array = {key: estimates[i * num_cells : (i + 1) * num_cells] for i, key in enumerate(arrays)}
    columns = [of_array[id(values)] for values in replicates.values()]
    return [dict(zip(replicates, cell, strict=True)) for cell in zip(*columns, strict=True)]


def _numbers(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Return value and interval of each row of arrays (cells, 1 + R), one below the other."""
    num_cells, width = arrays[0].shape
    together = max(1, _ROWS_TOGETHER // num_cells)
    scratch = np.empty((together * num_cells, width))
    numbers = np.empty((len(arrays) * num_cells, 3))
    for first in range(0, len(arrays), together):
        neighbours = arrays[first : first + together]
        block = np.concatenate(neighbours, out=scratch[: len(neighbours) * num_cells])
        rows = numbers[first * num_cells :][: len(block)]
        rows[:, 0] = block[:, 0]
        rows[:, 1:] = _intervals(block[:, 1:])
        rows[~np.isfinite(block[:, 0])] = np.nan
    return numbers


def _intervals(resamples: np.ndarray) -> np.ndarray:
    """Return `np.quantile(resamples, _TAILS, axis=1).T` of the defined ones, reordering all."""
    num_rows, num_resamples = resamples.shape
    (low, low_share), (high, high_share) = (divmod(t * (num_resamples - 1), 1) for t in _TAILS)
    below, above = int(low), int(high)
    intervals = np.full((num_rows, 2), np.nan)
    incomplete = np.ones(num_rows, dtype=bool)
    if above > below + 1:  # the tails do not meet
        # Partitions around a single place are the ones that numpy has in vector instructions.
        resamples.partition(below + 1, axis=1)
        resamples[:, below + 2 :].partition(above - below - 2, axis=1)
        lower, upper = resamples[:, : below + 1], resamples[:, above + 1 :]
        # Partitions bring infinities and NaN to the ends.
        with np.errstate(invalid="ignore"):  # of rows with infinities, which are computed below
            incomplete = ~np.isfinite(lower.min(axis=1) + upper.max(axis=1))
            intervals[:, 0] = _between(lower.max(axis=1), resamples[:, below + 1], low_share)
            intervals[:, 1] = _between(resamples[:, above], upper.min(axis=1), high_share)
    for row in np.flatnonzero(incomplete):
        defined = resamples[row][np.isfinite(resamples[row])]
        enough = len(defined) >= (1 - LARGEST_UNDEFINED_SHARE) * num_resamples
        intervals[row] = np.quantile(defined, _TAILS) if enough else np.nan
    return intervals


def _between(below: np.ndarray, above: np.ndarray, share: float) -> np.ndarray:
    """Interpolate as numpy's quantiles do, from the nearer number."""
    step = above - below
    return below + step * share if share < 0.5 else above - step * (1 - share)


def standard_error(replicates: np.ndarray) -> float:
    """Return the standard deviation of the resamples; 0 if they agree, NaN if undefined."""
    return float(standard_errors(replicates[None])[0])


def standard_errors(replicates: np.ndarray) -> np.ndarray:
    """Return `standard_error` of each row of a table (rows, 1 + R)."""
    values, resamples = replicates[:, 0], replicates[:, 1:]
    errors = np.full(len(values), np.nan)
    complete = np.isfinite(resamples.sum(axis=1)) & (resamples.shape[1] > 1)
    errors[complete] = resamples[complete].std(axis=1, ddof=1)
    for row in np.flatnonzero(~complete):
        defined = resamples[row][np.isfinite(resamples[row])]
        if len(defined) > 1:
            errors[row] = defined.std(ddof=1)
    errors[errors <= ROUNDING * np.maximum(1.0, np.abs(values))] = 0.0
    errors[~np.isfinite(values)] = np.nan
    return errors


def number_or_none(value: float) -> float | None:
    """Return the number for JSON: None (null) for NaN."""
    return None if isnan(value) else float(value)
