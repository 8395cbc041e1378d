"""Trends of metrics, and of the instruction's effects, over RLHF steps, KL and model size.

A trend is the slope of a least-squares line, a weighted sum of cells, and is computed for every
resample of the items. Its `unit` says what the interval covers:

- "items": items are resampled, training runs are fixed. Would these checkpoints show the trend on
  other items of the same kind? Checkpoints of a run share items and resamples, so what they have in
  common is not counted as evidence several times.
- "seeds": one slope per training seed, and the seeds are the sample. Would another training run
  show the trend on these items? Undefined with one seed.

See docs/reference/statistics.md. A row is a plain dict, see ROW.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from selfcorrect.evaluate.statistics.bootstrap import estimate, number_or_none, standard_error
from selfcorrect.evaluate.statistics.comparisons import Cell
from selfcorrect.evaluate.statistics.series import (
    Line,
    Quantity,
    Series,
    over_sizes,
    over_training,
    slopes_over_sizes,
    split_into_series,
)
from selfcorrect.evaluate.statistics.significance import (
    correct,
    mean_over_seeds,
    mixed_slope,
    wald_p,
)

# The keys of a row and their meaning; None (null) is undefined, never 0.
ROW: dict[str, str] = {
    "run": "the run's name",
    "model": "the model; null for a trend over models",
    "parameters": "its number of parameters; null as above",
    "seed": "training seed; null where several are combined",
    "experiment": "bbq, winogender, ...",
    "condition": "the condition",
    "metric": "the headline metric, or expected_<headline>",
    "quantity": "metric, or effect: metric(Q) - metric(condition), whose trend is an interaction",
    "against": "step, sqrt_kl, log10_parameters, or step_x_log10_parameters",
    "unit": "items or seeds: what is resampled or sampled",
    "num_seeds": "training seeds behind the row",
    "num_points": "points of the line, summed over combined seeds",
    "first": "smallest x of the line",
    "last": "largest x of the line",
    "step": "the step at which sizes are compared; null otherwise",
    "value": "slope: change per step, square root of a nat, or tenfold number of parameters",
    "low": "lower end of its 95 % interval",
    "high": "upper end",
    "standard_error": "of the slope, over the unit",
    "p_value": "two-sided, against no trend",
    "family": "the tests that are corrected together; null for expected_ metrics",
    "p_adjusted": "p_value after Holm's correction within the family",
    "method": "how interval and p-value were computed",
    "left_out": "points left out of the line, each with its reason",
    "undefined_because": "why there is no value, or no interval; null otherwise",
}
BOOTSTRAP = "least-squares line; percentile bootstrap over items, t test on its standard error"
T_TEST = "a least-squares line for each seed, t test over the seeds"
MIXED = "MixedLM (REML) with a random line for each seed, t with seeds - 1 degrees of freedom"
ONE_SEED = "one training seed only: how the trend varies with the seed is not known"


def trends(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Return the trends of headline metrics and of the instruction's effects on them; see ROW.

    Trends over steps and the square root of the KL are per model and seed; trends over size, and of
    the slope over steps over size, per seed; each is given over the seeds too. A trend that cannot
    be computed is a row without a value that says what is missing.
    """
    rows: list[dict[str, Any]] = []
    for series in split_into_series(cells):
        for quantity in series.quantities():
            for model in series.models:
                seeds = series.seeds(model)
                for against in ("step", "sqrt_kl"):
                    lines = {
                        seed: over_training(series, quantity, model, seed, against)
                        for seed in seeds
                    }
                    rows += _rows(series, quantity, model, against, lines, None)
            seeds = series.seeds()
            step = series.common_step(quantity)
            sized = {seed: over_sizes(series, quantity, seed, step) for seed in seeds}
            rows += _rows(series, quantity, None, "log10_parameters", sized, step)
            growing = {seed: slopes_over_sizes(series, quantity, seed) for seed in seeds}
            rows += _rows(series, quantity, None, "step_x_log10_parameters", growing, None)
    correct(rows)
    return [{name: row[name] for name in ROW} for row in rows]


# --- the rows ----------------------------------------------------------------------------------


def _rows(
    series: Series,
    quantity: Quantity,
    model: str | None,
    against: str,
    lines: Mapping[int, Line],
    step: int | None,
) -> list[dict[str, Any]]:
    """Return a row per seed over items, their mean over items, and a row over seeds."""
    family = f"{quantity.name} against {against}" if series.judges(quantity) else None
    shared = {
        "run": series.run,
        "model": model,
        "parameters": None if model is None else series.parameters[model],
        "experiment": series.experiment,
        "condition": quantity.condition,
        "metric": quantity.metric,
        "quantity": quantity.name,
        "against": against,
        "step": step,
    }
    slopes = {seed: line.slopes() for seed, line in lines.items() if line.undefined_because is None}
    rows = [
        shared
        | {"seed": seed, "num_seeds": 1, "left_out": line.left_out}
        | _over_items(slopes.get(seed), line.undefined_because, series.degrees, family)
        | _span([line])
        for seed, line in lines.items()
    ]
    together = shared | {"seed": None} | _span(list(lines.values())) | _left_out(lines)
    if len(slopes) > 1:
        mean = np.mean(list(slopes.values()), axis=0)
        name = None if family is None else f"{family}, mean over seeds"
        items = _over_items(mean, None, series.degrees, name)
        rows.append(together | {"num_seeds": len(slopes)} | items)
    name = None if family is None else f"{family}, over seeds"
    return [*rows, together | _over_seeds(lines, slopes, against, name)]


def _over_items(
    slopes: np.ndarray | None, reason: str | None, degrees: int, family: str | None
) -> dict[str, Any]:
    row: dict[str, Any] = {"unit": "items", "family": family, "method": BOOTSTRAP}
    if slopes is None:
        return row | _numbers({}) | {"undefined_because": reason}
    slope = estimate({"slope": slopes})["slope"]
    error = standard_error(slopes)
    numbers = {"value": slope.value, "low": slope.low, "high": slope.high, "standard_error": error}
    numbers["p_value"] = wald_p(slope.value, error, degrees)
    if np.isnan(slope.low):
        reason = "undefined in too many resamples for an interval"
    elif np.isnan(numbers["p_value"]):
        reason = "the resamples agree: no p-value"
    return row | _numbers(numbers) | {"undefined_because": reason}


def _over_seeds(
    lines: Mapping[int, Line], slopes: Mapping[int, np.ndarray], against: str, family: str | None
) -> dict[str, Any]:
    values = [float(replicates[0]) for replicates in slopes.values()]
    row: dict[str, Any] = {"unit": "seeds", "family": family, "num_seeds": len(values)}
    if len(values) < 2:
        reasons = {line.undefined_because for line in lines.values() if line.undefined_because}
        reason = "; ".join(sorted(reasons)) if reasons else ONE_SEED
        return row | _numbers({}) | {"method": T_TEST, "undefined_because": reason}
    numbers, method = mean_over_seeds(values), T_TEST
    if against in ("step", "sqrt_kl"):
        fitted_lines = [lines[seed] for seed in slopes]
        x, y = zip(*((line.x, line.y[:, 0]) for line in fitted_lines), strict=True)
        fitted, why_not = mixed_slope(x, y)
        method = f"{T_TEST} (no mixed model: {why_not})"
        if fitted is not None:
            numbers, method = fitted, MIXED
    agree = "the seeds agree: no interval" if np.isnan(numbers["low"]) else None
    return row | _numbers(numbers) | {"method": method, "undefined_because": agree}


def _numbers(numbers: Mapping[str, float]) -> dict[str, float | None]:
    names = ("value", "low", "high", "standard_error", "p_value")
    return {name: number_or_none(numbers.get(name, np.nan)) for name in names}


def _span(lines: Sequence[Line]) -> dict[str, Any]:
    x = np.concatenate([line.x for line in lines]) if lines else np.empty(0)
    ends = (float(x.min()), float(x.max())) if len(x) else (None, None)
    return {"num_points": len(x), "first": ends[0], "last": ends[1]}


def _left_out(lines: Mapping[int, Line]) -> dict[str, list[str]]:
    several = len(lines) > 1
    return {
        "left_out": [
            f"seed {seed}, {reason}" if several else reason
            for seed, line in lines.items()
            for reason in [*line.left_out, *([line.undefined_because] if several else [])]
            if reason is not None
        ]
    }
