"""`selfcorrect run`: the whole job, from a recipe to a report."""

from pathlib import Path
from typing import Annotated

import typer

from selfcorrect.recipes.load import load_recipe
from selfcorrect.scripts.commands.report import show
from selfcorrect.scripts.commands.train import RUNS, StagesFrom, measure_rest, train_ladder


def run(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Dotted keys, for example policy.steps=20.")
    ] = None,
    runs_dir: Annotated[Path, typer.Option(help="Where run folders lie.")] = RUNS,
    stages_from: StagesFrom = None,
) -> None:
    """Train the ladder, evaluate every checkpoint, write the report. Run again to resume."""
    checked = load_recipe(recipe, overrides or [])
    folder = runs_dir / checked.name
    train_ladder(checked, folder, stages_from=stages_from)
    measure_rest(checked, folder)
    show([folder], redraw=False)
