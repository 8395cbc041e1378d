"""Sums over clusters: every metric is a function of them, so a bootstrap is a matrix product."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from math import prod

import numpy as np
import pandas as pd

from selfcorrect.recipes.foundation.errors import InputError

OVERALL = "overall"  # the category of the figures over all categories that an experiment pools


@dataclass(frozen=True)
class Tally:
    """Sums over the C clusters of one experiment under one condition.

    `strata` holds each cluster's index into `categories`; `units` says how many equal sampling
    units a cluster stands for (1 except for law school's students); `sums[name]` has shape (C,) and
    is PER UNIT: the total of a sum over the data is `(units * sums[name]).sum()`. Of M cells with
    the same rows, which are added up together, the sums have shape (M, C) until `split`.
    """

    clusters: list[str]
    strata: np.ndarray
    categories: list[str]
    units: np.ndarray
    sums: dict[str, np.ndarray]

    def split(self) -> list["Tally"]:
        """Return the tally of each of the M cells, from sums of shape (M, C)."""
        cells = zip(*self.sums.values(), strict=True)
        return [replace(self, sums=dict(zip(self.sums, cell, strict=True))) for cell in cells]


def log_probabilities(frame: pd.DataFrame, num_options: int) -> np.ndarray:
    """The column `logprobs` as an array of shape (rows, num_options), natural logarithms."""
    rows = frame["logprobs"].to_numpy()
    check_num_options(map(len, rows), num_options)
    if not len(rows):
        return np.empty((0, num_options))
    table: np.ndarray = np.concatenate(list(rows)).astype(float).reshape(-1, num_options)
    return table


def answers_of(frame: pd.DataFrame, num_options: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `log_probabilities` and the column `mass` (rows,) of one cell."""
    return log_probabilities(frame, num_options), frame["mass"].to_numpy(dtype=float)


def check_num_options(found: Iterable[int], num_options: int) -> None:
    """Raise InputError unless each row has as many log-probabilities as there are options."""
    if not {num_options}.issuperset(found):
        raise InputError(f"column logprobs: every row needs {num_options} numbers")


def option_orders(column: pd.Series, num_options: int) -> np.ndarray:
    """Return the file's option index at each position shown, shape (rows, num_options).

    The column spells an order as "120", or as "10,0,..." for more than ten options.
    """
    codes, spellings = pd.factorize(column)
    orders = [option_order(str(spelling), num_options) for spelling in spellings]
    return np.array(orders, dtype=int)[codes]


@cache
def option_order(spelling: str, num_options: int) -> list[int]:
    """Return the file's option index at each position shown, from the spelling of one order."""
    parts = spelling.split(",") if num_options > 10 else list(spelling)
    order = [int(part) if part.isdecimal() else -1 for part in parts]
    if sorted(order) != list(range(num_options)):
        raise InputError(
            f"column order: {spelling[:80]!r} is no order of {num_options} options, such as '120', "
            "or '10,0,...' for more than ten"
        )
    return order


def answered(logprobs: np.ndarray) -> np.ndarray:
    """Which rows (..., options) hold an answer at all: no NaN, and some option is possible."""
    return ~np.isnan(logprobs).any(axis=-1) & (logprobs > -np.inf).any(axis=-1)


def probabilities(logprobs: np.ndarray) -> np.ndarray:
    """Probabilities normalised over the options, same shape; NaN in rows without an answer."""
    safe = np.where(answered(logprobs)[..., None], logprobs, np.nan)
    top = safe.max(axis=-1, initial=-np.inf, keepdims=True)
    weights = np.exp(safe - top)
    shares: np.ndarray = weights / weights.sum(axis=-1, keepdims=True)
    return shares


def first_likelier(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return 1 where `first` is larger, 0 where `second` is, 1/2 where they are equal, or NaN."""
    likelier = np.where(first == second, 0.5, (first > second).astype(float))
    return np.where(np.isnan(first) | np.isnan(second), np.nan, likelier)


def average_items(
    frame: pd.DataFrame, columns: Mapping[str, np.ndarray]
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Average the rows of each item, so that an item counts once however often it was asked.

    An item has a row per order of its options and per draw, so one with more options has more rows.
    Return the first row of each item, in order of appearance, and each column's mean over the
    item's rows, from columns of shape (..., rows) to (..., items). A row whose value is NaN is in
    no mean of that column; an item without values has NaN. So a count must be NaN, not 0, in the
    rows that it leaves out.
    """
    if frame["item"].is_unique:
        return frame.reset_index(drop=True), dict(columns)
    codes, items = pd.factorize(frame["item"])
    means = {}
    for name, values in columns.items():
        known = ~np.isnan(values)
        total = add_groups(codes, np.where(known, values, 0), len(items))
        means[name] = ratio(total, add_groups(codes, known, len(items)))
    return frame.drop_duplicates("item").reset_index(drop=True), means


def sum_by_cluster(
    frame: pd.DataFrame, columns: Mapping[str, np.ndarray], units: np.ndarray | None = None
) -> Tally:
    """Add up `columns` (each of shape (..., rows)) within the frame's clusters.

    A NaN counts as nothing: a column that can be undefined needs its own count beside it. `units`
    gives each row's cluster size and is 1 by default. Raises ValueError if an item has several
    rows, which would count several times: `average_items` makes one of them.
    """
    if "item" in frame and not frame["item"].is_unique:
        raise ValueError("sum_by_cluster: an item has several rows; call average_items first")
    groups = find_clusters(frame)
    sums = {
        name: add_groups(groups.codes, np.nan_to_num(values.astype(float)), len(groups.names))
        for name, values in columns.items()
    }
    return groups.tally(sums, None if units is None else units[groups.first])


def add_groups(codes: np.ndarray, values: np.ndarray, num_groups: int) -> np.ndarray:
    """Add up `values` (..., rows) within each group of rows: (..., num_groups).

    `codes` holds each row's group. Each sum runs over the rows in their order.
    """
    if values.ndim == 1:
        return np.bincount(codes, values, num_groups)
    num_cells = prod(values.shape[:-1])
    apart = (np.arange(num_cells)[:, None] * num_groups + codes).reshape(-1)
    sums = np.bincount(apart, values.reshape(-1), num_cells * num_groups)
    return sums.reshape(*values.shape[:-1], num_groups)


@dataclass(frozen=True)
class Clusters:
    """The clusters of a frame's rows, sorted by name.

    `codes` holds each row's index into `names`, `first` the first row of each cluster, and `strata`
    each cluster's index into the sorted `categories`.
    """

    names: list[str]
    codes: np.ndarray
    first: np.ndarray
    strata: np.ndarray
    categories: list[str]

    def means(self, values: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Return each cluster's mean of `values` (..., rows) over `rows` (a mask), NaN left out."""
        known = ~np.isnan(values) if rows is None else ~np.isnan(values) & rows
        total = add_groups(self.codes, np.where(known, values, 0.0), len(self.names))
        return ratio(total, add_groups(self.codes, known, len(self.names)))

    def tally(self, sums: Mapping[str, np.ndarray], units: np.ndarray | None = None) -> Tally:
        """Return a tally from one number per cluster (and cell); NaN counts as nothing."""
        table = np.broadcast_arrays(*sums.values())
        units = np.ones(len(self.names)) if units is None else units
        by_name = {
            name: np.nan_to_num(values.astype(float))
            for name, values in zip(sums, table, strict=True)
        }
        return Tally(self.names, self.strata, self.categories, units, by_name)


def find_clusters(frame: pd.DataFrame) -> Clusters:
    """Return the clusters of a frame's rows; InputError for a cluster in two categories."""
    return _clusters(*(tuple(frame[name].to_numpy()) for name in ("cluster", "category")))


@lru_cache(maxsize=4)  # the cells of an experiment have the same items
def _clusters(clusters: tuple[str, ...], categories_of_rows: tuple[str, ...]) -> Clusters:
    codes, names = pd.factorize(np.array(clusters, dtype=object), sort=True)
    first = np.unique(codes, return_index=True)[1]
    category, categories = pd.factorize(np.array(categories_of_rows, dtype=object), sort=True)
    strata = category[first]
    if not np.array_equal(strata[codes], category):
        raise InputError("column category: a cluster lies in two categories")
    return Clusters([str(c) for c in names], codes, first, strata, [str(c) for c in categories])


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Quotient of two arrays, NaN wherever the denominator is 0."""
    try:
        # The processor notices zeros by itself; to look for them takes as long as to divide.
        with np.errstate(divide="raise", invalid="raise"):
            return np.asarray(numerator / denominator)
    except FloatingPointError:
        quotient = np.full(np.broadcast(numerator, denominator).shape, np.nan)
        with np.errstate(invalid="ignore"):
            np.divide(numerator, denominator, out=quotient, where=np.asarray(denominator != 0))
        return quotient


def mean_columns(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Columns for `sum_by_cluster` from which `means` gives each value's mean, NaN left out."""
    return {f"sum_{name}": column for name, column in values.items()} | {
        f"count_{name}": ~np.isnan(column) for name, column in values.items()
    }


def means(sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The means of all that `mean_columns` was given, elementwise over the sums."""
    names = [name.removeprefix("sum_") for name in sums if name.startswith("sum_")]
    return {name: ratio(sums[f"sum_{name}"], sums[f"count_{name}"]) for name in names}


def mean_over_categories(values: Sequence[np.ndarray]) -> np.ndarray:
    """Mean of arrays, one per category, over those where it is defined; NaN where it is in none."""
    total = values[0].copy()
    for array in values[1:]:
        total += array
    undefined = np.isnan(total)
    total /= len(values)
    if undefined.any():
        rows = np.array([array[undefined] for array in values])
        defined = ~np.isnan(rows)
        total[undefined] = ratio(np.where(defined, rows, 0).sum(axis=0), defined.sum(axis=0))
    return total
