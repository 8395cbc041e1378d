"""What statistics.json holds: estimates by cell, comparisons, trends, thresholds, and their tests.

Every list is one of plain dicts with the same keys, so `results.rows` makes a dataframe of it.
docs/reference/statistics.md documents the keys.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from selfcorrect.evaluate.experiments import get_experiment
from selfcorrect.evaluate.experiments.tally import OVERALL
from selfcorrect.evaluate.run_folder import Checkpoint, CheckpointRecord
from selfcorrect.evaluate.statistics.bootstrap import CONFIDENCE, Estimate
from selfcorrect.evaluate.statistics.cells import Measured
from selfcorrect.evaluate.statistics.comparisons import Cell, Comparison, compare
from selfcorrect.evaluate.statistics.series import EXPECTED, MATCH_STATS
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
    "Percentile bootstrap over clusters (BBQ templates, occupations, distinct students) within "
    "each category. It says how far the number may move with other items of the same kind; it "
    "does not cover another training run, seed or wording of the prompt. An interval without width "
    "means that all clusters agree: the rare exception may still exist, in up to about 3 of n."
)
LISTS = {"effect": "effects", "growth": "growth", "change": "changes"}


def record_facts(record: CheckpointRecord | None) -> dict[str, Any]:
    """What checkpoint.json says that stands in every row; None for a stand-alone model."""
    names = ["parameters", "seed", "step", "episodes", "kl", "reward"]
    return {name: None if record is None else getattr(record, name) for name in names}


def statistics_of(
    cells: Sequence[Measured],
    checkpoints: Sequence[Checkpoint],
    num_resamples: int,
    seed: int,
    thresholds: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The content of statistics.json: of one run, or of several that are seeds of one recipe.

    `checkpoints` are those there are, measured or not. `thresholds` names, by experiment, the value
    of the headline metric to be reached, in place of no bias.
    """
    of_runs = [_cell(cell) for cell in cells if cell.record is not None]
    comparisons = compare(of_runs)
    compared = {
        name: [_comparison_json(one) for one in comparisons if one.kind == kind]
        for kind, name in LISTS.items()
    }
    over_seeds = _over_seeds(comparisons)
    for rows in (*compared.values(), over_seeds):
        correct(rows)
    found = trends(of_runs)
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
        "trends": found,
        "thresholds": threshold_steps(of_runs, thresholds),
        "side_by_side": _side_by_side(compared["changes"], compared["growth"], found),
        "missing": _missing(cells, checkpoints),
    }


def _cell(cell: Measured) -> Cell:
    record = cast(CheckpointRecord, cell.record)
    return Cell(
        run=cell.run,
        model=cell.model,
        parameters=record.parameters,
        seed=record.seed,
        step=record.step,
        experiment=cell.experiment,
        condition=cell.condition,
        replicates=cell.bootstrap.replicates,
        kl=record.kl,
    )


def _cell_json(cell: Measured) -> dict[str, Any]:
    return {
        "run": cell.run,
        "model": cell.model,
        **record_facts(cell.record),
        "experiment": cell.experiment,
        "condition": cell.condition,
        "num_items": cell.counts[OVERALL][0],
        "num_clusters": cell.counts[OVERALL][1],
        "left_out": cell.left_out,
        "num_texts": cell.num_texts,
        "num_truncated": cell.num_truncated,
        "metrics": {
            category: {metric: _estimate_json(value) for metric, value in estimates.items()}
            for category, estimates in cell.bootstrap.estimates.items()
        },
    }


def _estimate_json(estimate: Estimate) -> dict[str, float | None]:
    numbers = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    return {name: _number(value) for name, value in numbers.items()}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


# --- comparisons ---------------------------------------------------------------------------------


def _comparison_json(one: Comparison) -> dict[str, Any]:
    """`from_step` is null for an effect, which is of one step."""
    p_value = wald_p(one.estimate.value, one.error, one.degrees)
    return {
        **_place(one),
        "seed": one.seed,
        **_estimate_json(one.estimate),
        "standard_error": _number(one.error),
        "p_value": _number(p_value),
        "family": _family(one, "over items"),
        "p_adjusted": None,
        "detectable": _number(detectable(one.error, one.degrees)),
        "excludes_zero": one.estimate.excludes_zero,
        "undefined_because": one.reason,
    }


def _place(one: Comparison) -> dict[str, Any]:
    names = ["run", "model", "parameters", "experiment", "condition", "metric", "step", "from_step"]
    return {name: getattr(one, name) for name in names}


def _family(one: Comparison, unit: str) -> str | None:
    """Headline metrics are judged; match-stats asks for a correlation, not against a bias."""
    if one.metric != get_experiment(one.experiment).headline:
        return None
    if one.kind != "change" and one.condition == MATCH_STATS:
        return None
    return f"{one.kind}, {unit}"


def _over_seeds(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Effects, growths and changes with the training seed as the unit, where there are several."""
    groups: dict[tuple[Any, ...], list[Comparison]] = {}
    for one in comparisons:
        headline = get_experiment(one.experiment).headline
        if one.metric in (headline, EXPECTED + headline):
            groups.setdefault((one.kind, *_place(one).values()), []).append(one)
    rows = []
    for group in groups.values():
        if len(group) < 2:
            continue
        values = [one.estimate.value for one in group if not np.isnan(one.estimate.value)]
        numbers = {name: _number(value) for name, value in mean_over_seeds(values).items()}
        reason = None
        if len(values) < 2:
            reason = f"needs two seeds with a value, has {len(values)}"
            numbers = dict.fromkeys(numbers)
        elif numbers["low"] is None:
            reason = "the seeds agree: no interval"
        error = np.nan if numbers["standard_error"] is None else numbers["standard_error"]
        rows.append(
            {
                **_place(group[0]),
                "kind": group[0].kind,
                "num_seeds": len(values),
                **{name: numbers[name] for name in ("value", "low", "high", "standard_error")},
                "p_value": numbers["p_value"],
                "family": _family(group[0], "over seeds"),
                "p_adjusted": None,
                "detectable": _number(detectable(error, len(values) - 1)),
                "left_out": [
                    f"seed {one.seed}: {one.reason}"
                    for one in group
                    if np.isnan(one.estimate.value)
                ],
                "undefined_because": reason,
            }
        )
    return rows


def _side_by_side(
    changes: Sequence[Mapping[str, Any]],
    growth: Sequence[Mapping[str, Any]],
    found: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """The headline metric beside `expected_...`: does a change hold with probabilities too?

    First to last step (a condition's change, the growth of its effect), and the slope over steps.
    """
    keys = ("run", "model", "seed", "experiment", "condition", "metric")
    ends = {("metric", *(row[key] for key in keys)): row for row in changes}
    ends |= {("effect", *(row[key] for key in keys)): row for row in growth}
    slopes = {
        (row["quantity"], *(row[key] for key in keys)): row
        for row in found
        if row["against"] == "step" and row["unit"] == "items" and row["seed"] is not None
    }
    rows = []
    for place in slopes:
        *others, metric = place
        headline = get_experiment(str(place[4])).headline
        if metric != headline:
            continue
        row: dict[str, Any] = dict(zip(("quantity", *keys[:-1]), others, strict=True))
        twin = (*others, EXPECTED + headline)
        row |= {"headline": headline, "expected": twin[-1] if twin in slopes else None}
        for name, one in (("headline", place), ("expected", twin)):
            for kind, source in (("growth", ends.get(one)), ("slope", slopes.get(one))):
                for end in ("value", "low", "high"):
                    key = f"{name}_{kind}" + ("" if end == "value" else f"_{end}")
                    row[key] = None if source is None else source[end]
        reason = None if twin in slopes else f"{place[4]} measures no {twin[-1]}"
        rows.append(row | {"undefined_because": reason})
    return rows


def _missing(cells: Sequence[Measured], checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Sentences on what one checkpoint lacks and another has."""
    asked = {(cell.experiment, cell.condition) for cell in cells}
    held: dict[tuple[str, int, int], set[tuple[str, str]]] = {}
    for cell in cells:
        if cell.record is not None:
            place = (cell.model, cell.record.seed, cell.record.step)
            held.setdefault(place, set()).add((cell.experiment, cell.condition))
    sentences = []
    for record in (checkpoint.record for checkpoint in checkpoints):
        where = f"{record.model}, seed {record.seed}, step {record.step}"
        lacking = asked - held.get((record.model, record.seed, record.step), set())
        if lacking == asked:
            sentences.append(f"{where}: not evaluated")
            continue
        sentences += [
            f"{where}: no {name} under {condition}" for name, condition in sorted(lacking)
        ]
    return sentences
