"""Metric against RLHF steps (the paper's figure 2); several runs: a line a run. Copy and change.

python scripts/figure_steps.py RUN [RUN ...] [--model NAME] [--out FOLDER]
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from selfcorrect.evaluate.figures.curves import against_steps, save
from selfcorrect.evaluate.figures.runs import steps_by_run
from selfcorrect.evaluate.results import load
from selfcorrect.recipes.foundation.errors import InputError


def main(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    model: Annotated[str | None, typer.Option(help="Default: the largest.")] = None,
    out: Annotated[Path, typer.Option(help="Where PNG and SVG go.")] = Path("figures"),
) -> None:
    """Draw the headline metric against steps: a panel an experiment, a line a condition."""
    frame = load(*runs)
    if len(runs) == 1:
        figures = {"steps": against_steps(frame, model)}
    else:
        shown = frame if model is None else frame[frame["model"] == model]
        names = dict.fromkeys(frame["experiment"])
        figures = {f"steps-{name}": steps_by_run(shown, name) for name in names}
    for name, figure in figures.items():
        save(figure, out, name)
        print(out / f"{name}.png")


if __name__ == "__main__":
    try:
        typer.run(main)
    except InputError as error:
        sys.stderr.write(f"figure_steps: {error}\n")
        sys.exit(2)
