"""Paired comparisons over a run's cells: effects of the instruction, their growth, and changes.

Cells over the same clusters were resampled with the same draws (see bootstrap.py), so differences
are taken resample by resample and what the cells share cancels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan

import numpy as np

from selfcorrect.evaluate.statistics.bootstrap import (
    UNDEFINED,
    Estimate,
    Replicates,
    estimate,
    standard_errors,
)

UNINSTRUCTED = "Q"


@dataclass(frozen=True)
class Cell:
    """One experiment under one condition at one checkpoint; `kl` as in checkpoint.json.

    A stand-alone model has None for parameters, seed and step; only `compare` takes such cells.
    """

    run: str
    model: str
    parameters: int
    seed: int
    step: int
    experiment: str
    condition: str
    replicates: Replicates
    kl: float | None = None
    judged: bool = True


@dataclass(frozen=True)
class Comparison:
    """A difference of one metric between `cell` and other cells of its model and seed.

    `kind` is "effect" (metric(Q) - metric(condition) at `step`), "growth" (effect at `step` minus
    effect at `from_step`) or "change" (metric at `step` minus metric at `from_step`). `reason`
    says why the estimate is undefined, None where it is defined. `error` is the standard deviation
    of its resamples.
    """

    kind: str
    cell: Cell
    metric: str
    from_step: int | None
    estimate: Estimate
    reason: str | None
    error: float


def compare(cells: Sequence[Cell]) -> list[Comparison]:
    """Return the effects at every step, their growth, and each condition's change over steps."""
    trajectories: dict[tuple[str, str, int, str], list[Cell]] = {}
    for cell in cells:
        key = (cell.run, cell.model, cell.seed, cell.experiment)
        trajectories.setdefault(key, []).append(cell)
    return [
        comparison
        for trajectory in trajectories.values()
        for comparison in _compare_trajectory(trajectory)
    ]


def _compare_trajectory(cells: Sequence[Cell]) -> list[Comparison]:
    grid = {(cell.condition, cell.step): cell for cell in cells}
    comparisons: list[Comparison] = []
    for condition in dict.fromkeys(cell.condition for cell in cells):
        steps = sorted(step for name, step in grid if name == condition)
        first, last = grid[condition, steps[0]], grid[condition, steps[-1]]
        if first is not last:
            comparisons += _difference("change", last, [(1, last), (-1, first)], first.step)
        if condition == UNINSTRUCTED:
            continue
        paired = [step for step in steps if (UNINSTRUCTED, step) in grid]
        effects = {
            step: [(1, grid[UNINSTRUCTED, step]), (-1, grid[condition, step])] for step in paired
        }
        for step, terms in effects.items():
            comparisons += _difference("effect", grid[condition, step], terms, None)
        if len(paired) > 1:
            start, end = paired[0], paired[-1]
            terms = effects[end] + [(-sign, cell) for sign, cell in effects[start]]
            comparisons += _difference("growth", grid[condition, end], terms, start)
    return comparisons


def _difference(
    kind: str, cell: Cell, terms: Sequence[tuple[int, Cell]], from_step: int | None
) -> list[Comparison]:
    """Return the signed sum of `terms` for every metric of `cell`, resample by resample.

    The first term has the sign +1.
    """
    paired = len({term.replicates.population for _, term in terms}) == 1
    metrics = [
        metric
        for metric in cell.replicates.metrics
        if paired and all(metric in term.replicates.metrics for _, term in terms)
    ]
    table = np.empty((len(metrics), len(next(iter(cell.replicates.metrics.values()), ()))))
    (_, first), *others = terms
    for metric, row in zip(metrics, table, strict=True):
        np.add(0.0, first.replicates.metrics[metric], out=row)  # zeros without a sign
        for sign, term in others:
            (np.add if sign > 0 else np.subtract)(row, term.replicates.metrics[metric], out=row)
    estimates = estimate(dict(zip(metrics, table, strict=True)))
    errors = dict(zip(metrics, standard_errors(table).tolist(), strict=True))
    comparisons: list[Comparison] = []
    for metric in cell.replicates.metrics:
        result, reason = estimates.get(metric, UNDEFINED), None
        if not paired:
            reason = "the cells were measured on different items (another limit or data set)"
        elif metric not in estimates:
            reason = f"{metric} was not measured in every cell"
        elif isnan(result.value):
            reason = f"{metric} is undefined in a cell"
        error = errors.get(metric, np.nan)
        comparisons.append(Comparison(kind, cell, metric, from_step, result, reason, error))
    return comparisons
