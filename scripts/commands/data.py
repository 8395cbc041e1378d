"""`selfcorrect data`: list, fetch and check benchmarks and feedback sets."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from selfcorrect.evaluate.data.catalogue import DataSet, Finding, Hub, catalogue, check_set, choose
from selfcorrect.evaluate.data.fetch import Unreachable, fetch_set
from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from selfcorrect.scripts.commands.data_folder import DataDir, default_data_dir
from selfcorrect.scripts.commands.tables import table_console

app = typer.Typer(
    no_args_is_help=True,
    help="List, fetch and check benchmarks and feedback sets. The package contains none of them.",
)
Names = Annotated[list[str] | None, typer.Argument(help="Names of data sets.")]


@app.command("list")
def list_(names: Names = None, data_dir: DataDir = None) -> None:
    """List the data sets; with names, show their source, citation and checksums."""
    folder = data_dir or default_data_dir()
    if names:
        for name, data_set in choose(names, catalogue()).items():
            _describe(name, data_set)
        return
    table = Table("name", "content", "kind", "licence", box=None, pad_edge=False)
    table.add_column("rows", justify="right")
    table.add_column("files present", justify="right")
    for name, data_set in catalogue().items():
        states = [finding.state for finding in check_set(data_set, folder)]
        different = states.count("different")
        present = f"{states.count('right')} of {len(states)}"
        present += f", {different} different" if different else ""
        rows = "?" if data_set.rows is None else f"{data_set.rows:,}"
        present = "on the hub" if data_set.hub else present
        table.add_row(name, data_set.title, data_set.kind, data_set.licence, rows, present)
    table_console(130).print(table)
    typer.echo(f"\nData folder: {folder}")


def _describe(name: str, data_set: DataSet) -> None:
    facts = {
        "title": data_set.title,
        "kind": data_set.kind,
        "licence": data_set.licence,
        "rows": "not stated" if data_set.rows is None else f"{data_set.rows:,}",
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
        unpacked = ", unpacked" if file.packed else ""
        size = f"{file.rows:,} rows, {file.bytes:,} bytes{unpacked}"
        typer.echo(f"  file      {file.download_path}: {size}")
        typer.echo(f"            sha256 {file.sha256}")
    if data_set.hub:
        typer.echo(f"  recipe    {_recipe_line(data_set.hub, data_set.revision)}")
        typer.echo("            loaded through datasets; its checksum is not verified")


def _recipe_line(hub: Hub, revision: str) -> str:
    """Return the lines of a recipe that load a data set from the hub."""
    source = {**hub.model_dump(exclude_none=True), "revision": revision}
    keys = ", ".join(f"{key}: {value}" for key, value in source.items())
    return f"data: {{preferences: {{{keys}}}}}"


@app.command()
def fetch(
    names: Names = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every set that is not loaded from the hub.")
    ] = False,
    data_dir: DataDir = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds without data before the next attempt.")
    ] = 30.0,
) -> None:
    """Download data sets from their public source; run again to resume an interrupted download.

    Files that match their checksum are kept, and no other file is overwritten. Sets on the hub are
    loaded through `datasets` into its own cache.
    """
    if bool(names) == every:
        raise InputError(f"name data sets or give --all; available: {', '.join(catalogue())}")
    with_files = [name for name, data_set in catalogue().items() if data_set.files]
    wanted = choose(names or with_files, catalogue())
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
        except (InputError, RunFailure) as error:  # the remaining sets can still be fetched
            failures.append(error)
    for failure in failures[:-1]:
        typer.echo(f"selfcorrect: {failure}", err=True)
    if failures:
        raise failures[-1]


def _fetch(name: str, data_set: DataSet, folder: Path, timeout: float) -> str:
    """Fetch one set and return the line that reports it."""
    if data_set.hub:
        from selfcorrect.train.feedback.files import read_rows

        source = data_set.hub.model_dump()
        rows = read_rows(source.pop("path"), name, revision=data_set.revision, **source)
        line = _recipe_line(data_set.hub, data_set.revision)
        return f"{len(rows):,} rows are in the cache of datasets; {line}"
    columns = (TextColumn("  {task.description}"), BarColumn(), DownloadColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, TransferSpeedColumn(), console=console, disable=not console.is_terminal,
        transient=True,
    ) as bars:  # fmt: skip
        tasks = {file.path: bars.add_task(file.path, total=None) for file in data_set.files}

        def progress(path: str, done: float, total: int, /) -> None:
            bars.update(tasks[path], completed=done, total=total)

        fetched = fetch_set(data_set, folder, timeout_seconds=timeout, progress=progress)
    present = len(data_set.files) - len(fetched)
    return f"{len(fetched)} fetched, {present} present before; all checksums match: {folder}"


@app.command()
def check(names: Names = None, data_dir: DataDir = None) -> None:
    """Compare data sets with their published checksums: exit 1 if a file is missing or different.

    Without names, every set with a file in the data folder is checked. Files may be packed with
    gzip; their content is compared.
    """
    folder = data_dir or default_data_dir()
    wanted = choose(names or list(catalogue()), catalogue())
    findings = {name: check_set(data_set, folder) for name, data_set in wanted.items()}
    if not names:
        findings = {
            name: files
            for name, files in findings.items()
            if any(file.state != "missing" for file in files)
        }
        if not findings:
            raise RunFailure(f"{folder}: contains no data set; run `selfcorrect data fetch NAME`")
    wrong = [name for name, files in findings.items() if not _report(name, files)]
    if wrong:
        raise RunFailure(f"{folder}: missing or different: {', '.join(wrong)}")


def _report(name: str, files: list[Finding]) -> bool:
    """Print the findings on one set; return whether all files match."""
    if not files:
        typer.echo(f"{name}: loaded through datasets by its hub name; no file to check")
        return True
    if all(file.state == "missing" for file in files):
        typer.echo(f"{name}: missing; run `selfcorrect data fetch {name}`")
        return False
    bad = [file for file in files if file.state != "right"]
    typer.echo(f"{name}: {len(files) - len(bad)} of {len(files)} files match their checksum")
    for file in bad:
        typer.echo(f"  {file.path}: {file.reason}")
    return not bad
