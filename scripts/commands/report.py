"""`selfcorrect report`: table, statistics, figures and report.html from the files of a run."""

import logging
import time
from pathlib import Path
from typing import Annotated

import typer

from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.foundation.printable import escape_controls
from selfcorrect.scripts.commands.tables import table_console

COMPARISON = "comparison"  # default folder of a report on several runs, beside the first of them

logger = logging.getLogger(__name__)


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run folders (several are compared), or one folder of evaluations."),
    ],
    paper: Annotated[
        bool, typer.Option("--paper", help="Show the paper's published values in the figures.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of a comparison [default: comparison/ beside the first run]."),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Update the report until all runs are complete.")
    ] = False,
    every: Annotated[
        float, typer.Option(min=0.1, help="With --watch: seconds between two checks for changes.")
    ] = 15.0,
) -> None:
    """Write the report of a run, or a comparison of several.

    A run gets results, statistics, figures and report.html in its folder. Several runs get one
    report that compares them, in a separate folder; their own reports do not change.
    """
    if len(runs) == 1 and out is not None:
        raise InputError("--out needs several runs; the report of one run is in its own folder")
    if len(runs) > 1 and paper:
        raise InputError("--paper needs a single run folder")
    if watch:
        _watch(runs, paper, out, every)
    elif len(runs) == 1:
        show(runs, paper=paper)
    else:
        _print_results(_write(runs, paper, out))


def show(runs: list[Path], redraw: bool = True, paper: bool = False) -> None:
    """Write each run's report, print its closing table, and print the report's path.

    Without `redraw`, a report that is newer than all its inputs is kept.
    """
    from selfcorrect.evaluate.report.page import is_report_current

    for run in runs:
        if redraw or not is_report_current(run):
            _write([run], paper, None)
        _print_results(run / "report.html")


def _write(runs: list[Path], paper: bool, out: Path | None) -> Path:
    from selfcorrect.evaluate.report.page import write_comparison, write_report

    if len(runs) == 1:
        return write_report(runs[0], paper=paper)
    return write_comparison(runs, out or runs[0].resolve().parent / COMPARISON)


def _print_results(report: Path) -> None:
    from selfcorrect.evaluate.report.terminal import closing_table
    from selfcorrect.evaluate.statistics.files import read_results

    console = table_console(110)
    console.print(closing_table(read_results(report.parent / "results.parquet")))
    console.print(f"Report: {escape_controls(report)}", soft_wrap=True, markup=False)


def _watch(runs: list[Path], paper: bool, out: Path | None, every: float) -> None:
    """Write the report whenever one of its inputs has changed, until all runs are complete.

    A file that cannot be read at the moment (it is being copied, or its checkpoint deleted) is
    logged and tried again; until then the last complete report stays.
    """
    from selfcorrect.evaluate.measuring.progress import WatchedRun, report_inputs

    watched = [WatchedRun(run) for run in runs]
    for watched_run in watched:
        watched_run.progress()  # a recipe wrong from the start is an error, no reason to wait
    written, path, last_line, seconds = None, None, "", 0.0
    while True:
        started = time.monotonic()
        inputs = [report_inputs(run) for run in runs]
        try:
            progress = [watched_run.progress() for watched_run in watched]
            line = "; ".join(f"{run.name}: {p}" for run, p in zip(runs, progress, strict=True))
            if inputs != written:
                path, written = _write(runs, paper, out), inputs
                seconds = time.monotonic() - started
                line = f"{line}; {path}"
            if all(p.complete for p in progress) and path is not None:
                break
        except (InputError, FileNotFoundError) as error:
            for run in runs:
                if not run.is_dir():
                    raise InputError(f"{run}: the run folder no longer exists") from None
            line = f"waiting: {error}"
        if line != last_line:
            logger.info("%s %s", time.strftime("%H:%M:%S"), line)
            last_line = line
        time.sleep(max(every, seconds))  # at most half of a core, which the training needs
    _print_results(path)
