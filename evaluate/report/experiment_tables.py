"""All tables of one experiment, none longer than a page can hold."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from selfcorrect.evaluate.report.quantities import quantity_table
from selfcorrect.evaluate.report.tables import (
    CheckpointColumns,
    Table,
    category_table,
    result_tables,
)
from selfcorrect.evaluate.report.trend_tables import round_table, threshold_table, trend_table
from selfcorrect.evaluate.report.verdict import Series

MOST_CELLS = 12_000  # of a table in the page


def experiment_tables(
    statistics: Mapping[str, Any], experiment: str, series: Sequence[Series]
) -> list[Table]:
    """Return the tables of one experiment that have rows; `series` are those of the experiment."""
    cells = [cell for cell in statistics["cells"] if cell["experiment"] == experiment]
    trends, thresholds, rounds = (
        [row for row in statistics.get(name, []) if row["experiment"] == experiment]
        for name in ("trends", "thresholds", "rounds")
    )
    columns = CheckpointColumns(cells)
    tables = [
        quantity_table(series, statistics["about"]),
        trend_table(trends, columns),
        threshold_table(thresholds, columns),
        round_table(rounds, columns),
        category_table(cells),
        *result_tables(cells),
    ]
    return [
        _shortened(replace(table, name=f"{table.name}-{experiment}"))
        for table in tables
        if table.rows
    ]


def _shortened(table: Table) -> Table:
    most = MOST_CELLS // len(table.columns)
    if len(table.rows) <= most:
        return table
    files = "results.parquet and statistics.json have all"
    note = f"The first {most:,} of {len(table.rows):,} rows; {files}. {table.note}"
    return replace(table, rows=table.rows[:most], note=note)
