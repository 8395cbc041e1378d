"""Sentences on trends, thresholds and training seeds, for the verdict."""

from collections.abc import Mapping, Sequence
from typing import Any

from selfcorrect.evaluate.statistics.comparisons import UNINSTRUCTED
from selfcorrect.evaluate.statistics.formatting import p_value, with_interval
from selfcorrect.evaluate.statistics.thresholds import NOT_REACHED

Row = Mapping[str, Any]
_ENDS = ("value", "low", "high")


def corrected_p(row: Row) -> list[str]:
    """Return ["corrected p = 0.012"]; [] for a row that is in no family of tests."""
    p = row["p_adjusted"]
    if p is None:
        return []
    text = p_value(p)
    return [f"corrected p {text if text.startswith('<') else f'= {text}'}"]


def in_brackets(notes: Sequence[str]) -> str:
    """Return " (first; second)", or nothing without notes."""
    return f" ({'; '.join(notes)})" if notes else ""


def growth_over_seeds(rows: Sequence[Row], difference: str) -> list[str]:
    """Return the growth of the effect with training seeds as the unit, where there are several."""
    growth = [row for row in rows if row["kind"] == "growth" and row["value"] is not None]
    if not growth:
        return []
    models = "; by ".join(
        f"{with_interval(row)} in {row['model']}"
        + in_brackets([f"{row['num_seeds']} seeds", *corrected_p(row)])
        for row in growth
    )
    return [f"on average over training seeds, {difference} changes by {models}"]


def change_with_size(rows: Sequence[Row], difference: str) -> list[str]:
    """Return how the effect, and its slope over steps, change with the number of parameters."""
    parts, units = [], []
    for against in ("log10_parameters", "step_x_log10_parameters"):
        row = _most_general(
            [row for row in rows if row["against"] == against and row["quantity"] == "effect"]
        )
        if row is None:
            continue
        units.append("seeds" if row["unit"] == "seeds" else "items of these training runs")
        if against == "log10_parameters":
            parts.append(f"{difference} at step {row['step']} changes by {_slope(row)}")
        else:
            parts.append(f"its slope per 100 steps by {_slope(row, 100)}")
    if not parts:
        return []
    unit = " and ".join(dict.fromkeys(units))
    return [f"per tenfold number of parameters, {' and '.join(parts)}; intervals over {unit}"]


def _slope(row: Row, factor: float = 1) -> str:
    """Return the slope times `factor`, with its interval and p-value."""
    scaled = {end: None if row[end] is None else factor * row[end] for end in _ENDS}
    return (with_interval(scaled) + in_brackets(corrected_p(row))).replace(") (", "; ")


def _most_general(rows: Sequence[Row]) -> Row | None:
    """Return the row over seeds, or else the mean over seeds, or else the row of a single seed."""
    defined = [row for row in rows if row["value"] is not None]
    return min(defined, key=lambda r: (r["unit"] != "seeds", r["seed"] is not None), default=None)


def effect_along_steps(rows: Mapping[str, Sequence[Row]], condition: str) -> list[str]:
    """Return the linear trend of the effect over all steps, and its growth from probabilities."""
    difference = f"{UNINSTRUCTED} minus {condition}"
    sentences = []
    for row in _effects(rows["trends"], condition):
        # Through two checkpoints the line says no more than they do.
        if row["against"] == "step" and row["value"] is not None and row["num_points"] > 2:
            sentences.append(
                f"Linear trend over all {row['num_points']} steps: {difference} changes by "
                f"{_slope(row, row['last'] - row['first'])} from step {row['first']:g} to step "
                f"{row['last']:g}."
            )
    for row in _effects(rows["side_by_side"], condition):
        if row["expected_growth"] is not None:
            suffixes = {"value": "", "low": "_low", "high": "_high"}
            growth = {end: row[f"expected_growth{suffix}"] for end, suffix in suffixes.items()}
            sentences.append(
                f"With option probabilities instead of choices, {difference} changes by "
                f"{with_interval(growth)} from the first to the last step."
            )
    return sentences


def _effects(rows: Sequence[Row], condition: str) -> list[Row]:
    return [row for row in rows if (row["condition"], row["quantity"]) == (condition, "effect")]


def step_without_bias(thresholds: Sequence[Row], condition: str) -> list[str]:
    """Return the step at which there is no bias, where there was a clear one at first."""
    for row in thresholds:
        unclear = row["low"] is None or row["low"] == row["first"]
        if row["condition"] != condition or unclear:
            continue
        unbiased = f"{row['threshold']:g} (no bias)"
        if row["value"] == NOT_REACHED:
            share = f"{row['share_reached']:.0%} of the resamples do"
            return [f"{condition} does not reach {unbiased} by step {row['last']:g}; {share}."]
        low, high = (
            end if end == NOT_REACHED else f"{end:.1f}" for end in (row["low"], row["high"])
        )
        return [f"{condition} reaches {unbiased} at step {row['value']:.1f} [{low}, {high}]."]
    return []
