"""One job of a run: one model and one seed, from nothing to the last checkpoint."""

# ruff: noqa: TID253  (this file sets torch up)

import importlib.metadata
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoTokenizer

from selfcorrect.evaluate.callback import measure_undisturbed, whole
from selfcorrect.evaluate.cell_files import Origin
from selfcorrect.evaluate.claims import claimed
from selfcorrect.evaluate.offline import recipe_plan
from selfcorrect.evaluate.packing import Prepared
from selfcorrect.evaluate.plan import EvaluationPlan
from selfcorrect.evaluate.processes import joined
from selfcorrect.evaluate.run_folder import read_checkpoint
from selfcorrect.evaluate.weights import files_digest
from selfcorrect.recipes import termination
from selfcorrect.recipes.errors import InputError, RunFailure
from selfcorrect.recipes.load import training_digest
from selfcorrect.recipes.schema import Recipe
from selfcorrect.train.base import train_base
from selfcorrect.train.feedback import load_feedback
from selfcorrect.train.policy import train_policy
from selfcorrect.train.reward import train_reward
from selfcorrect.train.stage import Notify, finished

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed")


def versions() -> dict[str, str]:
    """Versions of the packages that decide a run's numbers, those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def run_job(recipe: Recipe, run: Path, model_name: str, seed: int, notify: Notify) -> None:
    """Train one model with one seed through all stages; finished stages are passed over."""
    quiet_libraries()
    torch.set_num_threads(threads_per_job(recipe))
    model = next(m for m in recipe.models if m.name == model_name)
    folder = run / model.name / f"seed-{seed}"
    alone = only_one(folder) if joined().rank == 0 else nullcontext()
    with alone, full_disk_is_said(run):
        feedback = load_feedback(recipe.data, recipe.seeds[0])
        train_base(recipe, model, feedback.preferences, folder / "base", seed, notify)
        base = folder / "base"
        tokenizer = AutoTokenizer.from_pretrained(base)
        reward = folder / "reward"
        train_reward(
            recipe.reward,
            base,
            feedback.preferences,
            tokenizer,
            reward,
            seed,
            notify,
            feedback.left_out,
        )
        record = {
            "model": model.name,
            "parameters": (finished(base) or {})["parameters"],
            "seed": seed,
            "recipe_digest": training_digest(recipe, model.name, seed),
            "versions": versions(),
            "adapter_of": str(Path("..") / ".." / "base") if recipe.ppo.lora else None,
        }
        train_policy(
            recipe.ppo,
            str(base),
            reward,
            feedback.prompts,
            tokenizer,
            folder / "ppo",
            seed,
            record,
            notify,
            _measure(recipe, run, notify),
        )


def threads_per_job(recipe: Recipe) -> int:
    """CPU threads of each process of a job: the recipe's, or an even share of the cores."""
    at_once = recipe.launch.jobs * recipe.launch.processes
    return recipe.launch.threads or max(1, (os.cpu_count() or 1) // at_once)


def _measure(recipe: Recipe, run: Path, notify: Notify) -> Any:
    """What measures the live policy at a kept checkpoint; None where evaluation is not inline."""
    if recipe.evaluate.attach == "off":
        return None
    plan: EvaluationPlan = recipe_plan(recipe, run)
    prepared = Prepared()

    def go_on(*_: Any) -> None:
        if termination.is_asked():
            raise termination.Terminated

    def measure(trainer: Any, folder: Path) -> None:
        processes = joined()
        checkpoint = processes.agree(lambda: read_checkpoint(folder))
        origin = Origin(checkpoint.record.weights_digest or files_digest(folder))
        writes = processes.rank == 0
        # What is left unmeasured on SIGTERM is measured after training; the state comes first.
        with (
            suppress(termination.Terminated),
            # `evaluate --watch` may be at it
            claimed(checkpoint.evaluation, wait=True) if writes else nullcontext(),
            whole(trainer.accelerator.unwrap_model(trainer.model)) as model,
        ):
            measure_undisturbed(
                plan,
                model,
                trainer.processing_class,
                checkpoint.evaluation,
                go_on,
                prepared,
                origin,
                processes,
            )

    return measure


@contextmanager
def full_disk_is_said(run: Path) -> Iterator[None]:
    """RunFailure with one line where a full disk is behind whatever a library raises.

    torch and safetensors report it as errors of their own; what they leave behind is half a file in
    a working folder, which the next start removes.
    """
    try:
        yield
    except (RuntimeError, OSError, SafetensorError) as error:
        said = "No space left" in str(error)
        if said or shutil.disk_usage(run).free < 2**20:
            raise RunFailure(
                f"{run}: no space left on the disk; what was finished is kept, "
                "make room and run the same command again"
            ) from None
        raise


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the job's lock; InputError where another process is at work on the same folder."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as handle:
        for wait_seconds in (1, 2, 4, 0):  # one that was just killed may still be going down
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(wait_seconds)
        else:
            raise InputError(
                f"{folder}: another process is training here; wait for it, or stop it first"
            )
        yield


def quiet_libraries() -> None:
    """Libraries speak only of errors: progress is shown by the run itself."""
    import logging
    import warnings

    from datasets.utils.logging import disable_progress_bar

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    if (
        not torch.cuda.is_available()
    ):  # or DeepSpeed, where it is installed, says that it found none
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
