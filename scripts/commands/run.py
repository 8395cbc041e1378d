"""`selfcorrect run` and `selfcorrect train`: a recipe, with or without evaluation and report."""

from pathlib import Path
from typing import Annotated

import typer

from selfcorrect.recipes.load import load_recipe
from selfcorrect.scripts.commands.progress import Bars
from selfcorrect.scripts.commands.report import show

RUNS = Path("runs")
RecipeName = Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Dotted keys, for example policy.steps=20.")
]
RunsDir = Annotated[Path, typer.Option(help="The folder of all run folders.")]
StagesFrom = Annotated[
    Path | None,
    typer.Option(help="Copy base and reward models from this run if the recipe makes the same."),
]


def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    runs_dir: RunsDir = RUNS,
    stages_from: StagesFrom = None,
) -> None:
    """Train the ladder, evaluate every checkpoint, write the report. Run again to resume."""
    from selfcorrect.train.run import run_recipe

    checked = load_recipe(recipe, overrides or [])
    with Bars() as bars:
        folder = run_recipe(
            checked, runs_dir / checked.name, progress=bars, stages_from=stages_from
        )
    show([folder], redraw=False)


def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    runs_dir: RunsDir = RUNS,
    model: Annotated[str | None, typer.Option(help="Only this model of the ladder.")] = None,
    seed: Annotated[int | None, typer.Option(help="Only this seed.")] = None,
    stages_from: StagesFrom = None,
) -> None:
    """Train the ladder to its last checkpoint; evaluate.attach decides about the evaluation."""
    from selfcorrect.train.run import run_recipe

    checked = load_recipe(recipe, overrides or [])
    with Bars() as bars:
        run_recipe(
            checked,
            runs_dir / checked.name,
            progress=bars,
            model=model,
            seed=seed,
            stages_from=stages_from,
            evaluate=checked.evaluate.attach == "inline",  # what a SIGTERM left unmeasured
        )
