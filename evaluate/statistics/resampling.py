"""Multinomial counts of many clusters, drawn exactly and in a fraction of numpy's time."""

import numpy as np
from scipy import special

# The Poisson counts aim this many standard deviations below the wanted total.
_MARGIN = 2
_BLOCK = 200  # resamples whose counts stay in the processor's cache
_BINS = 1 << 16


def fill_multinomial(
    generator: np.random.Generator, size: int, units: np.ndarray, counts: np.ndarray
) -> None:
    """Fill `counts` (R, C) with how often each cluster is drawn when `size` of all units are.

    `units` (C,) says how many equal units a cluster stands for: u of them are drawn u times as
    often as one. Where clusters are few or all alike this is numpy's multinomial. With few distinct
    whole u among many clusters (law school: 1,944 students, 83 counts) independent Poisson counts
    are topped up one by one to `size`: given their sum, Poisson counts are multinomial (Devroye
    1986, "Non-Uniform Random Variate Generation", chapter XI.1), and so is the whole. A resample
    whose Poisson counts exceed `size` is drawn anew by numpy.
    """
    chances = units / units.sum()
    kinds = np.unique(units)
    if len(kinds) == 1 or len(kinds) > len(units) / 4 or np.any(units != np.round(units)):
        counts[:] = generator.multinomial(size, chances, len(counts))
        return
    means = (size - _MARGIN * np.sqrt(size)) * kinds / units.sum()
    tables = [_poisson_table(mean) for mean in means]
    order = np.argsort(units, kind="stable")  # clusters of a kind stand side by side
    ends = np.cumsum([np.sum(units == kind) for kind in kinds])
    owner = np.repeat(np.arange(len(units)), units[order].astype(int))
    for start in range(0, len(counts), _BLOCK):
        rows = min(_BLOCK, len(counts) - start)
        block = np.empty((len(units), rows), dtype=np.int16)
        for (bins, steps), first, end in zip(tables, [0, *ends[:-1]], ends, strict=True):
            block[first:end] = _draw_poisson(generator, bins, steps, (end - first, rows))
        lacking = size - block.sum(axis=0, dtype=int)
        into = np.repeat(np.arange(rows), np.maximum(lacking, 0))
        picked = owner[generator.integers(0, len(owner), len(into))]
        more = np.bincount(picked * rows + into, minlength=block.size)
        counts.T[order, start : start + rows] = block + more.reshape(block.shape)
        over = start + np.flatnonzero(lacking < 0)
        counts[over] = generator.multinomial(size, chances, len(over))


def _poisson_table(mean: float) -> tuple[np.ndarray, np.ndarray]:
    """For each 1/65536 of [0, 1) the count that all of it means, or -1; and the whole CDF."""
    likely = np.arange(int(mean + 20 * np.sqrt(mean)) + 40)
    last = int(np.argmax(special.pdtrc(likely, mean) <= 1e-16))  # hardly ever more
    steps = special.pdtr(likely[: last + 1], mean)
    edges = np.ceil(steps * _BINS).astype(int)
    bins = np.cumsum(np.bincount(edges, minlength=_BINS)[:_BINS]).astype(np.int16)
    bins[np.minimum((steps * _BINS).astype(int), _BINS - 1)] = -1  # a step lies within
    return bins, steps


def _draw_poisson(
    generator: np.random.Generator, bins: np.ndarray, steps: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """Counts by inversion: the bin of a uniform number decides, and where it cannot, the number."""
    place = generator.integers(0, _BINS, shape, dtype=np.uint16)
    counts = bins[place]
    unclear = counts < 0
    exactly = (place[unclear] + generator.random(int(unclear.sum()))) / _BINS
    counts[unclear] = np.searchsorted(steps, exactly, side="right")
    return counts
