"""A job of a run: one model with one seed, from base model to last checkpoint."""

# ruff: noqa: TID253  (this file configures torch)

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from selfcorrect.evaluate.callback import gathered_weights, measure_during_training
from selfcorrect.evaluate.headlines import log_checkpoint
from selfcorrect.evaluate.measuring.cell_files import Origin
from selfcorrect.evaluate.measuring.measure import share_of_plan
from selfcorrect.evaluate.measuring.plan import EvaluationPlan
from selfcorrect.evaluate.measuring.run import recipe_plan, run_style
from selfcorrect.evaluate.prompts.dialogue import reads_clock
from selfcorrect.evaluate.run_folder import (
    POLICY_METHODS,
    check_inside,
    job_folder,
    read_checkpoint,
)
from selfcorrect.evaluate.scoring.load_model import warn_trust_remote_code
from selfcorrect.evaluate.scoring.precision import chosen
from selfcorrect.evaluate.scoring.token_trie import PackingCache
from selfcorrect.evaluate.scoring.weights import files_digest
from selfcorrect.recipes.foundation import signals
from selfcorrect.recipes.foundation.atomic_files import remove_leftovers
from selfcorrect.recipes.foundation.errors import InputError, explain_machine_faults
from selfcorrect.recipes.foundation.locks import hold_lock, lock_holder
from selfcorrect.recipes.foundation.progress import Progress, no_progress
from selfcorrect.recipes.foundation.ranks import current_ranks
from selfcorrect.recipes.load import training_digest
from selfcorrect.recipes.schema import Recipe
from selfcorrect.train.feedback.feedback import load_feedback
from selfcorrect.train.provenance import auto_precision, threads_per_job, versions
from selfcorrect.train.stages import JobFacts
from selfcorrect.train.stages.base import train_base
from selfcorrect.train.stages.checkpoints import Measure
from selfcorrect.train.stages.policy import train_policy
from selfcorrect.train.stages.reward import train_reward
from selfcorrect.train.trainers.state import stage_record

logger = logging.getLogger(__name__)

_PACKINGS = PackingCache()  # jobs in one process ask the same, mostly through the same tokenizer

KILLED_PROCESS_SECONDS = 7.0  # a process that was just killed may still be ending


def run_job(
    recipe: Recipe,
    run: Path,
    model_name: str,
    seed: int,
    progress: Progress = no_progress,
    plan: EvaluationPlan | None = None,
) -> None:
    """Train one model with one seed through all stages that are not finished.

    `plan` is the recipe's evaluation plan, if it is loaded already.
    """
    quiet_libraries()
    digest = training_digest(recipe, model_name, seed)
    recipe = recipe.of(model_name)
    torch.set_num_threads(threads_per_job(recipe))
    model = next(m for m in recipe.models if m.name == model_name)
    style = run_style(recipe, run)
    folder = job_folder(run, model.name, seed)
    trained = recipe.precision.trained
    job = JobFacts(folder, seed, progress, model.trust_remote_code, style, trained=trained)
    for stage in ("base", "reward", recipe.policy.method):
        check_inside(run, job.folder / stage)
        check_inside(run, job.folder / f"{stage}.work")
    lock = hold_job(job.folder) if current_ranks().rank == 0 else nullcontext()
    with explain_machine_faults(run), lock:
        feedback = load_feedback(recipe.data, recipe.seeds[0])
        train_base(job, recipe, model, feedback.preferences)
        parameters = (stage_record(job.base) or {})["parameters"]
        if recipe.launch.deepspeed is None:  # which has types of its own
            fast = auto_precision(run)
            job = replace(job, frozen=chosen(recipe.precision.frozen, parameters, fast))
        if model.trust_remote_code:
            warn_trust_remote_code(job.base)
        trust = {"trust_remote_code": model.trust_remote_code}
        tokenizer = AutoTokenizer.from_pretrained(job.base, **trust)
        if recipe.reward.has_model:
            train_reward(job, recipe.reward, feedback, tokenizer)
        record = {
            "model": model.name,
            "parameters": parameters,
            "seed": seed,
            "recipe_digest": digest,
            "versions": versions(),
            "adapter_of": str(Path("..") / ".." / "base") if recipe.policy.lora else None,
            "chat_template_kwargs": style.arguments or None,
            "chat_template_date": style.date if reads_clock(tokenizer, style) else None,
        }
        measure = None
        if recipe.evaluate.attach == "inline":
            measure = _measure_with(
                plan or recipe_plan(recipe, run), sorted(recipe.policy.checkpoints), progress
            )
        functions = {str(name): weight for name, weight in recipe.reward.functions.items()}
        train_policy(job, recipe.policy, feedback, tokenizer, record, measure, functions)


def _measure_with(plan: EvaluationPlan, steps: list[int], progress: Progress) -> Measure:
    """Return a function that measures the live policy at a kept checkpoint, one of `steps`."""

    def measure(trainer: Any, folder: Path) -> None:
        ranks = current_ranks()
        checkpoint = ranks.from_rank0(lambda: read_checkpoint(folder))
        num_measured = steps.index(checkpoint.record.step)

        def report(share: float) -> None:
            if signals.is_requested():
                raise signals.Terminated
            progress("evaluate", num_measured + share, len(steps))

        origin = Origin(checkpoint.record.weights_digest or files_digest(folder))
        with (
            # On SIGTERM the training state is saved first; the rest is measured after training.
            suppress(signals.Terminated),
            # `evaluate --watch` may be measuring this checkpoint.
            hold_lock(checkpoint.evaluation, math.inf) if ranks.rank == 0 else nullcontext(),
            gathered_weights(trainer.accelerator.unwrap_model(trainer.model)) as model,
        ):
            measure_during_training(
                plan, model, trainer.processing_class, checkpoint.evaluation,
                share_of_plan(plan, report), _PACKINGS, origin, ranks,
            )  # fmt: skip
        if ranks.rank == 0 and not signals.is_requested():
            progress("evaluate", num_measured + 1, len(steps))
            log_checkpoint(checkpoint)

    return measure


@contextmanager
def hold_job(folder: Path) -> Iterator[None]:
    """Hold the lock of a job's folder; InputError if another process is training there."""
    with hold_lock(folder, KILLED_PROCESS_SECONDS) as is_free:
        if not is_free:
            raise InputError(
                f"{folder}: {lock_holder(folder)} is training here; wait for it, or stop it first"
            )
        for method in POLICY_METHODS:
            remove_leftovers(folder / method)
        yield


def quiet_libraries() -> None:
    """Silence the libraries' own progress bars and warnings; the run shows its own progress."""
    import warnings

    from datasets.utils.logging import disable_progress_bar

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    if not torch.cuda.is_available():  # or DeepSpeed warns that it found none
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
