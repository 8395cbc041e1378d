"""Copy finished base and reward models from another run whose recipe would make the same.

Runs that differ only in their raters or their policy stage need not train base models again.
"""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from selfcorrect.evaluate.measuring.run import run_date
from selfcorrect.evaluate.prompts.dialogue import CLOCK
from selfcorrect.evaluate.run_folder import STAGE_RECORD, job_folder
from selfcorrect.recipes.foundation.atomic_files import atomic_folder
from selfcorrect.recipes.foundation.checksums import check_files, flatten, read_record, write_record
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.foundation.locks import hold_lock, lock_holder
from selfcorrect.recipes.load import TEMPLATE_KEYS, load_recipe
from selfcorrect.recipes.schema import Recipe

# Keys of the society that do not affect its corpus, and so no base model.
FEEDBACK_ONLY = ("raters", "pairs", "prompts", "feedback", "requests", "held_out")
STAGES = ("base", "reward")
CONFIG = "tokenizer_config.json"  # where older models have their template
REMEDY = "restore it, or leave out --stages-from"


def reusable_stages(recipe: Recipe, source: Path) -> list[str]:
    """Return the stages that the recipe of the run `source` makes exactly as `recipe` would.

    Raises InputError if `source` is not a run, or if its base models would differ.
    """
    if not (source / "recipe.yaml").is_file():
        raise InputError(f"--stages-from {source}: not a run folder (no recipe.yaml)")
    source_recipe = load_recipe(str(source / "recipe.yaml"))
    if (key := _difference(recipe, source_recipe, "base")) is not None:
        raise InputError(
            f"--stages-from {source}: its base models differ from this recipe's, because of {key}"
        )
    stages = STAGES if recipe.reward.has_model else STAGES[:1]
    return [stage for stage in stages if _difference(recipe, source_recipe, stage) is None]


def copy_stages(recipe: Recipe, run: Path, source: Path, stages: list[str]) -> list[str]:
    """Copy `stages` that are finished in `source` into `run`; return names (tiny/seed-1/base).

    Stages that exist in `run` stay. run.json lists under `taken` what was copied from where. Raises
    InputError for a damaged stage, and for one whose texts have another date than this run's.
    """
    source_recipe = load_recipe(str(source / "recipe.yaml"))
    source_models = {model.name: model for model in source_recipe.models}
    copied = []
    for model in recipe.models:
        if source_models.get(model.name) != model:
            continue
        for seed in recipe.seeds:
            folder, source_folder = (job_folder(top, model.name, seed) for top in (run, source))
            if set(_dated(recipe, stages)) - {path.name for path in folder.glob("*")}:
                _check_date(recipe, run, source, source_folder)
            copied += [
                f"{folder.relative_to(run)}/{stage}"
                for stage in _copy(folder, source_folder, stages)
            ]
    if copied:
        facts = read_record(run / "run.json", REMEDY)
        commit = None  # of a run that was copied without its run.json
        with suppress(FileNotFoundError):
            commit = read_record(source / "run.json", REMEDY).get("commit")
        entry = {"from": source_recipe.name, "commit": commit, "stages": copied}
        write_record(run / "run.json", {**facts, "taken": [*facts.get("taken", []), entry]})
    return copied


def _dated(recipe: Recipe, stages: list[str]) -> list[str]:
    """Return the stages that read rendered dialogues."""
    is_tuned = recipe.base is not None and recipe.base.method == "sft"
    return [stage for stage in stages if stage == "reward" or is_tuned]


def _check_date(recipe: Recipe, run: Path, source: Path, source_folder: Path) -> None:
    """Raise InputError if the models' chat template writes a date, and the runs' dates differ."""
    files = [*(source_folder / "base").rglob("*.jinja"), source_folder / "base" / CONFIG]
    texts = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
    if not any(CLOCK in text for text in texts):
        return
    date, other = run_date(recipe, run), run_date(recipe, source)
    if date != other:
        raise InputError(
            f"--stages-from {source}: its chat template wrote the date {other}, but {run} began "
            f"with {date}; start in a new folder, or leave out --stages-from"
        )


def _copy(folder: Path, source: Path, stages: list[str]) -> list[str]:
    copied: list[str] = []
    with hold_lock(folder, 10.0) as is_free:
        if not is_free:
            raise InputError(f"{folder}: {lock_holder(folder)} is training here; wait for it")
        for stage in stages:
            is_there = (folder / stage / STAGE_RECORD).is_file()
            if is_there or not (source / stage / STAGE_RECORD).is_file():
                continue
            record = read_record(source / stage / STAGE_RECORD, REMEDY)
            check_files(source / stage, record.get("files", {}), REMEDY)
            with atomic_folder(folder / stage) as new:
                shutil.copytree(source / stage, new, dirs_exist_ok=True)
            copied.append(stage)
    return copied


def _difference(first: Recipe, second: Recipe, stage: str) -> str | None:
    """Return the first key that affects `stage` and differs, or None."""
    keys, other_keys = dict(flatten(_inputs(first, stage))), dict(flatten(_inputs(second, stage)))
    return next(
        (key for key in {**keys, **other_keys} if keys.get(key) != other_keys.get(key)), None
    )


def _inputs(recipe: Recipe, stage: str) -> dict[str, Any]:
    """Return the parts of a recipe, except for the models, that decide a stage's weights."""
    content = recipe.model_dump(mode="json")
    data = {key: content["data"][key] for key in ("society", "feedback", "preferences")}
    if data["feedback"] is not None:
        data["benchmarks"] = content["data"]["benchmarks"]
    if stage == "base":
        if recipe.base is None:
            data = {}  # a given model is only copied
        elif recipe.base.method == "pretrain":
            society = data["society"].items()
            data = {"society": {key: value for key, value in society if key not in FEEDBACK_ONLY}}
    inputs = {"data": data, "base": content["base"]}
    inputs["launch"] = {key: content["launch"][key] for key in ("processes", "deepspeed")}
    if stage == "reward":
        inputs["precision"] = content["precision"]
    elif recipe.base is not None:
        inputs["precision.trained"] = content["precision"]["trained"]
    if stage == "reward" or (recipe.base is not None and recipe.base.method == "sft"):
        inputs |= {key: content[key] for key in TEMPLATE_KEYS}
    if stage == "reward":
        inputs["reward"] = {k: v for k, v in content["reward"].items() if k != "functions"}
        inputs["seeds"] = recipe.seeds[:1]  # decides the rows that a `limit` keeps
    return inputs
