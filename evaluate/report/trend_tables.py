"""The report's tables of trends, thresholds and rounds."""

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
from selfcorrect.evaluate.statistics.rounds import QUANTITIES

AGAINST = {
    "step": "step",
    "sqrt_kl": "√KL (nats)",
    "log10_parameters": "log10 parameters",
    "step_x_log10_parameters": "step × log10 parameters",
}
UNITS = {"items": "items", "seeds": "training seeds"}


def trend_table(trends: Sequence[Mapping[str, Any]], checkpoint: CheckpointColumns) -> Table:
    """Return the trends of one experiment's headline metric and of the effects on it."""
    trends = _headlines(trends)
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
        columns=["Trend", "Against", *checkpoint.run_column, "Model", "Seed",
                 "Condition", "Points", "Slope [95 % interval]", "Over", "p, corrected"],
        rows=[
            [
                text_cell(row["quantity"]),
                text_cell(AGAINST.get(row["against"], row["against"])),
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


def threshold_table(
    thresholds: Sequence[Mapping[str, Any]], checkpoint: CheckpointColumns
) -> Table:
    """Return the steps at which one experiment's headline metric reaches its threshold."""
    return Table(
        name="thresholds",
        title="Step at which the threshold is reached",
        note="Where the metric, interpolated linearly between kept steps, first reaches the "
        "threshold: the value without bias, unless another was given. Nothing is known beyond the "
        "last step. The interval is over items; the share is that of resamples that reach it.",
        columns=[*checkpoint.names[:-1], "Last step", "Condition", "Threshold",
                 "Starts", "Reached at", "95 % interval", "Share that reaches it"],
        rows=[
            [
                *checkpoint.cells({**row, "step": _rounded(row.get("last"))}),
                text_cell(row["condition"]),
                estimate_cell({"value": row["threshold"]}, False),
                text_cell(row["starts"] or "–"),
                _step(row["value"], row["undefined_because"]),
                _ends(row),
                estimate_cell({"value": row["share_reached"]}, False),
            ]
            for row in _headlines(thresholds)
        ],
    )  # fmt: skip


def round_table(rounds: Sequence[Mapping[str, Any]], checkpoint: CheckpointColumns) -> Table:
    """Return how answers changed from one condition to the one that continues its dialogue."""
    by_round: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for row in rounds:
        key = (row["run"], row["model"], row["seed"], row["step"], row["condition"])
        by_round.setdefault(key, {})[row["quantity"]] = row
    return Table(
        name="rounds",
        title="What a further round changes",
        note="Answers to the same items after the same texts of the model, before and after the "
        "round. The stereotyped option is the one that raises the headline metric. Entropy is that "
        "of an item's answer, in nats, after averaging over draws. In brackets 95 % intervals.",
        columns=[*checkpoint.names, "Condition", "Continues", "Changed",
                 "To the stereotyped", "Away from it", "Entropy before", "Entropy"],
        rows=[
            [
                *checkpoint.cells(first := next(iter(quantities.values()))),
                text_cell(first["condition"]),
                text_cell(first["continues"]),
                *(estimate_cell(quantities[name], True) for name in QUANTITIES),
            ]
            for quantities in by_round.values()
        ],
        meanings=list(QUANTITIES.items()),
    )  # fmt: skip


def _headlines(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["metric"] == get_experiment(row["experiment"]).headline]


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
