"""One job of a run: one model and one seed, from nothing to the last checkpoint."""

# ruff: noqa: TID253  (this file sets torch up)

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from selfcorrect.evaluate.callback import gathered_weights, measure_during_training
from selfcorrect.evaluate.measuring.cell_files import Origin
from selfcorrect.evaluate.measuring.plan import EvaluationPlan
from selfcorrect.evaluate.measuring.run import recipe_plan
from selfcorrect.evaluate.run_folder import POLICY_METHODS, check_inside, read_checkpoint
from selfcorrect.evaluate.scoring.load_model import warn_trust_remote_code
from selfcorrect.evaluate.scoring.token_trie import PackingCache
from selfcorrect.evaluate.scoring.weights import files_digest
from selfcorrect.recipes.foundation import signals
from selfcorrect.recipes.foundation.atomic_files import remove_leftovers
from selfcorrect.recipes.foundation.errors import InputError, explain_machine_faults
from selfcorrect.recipes.foundation.locks import hold_lock, lock_holder
from selfcorrect.recipes.foundation.progress import Progress
from selfcorrect.recipes.foundation.ranks import current_ranks
from selfcorrect.recipes.load import training_digest
from selfcorrect.recipes.schema import Recipe
from selfcorrect.train.feedback.feedback import load_feedback
from selfcorrect.train.provenance import threads_per_job, versions
from selfcorrect.train.stages.base import train_base
from selfcorrect.train.stages.policy import train_policy
from selfcorrect.train.stages.reward import train_reward
from selfcorrect.train.trainers.state import stage_record

GOING_DOWN_SECONDS = 7.0  # one that was just killed may still be going down


def run_job(recipe: Recipe, run: Path, model_name: str, seed: int, notify: Progress) -> None:
    """Train one model with one seed through all stages; finished stages are passed over."""
    quiet_libraries()
    digest = training_digest(recipe, model_name, seed)
    recipe = recipe.of(model_name)
    torch.set_num_threads(threads_per_job(recipe))
    model = next(m for m in recipe.models if m.name == model_name)
    folder = run / model.name / f"seed-{seed}"
    for stage in ("base", "reward", recipe.policy.method):
        check_inside(run, folder / stage)
        check_inside(run, folder / f"{stage}.work")
    alone = only_one(folder) if current_ranks().rank == 0 else nullcontext()
    with explain_machine_faults(run), alone:
        feedback = load_feedback(recipe.data, recipe.seeds[0])
        train_base(recipe, model, feedback.preferences, folder / "base", seed, notify)
        base = folder / "base"
        trust = {"trust_remote_code": model.trust_remote_code}
        if model.trust_remote_code:
            warn_trust_remote_code(base)
        tokenizer = AutoTokenizer.from_pretrained(base, **trust)
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
            **trust,
        )
        record = {
            "model": model.name,
            "parameters": (stage_record(base) or {})["parameters"],
            "seed": seed,
            "recipe_digest": digest,
            "versions": versions(),
            "adapter_of": str(Path("..") / ".." / "base") if recipe.policy.lora else None,
        }
        train_policy(
            recipe.policy,
            str(base),
            reward,
            feedback,
            tokenizer,
            folder / recipe.policy.method,
            seed,
            record,
            notify,
            _measure(recipe, run, notify),
            **trust,
        )


def _measure(recipe: Recipe, run: Path, notify: Progress) -> Any:
    """What measures the live policy at a kept checkpoint; None where evaluation is not inline."""
    if recipe.evaluate.attach == "off":
        return None
    plan: EvaluationPlan = recipe_plan(recipe, run)
    packings = PackingCache()

    def go_on(*_: Any) -> None:
        if signals.is_requested():
            raise signals.Terminated

    def measure(trainer: Any, folder: Path) -> None:
        processes = current_ranks()
        checkpoint = processes.from_rank0(lambda: read_checkpoint(folder))
        origin = Origin(checkpoint.record.weights_digest or files_digest(folder))
        writes = processes.rank == 0
        # What is left unmeasured on SIGTERM is measured after training; the state comes first.
        with (
            suppress(signals.Terminated),
            # `evaluate --watch` may be at it
            hold_lock(checkpoint.evaluation, math.inf) if writes else nullcontext(),
            gathered_weights(trainer.accelerator.unwrap_model(trainer.model)) as model,
        ):
            measure_during_training(
                plan,
                model,
                trainer.processing_class,
                checkpoint.evaluation,
                go_on,
                packings,
                origin,
                processes,
            )

    return measure


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the job's folder; InputError where another process is at work on it."""
    with hold_lock(folder, GOING_DOWN_SECONDS) as free:
        if not free:
            raise InputError(
                f"{folder}: {lock_holder(folder)} is training here; wait for it, or stop it first"
            )
        for method in POLICY_METHODS:
            remove_leftovers(folder / method)
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
    if not torch.cuda.is_available():  # or DeepSpeed says that it found none
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
