"""Trends: does a metric, or the instruction's effect, change with RLHF steps, KL, and model size?

A trend is the slope of a least-squares line, hence a weighted sum of cells, and so is taken anew in
every resample of the items. What its interval speaks about is its `unit`:

- "items": the items are resampled, the training runs stay as they are. With other items of the same
  kind, would these very checkpoints show the trend? Checkpoints of a run share their items and the
  resamples, so what they have in common is not counted as evidence several times.
- "seeds": one slope a training seed, and the seeds are the sample. Would another training run show
  the trend, on these items? Undefined with one seed.

docs/reference/statistics.md says more. A row is a plain dict, see ROW.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from selfcorrect.evaluate.statistics.bootstrap import Cell, estimate, standard_error
from selfcorrect.evaluate.statistics.series import (
    Line,
    Quantity,
    Study,
    over_sizes,
    over_training,
    slopes_over_sizes,
    studies,
)
from selfcorrect.evaluate.statistics.significance import (
    correct,
    mean_over_seeds,
    mixed_slope,
    wald_p,
)

# The keys of a row and what they say; None (null) is undefined, never 0.
ROW: dict[str, str] = {
    "run": "the run's name",
    "model": "the model; null where the trend is one over models",
    "parameters": "its number of parameters; null as above",
    "seed": "training seed; null where several are taken together",
    "experiment": "bbq, winogender, ...",
    "condition": "the condition",
    "metric": "the headline metric, or expected_<headline>",
    "quantity": "metric, or effect: metric(Q) - metric(condition), whose trend is an interaction",
    "against": "step, sqrt_kl, log10_parameters, or step_x_log10_parameters",
    "unit": "items or seeds: what is resampled, or a sample",
    "num_seeds": "training seeds behind the row",
    "num_points": "points of the line; over all seeds taken together",
    "first": "smallest x of the line",
    "last": "largest x of the line",
    "step": "the step at which sizes are compared; null otherwise",
    "value": "slope: change a step, a square root of nat, or a tenfold number of parameters",
    "low": "lower end of its 95 % interval",
    "high": "upper end",
    "standard_error": "of the slope, over the unit",
    "p_value": "two-sided, against no trend",
    "family": "the tests that are corrected together; null for expected_ metrics",
    "p_adjusted": "p_value after Holm's correction within the family",
    "method": "how interval and p-value were made",
    "left_out": "points that the line lacks, each with its reason",
    "undefined_because": "why there is no value, or no interval; null otherwise",
}
BOOTSTRAP = "least-squares line; percentile bootstrap over items, t test on its standard error"
T_TEST = "a least-squares line for each seed, t test over the seeds"
MIXED = "MixedLM (REML) with a random line for each seed, t with seeds - 1 degrees of freedom"
ONE_SEED = "one training seed only: how the trend varies with the seed is not known"


def trends(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Every trend of headline metrics and of the instruction's effects on them; see ROW.

    Against steps and the square root of the KL for each model and seed; against size, and of the
    slope over steps against size, for each seed; and all of these over the seeds. What cannot be
    had is a row without a value that says what is missing.
    """
    rows: list[dict[str, Any]] = []
    for study in studies(cells):
        for quantity in study.quantities():
            for model in study.models:
                seeds = study.seeds(model)
                for against in ("step", "sqrt_kl"):
                    lines = {
                        seed: over_training(study, quantity, model, seed, against) for seed in seeds
                    }
                    rows += _rows(study, quantity, model, against, lines, None)
            seeds = study.seeds()
            step = study.common_step(quantity)
            sized = {seed: over_sizes(study, quantity, seed, step) for seed in seeds}
            rows += _rows(study, quantity, None, "log10_parameters", sized, step)
            grown = {seed: slopes_over_sizes(study, quantity, seed) for seed in seeds}
            rows += _rows(study, quantity, None, "step_x_log10_parameters", grown, None)
    correct(rows)
    return [{name: row[name] for name in ROW} for row in rows]


# --- the rows ----------------------------------------------------------------------------------


def _rows(
    study: Study,
    quantity: Quantity,
    model: str | None,
    against: str,
    lines: Mapping[int, Line],
    step: int | None,
) -> list[dict[str, Any]]:
    """One row a seed over items, one over seeds, and of several seeds their mean over items."""
    family = f"{quantity.name} against {against}" if study.judges(quantity) else None
    shared = {
        "run": study.run,
        "model": model,
        "parameters": None if model is None else study.parameters[model],
        "experiment": study.experiment,
        "condition": quantity.condition,
        "metric": quantity.metric,
        "quantity": quantity.name,
        "against": against,
        "step": step,
    }
    slopes = {seed: line.slopes() for seed, line in lines.items() if line.lacking is None}
    rows = [
        shared
        | {"seed": seed, "num_seeds": 1, "left_out": line.left_out}
        | _over_items(slopes.get(seed), line.lacking, study.degrees, family)
        | _span([line])
        for seed, line in lines.items()
    ]
    together = shared | {"seed": None} | _span(list(lines.values())) | _left_out(lines)
    if len(slopes) > 1:
        mean = np.mean(list(slopes.values()), axis=0)
        name = None if family is None else f"{family}, mean over seeds"
        items = _over_items(mean, None, study.degrees, name)
        rows.append(together | {"num_seeds": len(slopes)} | items)
    name = None if family is None else f"{family}, over seeds"
    return [*rows, together | _over_seeds(lines, slopes, against, name)]


def _over_items(
    slopes: np.ndarray | None, lacking: str | None, degrees: int, family: str | None
) -> dict[str, Any]:
    found: dict[str, Any] = {"unit": "items", "family": family, "method": BOOTSTRAP}
    if slopes is None:
        return found | _numbers({}) | {"undefined_because": lacking}
    one = estimate({"slope": slopes})["slope"]
    error = standard_error(slopes)
    numbers = {"value": one.value, "low": one.low, "high": one.high, "standard_error": error}
    numbers["p_value"] = wald_p(one.value, error, degrees)
    reason = None
    if np.isnan(one.low):
        reason = "undefined in too many resamples for an interval"
    elif np.isnan(numbers["p_value"]):
        reason = "the resamples agree: no p-value"
    return found | _numbers(numbers) | {"undefined_because": reason}


def _over_seeds(
    lines: Mapping[int, Line],
    slopes: Mapping[int, np.ndarray],
    against: str,
    family: str | None,
) -> dict[str, Any]:
    values = [float(one[0]) for one in slopes.values()]
    found: dict[str, Any] = {"unit": "seeds", "family": family, "num_seeds": len(values)}
    if len(values) < 2:
        reasons = {line.lacking for line in lines.values() if line.lacking}
        why = "; ".join(sorted(reasons)) if reasons else ONE_SEED
        return found | _numbers({}) | {"method": T_TEST, "undefined_because": why}
    numbers, method = mean_over_seeds(values), T_TEST
    if against in ("step", "sqrt_kl"):
        used = [lines[seed] for seed in slopes]
        fitted, why_not = mixed_slope([one.x for one in used], [one.y[:, 0] for one in used])
        method = f"{T_TEST} (no mixed model: {why_not})"
        if fitted is not None:
            numbers, method = fitted, MIXED
    reason = "the seeds agree: no interval" if np.isnan(numbers["low"]) else None
    return found | _numbers(numbers) | {"method": method, "undefined_because": reason}


def _numbers(numbers: Mapping[str, float]) -> dict[str, float | None]:
    names = ("value", "low", "high", "standard_error", "p_value")
    given = {name: numbers.get(name, np.nan) for name in names}
    return {name: None if np.isnan(number) else float(number) for name, number in given.items()}


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
            for reason in [*line.left_out, *([line.lacking] if several and line.lacking else [])]
        ]
    }
