"""Model size by RLHF steps as a map: the metric as colour, or the instruction's effect. Copy it.

python scripts/figure_map.py RUN [RUN ...] [--experiment bbq] [--effect] [--out FOLDER]
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from selfcorrect.evaluate.figures.curves import save
from selfcorrect.evaluate.figures.maps import effects_by_size_and_step, size_by_steps
from selfcorrect.evaluate.results import load
from selfcorrect.evaluate.statistics.files import read_statistics
from selfcorrect.recipes.foundation.errors import InputError


def main(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; a figure for each.")],
    experiment: Annotated[str, typer.Option(help="bbq, winogender, law_school, ...")] = "bbq",
    effect: Annotated[bool, typer.Option("--effect", help="Q minus the condition.")] = False,
    out: Annotated[Path, typer.Option(help="Where PNG and SVG go.")] = Path("figures"),
) -> None:
    """Draw a panel a condition, a cell a checkpoint; what was not measured is hatched."""
    for number, run in enumerate(runs, start=1):
        if effect:
            rows = read_statistics(run / "statistics.json")["effects"]
            figure = effects_by_size_and_step(rows, experiment)
        else:
            figure = size_by_steps(load(run), experiment)
        name = f"map-{experiment}" + (f"-{number}" if len(runs) > 1 else "")
        save(figure, out, name)
        print(out / f"{name}.png")


if __name__ == "__main__":
    try:
        typer.run(main)
    except InputError as error:
        sys.stderr.write(f"figure_map: {error}\n")
        sys.exit(2)
