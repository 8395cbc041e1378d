"""Tests, corrections and power, computed by scipy and statsmodels.

statsmodels is imported in the functions that call it: importing it takes a second.
"""

import math
import re
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from scipy import special

from selfcorrect.evaluate.statistics.bootstrap import CONFIDENCE, ROUNDING
from selfcorrect.recipes.foundation.garbage import garbage_of_new_objects

POWER = 0.8
# Fewer seeds do not allow the mixed model to estimate a variance between them.
MIN_SEEDS_OF_MIXED_MODEL = 5


def wald_p(value: float, error: float, degrees: int) -> float:
    """Return the two-sided p of value / error under Student's t; NaN without spread or degrees."""
    if not error > 0 or degrees < 1:
        return float("nan")
    return float(2 * special.stdtr(degrees, -abs(value / error)))


def mean_over_seeds(values: Sequence[float]) -> dict[str, float]:
    """Return the mean of one number per seed with Student's interval and p.

    They are those of scipy's `ttest_1samp`, which takes a millisecond for each of many tests.

    Keys: value, low, high, standard_error, p_value. All but the value are NaN for fewer than two
    seeds, or seeds that all agree.
    """
    seeds = np.asarray(values, dtype=float)
    result = dict.fromkeys(("low", "high", "standard_error", "p_value"), float("nan"))
    result["value"] = float(seeds.mean()) if len(seeds) else float("nan")
    if len(seeds) < 2 or np.ptp(seeds) <= ROUNDING * max(1.0, float(np.abs(seeds).max())):
        return result
    degrees = len(seeds) - 1
    error = float(seeds.std(ddof=1) / np.sqrt(len(seeds)))
    half = float(special.stdtrit(degrees, (1 + CONFIDENCE) / 2)) * error
    return result | {
        "low": result["value"] - half,
        "high": result["value"] + half,
        "standard_error": error,
        "p_value": wald_p(result["value"], error, degrees),
    }


def mixed_slope(
    x: Sequence[np.ndarray], y: Sequence[np.ndarray]
) -> tuple[dict[str, float] | None, str]:
    """Fit the slope of y over x with a random line per seed: statsmodels' MixedLM by REML.

    `x` and `y` hold one array per seed. The interval and p use Student's t with seeds - 1 degrees
    of freedom, since MixedLM's normal quantiles are too narrow for few seeds. Returns the keys of
    `mean_over_seeds` and ""; or None and the reason where the model is not needed (equal x, where
    it gives the t test over slopes after a tenth of a second) or cannot be fitted well: few seeds,
    too few points, no convergence, or a variance at its boundary.
    """
    if len(x) < MIN_SEEDS_OF_MIXED_MODEL:
        return None, f"fewer than {MIN_SEEDS_OF_MIXED_MODEL} seeds"
    if min(len(np.unique(positions)) for positions in x) < 3:
        return None, "a seed with fewer than three points"
    if all(np.array_equal(positions, x[0]) for positions in x):
        return None, "every seed has the same x, where it is the t test"
    xs, ys = np.concatenate(x), np.concatenate(y)
    spread_x, spread_y = float(xs.std()), float(ys.std())
    if not spread_y > 0:
        return None, "no spread in the values"
    from statsmodels.regression.mixed_linear_model import MixedLM

    lines = np.column_stack([np.ones(len(xs)), (xs - xs.mean()) / spread_x])
    seeds = np.repeat(np.arange(len(x)), [len(positions) for positions in x])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = MixedLM(ys / spread_y, lines, groups=seeds, exog_re=lines)
            fit = model.fit(reml=True)
            error = float(fit.bse_fe[1])
        except (np.linalg.LinAlgError, ValueError):
            return None, "the mixed model cannot be fitted"
    # MixedLM warns for each optimiser that fails; only whether the last one converged matters.
    if not fit.converged:
        return None, "the mixed model does not converge"
    doubts = [warning for warning in caught if re.search("boundary|Hessian", str(warning.message))]
    smallest = np.linalg.eigvalsh(np.asarray(fit.cov_re))[0]
    if doubts or not error > 0 or smallest < 1e-6 * fit.scale:
        return None, "a variance of the mixed model at its boundary"
    scale = spread_y / spread_x
    value, error = float(fit.fe_params[1]) * scale, error * scale
    half = float(special.stdtrit(len(x) - 1, (1 + CONFIDENCE) / 2)) * error
    return {
        "value": value,
        "low": value - half,
        "high": value + half,
        "standard_error": error,
        "p_value": wald_p(value, error, len(x) - 1),
    }, ""


def detectable(error: float, degrees: int) -> float:
    """Return the smallest true difference that a two-sided 5 % t test finds with 80 % power.

    `error` is the standard error of the difference. statsmodels' `TTestPower` on degrees + 1
    observations gives the difference in standard deviations of one observation.
    """
    if not error > 0 or degrees < 1:
        return float("nan")
    return _smallest_effect(degrees) * math.sqrt(degrees + 1) * error


@cache
def _smallest_effect(degrees: int) -> float:
    from statsmodels.stats.power import TTestPower

    # With many degrees of freedom the t distribution is normal, and the solver may fail.
    n = min(degrees, 5000) + 1
    solved = TTestPower().solve_power(nobs=n, alpha=1 - CONFIDENCE, power=POWER)
    return float(np.ravel(solved)[0]) * float(np.sqrt(n / (degrees + 1)))


def correct(rows: Sequence[dict[str, Any]]) -> None:
    """Set `p_adjusted` of the rows, in place: Holm's correction within each run and `family`.

    Rows without a family or without a p-value get None and count in no family.
    """
    from statsmodels.stats.multitest import multipletests

    families: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        row["p_adjusted"] = None
        if row["family"] is not None and row["p_value"] is not None:
            families.setdefault((row["run"], row["family"]), []).append(row)
    with garbage_of_new_objects():  # multipletests collects garbage each time
        for family in families.values():
            adjusted = multipletests([row["p_value"] for row in family], method="holm")[1]
            for row, p in zip(family, adjusted, strict=True):
                row["p_adjusted"] = float(p)
