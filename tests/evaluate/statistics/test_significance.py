"""Tests of scipy and statsmodels behind one name each: by hand, and by what they promise."""

import numpy as np
import pytest
from scipy import stats

from selfcorrect.evaluate.statistics.bootstrap import standard_error
from selfcorrect.evaluate.statistics.significance import (
    correct,
    detectable,
    mean_over_seeds,
    mixed_slope,
    wald_p,
)

STEPS = np.array([0.0, 5, 10, 20, 40])


def test_wald_p():
    assert wald_p(2.0, 1.0, 10) == pytest.approx(2 * (1 - stats.t.cdf(2, 10)))
    assert wald_p(-2.0, 1.0, 10) == wald_p(2.0, 1.0, 10)
    assert np.isnan(wald_p(2.0, 0.0, 10))
    assert np.isnan(wald_p(2.0, np.nan, 10))
    assert np.isnan(wald_p(2.0, 1.0, 0))


def test_standard_error_up_to_rounding():
    assert standard_error(np.array([0.3, 0.1 + 0.2, 0.3, 0.3])) == 0
    assert standard_error(np.array([2.0, 1.0, 3.0])) == pytest.approx(np.sqrt(2))
    assert np.isnan(standard_error(np.array([np.nan, 1.0, 3.0])))


def test_mean_over_seeds_by_hand():
    mean = mean_over_seeds([1.0, 2.0, 6.0])
    error = np.std([1, 2, 6], ddof=1) / np.sqrt(3)
    half = stats.t.ppf(0.975, 2) * error
    assert mean["value"] == pytest.approx(3)
    assert mean["low"] == pytest.approx(3 - half)
    assert mean["high"] == pytest.approx(3 + half)
    assert mean["p_value"] == pytest.approx(2 * stats.t.sf(3 / error, 2))
    assert np.isnan(mean_over_seeds([1.0])["low"])
    assert np.isnan(mean_over_seeds([1.0, 1.0])["p_value"])
    assert np.isnan(mean_over_seeds([])["value"])


def seeds(number, rng, spread=0.01, noise=0.05, steps=STEPS):
    slopes = rng.normal(0.02, spread, number)
    return [steps] * number, [rng.normal(0, 0.1) + b * steps + rng.normal(0, noise, len(steps))
                              for b in slopes]  # fmt: skip


def test_mixed_model_of_equal_designs():
    """It equals the t test over slopes, so it is not fitted unless x differs a little."""
    x, y = seeds(6, np.random.default_rng(0))
    assert mixed_slope(x, y) == (None, "every seed has the same x, where it is the t test")
    fitted, reason = mixed_slope([*x[1:], x[0] + 1e-6], [*y[1:], y[0]])
    assert reason == ""
    plain = mean_over_seeds([np.polyfit(a, b, 1)[0] for a, b in zip(x, y, strict=True)])
    for key, value in plain.items():
        assert fitted[key] == pytest.approx(value, rel=1e-3)


def test_mixed_model_weighs_seeds():
    """A seed of three close steps says little of the slope; a plain mean would follow it."""
    x, y = seeds(8, np.random.default_rng(1), spread=0.005, noise=0.02)
    short = np.array([0.0, 1.0, 2.0])
    slopes = [np.polyfit(a, b, 1)[0] for a, b in zip(x, y, strict=True)]
    fitted, _ = mixed_slope([*x, short], [*y, np.array([0.2, 0.15, 0.17])])
    plain = mean_over_seeds([*slopes, -0.015])
    assert abs(fitted["value"] - np.mean(slopes)) < 0.5 * abs(plain["value"] - np.mean(slopes))


@pytest.mark.parametrize(
    ("number", "spread", "steps", "reason"),
    [
        (4, 0.01, STEPS, "fewer than 5 seeds"),
        (6, 0.01, STEPS[:2], "fewer than three points"),
        (6, 0.0, STEPS, "mixed model"),  # no variance between slopes: at the boundary
    ],
)
def test_mixed_model_that_cannot_be_fitted(number, spread, steps, reason):
    rng = np.random.default_rng(3)
    x = [steps + 1e-6 * seed for seed in range(number)]
    y = [0.02 * steps + rng.normal(0, 0.1, len(steps)) + rng.normal(0, spread) * steps for _ in x]
    fitted, why = mixed_slope(x, y)
    assert fitted is None
    assert reason in why


def test_holm_by_hand():
    def row(p, family="f", run="r"):
        return {"run": run, "family": family, "p_value": p}

    rows = [row(0.01), row(0.04), row(0.03), row(None), row(0.001, None), row(0.02, "other")]
    rows += [row(0.02, run="second")]
    correct(rows)
    adjusted = [one["p_adjusted"] for one in rows]
    # Sorted .01, .03, .04 times 3, 2, 1, and never less than the one before.
    assert adjusted[:3] == pytest.approx([0.03, 0.06, 0.06])
    assert adjusted[3:5] == [None, None]
    assert adjusted[5:] == pytest.approx([0.02, 0.02])


@pytest.mark.parametrize("num", [4, 40])
def test_detectable_difference(num):
    """Differences of `num` items with a true mean as large as what their error says."""
    rng = np.random.default_rng(5)
    effect = detectable(1 / np.sqrt(num), num - 1)
    samples = rng.normal(effect, 1, (4000, num))
    rejected = stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05
    assert rejected.mean() == pytest.approx(0.8, abs=0.025)
    assert detectable(1.0, 30_000) == pytest.approx(stats.norm.ppf([0.975, 0.8]).sum(), rel=1e-3)
    assert np.isnan(detectable(0.0, 10))
    assert np.isnan(detectable(np.nan, 10))
