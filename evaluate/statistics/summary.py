"""The content of statistics.json: estimates by cell, comparisons, trends, thresholds and tests.

Every list holds plain dicts of equal keys, so that `results.rows` can make a dataframe of it.
docs/reference/statistics.md documents the keys.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from selfcorrect.evaluate.experiments import get_experiment
from selfcorrect.evaluate.experiments.tally import OVERALL
from selfcorrect.evaluate.run_folder import Checkpoint, CheckpointRecord
from selfcorrect.evaluate.statistics.bootstrap import CONFIDENCE, Estimate, number_or_none
from selfcorrect.evaluate.statistics.cells import MeasuredCell
from selfcorrect.evaluate.statistics.comparisons import Cell, Comparison, compare
from selfcorrect.evaluate.statistics.series import EXPECTED
from selfcorrect.evaluate.statistics.significance import (
    POWER,
    correct,
    detectable,
    mean_over_seeds,
    wald_p,
)
from selfcorrect.evaluate.statistics.thresholds import threshold_steps
from selfcorrect.evaluate.statistics.trends import trends

INTERVAL_MEANING = (
    "Intervals are percentile bootstrap intervals over clusters (BBQ templates, occupations, "
    "distinct students) within each category. They cover other items of the same kind, but not "
    "another training run, seed or wording of the prompt. An interval without width means that all "
    "n clusters agree; up to about 3 in n could still differ."
)
_NUMBERS = ("value", "low", "high", "standard_error", "p_value")
LISTS = {"effect": "effects", "growth": "growth", "change": "changes"}


def record_facts(record: CheckpointRecord | None) -> dict[str, Any]:
    """Return the facts of checkpoint.json that each row repeats; None for a stand-alone model."""
    names = ["parameters", "seed", "step", "episodes", "kl", "reward"]
    return {name: None if record is None else getattr(record, name) for name in names}


def compare_cells(
    groups: Iterable[Sequence[MeasuredCell]],
) -> tuple[list[MeasuredCell], list[Comparison]]:
    """Return the cells of all groups, and their comparisons within each group.

    A group has all cells of a model and training seed. Its resamples are forgotten once they are
    compared, but for those of headline metrics.
    """
    cells: list[MeasuredCell] = []
    comparisons: list[Comparison] = []
    for group in groups:
        comparisons += compare([_checkpoint_cell(cell) for cell in group])
        for cell in group:
            headline = get_experiment(cell.experiment).headline
            cell.bootstrap.replicates.keep((headline, EXPECTED + headline))
        cells += group
    return cells, comparisons


def statistics_of(
    cells: Sequence[MeasuredCell],
    comparisons: Sequence[Comparison],
    checkpoints: Sequence[Checkpoint],
    num_resamples: int,
    seed: int,
    thresholds: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return the content of statistics.json, of one run or of several that are seeds of a recipe.

    `comparisons` are those of `compare_cells`. `checkpoints` are all that exist, measured or not.
    `thresholds` overrides, by experiment, the unbiased value of the headline metric.
    """
    checkpoint_cells = [_checkpoint_cell(cell) for cell in cells if cell.record is not None]
    compared = {
        name: [_comparison_json(row) for row in comparisons if row.kind == kind]
        for kind, name in LISTS.items()
    }
    over_seeds = _over_seeds(comparisons)
    for rows in (*compared.values(), over_seeds):
        correct(rows)
    all_trends = trends(checkpoint_cells)
    return {
        "about": {
            "num_resamples": num_resamples,
            "resampling_seed": seed,
            "confidence": CONFIDENCE,
            "power": POWER,
            "interval": INTERVAL_MEANING,
            "effect": "metric(Q) - metric(condition) on the same items, paired resamples",
            "growth": "effect at the last step - effect at the first step, paired resamples",
            "change": "metric at the last step - metric at the first step, paired resamples",
        },
        "cells": [_cell_json(cell) for cell in cells],
        **compared,
        "over_seeds": over_seeds,
        "trends": all_trends,
        "thresholds": threshold_steps(checkpoint_cells, thresholds),
        "rounds": [row for cell in cells for row in _rounds_json(cell)],
        "side_by_side": _side_by_side(compared["changes"], compared["growth"], all_trends),
        "missing": _missing(cells, checkpoints),
    }


def _checkpoint_cell(cell: MeasuredCell) -> Cell:
    facts = record_facts(cell.record)
    return Cell(
        run=cell.run,
        model=cell.model,
        parameters=facts["parameters"],
        seed=facts["seed"],
        step=facts["step"],
        experiment=cell.experiment,
        condition=cell.condition,
        replicates=cell.bootstrap.replicates,
        kl=facts["kl"],
        judged=cell.judged,
    )


def _cell_json(cell: MeasuredCell) -> dict[str, Any]:
    return {
        "run": cell.run,
        "model": cell.model,
        **record_facts(cell.record),
        "experiment": cell.experiment,
        "condition": cell.condition,
        "judged": cell.judged,
        "num_items": cell.counts[OVERALL][0],
        "num_clusters": cell.counts[OVERALL][1],
        "left_out": cell.left_out,
        "dtype": cell.dtype,
        "num_texts": cell.num_texts,
        "num_truncated": cell.num_truncated,
        "thoughts": cell.thoughts,
        "metrics": {
            category: {metric: _estimate_json(value) for metric, value in estimates.items()}
            for category, estimates in cell.bootstrap.estimates.items()
        },
    }


def _rounds_json(cell: MeasuredCell) -> list[dict[str, Any]]:
    """Return a row for each quantity of a condition that continues another (rounds.py)."""
    return [
        {
            "run": cell.run,
            "model": cell.model,
            **record_facts(cell.record),
            "experiment": cell.experiment,
            "condition": cell.condition,
            "continues": cell.continues,
            "quantity": name,
            **_estimate_json(value),
            "undefined_because": _reason(value),
        }
        for name, value in cell.rounds.items()
    ]


def _reason(value: Estimate) -> str | None:
    if np.isnan(value.value):
        return "no item has such an option"
    return "a category with one cluster: no interval" if np.isnan(value.low) else None


def _estimate_json(estimate: Estimate) -> dict[str, float | None]:
    # Called for every number of a run: NaN is the only number that differs from itself.
    value, low, high = estimate
    return {
        "value": None if value != value else value,
        "low": None if low != low else low,
        "high": None if high != high else high,
    }


# --- comparisons ---------------------------------------------------------------------------------


def _comparison_json(comparison: Comparison) -> dict[str, Any]:
    degrees = comparison.cell.replicates.degrees
    p_value = wald_p(comparison.estimate.value, comparison.error, degrees)
    return {
        **_identity(comparison),
        "seed": comparison.cell.seed,
        **_estimate_json(comparison.estimate),
        "standard_error": number_or_none(comparison.error),
        "p_value": number_or_none(p_value),
        "family": _family(comparison, "over items"),
        "p_adjusted": None,
        "detectable": number_or_none(detectable(comparison.error, degrees)),
        "excludes_zero": comparison.estimate.excludes_zero,
        "undefined_because": comparison.reason,
    }


def _identity(comparison: Comparison) -> dict[str, Any]:
    """Return what is compared, without the seed; `from_step` is None for effects."""
    names = "run model parameters experiment condition judged".split()
    return {name: getattr(comparison.cell, name) for name in names} | {
        "metric": comparison.metric,
        "step": comparison.cell.step,
        "from_step": comparison.from_step,
    }


def _family(comparison: Comparison, unit: str) -> str | None:
    """Return the family of tests; None for what is not judged against a bias."""
    if comparison.metric != get_experiment(comparison.cell.experiment).headline:
        return None
    if comparison.kind != "change" and not comparison.cell.judged:
        return None
    return f"{comparison.kind}, {unit}"


def _over_seeds(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Return the comparisons with the training seed as the unit, where there are several seeds."""
    groups: dict[tuple[Any, ...], list[Comparison]] = {}
    for comparison in comparisons:
        headline = get_experiment(comparison.cell.experiment).headline
        if comparison.metric in (headline, EXPECTED + headline):
            key = (comparison.kind, *_identity(comparison).values())
            groups.setdefault(key, []).append(comparison)
    rows = []
    for group in groups.values():
        if len(group) < 2:
            continue
        values = [seed.estimate.value for seed in group if not np.isnan(seed.estimate.value)]
        numbers = {name: number_or_none(value) for name, value in mean_over_seeds(values).items()}
        reason = None
        if len(values) < 2:
            reason = f"needs two seeds with a value, has {len(values)}"
            numbers = dict.fromkeys(numbers)
        elif numbers["low"] is None:
            reason = "the seeds agree: no interval"
        error = np.nan if numbers["standard_error"] is None else numbers["standard_error"]
        rows.append(
            {
                **_identity(group[0]),
                "kind": group[0].kind,
                "num_seeds": len(values),
                **{name: numbers[name] for name in _NUMBERS},
                "family": _family(group[0], "over seeds"),
                "p_adjusted": None,
                "detectable": number_or_none(detectable(error, len(values) - 1)),
                "left_out": [
                    f"seed {comparison.cell.seed}: {comparison.reason}"
                    for comparison in group
                    if np.isnan(comparison.estimate.value)
                ],
                "undefined_because": reason,
            }
        )
    return rows


def _side_by_side(
    changes: Sequence[Mapping[str, Any]],
    growth: Sequence[Mapping[str, Any]],
    all_trends: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Return each headline metric's growth and slope beside those of `expected_<headline>`.

    Growth is from the first to the last step: a condition's change, or the growth of its effect.
    """
    keys = ("run", "model", "seed", "experiment", "condition", "metric")
    ends = {("metric", *(row[key] for key in keys)): row for row in changes}
    ends |= {("effect", *(row[key] for key in keys)): row for row in growth}
    slopes = {
        (row["quantity"], *(row[key] for key in keys)): row
        for row in all_trends
        if row["against"] == "step" and row["unit"] == "items" and row["seed"] is not None
    }
    rows = []
    for headline_key in slopes:
        *identity, metric = headline_key
        row: dict[str, Any] = dict(zip(("quantity", *keys[:-1]), identity, strict=True))
        headline = get_experiment(row["experiment"]).headline
        if metric != headline:
            continue
        expected = EXPECTED + headline
        expected_key = (*identity, expected)
        measured = expected_key in slopes
        row |= {"headline": headline, "expected": expected if measured else None}
        for name, key in (("headline", headline_key), ("expected", expected_key)):
            for kind, source in (("growth", ends.get(key)), ("slope", slopes.get(key))):
                for end in ("value", "low", "high"):
                    column = f"{name}_{kind}" + ("" if end == "value" else f"_{end}")
                    row[column] = None if source is None else source[end]
        reason = None if measured else f"{row['experiment']} measures no {expected}"
        rows.append(row | {"undefined_because": reason})
    return rows


def _missing(cells: Sequence[MeasuredCell], checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Return a sentence for each cell that one checkpoint lacks and another has."""
    expected = {(cell.experiment, cell.condition) for cell in cells}
    measured: dict[tuple[str, int, int], set[tuple[str, str]]] = {}
    for cell in cells:
        if cell.record is not None:
            key = (cell.model, cell.record.seed, cell.record.step)
            measured.setdefault(key, set()).add((cell.experiment, cell.condition))
    sentences = []
    for record in (checkpoint.record for checkpoint in checkpoints):
        key = (record.model, record.seed, record.step)
        name = "{}, seed {}, step {}".format(*key)
        absent = expected - measured.get(key, set())
        if absent == expected:
            sentences.append(f"{name}: not evaluated")
            continue
        sentences += [f"{name}: no {cell} under {condition}" for cell, condition in sorted(absent)]
    return sentences
