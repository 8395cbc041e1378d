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

import numpy as np

from selfcorrect.evaluate.experiments.tally import OVERALL, Tally

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
# With more undefined resamples than this, the interval would describe a selection of them.
LARGEST_UNDEFINED_SHARE = 0.05
# Numbers whose relative spread is smaller than this are equal up to rounding.
ROUNDING = 1e-12
_TAILS = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]

Metrics = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its percentile interval; NaN where undefined."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool | None:
        """Return whether zero lies outside the interval; None when there is no interval."""
        if np.isnan(self.low) or np.isnan(self.high):
            return None
        return self.low > 0 or self.high < 0


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
    draws = draws or Draws()
    population, sums = _resampled_sums(tally, draws)
    chosen = [c for c in tally.categories if pooled is None or c in pooled]
    members = [tally.strata == tally.categories.index(category) for category in chosen]
    sizes = [round(float(np.sum(tally.units[clusters]))) for clusters in members]
    degrees = sum(max(size - 1, 0) for size in sizes)
    replicates = Replicates(population, _replicates(metrics, sums, chosen), degrees)
    estimates = {OVERALL: estimate(replicates.metrics)}
    for category in tally.categories:
        if chosen == [category]:  # the overall value pools this category alone
            estimates[category] = estimates[OVERALL]
        else:
            estimates[category] = estimate(_replicates(metrics, sums, [category]))
    return Bootstrap(estimates, replicates)


def _resampled_sums(tally: Tally, draws: Draws) -> tuple[bytes, dict[str, dict[str, np.ndarray]]]:
    """Return the population that was resampled, and each category's sums of shape (1 + R,)."""
    names = list(tally.sums)
    table = np.stack([np.asarray(tally.sums[name], dtype=float) for name in names])
    labels = np.array(tally.clusters, dtype=object)
    population: list[str] = []
    sums: dict[str, dict[str, np.ndarray]] = {}
    for index, category in sorted(enumerate(tally.categories), key=lambda pair: pair[1]):
        members = np.flatnonzero(tally.strata == index)
        if not len(members):
            continue
        members = members[np.argsort(labels[members], kind="stable")]
        units = np.asarray(tally.units, dtype=float)[members]
        product = table[:, members] @ draws.weights(category, units).T
        sums[category] = dict(zip(names, product, strict=True))
        population += [f"{category}\t{labels[i]}\t{tally.units[i]:g}" for i in members]
    return "\n".join(population).encode(), sums


def _replicates(
    metrics: Metrics, sums: Mapping[str, Mapping[str, np.ndarray]], categories: Sequence[str]
) -> dict[str, np.ndarray]:
    """Return the metrics over `categories`, each of shape (1 + R,); none without a category."""
    chosen = [sums[category] for category in categories if category in sums]
    if not chosen:
        return {}
    if len(chosen) == 1:
        table = {name: values[:, None] for name, values in chosen[0].items()}
    else:
        table = {name: np.stack([part[name] for part in chosen], axis=1) for name in chosen[0]}
    replicates = metrics(table)
    # A category of a single unit has no resamples. Metrics that skip NaN must not hide that.
    absent = np.isnan(next(iter(table.values()))).any(axis=1)
    if not absent.any():
        return replicates
    return {name: np.where(absent, np.nan, values) for name, values in replicates.items()}


def estimate(replicates: Mapping[str, np.ndarray]) -> dict[str, Estimate]:
    """Return values (entry 0) and percentile intervals (the other entries) of several metrics."""
    if not replicates:
        return {}
    names, same = _distinct(replicates)
    table = np.stack([replicates[name] for name in names])
    values, resamples = table[:, 0], table[:, 1:]
    intervals = np.full((len(table), 2), np.nan)
    num_defined = np.isfinite(resamples).sum(axis=1)
    complete = num_defined == resamples.shape[1]
    if complete.any():
        intervals[complete] = np.quantile(resamples[complete], _TAILS, axis=1).T
    enough = num_defined >= (1 - LARGEST_UNDEFINED_SHARE) * resamples.shape[1]
    for row in np.flatnonzero(enough & ~complete):
        intervals[row] = np.quantile(resamples[row][np.isfinite(resamples[row])], _TAILS)
    estimates = {
        name: Estimate(float(value), float(low), float(high)) if np.isfinite(value) else UNDEFINED
        for name, value, (low, high) in zip(names, values, intervals, strict=True)
    }
    return {name: estimates[same[name]] for name in replicates}


def _distinct(replicates: Mapping[str, np.ndarray]) -> tuple[list[str], dict[str, str]]:
    """Return the names of the distinct arrays, and the distinct name that each name equals.

    Quantiles are slow, and equal arrays are common: within a single category, a mean over
    categories is the metric itself.
    """
    first: dict[bytes, str] = {}
    same = {}
    for name, values in replicates.items():
        same[name] = first.setdefault(values.tobytes(), name)
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
