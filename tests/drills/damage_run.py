"""Small runs with every kind of file, for damage.py: finished, interrupted, and with LoRA."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfcorrect.recipes.load import load_recipe, save_recipe
from selfcorrect.recipes.schema import Recipe
from tests.support import small_runs

SMALL = [
    *small_runs.SMALL,
    "data.society.corpus.documents=400",
    "data.society.corpus.stereotypes_first=100",
    "data.society.pairs=120",
    "data.society.prompts=60",
    "policy.steps=3",
    "policy.checkpoints=[0, 2, 3]",
    "policy.trainer.per_device_train_batch_size=4",
    "evaluate.limit=16",
    "evaluate.conditions=[Q, Q+IF]",
]
ADAPTER = [
    "name=adapter",
    "policy.steps=1",
    "policy.checkpoints=[0, 1]",
    "policy.lora={r: 2, target_modules: [q_proj]}",
    "evaluate.attach=off",
]


@dataclass(frozen=True)
class Kind:
    """A kind of file: an example, another file to swap it with, and its reader.

    `derived`: a damaged file is computed again. `known` is False if a well-formed file cannot be
    told from another one, such as a table of answers that is read for the first time.
    """

    name: str
    path: Path
    other: Path
    read: Callable[[], Any]
    derived: bool = False
    known: bool = True


def small_run(runs: Path) -> Path:
    """Train and measure a run; beside it, small.work is the training state of an interruption."""
    recipe = load_recipe("quickstart", SMALL)
    run = runs / recipe.name
    job = run / "tiny" / "seed-0"
    try:
        _train(recipe, run, stop_at=3)
    except KeyboardInterrupt:
        shutil.copytree(job / "ppo.work", runs / "small.work")
    _train(recipe, run)
    return run


def adapter_run(runs: Path, given: Path) -> Path:
    """Train an adapter on the base and the reward model of a given run."""
    recipe = load_recipe("quickstart", [*SMALL, *ADAPTER])
    job = runs / recipe.name / "tiny" / "seed-0"
    for stage in ("base", "reward"):
        shutil.copytree(given / "tiny" / "seed-0" / stage, job / stage)
    shutil.copy(given / "run.json", runs / recipe.name / "run.json")
    save_recipe(recipe, runs / recipe.name / "recipe.yaml")
    _train(recipe, runs / recipe.name)
    return runs / recipe.name


def _train(recipe: Recipe, run: Path, stop_at: int | None = None) -> None:
    from selfcorrect.train.run import prepare_run, train_run

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage.endswith(": ppo") and done == stop_at:
            raise KeyboardInterrupt

    prepare_run(recipe, run)
    train_run(recipe, run, interrupt)


def load_folder(folder: Path) -> Any:
    """Return a digest of weights, config and tokenizer, as evaluation loads them."""
    from selfcorrect.evaluate.scoring.weights import CheckpointLoader, weights_digest

    model, tokenizer = CheckpointLoader("cpu").load(folder)
    return weights_digest(model), str(model.config), tokenizer.backend_tokenizer.to_str()
