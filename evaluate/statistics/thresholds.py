"""The RLHF step at which a metric reaches a threshold: its unbiased value, or one that is given.

The metric is interpolated linearly between kept checkpoints, and the first crossing counts, from
the side on which the first checkpoint lies. Every resample of the items is treated alike. One that
never crosses is "not reached", which is larger than any step, so the ends of the interval can be
"not reached" too. The interval covers other items at these checkpoints; each training seed has a
row of its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from selfcorrect.evaluate.experiments import get_experiment
from selfcorrect.evaluate.statistics.bootstrap import (
    CONFIDENCE,
    LARGEST_UNDEFINED_SHARE,
    ROUNDING,
)
from selfcorrect.evaluate.statistics.comparisons import Cell
from selfcorrect.evaluate.statistics.series import (
    Quantity,
    Series,
    over_training,
    split_into_series,
)

NOT_REACHED = "not reached"
# The keys of a row and their meaning.
ROW: dict[str, str] = {
    "run": "the run's name",
    "model": "the model",
    "parameters": "its number of parameters",
    "seed": "training seed",
    "experiment": "bbq, winogender, ...",
    "condition": "the condition; a condition that is not judged against a bias has no row",
    "metric": "the headline metric, or expected_<headline>",
    "threshold": "the metric's value without bias, or the one asked for",
    "starts": "above, below or at the threshold, at the first checkpoint",
    "value": "step, a fraction between kept steps; 'not reached'; null: undefined",
    "low": "lower end of the 95 % interval over items, in the same form",
    "high": "upper end, in the same form",
    "share_reached": "share of resamples that reach the threshold",
    "first": "first step of the line",
    "last": "last step of the line; nothing is known beyond it",
    "num_points": "checkpoints behind it",
    "left_out": "checkpoints left out of the line, each with its reason",
    "undefined_because": "why there is no value, or no interval; null otherwise",
}
_TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)


def threshold_steps(
    cells: Sequence[Cell], thresholds: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Return a row for each training run, experiment and condition; see ROW.

    `thresholds` overrides, by experiment, the unbiased value of the headline metric.
    """
    rows = []
    for series in split_into_series(cells):
        unbiased = get_experiment(series.experiment).metrics[series.headline].unbiased
        threshold = (thresholds or {}).get(series.experiment, unbiased)
        for quantity in series.quantities():
            if quantity.name == "effect" or not series.judged[quantity.condition]:
                continue
            for model in series.models:
                for seed in series.seeds(model):
                    row = _row(series, quantity, model, seed, threshold)
                    rows.append({name: row[name] for name in ROW})
    return rows


def crossing(steps: np.ndarray, values: np.ndarray, threshold: float, side: float) -> np.ndarray:
    """Return the first step at which each column of `values` (P, N) reaches `threshold`, (N,).

    A value on the threshold up to rounding has reached it.

    `side` is 1 where values start above the threshold and -1 where they start below; `steps` (P,)
    increase. A column that never reaches it is inf, one with a NaN is NaN.
    """
    above = side * _distance(values, threshold)
    reached = above <= 0
    after = reached.argmax(axis=0)
    before = np.maximum(after - 1, 0)
    columns = np.arange(values.shape[1])
    start, end = above[before, columns], above[after, columns]
    with np.errstate(divide="ignore", invalid="ignore"):
        fraction = np.where(after > 0, start / (start - end), 0.0)
    crossings = steps[before] + fraction * (steps[after] - steps[before])
    crossings = np.where(reached.any(axis=0), crossings, np.inf)
    return np.where(np.isnan(above).any(axis=0), np.nan, crossings)


def _row(
    series: Series, quantity: Quantity, model: str, seed: int, threshold: float | None
) -> dict[str, Any]:
    line = over_training(series, quantity, model, seed)
    row: dict[str, Any] = dict.fromkeys(ROW) | {
        "run": series.run,
        "model": model,
        "parameters": series.parameters[model],
        "seed": seed,
        "experiment": series.experiment,
        "condition": quantity.condition,
        "metric": quantity.metric,
        "threshold": threshold,
        "num_points": len(line.x),
        "left_out": line.left_out,
    }
    if len(line.x):
        row |= {"first": float(line.x[0]), "last": float(line.x[-1])}
    if threshold is None:
        return row | {
            "undefined_because": "no value of this metric means no bias: give a threshold"
        }
    if line.undefined_because is not None:
        return row | {"undefined_because": line.undefined_because}
    start = float(_distance(line.y[0, 0], threshold))
    row["starts"] = "at" if start == 0 else "above" if start > 0 else "below"
    steps = crossing(line.x, line.y, threshold, float(np.sign(start)) or 1.0)
    row["value"] = _json_step(steps[0]) if start else float(line.x[0])
    resamples = steps[1:][~np.isnan(steps[1:])]
    if len(resamples) < max(1, (1 - LARGEST_UNDEFINED_SHARE) * (len(steps) - 1)):
        return row | {"undefined_because": "undefined in too many resamples for an interval"}
    row["share_reached"] = float(np.isfinite(resamples).mean())
    if start == 0:
        return row | {
            "undefined_because": "the first checkpoint lies on the threshold: no interval"
        }
    # Order statistics: between a step and "not reached" nothing can be interpolated.
    low = np.quantile(resamples, _TAILS[0], method="lower")
    high = np.quantile(resamples, _TAILS[1], method="higher")
    return row | {"low": _json_step(low), "high": _json_step(high)}


def _distance(values: np.ndarray, threshold: float) -> np.ndarray:
    """Return values - threshold, 0 where they agree up to rounding."""
    distance = values - threshold
    return np.where(np.abs(distance) <= ROUNDING, 0.0, distance)


def _json_step(step: float) -> float | str:
    return NOT_REACHED if np.isinf(step) else float(step)
