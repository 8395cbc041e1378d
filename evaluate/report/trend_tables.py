"""The report's tables on trends, on the step at which a threshold is reached, and on seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

from selfcorrect.evaluate.experiments import get_experiment
from selfcorrect.evaluate.report.tables import (
    Place,
    Table,
    TableCell,
    count_cell,
    estimate_cell,
    probability_cell,
    text_cell,
)
from selfcorrect.evaluate.statistics.formatting import number, significant

AGAINST = {
    "step": "RLHF step",
    "sqrt_kl": "√KL (nats)",
    "log10_parameters": "log10 parameters",
    "step_x_log10_parameters": "step × log10 parameters",
}
UNITS = {"items": "other items", "seeds": "other seeds"}


def trend_tables(statistics: Mapping[str, Any]) -> list[Table]:
    """Trends, thresholds and comparisons over seeds, of headline metrics; only those with rows."""
    place = Place(statistics["cells"])
    tables = [_trends(statistics, place), _thresholds(statistics, place)]
    tables += [_over_seeds(statistics, place), _side_by_side(statistics, place)]
    return [table for table in tables if table.rows]


def _trends(statistics: Mapping[str, Any], place: Place) -> Table:
    found = _headlines(statistics.get("trends", []))
    alone = [row for row in found if row["unit"] == "seeds" and row["num_seeds"] < 2]
    shown = [row for row in found if row not in alone]
    note = (
        "The slope of a least-squares line: change a step, a √nat, or a tenfold number of "
        "parameters. An effect is Q minus the condition, so its trend says whether the "
        "instruction does more. Each interval is about what could have been different: the items, "
        "or the training seeds. p-values are corrected (Holm) among trends of one kind."
    )
    if alone:
        note += " Over seeds nothing can be said where there is one training seed."
    return Table(
        name="trends",
        title="Trends with steps, KL and size",
        note=note,
        columns=["Trend", "Against", "Experiment", *place.columns[: place.several], "Model", "Seed",
                 "Condition", "Points", "Slope [95 % interval]", "About", "p, corrected"],
        rows=[
            [
                text_cell(row["quantity"]),
                text_cell(AGAINST.get(row["against"], row["against"])),
                text_cell(get_experiment(row["experiment"]).title),
                *place.run(row),
                text_cell(row["model"] or "all sizes"),
                TableCell("all" if row["seed"] is None else str(row["seed"]), row["seed"]),
                text_cell(row["condition"]),
                count_cell(row["num_points"]),
                _slope(row),
                text_cell(UNITS[row["unit"]]),
                probability_cell(row["p_adjusted"]),
            ]
            for row in shown
        ],
    )  # fmt: skip


def _thresholds(statistics: Mapping[str, Any], place: Place) -> Table:
    found = _headlines(statistics.get("thresholds", []))
    return Table(
        name="thresholds",
        title="Step at which the threshold is reached",
        note="The first crossing of the straight lines between kept steps; without a threshold of "
        "one's own it is the value of no bias. Nothing is known beyond the last step. The interval "
        "is over items; the share is that of the resamples that reach it.",
        columns=["Experiment", *place.columns[:-1], "Last step", "Condition", "Threshold",
                 "Starts", "Reached at", "95 % interval", "Share that reaches it"],
        rows=[
            [
                text_cell(get_experiment(row["experiment"]).title),
                *place.cells({**row, "step": _whole(row.get("last"))}),
                text_cell(row["condition"]),
                estimate_cell({"value": row["threshold"]}, False),
                text_cell(row["starts"] or "–"),
                _step(row["value"], row["undefined_because"]),
                _ends(row),
                estimate_cell({"value": row["share_reached"]}, False),
            ]
            for row in found
        ],
    )  # fmt: skip


def _over_seeds(statistics: Mapping[str, Any], place: Place) -> Table:
    singular = {"effect": "effect", "growth": "growth of the effect", "change": "change"}
    return Table(
        name="over-seeds",
        title="Comparisons over training seeds",
        note="Each training seed counts once: the interval is Student's over the seeds.",
        columns=["Comparison", "Experiment", *place.columns[: place.several], "Model", "Seeds",
                 "Condition", "Step", "Difference [95 % interval]", "p, corrected"],
        rows=[
            [
                text_cell(singular.get(row["kind"], row["kind"])),
                text_cell(get_experiment(row["experiment"]).title),
                *place.run(row),
                text_cell(row["model"]),
                count_cell(row["num_seeds"]),
                text_cell(row["condition"]),
                count_cell(row["step"]),
                estimate_cell(row, True),
                probability_cell(row["p_adjusted"]),
            ]
            for row in _headlines(statistics.get("over_seeds", []))
        ],
    )  # fmt: skip


def _side_by_side(statistics: Mapping[str, Any], place: Place) -> Table:
    """From choices and from probabilities: what shows in the first alone may be a threshold's."""
    kinds = {"metric": "change", "effect": "growth of the effect"}
    return Table(
        name="side-by-side",
        title="From choices and from probabilities",
        note="First to last step, the headline metric from the option chosen and the same from the "
        "options' probabilities. A jump in the first alone can come from an option that was close "
        "to being chosen before.",
        columns=["Comparison", "Experiment", *place.columns[: place.several], "Model", "Seed",
                 "Condition", "From choices", "From probabilities"],
        rows=[
            [
                text_cell(kinds.get(row["quantity"], row["quantity"])),
                text_cell(get_experiment(row["experiment"]).title),
                *place.run(row),
                text_cell(row["model"]),
                count_cell(row["seed"]),
                text_cell(row["condition"]),
                estimate_cell(_part(row, "headline_growth"), True),
                estimate_cell(_part(row, "expected_growth"), True),
            ]
            for row in statistics.get("side_by_side", [])
        ],
    )  # fmt: skip


def _headlines(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["metric"] == get_experiment(row["experiment"]).headline]


def _part(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    ends = {"value": "", "low": "_low", "high": "_high"}
    return {key: row.get(name + end) for key, end in ends.items()}


def _slope(row: Mapping[str, Any]) -> TableCell:
    """Three significant digits: a slope a step is small."""
    if row["value"] is None:
        return TableCell(f"undefined: {row['undefined_because']}", None)
    value, low, high = (significant(row[name]) for name in ("value", "low", "high"))
    interval = "(no interval)" if row["low"] is None else f"[{low}, {high}]"
    return TableCell(f"{value} {interval}", row["value"])


def _step(value: float | str | None, reason: str | None) -> TableCell:
    if value is None:
        return TableCell(f"undefined: {reason}", None)
    if isinstance(value, str):  # "not reached": later than any step
        return TableCell(value, 1e18)
    return TableCell(number(value).removesuffix(".000"), value)


def _whole(step: float | None) -> int | None:
    return None if step is None else round(step)


def _ends(row: Mapping[str, Any]) -> TableCell:
    if row["low"] is None or row["high"] is None:
        return TableCell("–", None)
    low, high = (_step(row[name], None) for name in ("low", "high"))
    return TableCell(f"{low.text} to {high.text}", low.sort)
