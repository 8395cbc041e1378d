"""Bootstrap and paired comparisons: hand-computed values, pairing, coverage, speed."""

import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from selfcorrect.evaluate.experiments.bbq import BBQ
from selfcorrect.evaluate.experiments.tally import Tally
from selfcorrect.evaluate.statistics.bootstrap import Draws, Replicates, bootstrap
from selfcorrect.evaluate.statistics.comparisons import Cell, compare
from tests.support.recorded_run import Size, record_cell


def make_tally(sums, strata=None, units=None, clusters=None, categories=None):
    count = len(next(iter(sums.values())))
    strata = np.zeros(count, dtype=int) if strata is None else np.asarray(strata)
    return Tally(
        clusters=clusters or [f"t{i:03d}" for i in range(count)],
        strata=strata,
        categories=categories or [f"c{k}" for k in range(strata.max() + 1)],
        units=np.ones(count) if units is None else np.asarray(units, dtype=float),
        sums={name: np.asarray(values, dtype=float) for name, values in sums.items()},
    )


def share(sums):
    hits, count = sums["hits"].sum(axis=1), sums["count"].sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"share": np.where(count > 0, hits / count, np.nan)}


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


def test_standard_error_of_a_mean_is_the_textbook_one():
    values = np.random.default_rng(1).normal(size=12)
    result = bootstrap(
        make_tally({"hits": values, "count": np.ones(12)}), share, draws=Draws(40000)
    )
    spread = result.replicates.metrics["share"][1:].std()
    # 11 draws of 12: the resampled mean varies by s^2 / 12 with s^2 the unbiased variance.
    assert spread == pytest.approx(values.std(ddof=1) / np.sqrt(12), rel=0.02)


def test_a_cluster_of_u_units_equals_u_clusters():
    weighted = make_tally({"hits": [1, 0, 0.5], "count": [1, 1, 1]}, units=[200, 300, 100])
    apart = make_tally(
        {"hits": np.repeat([1, 0, 0.5], [200, 300, 100]), "count": np.ones(600)},
    )
    one = bootstrap(weighted, share, draws=Draws(20000)).replicates.metrics["share"]
    other = bootstrap(apart, share, draws=Draws(20000)).replicates.metrics["share"]
    assert one[0] == pytest.approx(other[0])
    assert one[1:].std() == pytest.approx(other[1:].std(), rel=0.03)


def test_categories_are_never_mixed():
    """Two categories without inner spread: every resample gives the same overall value."""
    tally = make_tally({"hits": [1, 1, 1, 0, 0, 0], "count": np.ones(6)}, strata=[0, 0, 0, 1, 1, 1])
    assert np.ptp(bootstrap(tally, share).replicates.metrics["share"]) == pytest.approx(0)


def test_the_order_of_clusters_and_categories_changes_nothing():
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


def test_undefined_is_nan_never_zero():
    nothing = bootstrap(make_tally({"hits": [0, 0], "count": [0, 0]}), share)
    assert np.isnan(nothing.estimates["overall"]["share"].value)
    # One answered cluster in two: a quarter or more of the resamples are undefined.
    rare = bootstrap(make_tally({"hits": [1, 0], "count": [1, 0]}), share)
    assert rare.estimates["overall"]["share"].value == 1
    assert np.isnan(rare.estimates["overall"]["share"].low)


def test_a_category_of_one_template_takes_the_overall_interval_with_it():
    """Its spread is unknown, so an interval over the others alone would be too narrow."""
    tally = make_tally({"hits": [1, 0, 1, 1], "count": np.ones(4)}, strata=[0, 0, 0, 1])
    estimates = bootstrap(tally, share).estimates
    assert estimates["overall"]["share"].value == 0.75
    assert np.isnan(estimates["overall"]["share"].low)
    assert not np.isnan(estimates["c0"]["share"].low)
    assert np.isnan(estimates["c1"]["share"].low)


def test_one_cluster_has_a_value_and_no_interval():
    result = bootstrap(make_tally({"hits": [1], "count": [2]}), share).estimates["overall"]["share"]
    assert result.value == 0.5
    assert np.isnan(result.low)
    assert result.excludes_zero is None


def cell(step, condition, hits, clusters=None):
    tally = make_tally({"hits": hits, "count": np.full(len(hits), 10)}, clusters=clusters)
    replicates = bootstrap(tally, share, draws=Draws(500)).replicates
    return Cell("run", "m", 10, 0, step, "bbq", condition, replicates)


def find(comparisons, kind, condition, step):
    (one,) = [c for c in comparisons if (c.kind, c.condition, c.step) == (kind, condition, step)]
    return one


def test_effects_growth_and_change_by_hand():
    cells = [
        cell(0, "Q", [5, 5, 8, 2]),
        cell(0, "Q+IF", [5, 4, 8, 1]),
        cell(20, "Q", [6, 6, 9, 3]),
        cell(20, "Q+IF", [1, 1, 4, 0]),
    ]
    found = compare(cells)
    assert find(found, "effect", "Q+IF", 0).estimate.value == pytest.approx((20 - 18) / 40)
    assert find(found, "effect", "Q+IF", 20).estimate.value == pytest.approx((24 - 6) / 40)
    growth = find(found, "growth", "Q+IF", 20)
    assert growth.from_step == 0
    assert growth.estimate.value == pytest.approx((18 - 2) / 40)
    assert find(found, "change", "Q", 20).estimate.value == pytest.approx(4 / 40)
    assert find(found, "change", "Q+IF", 20).estimate.value == pytest.approx(-12 / 40)
    assert len(found) == 5


def test_pairing_removes_what_the_conditions_share():
    """Q+IF is .1 below Q in every template: the effect has no spread though each metric has."""
    hits = np.random.default_rng(0).integers(1, 10, 30)
    found = compare([cell(0, "Q", hits), cell(0, "Q+IF", hits - 1)])
    effect = find(found, "effect", "Q+IF", 0).estimate
    assert (effect.low, effect.high) == (pytest.approx(0.1), pytest.approx(0.1))
    assert effect.excludes_zero


def test_different_items_leave_a_comparison_undefined_and_say_so():
    found = compare(
        [cell(0, "Q", [1, 2, 3]), cell(0, "Q+IF", [1, 2, 4], clusters=["t000", "t001", "t009"])]
    )
    effect = find(found, "effect", "Q+IF", 0)
    assert np.isnan(effect.estimate.value)
    assert "different items" in effect.reason


def test_a_metric_undefined_in_one_cell_leaves_the_comparison_undefined():
    population = b"same"
    one = Replicates(population, {"share": np.full(11, 0.3)})
    other = Replicates(population, {"share": np.full(11, np.nan)})
    found = compare(
        [Cell("r", "m", 1, 0, 0, "bbq", "Q", one), Cell("r", "m", 1, 0, 0, "bbq", "Q+IF", other)]
    )
    assert np.isnan(found[0].estimate.value)
    assert "undefined" in found[0].reason


@pytest.mark.parametrize("per_category", [5, 25])
def test_intervals_cover_the_truth(per_category):
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


def test_intervals_of_an_effect_cover_it_and_find_what_is_detectable():
    """Shares of yes of 30 templates under Q and Q+IF, which answer alike; 300 worlds."""
    rng = np.random.default_rng(12)
    num, size = 300, 20
    covered, errors, detected = 0, [], []
    for world in range(num):
        rates = rng.beta(2, 2, 30)
        hits = rng.binomial(size, rates)
        falls = rng.binomial(hits, rng.uniform(0, 0.4, 30))  # a fifth of the yes is taken back
        draws = Draws(400, seed=world)
        cells = []
        for condition, found in (("Q", hits), ("Q+IF", hits - falls)):
            tally = make_tally({"hits": found, "count": np.full(30, size)})
            replicates = bootstrap(tally, share, draws=draws).replicates
            cells.append(Cell("run", "m", 10, 0, 0, "bbq", condition, replicates))
        effect = find(compare(cells), "effect", "Q+IF", 0)
        covered += effect.estimate.low <= 0.1 <= effect.estimate.high
        errors.append(effect.error)
        assert effect.degrees == 29
        detected.append(effect.estimate.value)
    assert 0.91 <= covered / num <= 0.98
    # The bootstrap's standard error is what effects really vary by from world to world.
    assert np.mean(errors) == pytest.approx(np.std(detected), rel=0.1)


@pytest.mark.parametrize("units", [np.ones(7), np.repeat([1.0, 3.0, 20.0], 8)])
def test_every_resample_stands_for_as_many_units_as_there_are(units):
    """So that pooled categories keep their share of the whole, though n - 1 of n are drawn."""
    weights = Draws(200).weights("c", units)
    assert weights.shape == (201, len(units))
    np.testing.assert_array_equal(weights[0], units)
    np.testing.assert_allclose(weights.sum(axis=1), units.sum())
    assert len(np.unique(weights[1:], axis=0)) > 150


def test_degrees_of_freedom_are_the_units_less_one_a_category():
    tally = make_tally({"hits": np.ones(6), "count": np.ones(6)}, strata=[0, 0, 0, 1, 1, 2])
    assert bootstrap(tally, share, draws=Draws(5)).replicates.degrees == 3
    only = bootstrap(tally, share, pooled=["c0"], draws=Draws(5)).replicates
    assert only.degrees == 2
    weighted = make_tally({"hits": [1, 0], "count": [1, 1]}, units=[20, 5])
    assert bootstrap(weighted, share, draws=Draws(5)).replicates.degrees == 24


def test_ten_thousand_resamples_of_a_full_bbq_checkpoint_take_under_two_seconds(tmp_path):
    """All metrics of 11 categories of 30 templates, overall and by category."""
    size = Size(categories=tuple(f"c{k}" for k in range(11)), templates=30, blocks=1)
    path = record_cell(tmp_path, "bbq", "Q", 0.5, size)
    tally = BBQ.tally(pq.read_table(path).to_pandas())
    assert len(tally.clusters) == 330
    start = time.process_time()
    bootstrap(tally, BBQ.compute, BBQ.overall_categories(tally.categories), Draws(10000))
    assert time.process_time() - start < 2
