"""`selfcorrect score`: score a table of answers, whatever model or person gave them."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selfcorrect.recipes.foundation.printable import escape_controls
from selfcorrect.scripts.commands.data_folder import DataDir, existing_data_dir
from selfcorrect.scripts.commands.tables import table_console

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(no_args_is_help=True, help="Score a table of answers.")

_BIASES = ("bias_ambiguous", "bias_disambiguated")
_SHARES = ("accuracy_ambiguous", "accuracy_disambiguated", "share_unknown_disambiguated")
_LETTERS = ("share_option_0", "share_option_1", "share_option_2")
_HEADINGS = (
    "Bias,\nambiguous",
    "Bias,\ndisambiguated",
    "Accuracy\nambig.",
    "Accuracy\ndisamb.",
    "Unknown\ndisamb.",
    "Letters\n(a) (b) (c)",
    "Answers",
)
_WIDTH = 112  # columns that the table needs


@app.callback()
def _keep_benchmark_as_subcommand() -> None:
    pass


@app.command("bbq")
def bbq(
    answers: Annotated[
        Path,
        typer.Argument(
            help="CSV, JSONL or parquet with the columns category, example_id, answer "
            "(the option's index, 0 to 2, or its text)."
        ),
    ],
    data_dir: DataDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compute bias and accuracy by category and overall, as BBQ's authors define them."""
    from selfcorrect.evaluate.answers.read import read_answers
    from selfcorrect.evaluate.answers.score import score_bbq

    folder = existing_data_dir(data_dir)
    table = read_answers(answers)
    scores = score_bbq(table, folder, str(answers))
    if as_json:
        typer.echo(json.dumps(scores, indent=2, allow_nan=False))
        return
    console = table_console(_WIDTH, fit=False)
    console.print(_table(scores))
    for line in _remarks(scores):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(scores: dict[str, Any]) -> "Table":
    from rich.markup import escape

    from selfcorrect.evaluate.report.terminal import results_table

    table = results_table(
        "BBQ",
        "Bias: 1 always with the stereotype, -1 always against it; in brackets the 95 % "
        "interval over templates (the other columns' intervals: --json). –: undefined",
    )
    table.add_column("Category", overflow="fold")
    for heading in _HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    answered = {name: row for name, row in scores["categories"].items() if _num_answers(row)}
    for index, (name, row) in enumerate(answered.items()):
        last = index == len(answered) - 1
        table.add_row(escape(escape_controls(name)), *_cells(row), end_section=last)
    table.add_row("Overall, pooled", *_cells(scores["overall"]["pooled"]))
    table.add_row("Overall, mean", *_cells(scores["overall"]["mean"]))
    return table


def _cells(row: dict[str, Any]) -> list[str]:
    from selfcorrect.evaluate.statistics.formatting import compact

    biases = []
    for name in _BIASES:
        low, high = row[f"{name}_low"], row[f"{name}_high"]
        interval = "" if low is None else f" \\[{compact(low)}, {compact(high)}]"
        biases.append(compact(row[name]) + interval)
    shares = [compact(row[name]) for name in _SHARES]
    letters = " ".join(compact(row[name]) for name in _LETTERS)
    return [*biases, *shares, letters, f"{_num_answers(row):,}"]


def _num_answers(row: dict[str, Any]) -> int:
    return int(row["n_rows"] - row["n_unanswered"])


def _remarks(scores: dict[str, Any]) -> list[str]:
    """Return lines on the answers that the table leaves out, counted over every category."""
    categories = scores["categories"]
    sums = {
        name: sum(row[name] for row in categories.values())
        for name in ("n_rows", "n_unparsed", "n_unclear", "n_unanswered", "n_undecided")
    }
    num_answers = sums["n_rows"] - sums["n_unanswered"]
    lines = [
        "Overall: without intersections (_x_) and questions about names; pooled weights answers "
        "equally, mean weights categories equally.",
        f"Unparsed: {sums['n_unparsed']:,} of {num_answers:,} answers match no option"
        + (f", or several ({sums['n_unclear']:,})" if sums["n_unclear"] else ""),
        f"Unanswered: {sums['n_unanswered']:,} of {sums['n_rows']:,} rows of the data"
        + _unanswered_by_category(categories),
    ]
    if sums["n_undecided"]:
        lines.append(
            f"Left out of the bias scores: {sums['n_undecided']:,} answers to questions whose "
            "stereotyped option the data do not state"
        )
    return lines


def _unanswered_by_category(categories: dict[str, dict[str, Any]]) -> str:
    parts = [
        f"{escape_controls(name)} {row['n_unanswered']:,}" + ("" if _num_answers(row) else " (all)")
        for name, row in categories.items()
        if row["n_unanswered"]
    ]
    return f": {', '.join(parts)}" if parts else ""
