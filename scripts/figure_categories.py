"""Metric against RLHF steps in every category of a benchmark. Copy and change.

python scripts/figure_categories.py RUN [RUN ...] [--experiment bbq] [--model NAME] [--out FOLDER]
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from selfcorrect.evaluate.figures.curves import save
from selfcorrect.evaluate.figures.details import by_category
from selfcorrect.evaluate.results import load
from selfcorrect.recipes.foundation.errors import InputError


def main(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; a figure for each.")],
    experiment: Annotated[str, typer.Option(help="One that has categories.")] = "bbq",
    model: Annotated[str | None, typer.Option(help="Default: the largest.")] = None,
    out: Annotated[Path, typer.Option(help="Where PNG and SVG go.")] = Path("figures"),
) -> None:
    """Draw the headline metric of one model: a panel a category, a line a condition."""
    for number, run in enumerate(runs, start=1):
        figure = by_category(load(run), experiment, model)
        name = f"categories-{experiment}" + (f"-{number}" if len(runs) > 1 else "")
        figure.suptitle(f"{run.resolve().name}: {figure.get_suptitle()}", x=0.01, ha="left")
        save(figure, out, name)
        print(out / f"{name}.png")


if __name__ == "__main__":
    try:
        typer.run(main)
    except InputError as error:
        sys.stderr.write(f"figure_categories: {error}\n")
        sys.exit(2)
