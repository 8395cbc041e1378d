"""Sentences on trends, thresholds and seeds, and how numbers are written in all sentences."""

from collections.abc import Mapping, Sequence
from typing import Any

from selfcorrect.evaluate.statistics.formatting import p_value, with_interval
from selfcorrect.evaluate.statistics.thresholds import NOT_REACHED

Row = Mapping[str, Any]


def corrected(row: Row, before: str) -> str:
    """As in ", corrected p = 0.012"; nothing for a row that is in no family."""
    p = row.get("p_adjusted")
    if p is None:
        return ""
    return f"{before}corrected p {p_value(p) if p < 0.001 else f'= {p_value(p)}'}"


def over_seeds(rows: Sequence[Row]) -> list[str]:
    """The growth of an effect with the training seed as the unit, where there are several."""
    grown = [row for row in rows if row["kind"] == "growth" and row["value"] is not None]
    if not grown:
        return []
    each = "; ".join(
        f"{row['model']} {with_interval(row)}{corrected(row, ', ')}, {row['num_seeds']} seeds"
        for row in grown
    )
    return [f", the same with training seeds as the unit: {each}"]


def with_size(rows: Sequence[Row]) -> list[str]:
    """How the effect, and its slope over steps, change with the number of parameters."""
    parts, units = [], []
    for against in ("log10_parameters", "step_x_log10_parameters"):
        mine = [row for row in rows if row["against"] == against and row["quantity"] == "effect"]
        row = _widest(mine)
        if row is None:
            continue
        units.append("seeds" if row["unit"] == "seeds" else "items, for these training runs")
        if against == "log10_parameters":
            what, shown = f"it changes at step {row['step']} by", row
        else:
            what = "its slope per 100 steps by"
            shown = {end: row[end] and 100 * row[end] for end in ("value", "low", "high")}
        parts.append(f"{what} {with_interval(shown)}{corrected(row, ', ')}")
    if not parts:
        return []
    unit = " and ".join(dict.fromkeys(units))
    return [f", for each tenfold number of parameters: {'; '.join(parts)} (over {unit})"]


def _widest(rows: Sequence[Row]) -> Row | None:
    """What says most: over seeds, or else the mean over seeds, or else the one seed's own."""
    defined = [row for row in rows if row["value"] is not None]
    return min(defined, key=lambda r: (r["unit"] != "seeds", r["seed"] is not None), default=None)


def along_steps(rows: Mapping[str, Sequence[Row]], condition: str) -> list[str]:
    """The effect's straight line through all steps, and its growth from probabilities."""
    sentences = []
    for row in rows["trends"]:
        mine = row["condition"] == condition and row["quantity"] == "effect"
        # Through two checkpoints the line says no more than they do.
        if mine and row["against"] == "step" and row["value"] is not None and row["num_points"] > 2:
            length = row["last"] - row["first"]
            change = {e: row[e] and length * row[e] for e in ("value", "low", "high")}
            sentences.append(
                f"On a straight line through all {row['num_points']} steps this difference changes "
                f"by {with_interval(change)} from step {row['first']:g} to {row['last']:g}"
                f"{corrected(row, ', ')}."
            )
    for row in rows["side_by_side"]:
        mine = row["condition"] == condition and row["quantity"] == "effect"
        if mine and row["expected_growth"] is not None:
            ends = {"value": "", "low": "_low", "high": "_high"}
            growth = {end: row[f"expected_growth{suffix}"] for end, suffix in ends.items()}
            sentences.append(
                "With probabilities in the place of choices, it changes by "
                f"{with_interval(growth)} from the first to the last step."
            )
    return sentences


def reached(thresholds: Sequence[Row], condition: str) -> list[str]:
    """At which step there is no bias, where there was a clear one at first."""
    for row in thresholds:
        unclear = row["low"] is None or row["low"] == row["first"]
        if row["condition"] != condition or unclear:
            continue
        bias = f"{row['threshold']:g} (no bias)"
        if row["value"] == NOT_REACHED:
            share = f"{row['share_reached']:.0%} of resamples do"
            return [f"{condition} does not reach {bias} by step {row['last']:g} ({share})."]
        ends = [end if end == NOT_REACHED else f"{end:.1f}" for end in (row["low"], row["high"])]
        return [f"{condition} reaches {bias} at step {row['value']:.1f} [{ends[0]}, {ends[1]}]."]
    return []
