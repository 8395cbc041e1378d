"""Finished base and reward models of another run, taken where this recipe would make the same.

Runs that differ in their raters, or in PPO alone, need not train the same base models again.
"""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from selfcorrect.evaluate.report.comparison import flatten
from selfcorrect.evaluate.run_folder import STAGE_RECORD
from selfcorrect.recipes.foundation.atomic_files import atomic_folder
from selfcorrect.recipes.foundation.checksums import check_files, read_record, write_record
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.foundation.locks import hold_lock, lock_holder
from selfcorrect.recipes.load import load_recipe
from selfcorrect.recipes.schema import Recipe

# What of the society no base model sees: its corpus is the same without.
FEEDBACK_ONLY = ("raters", "pairs", "prompts", "feedback", "held_out")
STAGES = ("base", "reward")
REMEDY = "mend it, or leave --stages-from out"


def reusable(recipe: Recipe, other: Path) -> list[str]:
    """The stages that come out of `other` as they would out of `recipe`, for models of one name.

    Raises InputError where `other` is no run, or its base models would be others.
    """
    if not (other / "recipe.yaml").is_file():
        raise InputError(f"--stages-from {other}: no run (no recipe.yaml)")
    theirs = load_recipe(str(other / "recipe.yaml"))
    if (key := _difference(recipe, theirs, "base")) is not None:
        raise InputError(
            f"--stages-from {other}: its base models would not be this recipe's, which differs in "
            f"{key}"
        )
    return [stage for stage in STAGES if _difference(recipe, theirs, stage) is None]


def take_stages(recipe: Recipe, run: Path, other: Path, stages: list[str]) -> list[str]:
    """Copy `stages` that are finished in `other` into `run`; names such as width-64/seed-1/base.

    What stands in `run` already stays. run.json says under `taken` what came from where. Raises
    InputError where what would be copied is damaged.
    """
    theirs = load_recipe(str(other / "recipe.yaml"))
    known = {model.name: model for model in theirs.models}
    taken = []
    for model in recipe.models:
        if known.get(model.name) != model:
            continue
        for seed in recipe.seeds:
            job = Path(model.name) / f"seed-{seed}"
            taken += [f"{job}/{stage}" for stage in _take(run / job, other / job, stages)]
    if taken:
        facts = read_record(run / "run.json", REMEDY)
        commit = None  # of a run whose run.json did not come along
        with suppress(FileNotFoundError):
            commit = read_record(other / "run.json", REMEDY).get("commit")
        entry = {"from": theirs.name, "commit": commit, "stages": taken}
        write_record(run / "run.json", {**facts, "taken": [*facts.get("taken", []), entry]})
    return taken


def _take(folder: Path, other: Path, stages: list[str]) -> list[str]:
    taken: list[str] = []
    with hold_lock(folder, 10.0) as free:
        if not free:
            raise InputError(f"{folder}: {lock_holder(folder)} is training here; wait for it")
        for stage in stages:
            there, here = other / stage, folder / stage
            if not (there / STAGE_RECORD).is_file() or (here / STAGE_RECORD).is_file():
                continue
            record = read_record(there / STAGE_RECORD, REMEDY)
            check_files(there, record.get("files", {}), REMEDY)
            with atomic_folder(here) as new:
                shutil.copytree(there, new, dirs_exist_ok=True)
            taken.append(stage)
    return taken


def _difference(mine: Recipe, theirs: Recipe, stage: str) -> str | None:
    """The first key that decides `stage` and is not the same in both."""
    ours, others = dict(flatten(_parts(mine, stage))), dict(flatten(_parts(theirs, stage)))
    keys = (key for key in {**ours, **others} if ours.get(key) != others.get(key))
    return next(keys, None)


def _parts(recipe: Recipe, stage: str) -> dict[str, Any]:
    """What of a recipe decides the weights that come out of `stage`, the models aside."""
    content = recipe.model_dump(mode="json")
    data = {key: content["data"][key] for key in ("society", "preferences")}
    if stage == "base":
        if recipe.base is None:
            data = {}  # a given model is only copied
        elif recipe.base.method == "pretrain":
            society = data["society"].items()
            data = {"society": {key: value for key, value in society if key not in FEEDBACK_ONLY}}
    parts = {"data": data, "base": content["base"]}
    parts["launch"] = {key: content["launch"][key] for key in ("processes", "deepspeed")}
    if stage == "reward":
        parts["reward"] = content["reward"]
        parts["seeds"] = recipe.seeds[:1]  # which rows a `limit` keeps
    return parts
