"""The report's tables: each cell has the text that it shows and the value that it sorts by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from selfcorrect.evaluate.experiments import get_experiment
from selfcorrect.evaluate.experiments.tally import OVERALL
from selfcorrect.evaluate.statistics.formatting import number, p_value, with_interval
from selfcorrect.recipes.foundation.printable import escape_controls


@dataclass(frozen=True)
class TableCell:
    """A table cell's text and the value it sorts by (None: undefined, sorts last)."""

    text: str
    sort: str | float | None


@dataclass(frozen=True)
class Table:
    """A table of the report; `meanings` explains its columns."""

    name: str
    title: str
    note: str
    columns: list[str]
    rows: list[list[TableCell]]
    meanings: list[tuple[str, str]] = field(default_factory=list)


def result_tables(cells: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Return the cells of one experiment: a row per checkpoint and condition, a column per metric.

    Metrics from probabilities instead of choices ("expected_") and means over categories ("_mean")
    are in a second table where an experiment has them.
    """
    metrics = get_experiment(cells[0]["experiment"]).metrics
    first = [name for name in metrics if not _is_variant(name)]
    variants = [name for name in metrics if _is_variant(name)]
    tables = [_result_table("Every checkpoint and condition", cells, first)]
    if variants:
        title = "The same from probabilities, and means over categories"
        tables.append(_result_table(title, cells, variants, "variants"))
    return tables


def _is_variant(metric: str) -> bool:
    return metric.startswith("expected_") or metric.endswith("_mean")


def _result_table(
    title: str,
    cells: Sequence[Mapping[str, Any]],
    metrics: Sequence[str],
    name: str = "results",
) -> Table:
    """Return the table; metrics without any defined value have no column but are named above it."""
    definition = get_experiment(cells[0]["experiment"])
    values = [cell["metrics"][OVERALL] for cell in cells]
    measured = [name for name in metrics if any(name in value for value in values)]
    defined = [
        name
        for name in measured
        if any((value.get(name) or {}).get("value") is not None for value in values)
    ]
    label = {name: definition.metrics[name].label for name in measured}
    note = [
        f"{label[m]}: {definition.metrics[m].meaning}." for m in defined if m == definition.headline
    ]
    if undefined := [label[name] for name in measured if name not in defined]:
        note.append(f"Undefined everywhere: {', '.join(undefined)}.")
    # How many texts were cut off at the length limit, where the model wrote any.
    wrote = any(cell["num_texts"] for cell in cells) and name == "results"
    checkpoint = CheckpointColumns(cells)
    rows = [
        [*checkpoint.cells(cell), text_cell(cell["condition"]), count_cell(cell["num_items"])]
        + ([_cut_off(cell)] if wrote else [])
        + [estimate_cell(value.get(name), name == definition.headline) for name in defined]
        for cell, value in zip(cells, values, strict=True)
    ]
    return Table(
        name=name,
        title=title,
        note=" ".join(note),
        columns=[*checkpoint.names, "Condition", "Items"]
        + (["Texts cut off"] if wrote else [])
        + [label[name] for name in defined],
        rows=rows,
        meanings=[
            (definition.metrics[name].label, definition.metrics[name].meaning) for name in defined
        ],
    )


def _cut_off(cell: Mapping[str, Any]) -> TableCell:
    if not cell["num_texts"]:
        return TableCell("–", None)
    kind = " thoughts" if cell.get("thoughts") else ""
    text = f"{cell['num_truncated']:,} of {cell['num_texts']:,}{kind}"
    return TableCell(text, cell["num_truncated"])


def category_table(cells: Sequence[Mapping[str, Any]]) -> Table:
    """Return the headline metric by category at each last step; no rows for a single category."""
    definition = get_experiment(cells[0]["experiment"])
    categories = sorted({name for cell in cells for name in cell["metrics"]} - {OVERALL})
    checkpoint = CheckpointColumns(cells)
    last: dict[tuple[str, str, int], int] = {}
    for cell in cells:
        key = cell["run"], cell["model"], cell["seed"]
        last[key] = max(cell["step"] or 0, last.get(key, 0))
    rows = [
        [
            *checkpoint.cells(cell),
            text_cell(cell["condition"]),
            text_cell(category),
            estimate_cell(cell["metrics"].get(category, {}).get(definition.headline), True),
        ]
        for cell in cells
        if (cell["step"] or 0) == last[cell["run"], cell["model"], cell["seed"]]
        for category in (categories if len(categories) > 1 else [])
    ]
    return Table(
        name="categories",
        title=f"Categories{' at the last step' if checkpoint.facts else ''}",
        note=f"The overall value pools {', '.join(definition.overall_categories(categories))}.",
        columns=[*checkpoint.names, "Condition", "Category", definition.headline_metric.label],
        rows=rows,
    )


def difference_table(
    name: str, title: str, runs: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]
) -> Table:
    """Return the keys in which a file differs between runs, a column per run."""
    return Table(
        name=name,
        title=title,
        note="" if rows else "They are equal in every key.",
        columns=["Key", *map(escape_controls, runs)],
        rows=[[text_cell(key), *map(text_cell, values)] for key, values in rows],
    )


def left_out_table(
    statistics: Mapping[str, Any], feedback: Sequence[Mapping[str, int]] = ()
) -> Table:
    """Return how many items, preference pairs and prompts were left out, by reason.

    `feedback` has these counts for each reward model's and each policy's training.
    """
    counts: dict[tuple[str, str], set[int]] = {}
    for cell in statistics["cells"]:
        for reason, count in cell["left_out"].items():
            counts.setdefault((get_experiment(cell["experiment"]).title, reason), set()).add(count)
    for left_out in feedback:
        for reason, count in left_out.items():
            counts.setdefault(("Feedback", reason), set()).add(count)
    return Table(
        name="left-out",
        title="Left out",
        note="" if counts else "No item, preference pair or prompt is recorded as left out.",
        columns=["Experiment or feedback", "Reason", "Items, pairs or prompts"],
        rows=[
            [
                text_cell(source),
                text_cell(reason),
                TableCell(" or ".join(map(str, sorted(numbers))), max(numbers)),
            ]
            for (source, reason), numbers in counts.items()
        ],
    )


class CheckpointColumns:
    """The columns that name a row's checkpoint; the run is named where there are several.

    Stand-alone models have no parameters, seed and step.
    """

    def __init__(self, cells: Sequence[Mapping[str, Any]]) -> None:
        self.several = len({cell["run"] for cell in cells}) > 1
        self.run_column = ["Run"] if self.several else []
        trained = any(cell.get("step") is not None for cell in cells)
        self.facts = ["parameters", "seed", "step"] if trained else []
        self.names = [*self.run_column, "Model", *map(str.capitalize, self.facts)]

    def run(self, row: Mapping[str, Any]) -> list[TableCell]:
        """Return the cell that names the run, where there are several."""
        return [text_cell(row["run"])] if self.several else []

    def cells(self, row: Mapping[str, Any]) -> list[TableCell]:
        """Return the cells of all columns."""
        counts = (count_cell(row[name]) for name in self.facts)
        return [*self.run(row), text_cell(row["model"]), *counts]


def text_cell(value: object) -> TableCell:
    """Return a cell of escaped text, sorted without regard to case."""
    text = escape_controls(value)
    return TableCell(text, text.lower())


def count_cell(value: int | None) -> TableCell:
    """Return a cell with a whole number; a dash for None."""
    return TableCell("–" if value is None else f"{value:,}", value)


def estimate_cell(row: Mapping[str, Any] | None, interval: bool) -> TableCell:
    """Return a cell with a value, and its interval if asked for."""
    if row is None or row["value"] is None:
        return TableCell("undefined", None)
    return TableCell(with_interval(row) if interval else number(row["value"]), row["value"])


def probability_cell(value: float | None) -> TableCell:
    """Return a cell with a p-value; a dash for None."""
    return TableCell("–" if value is None else p_value(value), value)
