"""Fast multinomial counts are multinomial: totals, moments, margins, and the same every time."""

import numpy as np
import pytest
from scipy import stats

from selfcorrect.evaluate.statistics import resampling
from selfcorrect.evaluate.statistics.resampling import fill_multinomial

# Few sizes among many clusters, as students have: the branch with Poisson counts.
UNITS = np.repeat([1.0, 2.0, 7.0, 30.0], 10)


def counts(units, num_resamples, seed=0):
    table = np.empty((num_resamples, len(units)))
    fill_multinomial(np.random.default_rng(seed), int(units.sum()) - 1, units, table)
    return table


@pytest.mark.parametrize("margin", [2, 0])
def test_counts_have_the_total_the_mean_and_the_covariance_of_a_multinomial(margin, monkeypatch):
    """With margin 0 half of the resamples are drawn anew, with margin 2 nearly all topped up."""
    monkeypatch.setattr(resampling, "_MARGIN", margin)
    num, size = 40_000, int(UNITS.sum()) - 1
    table = counts(UNITS, num)
    assert (table.sum(axis=1) == size).all()
    assert (table >= 0).all()
    chances = UNITS / UNITS.sum()
    expected = size * (np.diag(chances) - np.outer(chances, chances))
    errors = np.sqrt(size * chances * (1 - chances) / num)
    assert np.abs((table.mean(axis=0) - size * chances) / errors).max() < 4.5
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)) / num)
    assert np.abs((np.cov(table.T) - expected) / scale).max() < 7


def test_each_margin_is_binomial_in_all_of_its_shape():
    size = int(UNITS.sum()) - 1
    table = counts(UNITS, 40_000)
    for cluster in (0, 15, 25, 39):
        chance = UNITS[cluster] / UNITS.sum()
        inner = stats.binom.ppf(np.linspace(0.02, 0.98, 9), size, chance)
        edges = np.concatenate([[-np.inf], np.unique(inner), [np.inf]])
        found = np.histogram(table[:, cluster], edges + 0.5)[0]
        expected = np.diff(stats.binom.cdf(edges, size, chance)) * len(table)
        assert stats.chisquare(found, expected * found.sum() / expected.sum()).pvalue > 1e-4


def test_the_same_seed_gives_the_same_counts_and_another_seed_others():
    assert (counts(UNITS, 500) == counts(UNITS, 500)).all()
    assert (counts(UNITS, 500) != counts(UNITS, 500, seed=1)).any()


def test_clusters_of_one_unit_keep_numpys_own_draws():
    units = np.ones(25)
    table = counts(units, 100)
    expected = np.random.default_rng(0).multinomial(24, units / 25, 100)
    np.testing.assert_array_equal(table, expected)


@pytest.mark.parametrize("mean", [0.04, 1.0, 11.3, 90.0])
def test_a_bin_that_names_a_count_is_of_that_count_alone(mean):
    """Both of its ends lie between the same two steps of the distribution; a step is in no bin."""
    bins, steps = resampling._poisson_table(mean)
    known = np.flatnonzero(bins >= 0)
    assert len(bins) == 65536
    assert len(bins) - len(known) <= len(steps)
    ends = [(known + side) / 65536 for side in (0, 1 - 1e-9)]
    for end in ends:
        np.testing.assert_array_equal(np.searchsorted(steps, end, side="right"), bins[known])
