"""The report's tables of trends, thresholds and comparisons over training seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

from selfcorrect.evaluate.experiments import get_experiment
from selfcorrect.evaluate.report.tables import (
    CheckpointColumns,
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
UNITS = {"items": "items", "seeds": "training seeds"}


def trend_tables(statistics: Mapping[str, Any]) -> list[Table]:
    """Return the tables that have rows: trends, thresholds, comparisons over seeds."""
    columns = CheckpointColumns(statistics["cells"])
    make = (_trends, _thresholds, _over_seeds, _side_by_side)
    tables = [table(statistics, columns) for table in make]
    return [table for table in tables if table.rows]


def _trends(statistics: Mapping[str, Any], checkpoint: CheckpointColumns) -> Table:
    trends = _headlines(statistics.get("trends", []))
    single = [row for row in trends if row["unit"] == "seeds" and row["num_seeds"] < 2]
    shown = [row for row in trends if row not in single]
    note = (
        "The slope of a least-squares line: change per step, √nat, or tenfold number of "
        "parameters. An effect is Q minus the condition, so its trend shows whether the "
        "instruction does more. An interval is over items or over training seeds. p-values are "
        "corrected (Holm) among trends of one kind."
    )
    if single:
        note += " With one training seed there are no trends over seeds."
    return Table(
        name="trends",
        title="Trends with steps, KL and size",
        note=note,
        columns=["Trend", "Against", "Experiment", *checkpoint.run_column, "Model", "Seed",
                 "Condition", "Points", "Slope [95 % interval]", "Over", "p, corrected"],
        rows=[
            [
                text_cell(row["quantity"]),
                text_cell(AGAINST.get(row["against"], row["against"])),
                text_cell(get_experiment(row["experiment"]).title),
                *checkpoint.run(row),
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


def _thresholds(statistics: Mapping[str, Any], checkpoint: CheckpointColumns) -> Table:
    return Table(
        name="thresholds",
        title="Step at which the threshold is reached",
        note="Where the metric, interpolated linearly between kept steps, first reaches the "
        "threshold: the value without bias, unless another was given. Nothing is known beyond the "
        "last step. The interval is over items; the share is that of resamples that reach it.",
        columns=["Experiment", *checkpoint.names[:-1], "Last step", "Condition", "Threshold",
                 "Starts", "Reached at", "95 % interval", "Share that reaches it"],
        rows=[
            [
                text_cell(get_experiment(row["experiment"]).title),
                *checkpoint.cells({**row, "step": _rounded(row.get("last"))}),
                text_cell(row["condition"]),
                estimate_cell({"value": row["threshold"]}, False),
                text_cell(row["starts"] or "–"),
                _step(row["value"], row["undefined_because"]),
                _ends(row),
                estimate_cell({"value": row["share_reached"]}, False),
            ]
            for row in _headlines(statistics.get("thresholds", []))
        ],
    )  # fmt: skip


def _over_seeds(statistics: Mapping[str, Any], checkpoint: CheckpointColumns) -> Table:
    singular = {"effect": "effect", "growth": "growth of the effect", "change": "change"}
    return Table(
        name="over-seeds",
        title="Comparisons over training seeds",
        note="Each training seed is one observation; intervals are Student's over the seeds.",
        columns=["Comparison", "Experiment", *checkpoint.run_column, "Model", "Seeds",
                 "Condition", "Step", "Difference [95 % interval]", "p, corrected"],
        rows=[
            [
                text_cell(singular.get(row["kind"], row["kind"])),
                text_cell(get_experiment(row["experiment"]).title),
                *checkpoint.run(row),
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


def _side_by_side(statistics: Mapping[str, Any], checkpoint: CheckpointColumns) -> Table:
    kinds = {"metric": "change", "effect": "growth of the effect"}
    return Table(
        name="side-by-side",
        title="From choices and from probabilities",
        note="Changes from the first to the last step, of the headline metric from the chosen "
        "options and of the same metric from the options' probabilities. A jump in the first alone "
        "can come from an option that was nearly chosen before.",
        columns=["Comparison", "Experiment", *checkpoint.run_column, "Model", "Seed",
                 "Condition", "From choices", "From probabilities"],
        rows=[
            [
                text_cell(kinds.get(row["quantity"], row["quantity"])),
                text_cell(get_experiment(row["experiment"]).title),
                *checkpoint.run(row),
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
    """Return a slope with three significant digits, as slopes per step are small."""
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


def _rounded(step: float | None) -> int | None:
    return None if step is None else round(step)


def _ends(row: Mapping[str, Any]) -> TableCell:
    if row["low"] is None or row["high"] is None:
        return TableCell("–", None)
    low, high = (_step(row[name], None) for name in ("low", "high"))
    return TableCell(f"{low.text} to {high.text}", low.sort)
