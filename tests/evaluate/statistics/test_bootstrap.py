"""Bootstrap over clusters: hand-computed values, draws, undefined metrics and coverage."""

import numpy as np
import pytest
from scipy import stats
from threadpoolctl import threadpool_limits

from selfcorrect.evaluate.statistics.bootstrap import (
    Draws,
    Estimate,
    bootstrap,
    bootstrap_together,
    estimate,
)
from tests.support.tallies import make_tally, share


def test_point_values_are_plain_sums_times_units():
    tally = make_tally(
        {"hits": [1, 0, 2, 3], "count": [2, 2, 4, 4]}, strata=[0, 0, 1, 1], units=[3, 1, 1, 1]
    )
    result = bootstrap(tally, share, draws=Draws(50))
    assert result.estimates["c0"]["share"].value == pytest.approx(3 / 8)
    assert result.estimates["c1"]["share"].value == pytest.approx(5 / 8)
    assert result.estimates["overall"]["share"].value == pytest.approx((3 + 5) / 16)
    only_c1 = bootstrap(tally, share, pooled=["c1"], draws=Draws(50))
    assert only_c1.estimates["overall"]["share"].value == pytest.approx(5 / 8)


def test_standard_error_of_a_mean():
    values = np.random.default_rng(1).normal(size=12)
    result = bootstrap(
        make_tally({"hits": values, "count": np.ones(12)}), share, draws=Draws(40000)
    )
    spread = result.replicates.metrics["share"][1:].std()
    # 11 draws of 12: the resampled mean varies by s^2 / 12 with s^2 the unbiased variance.
    assert spread == pytest.approx(values.std(ddof=1) / np.sqrt(12), rel=0.02)


def test_cluster_of_several_units():
    weighted = make_tally({"hits": [1, 0, 0.5], "count": [1, 1, 1]}, units=[200, 300, 100])
    apart = make_tally(
        {"hits": np.repeat([1, 0, 0.5], [200, 300, 100]), "count": np.ones(600)},
    )
    one = bootstrap(weighted, share, draws=Draws(20000)).replicates.metrics["share"]
    other = bootstrap(apart, share, draws=Draws(20000)).replicates.metrics["share"]
    assert one[0] == pytest.approx(other[0])
    assert one[1:].std() == pytest.approx(other[1:].std(), rel=0.03)


def test_resampling_within_categories():
    """Two categories without inner spread: every resample gives the same overall value."""
    tally = make_tally({"hits": [1, 1, 1, 0, 0, 0], "count": np.ones(6)}, strata=[0, 0, 0, 1, 1, 1])
    assert np.ptp(bootstrap(tally, share).replicates.metrics["share"]) == pytest.approx(0)


def test_order_of_clusters_and_categories():
    rng = np.random.default_rng(3)
    hits, strata = rng.integers(0, 5, 20), np.repeat([0, 1], 10)
    tally = make_tally({"hits": hits, "count": np.full(20, 4)}, strata=strata)
    order = rng.permutation(20)
    shuffled = make_tally(
        {"hits": hits[order], "count": np.full(20, 4)},
        strata=1 - strata[order],
        clusters=[tally.clusters[i] for i in order],
        categories=["c1", "c0"],
    )
    one, other = bootstrap(tally, share), bootstrap(shuffled, share)
    assert one.replicates.population == other.replicates.population
    np.testing.assert_allclose(
        one.replicates.metrics["share"], other.replicates.metrics["share"], rtol=1e-12
    )


def test_undefined_metrics_are_nan():
    nothing = bootstrap(make_tally({"hits": [0, 0], "count": [0, 0]}), share)
    assert np.isnan(nothing.estimates["overall"]["share"].value)
    # One answered cluster in two: a quarter or more of the resamples are undefined.
    rare = bootstrap(make_tally({"hits": [1, 0], "count": [1, 0]}), share)
    assert rare.estimates["overall"]["share"].value == 1
    assert np.isnan(rare.estimates["overall"]["share"].low)


def test_category_of_one_cluster_has_no_interval():
    """Its spread is unknown, so an interval over the others alone would be too narrow."""
    tally = make_tally({"hits": [1, 0, 1, 1], "count": np.ones(4)}, strata=[0, 0, 0, 1])
    estimates = bootstrap(tally, share, category_means={"share": "mean"}).estimates
    assert estimates["overall"]["share"].value == 0.75
    assert estimates["overall"]["mean"].value == pytest.approx((2 / 3 + 1) / 2)
    for name in ("share", "mean"):
        assert np.isnan(estimates["overall"][name].low)
    assert not np.isnan(estimates["c0"]["share"].low)
    assert np.isnan(estimates["c1"]["share"].low)


def test_single_cluster():
    result = bootstrap(make_tally({"hits": [1], "count": [2]}), share).estimates["overall"]["share"]
    assert result.value == 0.5
    assert np.isnan(result.low)
    assert result.excludes_zero is None


def test_rounding_excludes_no_zero():
    assert Estimate(0.1, 0.01, 0.2).excludes_zero
    assert Estimate(-0.1, -0.2, -0.01).excludes_zero
    assert not Estimate(0.1, 0.1 + 0.2 - 0.3, 0.2).excludes_zero
    assert not Estimate(-0.1, -0.2, 0.3 - (0.1 + 0.2)).excludes_zero


@pytest.mark.parametrize("per_category", [5, 25])
def test_interval_coverage(per_category):
    """Clustered yes/no answers: each template has its own rate, 4 categories, 300 worlds."""
    rng = np.random.default_rng(11)
    strata, truth, covered = np.repeat(np.arange(4), per_category), 0.4, 0
    for world in range(300):
        rates = rng.beta(0.8, 1.2, len(strata))
        tally = make_tally(
            {"hits": rng.binomial(8, rates), "count": np.full(len(strata), 8)}, strata=strata
        )
        interval = bootstrap(tally, share, draws=Draws(400, seed=world)).estimates["overall"]
        covered += interval["share"].low <= truth <= interval["share"].high
    assert 0.90 <= covered / 300 <= 0.98


@pytest.mark.parametrize("units", [np.ones(7), np.repeat([1.0, 3.0, 20.0], 8)])
def test_resamples_have_the_weight_of_the_data(units):
    """So that pooled categories keep their share of the whole, though n - 1 of n are drawn."""
    weights = Draws(200).weights("c", units)
    assert weights.shape == (201, len(units))
    np.testing.assert_array_equal(weights[0], units)
    np.testing.assert_allclose(weights.sum(axis=1), units.sum())
    assert len(np.unique(weights[1:], axis=0)) > 150


def test_degrees_of_freedom():
    tally = make_tally({"hits": np.ones(6), "count": np.ones(6)}, strata=[0, 0, 0, 1, 1, 2])
    assert bootstrap(tally, share, draws=Draws(5)).replicates.degrees == 3
    only = bootstrap(tally, share, pooled=["c0"], draws=Draws(5)).replicates
    assert only.degrees == 2
    weighted = make_tally({"hits": [1, 0], "count": [1, 1]}, units=[20, 5])
    assert bootstrap(weighted, share, draws=Draws(5)).replicates.degrees == 24


UNITS = np.repeat([1.0, 2.0, 7.0, 30.0], 10)


def test_draws_are_multinomial():
    """Totals, means, covariances and one margin of the counts behind the weights."""
    num, total = 20_000, int(UNITS.sum())
    counts = Draws(num).weights("c", UNITS)[1:] * (total - 1) / total
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-9)
    np.testing.assert_allclose(counts.sum(axis=1), total - 1)
    chances = UNITS / total
    expected = (total - 1) * (np.diag(chances) - np.outer(chances, chances))
    errors = np.sqrt(np.diag(expected) / num)
    assert np.abs((counts.mean(axis=0) - (total - 1) * chances) / errors).max() < 4.5
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)) / num)
    assert np.abs((np.cov(counts.T) - expected) / scale).max() < 7
    observed = np.bincount(np.round(counts[:, 0]).astype(int), minlength=3)[:3]
    margin = stats.binom.pmf(range(3), total - 1, chances[0])
    assert stats.chisquare(observed, margin / margin.sum() * observed.sum()).pvalue > 1e-4


def test_draws_depend_on_seed_category_and_units_alone():
    draws = Draws(50)
    weights = draws.weights("c", UNITS)
    assert draws.weights("c", UNITS.copy()) is weights  # cells of one population share them
    np.testing.assert_array_equal(Draws(50).weights("c", UNITS), weights)
    for other in (Draws(50, seed=1).weights("c", UNITS), draws.weights("d", UNITS)):
        assert (other[1:] != weights[1:]).any()


def test_resamples_are_computed_together():
    """Metrics are called once per category and once overall, not once per resample."""
    calls = []

    def counted(sums):
        calls.append(sums["hits"].shape)
        return share(sums)

    tally = make_tally({"hits": np.ones(12), "count": np.ones(12)}, strata=np.repeat([0, 1, 2], 4))
    bootstrap(tally, counted, draws=Draws(1000))
    assert calls == [(1001,)] * 4


@pytest.mark.parametrize("num_resamples", [1, 2, 10, 39, 40, 200, 1999, 2000, 5001])
def test_intervals_are_numpys_quantiles(num_resamples):
    """Bit for bit, though rows are only partitioned: skewed, tied, constant, sorted resamples."""
    random = np.random.default_rng(num_resamples)
    normal = random.normal(size=(70, 1 + num_resamples))
    kinds = [normal, np.exp(4 * normal), np.round(normal), normal > 1.5, 0 * normal,
             np.sort(normal), -np.sort(-normal), np.where(normal > 1, normal, 0)]  # fmt: skip
    for kind in kinds:
        replicates = {str(i): row for i, row in enumerate(kind.astype(float))}
        ends = [(found.low, found.high) for found in estimate(replicates).values()]
        tails = [(1 - 0.95) / 2, (1 + 0.95) / 2]
        expected = np.quantile(kind[:, 1:].astype(float), tails, axis=1).T
        assert np.array_equal(ends, expected)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("hole", [np.nan, np.inf, -np.inf])
def test_undefined_resamples_are_left_out_up_to_a_twentieth(hole):
    """Among complete rows, whose numbers they must not change; the rows given stay as they are."""
    rows = np.random.default_rng(0).normal(size=(70, 2001))
    for i, num_undefined in enumerate([1, 2, 50, 51, 52, 99, 100, 101, 1999, 2000]):
        rows[7 * i, 1 + np.random.default_rng(i).permutation(2000)[:num_undefined]] = hole
    replicates = {str(i): row for i, row in enumerate(rows.copy())}
    intervals = [(e.low, e.high) for e in estimate(replicates).values()]
    expected = [
        np.quantile(defined, [(1 - 0.95) / 2, (1 + 0.95) / 2])
        if len(defined := row[1:][np.isfinite(row[1:])]) >= 1900
        else (np.nan, np.nan)
        for row in rows
    ]
    assert np.array_equal(intervals, expected, equal_nan=True)
    assert np.array_equal(list(replicates.values()), rows, equal_nan=True)


def test_threads_of_blas_change_no_bit():
    generator = np.random.default_rng(0)
    hits = generator.random((3, 900))
    tallies = [make_tally({"hits": row, "count": np.ones(900)}) for row in hits]
    found = []
    for threads in (1, 2):
        with threadpool_limits(threads, user_api="blas"):
            draws = Draws(2000)
            found.append(bootstrap_together(tallies, share, [["c0"]] * 3, draws, {}))
    for one_thread, two_threads in zip(*found, strict=True):
        assert one_thread.estimates == two_threads.estimates
