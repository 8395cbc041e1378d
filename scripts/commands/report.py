"""`selfcorrect report`: table, statistics, figures and report.html from what is on disk."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.foundation.printable import visible

COMPARISON = "comparison"  # the folder of a report on several runs, beside the first of them


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several are compared.")],
    paper: Annotated[
        bool, typer.Option("--paper", help="Show the published values beside ours in figures.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of a comparison; default: comparison/ beside the first run."),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Redraw while the runs grow, until they are complete.")
    ] = False,
    every: Annotated[
        float, typer.Option(min=0.1, help="With --watch: seconds between two looks.")
    ] = 15.0,
) -> None:
    """Write results, statistics, figures and report.html: of one run into its folder.

    Several runs get one report that compares them, in a folder of its own; theirs stay as they are.
    """
    if len(runs) == 1 and out is not None:
        raise InputError("--out is for several runs; the report of one run lies in its own folder")
    if len(runs) > 1 and paper:
        raise InputError("--paper is for a report on one run; give one run folder")
    if watch:
        _watch(runs, paper, out, every)
    elif len(runs) == 1:
        show(runs, paper=paper)
    else:
        _print_results(_write(runs, paper, out))


def show(runs: list[Path], redraw: bool = True, paper: bool = False) -> None:
    """Write each run's own report, print its closing table, and name the report.

    Without `redraw`, a report that is newer than all it is made from is left as it is.
    """
    for run in runs:
        path = run / "report.html"
        if redraw or not is_current(path):
            path = _write([run], paper, None)
        _print_results(path)


def _write(runs: list[Path], paper: bool, out: Path | None) -> Path:
    from selfcorrect.evaluate.report.page import write_comparison, write_report

    if len(runs) == 1:
        return write_report(runs[0], paper=paper)
    return write_comparison(runs, out or runs[0].resolve().parent / COMPARISON)


def _print_results(report: Path) -> None:
    from rich.console import Console

    from selfcorrect.evaluate.report.terminal import closing_table
    from selfcorrect.evaluate.statistics.files import read_results

    # Where the output is no terminal, the table still gets the width that it needs.
    console = Console() if sys.stdout.isatty() else Console(width=110)
    console.print(closing_table(read_results(report.parent / "results.parquet")))
    console.print(f"Report: {visible(report)}", soft_wrap=True, markup=False)


def _watch(runs: list[Path], paper: bool, out: Path | None, every: float) -> None:
    """Redraw whenever a file behind the report has changed; end when all runs are complete.

    What cannot be read at one look (a file that is still being copied, a checkpoint that is just
    being deleted) is said and looked at again; the last whole report stays until then.
    """
    from selfcorrect.evaluate.measuring.progress import Watched, made_from

    watched = [Watched(run) for run in runs]
    for one in watched:
        one.progress()  # what is wrong with a recipe from the start is no matter of waiting
    drawn, path, said, took = None, None, "", 0.0
    while True:
        began = time.monotonic()
        state = [made_from(run) for run in runs]
        try:
            progress = [one.progress() for one in watched]
            line = "; ".join(f"{run.name}: {one}" for run, one in zip(runs, progress, strict=True))
            if state != drawn:
                path, drawn = _write(runs, paper, out), state
                took = time.monotonic() - began
                line = f"{line}; {path}"
            if all(one.complete for one in progress) and path is not None:
                break
        except (InputError, FileNotFoundError) as reason:
            for run in runs:
                if not run.is_dir():
                    raise InputError(f"{run}: is gone") from None
            line = f"waiting: {' '.join(str(reason).split())}"
        if line != said:
            sys.stderr.write(f"{time.strftime('%H:%M:%S')} {visible(line)}\n")
            sys.stderr.flush()
            said = line
        time.sleep(max(every, took))  # half of a core at most: the training needs it
    _print_results(path)


def is_current(report: Path) -> bool:
    """Whether the report is newer than all it is made from."""
    from selfcorrect.evaluate.measuring.progress import made_from
    from selfcorrect.evaluate.statistics.files import read_results

    results = report.parent / "results.parquet"
    if not (report.is_file() and results.is_file()):
        return False
    try:
        read_results(results)
    except InputError as error:
        sys.stderr.write(f"{str(error).partition(';')[0]}; the report is made anew\n")
        return False
    written = report.stat().st_mtime_ns
    return all(changed <= written for changed, _ in made_from(report.parent).values())
