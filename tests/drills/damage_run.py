"""A small run of every kind of file for damage.py: finished, stopped half-way, with LoRA."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfcorrect.recipes.load import load_recipe, save_recipe
from selfcorrect.recipes.schema import Recipe

SMALL = [
    "name=small",
    "models=[{name: tiny, scratch: {model_type: llama, hidden_size: 8, intermediate_size: 16, "
    "num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2, "
    "max_position_embeddings: 128}}]",
    "data.society.corpus.documents=400",
    "data.society.corpus.stereotypes_first=100",
    "data.society.pairs=120",
    "data.society.prompts=60",
    "data.society.blocks_per_template=1",
    "base.trainer.save_steps=5",
    "reward.trainer.save_steps=3",
    "policy.resume_every=1",
    "policy.steps=3",
    "policy.checkpoints=[0, 2, 3]",
    "policy.trainer.per_device_train_batch_size=4",
    "evaluate.limit=16",
    "evaluate.conditions=[Q, Q+IF]",
    "launch.jobs=1",
    "launch.threads=1",
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
    """A kind of file: where one lies, another of the kind to swap it with, and its reader.

    `derived`: what is damaged is to be made anew. `known` is False where nothing tells a file that
    is well-formed from another one: a table of answers that is read for the first time.
    """

    name: str
    path: Path
    other: Path
    read: Callable[[], Any]
    derived: bool = False
    known: bool = True


def small_run(runs: Path) -> Path:
    """Train and measure the run; beside it, <its name>.work is what it had to resume from."""
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
    """A run that trains an adapter, on the base and the reward model of the run that is given."""
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
