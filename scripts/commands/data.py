"""`selfcorrect data`: benchmarks and feedback sets: what they are, fetching them, checking them."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from selfcorrect.evaluate.data.catalogue import DataSet, Finding, Hub, catalogue, check_set, choose
from selfcorrect.evaluate.data.fetch import Unreachable, fetch_set
from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from selfcorrect.scripts.commands.evaluate import default_data_dir

app = typer.Typer(
    no_args_is_help=True,
    help="Benchmarks and feedback sets: list, fetch and check them. Nothing of them comes along.",
)
Names = Annotated[list[str] | None, typer.Argument(help="Names of data sets.")]
Folder = Annotated[
    Path | None,
    typer.Option(help="Data folder; default: SELFCORRECT_DATA_DIR, or the user's cache."),
]


@app.command("list")
def list_(names: Names = None, data_dir: Folder = None) -> None:
    """One line a data set; with names, all that is known of these: source, citation, checksums."""
    folder = data_dir or default_data_dir()
    if names:
        for name, data_set in choose(names, catalogue()).items():
            _describe(name, data_set)
        return
    table = Table("name", "what", "kind", "licence", box=None, pad_edge=False)
    table.add_column("rows", justify="right")
    table.add_column("files here", justify="right")
    for name, data_set in catalogue().items():
        states = [finding.state for finding in check_set(data_set, folder)]
        other = states.count("different")
        here = f"{states.count('right')} of {len(states)}" + (f", {other} other" if other else "")
        table.add_row(
            name,
            data_set.title,
            data_set.kind,
            data_set.licence,
            "?" if data_set.rows is None else f"{data_set.rows:,}",
            "on the hub" if data_set.hub else here,
        )
    console = Console()
    (console if console.is_terminal else Console(width=130)).print(table)
    typer.echo(f"\nData folder: {folder}")


def _describe(name: str, data_set: DataSet) -> None:
    rows = "not stated" if data_set.rows is None else f"{data_set.rows:,}"
    facts = {
        "title": data_set.title,
        "kind": data_set.kind,
        "licence": data_set.licence,
        "rows": rows,
        "citation": data_set.citation,
        "homepage": data_set.homepage,
        "source": data_set.address,
        "revision": data_set.revision,
        "note": data_set.note,
    }
    typer.echo(name)
    for key, value in facts.items():
        if value:
            typer.echo(f"  {key:9} {value}")
    for file in data_set.files:
        packed = ", unpacked" if file.packed else ""
        size = f"{file.rows:,} rows, {file.bytes:,} bytes{packed}"
        typer.echo(f"  file      {file.download_path}: {size}")
        typer.echo(f"            sha256 {file.sha256}")
    if data_set.hub:
        typer.echo(f"  recipe    {_recipe_line(data_set.hub, data_set.revision)}")
        typer.echo("            loaded through datasets; no checksum of it is verified here")


def _recipe_line(hub: Hub, revision: str) -> str:
    """How a recipe names a data set that `datasets` loads."""
    given = {**hub.model_dump(exclude_none=True), "revision": revision}
    inner = ", ".join(f"{key}: {value}" for key, value in given.items())
    return f"data: {{preferences: {{{inner}}}}}"


@app.command()
def fetch(
    names: Names = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every set with files of its own (not those on the hub).")
    ] = False,
    data_dir: Folder = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds of silence before the next attempt.")
    ] = 30.0,
) -> None:
    """Download data sets from their public source; what breaks off goes on with the same command.

    Files that are here and right are left alone, others are never overwritten. Sets on the hub go
    through `datasets` into its own cache.
    """
    if bool(names) == every:
        raise InputError(f"name data sets or give --all; there are {', '.join(catalogue())}")
    wanted = choose(names or [name for name, one in catalogue().items() if one.files], catalogue())
    folder = data_dir or default_data_dir()
    failures: list[InputError | RunFailure] = []
    for name, data_set in wanted.items():
        typer.echo(f"{name}: licence: {data_set.licence}; source: {data_set.homepage}")
        if data_set.note:
            typer.echo(f"  {data_set.note}")
        try:
            typer.echo(f"  {_fetch(name, data_set, folder, timeout)}")
        except Unreachable:
            raise
        except (InputError, RunFailure) as error:  # the others can be had all the same
            failures.append(error)
    for failure in failures[:-1]:
        typer.echo(f"selfcorrect: {failure}", err=True)
    if failures:
        raise failures[-1]


def _fetch(name: str, data_set: DataSet, folder: Path, timeout: float) -> str:
    """Fetch one set; returns what is said of it."""
    if data_set.hub:
        from selfcorrect.train.feedback.files import read_rows

        given = data_set.hub.model_dump()
        rows = read_rows(given.pop("path"), name, revision=data_set.revision, **given)
        line = _recipe_line(data_set.hub, data_set.revision)
        return f"{len(rows):,} rows are in the cache of datasets; {line}"
    columns = (TextColumn("  {task.description}"), BarColumn(), DownloadColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, TransferSpeedColumn(), console=console, disable=not console.is_terminal,
        transient=True,
    ) as bars:  # fmt: skip
        tasks = {file.path: bars.add_task(file.path, total=None) for file in data_set.files}

        def progress(path: str, done: int, total: int) -> None:
            bars.update(tasks[path], completed=done, total=total)

        new = fetch_set(data_set, folder, timeout_seconds=timeout, progress=progress)
    here = len(data_set.files) - len(new)
    return f"{len(new)} fetched, {here} already here; every checksum is right: {folder}"


@app.command()
def check(names: Names = None, data_dir: Folder = None) -> None:
    """Compare the data folder with what was published: exit 0 all right, 1 missing or different.

    Without names, every set of which a file is here. A file may be packed with gzip: what counts is
    the text inside.
    """
    folder = data_dir or default_data_dir()
    wanted = choose(names or list(catalogue()), catalogue())
    found = {name: check_set(data_set, folder) for name, data_set in wanted.items()}
    if not names:
        found = {n: f for n, f in found.items() if any(one.state != "missing" for one in f)}
        if not found:
            raise RunFailure(f"{folder}: no data set is here; selfcorrect data fetch NAME")
    wrong = [name for name, findings in found.items() if not _report(name, findings)]
    if wrong:
        raise RunFailure(f"{folder}: missing or different: {', '.join(wrong)}")


def _report(name: str, findings: list[Finding]) -> bool:
    """Print what was found of one set; whether all of it is right."""
    if not findings:
        typer.echo(f"{name}: loaded through datasets by its hub name; nothing here to check")
        return True
    if all(finding.state == "missing" for finding in findings):
        typer.echo(f"{name}: not here; selfcorrect data fetch {name}")
        return False
    bad = [finding for finding in findings if finding.state != "right"]
    typer.echo(f"{name}: {len(findings) - len(bad)} of {len(findings)} files as published")
    for finding in bad:
        typer.echo(f"  {finding.path}: {finding.reason}")
    return not bad
