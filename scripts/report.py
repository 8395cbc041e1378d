"""`selfcorrect report`: table, statistics, figures and report.html from what is on disk."""

import sys
from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
) -> None:
    """Write results, statistics, figures and report.html into each run folder."""
    show(runs)


def show(runs: list[Path]) -> None:
    """Write each run's report, print its closing table, and name the report."""
    import pandas as pd
    from rich.console import Console

    from selfcorrect.evaluate.closing_table import closing_table
    from selfcorrect.evaluate.report import write_report

    # Where the output is no terminal, the table still gets the width that it needs.
    console = Console() if sys.stdout.isatty() else Console(width=110)
    for run in runs:
        path = write_report(run)
        console.print(closing_table(pd.read_parquet(run / "results.parquet")))
        console.print(f"Report: {path}", soft_wrap=True)
