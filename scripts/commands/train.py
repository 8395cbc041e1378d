"""`selfcorrect train`: only the training; and what `run` shares with it."""

from pathlib import Path
from typing import Annotated

import typer

from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.load import load_recipe
from selfcorrect.recipes.schema import Recipe
from selfcorrect.scripts.commands.progress import Bars

RUNS = Path("runs")
StagesFrom = Annotated[
    Path | None,
    typer.Option(help="A run whose base and reward models are taken where they are the same."),
]


def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Dotted keys, for example policy.steps=20.")
    ] = None,
    runs_dir: Annotated[Path, typer.Option(help="Where run folders lie.")] = RUNS,
    model: Annotated[str | None, typer.Option(help="Only this model of the ladder.")] = None,
    seed: Annotated[int | None, typer.Option(help="Only this seed.")] = None,
    stages_from: StagesFrom = None,
) -> None:
    """Train the ladder to its last checkpoint; evaluation as the recipe attaches it."""
    checked = load_recipe(recipe, overrides or [])
    folder = runs_dir / checked.name
    train_ladder(checked, folder, model, seed, stages_from)
    if checked.evaluate.attach == "inline":
        measure_rest(checked, folder, model, seed)  # what a SIGTERM has left


def train_ladder(
    recipe: Recipe,
    folder: Path,
    model: str | None = None,
    seed: int | None = None,
    stages_from: Path | None = None,
) -> None:
    """Check all of the recipe before anything is loaded, then train what is not finished."""
    from selfcorrect.train.run import open_run, train_run, unfinished

    names = [m.name for m in recipe.models]
    if model is not None and model not in names:
        raise InputError(f"--model {model}: the recipe has {', '.join(names)}")
    if seed is not None and seed not in recipe.seeds:
        raise InputError(f"--seed {seed}: the recipe has {recipe.seeds}")
    todo = bool(unfinished(recipe, folder))
    if todo:
        from selfcorrect.train.check import check_training
        from selfcorrect.train.distributed.settings import check_launch

        check_launch(recipe)
        check_training(recipe)
    if todo and stages_from is not None:
        from selfcorrect.train.stages.reuse import reusable, take_stages

        stages = reusable(recipe, stages_from)  # before anything is written
    open_run(recipe, folder)
    if todo and stages_from is not None:
        taken = take_stages(recipe, folder, stages_from, stages)
        print(f"Taken from {stages_from}: {', '.join(taken) or 'nothing, all of it is here'}")
    wanted = {
        (name, number)
        for name in names
        for number in recipe.seeds
        if model in (None, name) and seed in (None, number)
    }
    with Bars() as bars:
        train_run(recipe, folder, lambda job, *rest: bars(f"{job[0]} seed {job[1]}", *rest), wanted)
    if todo:
        _say_cost(recipe, folder, wanted)


def _say_cost(recipe: Recipe, folder: Path, jobs: set[tuple[str, int]]) -> None:
    """One line on what attached evaluation took beside PPO, over these jobs."""
    from selfcorrect.recipes.foundation.checksums import read_record
    from selfcorrect.train.run import last_record

    paths = [last_record(recipe, folder, job) for job in jobs]
    stages = [read_record(path, "delete it and run again") for path in paths if path.is_file()]
    spent = sum(stage["evaluation_seconds"] for stage in stages)
    if spent:
        from selfcorrect.evaluate.measuring.measure import cost_message

        training = sum(stage["seconds"] for stage in stages) - spent
        print(cost_message(spent, training, recipe.policy.method.upper()))


def measure_rest(
    recipe: Recipe, folder: Path, model: str | None = None, seed: int | None = None
) -> None:
    """Evaluate whatever checkpoint (of one model, of one seed) still lacks a cell."""
    from selfcorrect.evaluate.measuring.run import evaluate_run
    from selfcorrect.evaluate.run_folder import planned_checkpoints
    from selfcorrect.train.provenance import threads_per_job

    threads = threads_per_job(recipe)  # as while training: sums may round by their number
    only = None
    if model is not None or seed is not None:
        only = {
            at
            for at in planned_checkpoints(recipe)
            if model in (None, at[0]) and seed in (None, at[1])
        }
    with Bars() as bars:
        evaluate_run(recipe, folder, lambda *args: bars("all", *args), threads=threads, only=only)
