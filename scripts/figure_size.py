"""Metric against model size (the paper's figure 1); several runs: a line a run. Copy and change.

python scripts/figure_size.py RUN [RUN ...] [--step N] [--out FOLDER]
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from selfcorrect.evaluate.figures.curves import against_size, save
from selfcorrect.evaluate.figures.runs import size_by_run
from selfcorrect.evaluate.results import load
from selfcorrect.recipes.foundation.errors import InputError


def main(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    step: Annotated[
        list[int] | None,
        typer.Option(help="RLHF step, again for more; default: the last that all models have."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where PNG and SVG go.")] = Path("figures"),
) -> None:
    """Draw the headline metric against parameters: a panel an experiment, a line a condition."""
    frame = load(*runs)
    if len(runs) == 1:
        figure = against_size(frame, *(step or []))
    else:
        figure = size_by_run(frame[frame["step"].isin(step)] if step else frame)
    save(figure, out, "size")
    print(out / "size.png")


if __name__ == "__main__":
    try:
        typer.run(main)
    except InputError as error:
        sys.stderr.write(f"figure_size: {error}\n")
        sys.exit(2)
