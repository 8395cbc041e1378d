"""At which RLHF step does a metric reach a threshold: no bias, or a value of one's own?

Between kept checkpoints the metric is taken to move on a straight line; the first crossing counts,
from the side on which the first checkpoint lies. The same is asked of every resample of the items,
and a resample that never gets there says "not reached", which is larger than any step: so the ends
of the interval may be "not reached" too. It is about these checkpoints and other items; other
training seeds are rows of their own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from selfcorrect.evaluate.statistics.bootstrap import CONFIDENCE, LARGEST_UNDEFINED_SHARE, Cell
from selfcorrect.evaluate.statistics.cells import experiment_named
from selfcorrect.evaluate.statistics.series import (
    MATCH_STATS,
    Quantity,
    Study,
    over_training,
    studies,
)

NOT_REACHED = "not reached"
# The keys of a row and what they say.
ROW: dict[str, str] = {
    "run": "the run's name",
    "model": "the model",
    "parameters": "its number of parameters",
    "seed": "training seed",
    "experiment": "bbq, winogender, ...",
    "condition": "the condition; Match stats, which asks for no parity, has no row",
    "metric": "the headline metric, or expected_<headline>",
    "threshold": "the metric's value without bias, or the one asked for",
    "starts": "above, below or at the threshold, at the first checkpoint",
    "value": "step, a fraction between kept steps; 'not reached'; null: undefined",
    "low": "lower end of the 95 % interval over items, in the same way",
    "high": "upper end, in the same way",
    "share_reached": "share of resamples that reach the threshold",
    "first": "first step of the line",
    "last": "last step of the line: nothing is known beyond",
    "num_points": "checkpoints behind it",
    "left_out": "checkpoints that the line lacks, each with its reason",
    "undefined_because": "why there is no value, or no interval; null otherwise",
}
_TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)


def threshold_steps(
    cells: Sequence[Cell], thresholds: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """A row for each training run, experiment and condition; see ROW.

    `thresholds` gives an experiment's threshold in its headline metric in place of no bias.
    """
    rows = []
    for study in studies(cells):
        no_bias = experiment_named(study.experiment).DESCRIPTIONS[study.headline][2]
        threshold = (thresholds or {}).get(study.experiment, no_bias)
        for quantity in study.quantities():
            if quantity.name == "effect" or quantity.condition == MATCH_STATS:
                continue
            for model in study.models:
                for seed in study.seeds(model):
                    found = _row(study, quantity, model, seed, threshold)
                    rows.append({name: found[name] for name in ROW})
    return rows


def crossing(steps: np.ndarray, values: np.ndarray, threshold: float, side: float) -> np.ndarray:
    """The first step at which each column of `values` (P, N) reaches `threshold`, shape (N,).

    `side` is 1 where values start above, -1 where below; `steps` (P,) rise. Never: inf. A column
    with a NaN: NaN.
    """
    above = side * (values - threshold)
    reached = above <= 0
    place = reached.argmax(axis=0)
    columns = np.arange(values.shape[1])
    before = np.maximum(place - 1, 0)
    last, now = above[before, columns], above[place, columns]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(place > 0, last / (last - now), 0.0)
    found = steps[before] + share * (steps[place] - steps[before])
    found = np.where(reached.any(axis=0), found, np.inf)
    return np.where(np.isnan(above).any(axis=0), np.nan, found)


def _row(
    study: Study, quantity: Quantity, model: str, seed: int, threshold: float | None
) -> dict[str, Any]:
    line = over_training(study, quantity, model, seed)
    row: dict[str, Any] = dict.fromkeys(ROW) | {
        "run": study.run,
        "model": model,
        "parameters": study.parameters[model],
        "seed": seed,
        "experiment": study.experiment,
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
    if line.lacking is not None:
        return row | {"undefined_because": line.lacking}
    start = line.y[0, 0] - threshold
    row["starts"] = "at" if start == 0 else "above" if start > 0 else "below"
    steps = crossing(line.x, line.y, threshold, float(np.sign(start)) or 1.0)
    row["value"] = _plain(steps[0]) if start else float(line.x[0])
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
    return row | {"low": _plain(low), "high": _plain(high)}


def _plain(step: float) -> float | str:
    return NOT_REACHED if np.isinf(step) else float(step)
