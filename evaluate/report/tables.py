"""The report's tables: each cell has the text that it shows and the value that it sorts by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from selfcorrect.evaluate.experiments import get_experiment
from selfcorrect.evaluate.experiments.tally import OVERALL
from selfcorrect.evaluate.statistics.formatting import number, p_value, with_interval
from selfcorrect.recipes.foundation.printable import escape_controls

COMPARISONS = {"effects": "effect", "growth": "growth of the effect", "changes": "change"}


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


def result_tables(statistics: Mapping[str, Any]) -> list[Table]:
    """Return a table per experiment: a row per checkpoint and condition, a column per metric.

    Metrics from probabilities instead of choices ("expected_") and means over categories ("_mean")
    are in a second table where an experiment has them.
    """
    tables = []
    for experiment in dict.fromkeys(cell["experiment"] for cell in statistics["cells"]):
        definition = get_experiment(experiment)
        cells = [cell for cell in statistics["cells"] if cell["experiment"] == experiment]
        first = [name for name in definition.metrics if not _is_variant(name)]
        variants = [name for name in definition.metrics if _is_variant(name)]
        tables.append(_result_table(experiment, "every checkpoint and condition", cells, first))
        if variants:
            title = "from probabilities, and means over categories"
            tables.append(_result_table(experiment, title, cells, variants, "-variants"))
    return tables


def _is_variant(metric: str) -> bool:
    return metric.startswith("expected_") or metric.endswith("_mean")


def _result_table(
    experiment: str,
    title: str,
    cells: Sequence[Mapping[str, Any]],
    metrics: Sequence[str],
    suffix: str = "",
) -> Table:
    """Return the table; metrics without any defined value have no column but are named above it."""
    definition = get_experiment(experiment)
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
    wrote = any(cell["num_texts"] for cell in cells) and not suffix
    checkpoint = CheckpointColumns(cells)
    rows = [
        [*checkpoint.cells(cell), text_cell(cell["condition"]), count_cell(cell["num_items"])]
        + ([_cut_off(cell)] if wrote else [])
        + [estimate_cell(value.get(name), name == definition.headline) for name in defined]
        for cell, value in zip(cells, values, strict=True)
    ]
    return Table(
        name=f"results-{experiment}{suffix}",
        title=f"{get_experiment(experiment).title}: {title}",
        note=" ".join(note),
        columns=[*checkpoint.names, "Condition", "Prompts"]
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
    return TableCell(f"{cell['num_truncated']:,} of {cell['num_texts']:,}", cell["num_truncated"])


def comparison_table(statistics: Mapping[str, Any]) -> Table:
    """Return headline metrics' effects, the growth of effects, and each condition's change."""
    checkpoint = CheckpointColumns(statistics["cells"])
    rows = []
    for kind, name in COMPARISONS.items():
        for row in statistics[kind]:
            if row["metric"] != get_experiment(row["experiment"]).headline:
                continue
            start = row.get("from_step")
            steps = str(row["step"]) if start is None else f"{start} to {row['step']}"
            judged = {True: "yes", False: "no", None: row["undefined_because"] or "no interval"}
            rows.append(
                [
                    text_cell(name),
                    text_cell(get_experiment(row["experiment"]).title),
                    *checkpoint.run(row),
                    text_cell(row["model"]),
                    count_cell(row["seed"]),
                    text_cell(row["condition"]),
                    TableCell(steps, row["step"]),
                    estimate_cell(row, True),
                    text_cell(judged[row["excludes_zero"]]),
                    probability_cell(row.get("p_adjusted")),
                    estimate_cell({"value": row.get("detectable")}, False),
                ]
            )
    about = statistics["about"]
    return Table(
        name="comparisons",
        title="Comparisons on the same items",
        note=f"Effect: {about['effect']}. Growth: {about['growth']}. Change: {about['change']}. "
        "Intervals are per row; p-values are corrected for the number of rows of a kind (Holm). "
        "Detectable: the smallest true difference that this many items would show with an interval "
        f"that excludes zero in {about.get('power', 0.8):.0%} of cases.",
        columns=[
            "Comparison", "Experiment", *checkpoint.run_column, "Model", "Seed",
            "Condition", "Step", "Difference [95 % interval]", "Excludes zero", "p, corrected",
            "Detectable",
        ],
        rows=rows,
    )  # fmt: skip


def category_tables(statistics: Mapping[str, Any]) -> list[Table]:
    """Return the headline metric by category at each model's last step, if there are categories."""
    tables = []
    for experiment in dict.fromkeys(cell["experiment"] for cell in statistics["cells"]):
        definition = get_experiment(experiment)
        cells = [cell for cell in statistics["cells"] if cell["experiment"] == experiment]
        categories = sorted({name for cell in cells for name in cell["metrics"]} - {OVERALL})
        if len(categories) < 2:
            continue
        checkpoint = CheckpointColumns(cells)
        last: dict[tuple[str, str, int], int] = {}
        for cell in cells:
            key = cell["run"], cell["model"], cell["seed"]
            last[key] = max(cell["step"], last.get(key, 0))
        rows = [
            [
                *checkpoint.cells(cell),
                text_cell(cell["condition"]),
                text_cell(category),
                estimate_cell(cell["metrics"].get(category, {}).get(definition.headline), True),
            ]
            for cell in cells
            if cell["step"] == last[cell["run"], cell["model"], cell["seed"]]
            for category in categories
        ]
        label = definition.headline_metric.label
        pooled = definition.overall_categories(categories)
        tables.append(
            Table(
                name=f"categories-{experiment}",
                title=f"{get_experiment(experiment).title}: categories at the last step",
                note=f"The overall value pools {', '.join(pooled)}.",
                columns=[*checkpoint.names, "Condition", "Category", label],
                rows=rows,
            )
        )
    return tables


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
    """The columns that name a row's checkpoint; the run is named where there are several."""

    def __init__(self, cells: Sequence[Mapping[str, Any]]) -> None:
        self.several = len({cell["run"] for cell in cells}) > 1
        self.run_column = ["Run"] if self.several else []
        self.names = [*self.run_column, "Model", "Parameters", "Seed", "Step"]

    def run(self, row: Mapping[str, Any]) -> list[TableCell]:
        """Return the cell that names the run, where there are several."""
        return [text_cell(row["run"])] if self.several else []

    def cells(self, row: Mapping[str, Any]) -> list[TableCell]:
        """Return the cells of all columns."""
        counts = (count_cell(row[name]) for name in ("parameters", "seed", "step"))
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
