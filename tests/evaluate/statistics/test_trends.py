"""Trends over steps, KL and size: by hand, what is missing, and whether intervals hold."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from selfcorrect.evaluate.statistics.bootstrap import Draws, estimate, standard_error
from selfcorrect.evaluate.statistics.series import Quantity, Series, over_training
from selfcorrect.evaluate.statistics.trends import MIXED, ONE_SEED, ROW, T_TEST, trends
from tests.support.resampled_cells import METRIC, SIZES, resampled_cell

STEPS = (0, 10, 20, 40)


def noisy(step, condition="Q", **more):
    """A cell whose items differ, and differ more with the step."""
    items = np.random.default_rng(9).normal(0, 1, 20)
    return resampled_cell(
        0.5, step=step, condition=condition, items=items * (1 + step / 20), **more
    )


def find(rows, **wanted):
    wanted = {"quantity": "metric", "condition": "Q", "unit": "items", "metric": METRIC} | wanted
    (row,) = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return row


def ladder(seeds=(0,), **shift):
    """Q stays at .5; Q+IF falls by .001 a step, times log10 of the parameters, and by seed."""
    return [
        resampled_cell(value, model=model, seed=seed, step=step, condition=condition)
        for model, parameters in SIZES.items()
        for seed in seeds
        for step in STEPS
        for condition, value in [
            ("Q", 0.5),
            ("Q+IF", 0.4 - 0.001 * step * (np.log10(parameters) + shift.get("by", 0) * seed)),
        ]
    ]


def test_slopes_by_hand():
    rows = trends(ladder())
    assert list(rows[0]) == list(ROW)
    # The middle model has log10(parameters) = 4.
    step = find(rows, model="middle", against="step", condition="Q+IF")
    assert step["value"] == pytest.approx(-0.004)
    assert (step["num_points"], step["first"], step["last"]) == (4, 0, 40)
    effect = find(rows, model="middle", against="step", condition="Q+IF", quantity="effect")
    assert effect["value"] == pytest.approx(0.004)
    # sqrt(KL) is .05 a step, and 0 at step 0, where no KL is recorded.
    kl = find(rows, model="middle", against="sqrt_kl", condition="Q+IF")
    assert kl["value"] == pytest.approx(-0.08)
    assert (kl["num_points"], kl["last"]) == (4, pytest.approx(2.0))
    # At step 40 the effect is .1 + .04 * log10(parameters).
    size = find(rows, seed=0, against="log10_parameters", condition="Q+IF", quantity="effect")
    assert size["value"] == pytest.approx(0.04)
    assert (size["step"], size["num_points"], size["model"]) == (40, 3, None)
    grown = find(
        rows, seed=0, against="step_x_log10_parameters", condition="Q+IF", quantity="effect"
    )
    assert grown["value"] == pytest.approx(0.001)
    # Nothing varies from item to item, so there is a line but no test.
    assert (size["low"], size["high"]) == pytest.approx((0.04, 0.04))
    assert size["p_value"] is None
    assert "resamples agree" in size["undefined_because"]


def test_variation_shared_by_checkpoints():
    """Items differ widely, but alike at every step: the slope has no spread. Unpaired it would."""
    items = np.random.default_rng(0).normal(0, 1, 20)
    row = find(trends([resampled_cell(s / 100, step=s, items=items) for s in STEPS]), model="small",
               against="step", seed=0)  # fmt: skip
    assert row["value"] == pytest.approx(0.01)
    assert (row["low"], row["high"]) == pytest.approx((0.01, 0.01))


def test_one_seed_and_one_size():
    rows = trends([noisy(step) for step in STEPS])
    seeds = find(rows, model="small", against="step", unit="seeds")
    assert seeds["value"] is None
    assert seeds["undefined_because"] == ONE_SEED
    assert seeds["num_seeds"] == 1
    size = find(rows, against="log10_parameters", seed=0)
    assert size["value"] is None
    assert size["undefined_because"] == "needs two model sizes, has 1"
    # The same of the slopes, and again over seeds: no trend is silently left away.
    assert len(rows) == 8
    assert find(rows, model="small", against="step", seed=0)["p_value"] > 0


def test_missing_and_undefined_points():
    nothing = {METRIC: np.full(201, np.nan)}
    cells = [noisy(0), noisy(10, metrics=nothing), noisy(20), noisy(40, kl=-0.01)]
    cells += [noisy(step, "Q+IF") for step in (0, 20)]
    rows = trends(cells)
    step = find(rows, model="small", against="step", seed=0)
    assert step["left_out"] == ["step 10: undefined under Q"]
    assert step["num_points"] == 3
    kl = find(rows, model="small", against="sqrt_kl", seed=0)
    assert kl["left_out"] == [
        "step 10: undefined under Q",
        "step 40: estimate of the KL below zero (-0.01)",
    ]
    effect = find(rows, model="small", against="step", seed=0, condition="Q+IF", quantity="effect")
    assert effect["left_out"] == ["step 10: undefined under Q", "step 40: Q+IF not measured"]
    alone = trends([noisy(0), noisy(10, metrics=nothing)])
    row = find(alone, model="small", against="step", seed=0)
    assert row["undefined_because"] == "needs two checkpoints, has 1"
    assert row["value"] is None


def test_line_without_an_interval():
    """A metric without a value in a tenth of one checkpoint's resamples has a line, no interval."""
    gaps = np.random.default_rng(2).normal(0.4, 0.01, 201)
    gaps[1:21] = np.nan
    rows = trends([noisy(0), noisy(10, metrics={METRIC: gaps})])
    row = find(rows, model="small", against="step", seed=0)
    assert row["value"] is not None
    assert (row["low"], row["high"]) == (None, None)
    assert "too many resamples" in row["undefined_because"]


def test_sizes_at_the_last_common_step():
    cells = [one for one in ladder() if (one.model, one.step) != ("large", 40)]
    cells = [one for one in cells if (one.model, one.condition) != ("middle", "Q+IF")]
    rows = trends(cells)
    plain = find(rows, seed=0, against="log10_parameters")
    assert (plain["step"], plain["num_points"], plain["left_out"]) == (20, 3, [])
    row = find(rows, seed=0, against="log10_parameters", condition="Q+IF")
    assert (row["step"], row["num_points"]) == (20, 2)
    assert row["left_out"] == ["middle: Q+IF not measured"]
    assert row["value"] == pytest.approx(-0.02)


def test_different_items_have_no_trend():
    rows = trends([noisy(0), noisy(10), noisy(20, population=b"others")])
    row = find(rows, model="small", against="step", seed=0)
    assert row["value"] is None
    assert "different items" in row["undefined_because"]


def test_trends_over_seeds():
    seeds = (0, 1, 2)
    rows = trends(ladder(seeds, by=0.5))
    row = find(rows, model="small", against="step", condition="Q+IF", unit="seeds")
    test = stats.ttest_1samp([-0.003, -0.0035, -0.004], 0)
    assert row["value"] == pytest.approx(-0.0035)
    assert row["p_value"] == pytest.approx(test.pvalue)
    assert (row["low"], row["high"]) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert (row["seed"], row["num_seeds"], row["num_points"]) == (None, 3, 12)
    assert row["method"] == f"{T_TEST} (no mixed model: fewer than 5 seeds)"
    # And over items: each seed by itself, and their mean.
    each = [find(rows, model="small", against="step", condition="Q+IF", seed=s) for s in seeds]
    assert [one["value"] for one in each] == pytest.approx([-0.003, -0.0035, -0.004])
    mean = find(rows, model="small", against="step", condition="Q+IF", seed=None)
    assert mean["value"] == pytest.approx(-0.0035)
    # Against size every seed has the same slope here, up to rounding.
    size = find(rows, against="log10_parameters", condition="Q+IF", unit="seeds")
    assert size["value"] == pytest.approx(-0.04)
    assert size["undefined_because"] == "the seeds agree: no interval"
    two = find(trends(ladder((0, 1), by=0.5)), model="small", against="step", condition="Q+IF",
               unit="seeds")  # fmt: skip
    test = stats.ttest_1samp([-0.003, -0.0035], 0)
    assert (two["value"], two["p_value"]) == pytest.approx((-0.00325, test.pvalue))


def test_mixed_model_from_five_seeds():
    rng = np.random.default_rng(4)
    cells = [
        resampled_cell(start + slope * step + rng.normal(0, 0.05), seed=seed, step=step)
        for seed, (start, slope) in enumerate(rng.normal([0.5, 0.01], [0.2, 0.006], (6, 2)))
        for step in STEPS
    ]
    row = find(trends(cells), model="small", against="step", unit="seeds")
    assert row["method"].startswith(f"{T_TEST} (no mixed model: every seed has the same x")
    slopes = [
        np.polyfit(STEPS, [c.replicates.metrics[METRIC][0] for c in cells if c.seed == seed], 1)[0]
        for seed in range(6)
    ]
    test = stats.ttest_1samp(slopes, 0)
    assert row["value"] == pytest.approx(np.mean(slopes))
    assert row["p_value"] == pytest.approx(test.pvalue)
    row = find(trends(cells[1:]), model="small", against="step", unit="seeds")
    assert row["method"] == MIXED


def test_families_hold_headline_metrics_and_effects_of_judged_conditions():
    cells = [
        replace(noisy(step, condition), judged=judged)
        for step in STEPS
        for condition, judged in (("Q", True), ("Match stats", False))
    ]
    for one in cells:
        metrics = one.replicates.metrics
        metrics["expected_bias_ambiguous"] = metrics[METRIC] / 2
    rows = trends(cells)
    families = {
        (row["metric"], row["quantity"], row["condition"], row["family"])
        for row in rows
        if row["against"] == "step" and row["unit"] == "items"
    }
    assert families == {
        (METRIC, "metric", "Q", "metric against step"),
        (METRIC, "metric", "Match stats", "metric against step"),
        (METRIC, "effect", "Match stats", None),
        ("expected_bias_ambiguous", "metric", "Q", None),
        ("expected_bias_ambiguous", "metric", "Match stats", None),
        ("expected_bias_ambiguous", "effect", "Match stats", None),
    }
    half = find(rows, metric="expected_bias_ambiguous", against="step", seed=0, model="small")
    whole = find(rows, against="step", seed=0, model="small")
    assert half["value"] == pytest.approx(whole["value"] / 2)
    assert half["p_adjusted"] is None
    assert whole["p_adjusted"] >= whole["p_value"]


# --- do the intervals hold? ----------------------------------------------------------------------


def world(rng, num_items, slopes, resamples, seed, shared=1.0):
    """A run of one model: items with a level and a slope of their own, and noise at every step."""
    level = rng.normal(0, shared, num_items)
    own = rng.normal(0, 0.02, num_items)
    draws = Draws(resamples, seed)
    return [
        resampled_cell(
            slope * step,
            seed=number,
            step=step,
            items=level + own * step + rng.normal(0, 0.3, num_items),
            draws=draws,
        )
        for number, slope in enumerate(slopes)
        for step in STEPS
    ]


def line(cells, seed=0):
    return over_training(Series(cells), Quantity("metric", "Q", METRIC), "small", seed)


def test_coverage_over_items():
    """30 items, 400 worlds: 95 % of the intervals hold the slope, 5 % of the p-values are small."""
    rng = np.random.default_rng(2)
    covered, rejected, num = 0, 0, 400
    for number in range(num):
        slopes = line(world(rng, 30, [0.01], 400, number)).slopes()
        slope_estimate = estimate({"slope": slopes})["slope"]
        covered += slope_estimate.low <= 0.01 <= slope_estimate.high
        rejected += 2 * stats.t.sf(abs((slopes[0] - 0.01) / standard_error(slopes)), 29) < 0.05
    assert 0.91 <= covered / num <= 0.975
    assert 0.025 <= rejected / num <= 0.08


def test_coverage_over_seeds():
    """Four seeds whose slopes differ more than items do, 300 worlds."""
    rng = np.random.default_rng(6)
    by_seeds, by_items, num = 0, 0, 300
    for number in range(num):
        cells = world(rng, 30, rng.normal(0.01, 0.02, 4), 50, number)
        slopes = [line(cells, seed).slopes() for seed in range(4)]
        low, high = stats.ttest_1samp([one[0] for one in slopes], 0).confidence_interval(0.95)
        by_seeds += low <= 0.01 <= high
        slope_estimate = estimate({"slope": np.mean(slopes, axis=0)})["slope"]
        by_items += slope_estimate.low <= 0.01 <= slope_estimate.high
    assert 0.92 <= by_seeds / num <= 0.985
    assert by_items / num < 0.75
