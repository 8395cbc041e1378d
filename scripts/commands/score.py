"""`selfcorrect score`: scores for answers that stand in a file, whoever gave them."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.scripts.commands.evaluate import default_data_dir

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
def _keep_the_benchmark_in_the_command() -> None:
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
    data_dir: Annotated[Path | None, typer.Option(help="Folder with BBQ's files in bbq/.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not a table.")] = False,
) -> None:
    """Bias and accuracy by category and overall, as BBQ's authors define them."""
    from selfcorrect.evaluate.answers.read import read_answers
    from selfcorrect.evaluate.answers.score import score_bbq

    folder = data_dir or default_data_dir()
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such data folder; give --data-dir, or `selfcorrect data fetch bbq`"
        )
    table = read_answers(answers)
    scores = score_bbq(table, folder, str(answers))
    given = {str(answer).strip() for answer in table["answer"]}
    if "3" in given and "0" not in given:
        typer.echo(f"{answers}: some answers are 3 and none is 0: indices count from 0", err=True)
    if as_json:
        typer.echo(json.dumps(scores, indent=2, allow_nan=False))
        return
    _show(scores)


def _show(scores: dict[str, Any]) -> None:
    from rich.console import Console

    # A narrow terminal wraps lines; it must not cut numbers.
    width = Console().width if sys.stdout.isatty() else _WIDTH
    console = Console(width=max(_WIDTH, width))
    console.print(_table(scores))
    for line in _remarks(scores):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(scores: dict[str, Any]) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    from selfcorrect.recipes.foundation.printable import escape_controls

    table = Table(
        title="BBQ",
        caption="Bias: 1 always with the stereotype, -1 always against it; in brackets the 95 % "
        "interval over templates (those of the other columns: --json). –: undefined",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("Category", overflow="fold")
    for heading in _HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    answered = {name: one for name, one in scores["categories"].items() if _num_answers(one)}
    for index, (name, one) in enumerate(answered.items()):
        last = index == len(answered) - 1
        table.add_row(escape(escape_controls(name)), *_cells(one), end_section=last)
    table.add_row("Overall, pooled", *_cells(scores["overall"]["pooled"]))
    table.add_row("Overall, mean", *_cells(scores["overall"]["mean"]))
    return table


def _cells(one: dict[str, Any]) -> list[str]:
    from selfcorrect.evaluate.statistics.formatting import compact, compact_with_interval

    ends = {"value": "", "low": "_low", "high": "_high"}
    biases = [
        compact_with_interval({end: one[name + suffix] for end, suffix in ends.items()})
        for name in _BIASES
    ]
    shares = [compact(one[name]) for name in _SHARES]
    letters = " ".join(compact(one[name]) for name in _LETTERS)
    return [*biases, *shares, letters, f"{_num_answers(one):,}"]


def _num_answers(one: dict[str, Any]) -> int:
    return int(one["n_rows"] - one["n_unanswered"])


def _remarks(scores: dict[str, Any]) -> list[str]:
    """What the table leaves out, with counts; over every category, not the overall ones alone."""
    categories = scores["categories"]
    sums = {
        name: sum(one[name] for one in categories.values())
        for name in ("n_rows", "n_unparsed", "n_unclear", "n_unanswered", "n_undecided")
    }
    num_answers = sums["n_rows"] - sums["n_unanswered"]
    lines = [
        "Overall: no intersections (_x_) and no name questions; pooled weighs answers alike, mean "
        "categories.",
        f"Unparsed: {sums['n_unparsed']:,} of {num_answers:,} answers match no option"
        + (f", or several ({sums['n_unclear']:,})" if sums["n_unclear"] else ""),
        f"Unanswered: {sums['n_unanswered']:,} of {sums['n_rows']:,} rows of the data"
        + _where_unanswered(categories),
    ]
    if sums["n_undecided"]:
        lines.append(
            f"Left out of the bias scores: {sums['n_undecided']:,} answers to questions of which "
            "the data do not tell which option agrees with the stereotype"
        )
    return lines


def _where_unanswered(categories: dict[str, dict[str, Any]]) -> str:
    from selfcorrect.recipes.foundation.printable import escape_controls

    parts = [
        f"{escape_controls(name)} {one['n_unanswered']:,}"
        + (" (all)" if not _num_answers(one) else "")
        for name, one in categories.items()
        if one["n_unanswered"]
    ]
    return f": {', '.join(parts)}" if parts else ""
