"""Run a recipe in its folder: check everything, train job by job, measure what is left."""

import logging
import math
import os
import shutil
import signal
import sys
import threading
from collections.abc import Collection
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext, suppress
from multiprocessing import current_process, get_context, parent_process
from pathlib import Path
from typing import Any

from tqdm import tqdm

from selfcorrect.evaluate.headlines import log_checkpoint
from selfcorrect.evaluate.measuring.inputs import FILE as INPUTS
from selfcorrect.evaluate.measuring.inputs import check_inputs
from selfcorrect.evaluate.measuring.measure import cost_message
from selfcorrect.evaluate.measuring.plan import EvaluationPlan
from selfcorrect.evaluate.measuring.run import evaluate_run, recipe_plan, run_date
from selfcorrect.evaluate.run_folder import STAGE_RECORD, job_folder, planned_checkpoints
from selfcorrect.recipes.foundation import signals
from selfcorrect.recipes.foundation.checksums import read_record
from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from selfcorrect.recipes.foundation.locks import LOCK, hold_lock
from selfcorrect.recipes.foundation.messages import log_to_stderr
from selfcorrect.recipes.foundation.progress import Progress, no_progress
from selfcorrect.recipes.foundation.ranks import best_device
from selfcorrect.recipes.load import TEMPLATE_KEYS, load_recipe, save_recipe
from selfcorrect.recipes.schema import Recipe
from selfcorrect.train.check import check_training
from selfcorrect.train.provenance import auto_precision, record_start, threads_per_job
from selfcorrect.train.stages.reuse import copy_stages, reusable_stages

BENCHMARKS = "benchmarks"  # the society's, in the run's folder
Job = tuple[str, int]  # model, seed

logger = logging.getLogger(__name__)


def run_recipe(
    recipe: Recipe,
    run: Path,
    *,
    progress: Progress = no_progress,
    model: str | None = None,
    seed: int | None = None,
    stages_from: Path | None = None,
    evaluate: bool = True,
) -> Path:
    """Train and measure in the folder `run` whatever of the recipe is missing there; return it.

    `model` and `seed` restrict the work. `stages_from` is a run whose base and reward models are
    copied if this recipe would make the same. Without `evaluate`, checkpoints are measured only
    during training, as `evaluate.attach` says. `progress` gets stages such as "tiny seed 0: ppo".

    Raises InputError, in one line, before anything is trained if the recipe, its data or the
    folder cannot be used, and RunFailure for errors later on. Call it again to resume.
    """
    jobs = _select_jobs(recipe, model, seed)
    was_finished = not unfinished(recipe, run)
    plan = prepare_run(recipe, run, stages_from=stages_from)
    train_run(recipe, run, progress, plan=plan, only=jobs)
    if not was_finished:
        _log_evaluation_cost(recipe, run, jobs)
    if evaluate:
        all_jobs = model is None and seed is None
        keys = {key for key in planned_checkpoints(recipe) if (key.model, key.seed) in jobs}
        evaluate_run(
            recipe,
            run,
            _with_prefix(progress, "all"),
            plan=plan,
            threads=threads_per_job(recipe),  # as in training: sums may round by their number
            only=None if all_jobs else keys,
            on_measured=log_checkpoint,
        )
    return run


def prepare_run(
    recipe: Recipe, run: Path, *, stages_from: Path | None = None, here: bool = True
) -> EvaluationPlan:
    """Check the recipe, make or open its folder, and load the benchmarks, before any training.

    A run may have more models or seeds than before, and other evaluation or launch settings,
    except for the processes that share a batch; other changes belong to another run. Nothing is
    written to a foreign folder, or to a finished run, which may be read-only. With `here=False`,
    this machine only submits jobs: its devices are not checked.

    Raises InputError for anything that would fail during training.
    """
    if here and unfinished(recipe, run):
        from selfcorrect.evaluate.scoring.precision import check_dtype
        from selfcorrect.train.distributed.settings import check_launch

        check_launch(recipe)
        for key in ("frozen", "trained"):
            check_dtype(getattr(recipe.precision, key), best_device(), f"precision.{key}")
    old = check_run(recipe, run)
    reused: list[str] = []
    if stages_from is not None and unfinished(recipe, run):
        reused = reusable_stages(recipe, stages_from)
    is_read_only = old == recipe and not unfinished(recipe, run)
    with nullcontext() if is_read_only else hold_lock(run, math.inf):
        auto = auto_precision(run, stages_from) if here else None
        plan = _open(recipe, run, run_date(recipe, run, stages_from), auto)
    if stages_from is not None and unfinished(recipe, run):
        copied = copy_stages(recipe, run, stages_from, reused)
        logger.info("copied from %s: %s", stages_from, ", ".join(copied) or "nothing, all is here")
    return plan


def check_run(recipe: Recipe, run: Path) -> Recipe | None:
    """Check the recipe and the folder without writing; return the recipe of an existing run.

    Raises InputError if the folder is not this recipe's, or if training would fail.
    """
    old = _check_folder(recipe, run)
    if unfinished(recipe, run):
        check_training(recipe)
    return old


def _open(recipe: Recipe, run: Path, date: str, auto: str | None) -> EvaluationPlan:
    old = _check_folder(recipe, run)  # again: another process may have made it in the meantime
    try:
        plan = recipe_plan(recipe, run, date)
    except InputError:
        if old is None:
            shutil.rmtree(run, ignore_errors=True)
        raise
    if old != recipe:
        save_recipe(recipe, run / "recipe.yaml")
    check_inputs(recipe, run, training=bool(unfinished(recipe, run)))
    if unfinished(recipe, run):
        record_start(recipe, run, date, auto)
    return plan


def _check_folder(recipe: Recipe, run: Path) -> Recipe | None:
    path = run / "recipe.yaml"
    if path.is_file():
        old = load_recipe(str(path))
        _check_same(old, recipe, run)
        return old
    if run.exists():
        names = {path.name for path in run.iterdir() if not path.name.endswith(".part")}
        # A run that was killed at once leaves these.
        if names and not (LOCK in names and names <= {LOCK, BENCHMARKS, INPUTS}):
            raise InputError(
                f"{run}: not empty, and not a run folder (no recipe.yaml); choose another folder"
            )
    return None


def _check_same(old: Recipe, new: Recipe, run: Path) -> None:
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    for section in ("data", "base", "reward", "policy", "precision", *TEMPLATE_KEYS):
        key = _first_difference(before[section], after[section], section)
        if key:
            raise InputError(
                f"{run}: holds a run of another recipe, which differs in {key}; "
                "use another name or --runs-dir, or delete the folder"
            )
    for name in ("processes", "deepspeed"):
        key = _first_difference(before["launch"][name], after["launch"][name], f"launch.{name}")
        if key:
            raise InputError(
                f"{run}: was begun with {key}: {before['launch'][name]}, on which its batches and "
                "training states depend; keep that value, or use another name"
            )
    known = {model["name"]: model for model in before["models"]}
    for model in after["models"]:
        if known.get(model["name"], model) != model:
            raise InputError(
                f"{run}: this run already has a different model named {model['name']}; rename the "
                "one in your recipe"
            )


def _first_difference(before: Any, after: Any, key: str) -> str | None:
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted({*before, *after}, key=str):
            difference = _first_difference(before.get(name), after.get(name), f"{key}.{name}")
            if difference:
                return difference
        return None
    return key if before != after else None


def _select_jobs(recipe: Recipe, model: str | None, seed: int | None) -> set[Job]:
    names = [m.name for m in recipe.models]
    if model is not None and model not in names:
        raise InputError(f"model {model}: not in the recipe, which has {', '.join(names)}")
    if seed is not None and seed not in recipe.seeds:
        raise InputError(f"seed {seed}: not in the recipe, which has {recipe.seeds}")
    return {
        (name, number)
        for name in names
        for number in recipe.seeds
        if model in (None, name) and seed in (None, number)
    }


def unfinished(recipe: Recipe, run: Path) -> list[Job]:
    """Return the jobs whose last stage is not finished, in the order in which they start."""
    jobs = [(model.name, seed) for model in reversed(recipe.models) for seed in recipe.seeds]
    return [job for job in jobs if not last_record(recipe, run, job).is_file()]


def last_record(recipe: Recipe, run: Path, job: Job) -> Path:
    """Return the path of the record that a job's last stage writes at its end."""
    return job_folder(run, *job) / recipe.policy.method / STAGE_RECORD


def _log_evaluation_cost(recipe: Recipe, run: Path, jobs: Collection[Job]) -> None:
    """Log how long evaluation took during the policy stages of these jobs."""
    paths = [last_record(recipe, run, job) for job in jobs]
    records = [read_record(path, "delete it and run again") for path in paths if path.is_file()]
    spent = sum(record["evaluation_seconds"] for record in records)
    if spent:
        training = sum(record["seconds"] for record in records) - spent
        logger.info(cost_message(spent, training, recipe.policy.method.upper()))


def train_run(
    recipe: Recipe,
    run: Path,
    progress: Progress = no_progress,
    *,
    plan: EvaluationPlan | None = None,
    only: Collection[Job] | None = None,
) -> None:
    """Train every unfinished job (of `only`), `launch.jobs` at a time, in a prepared run folder.

    The largest models are listed last and take longest, so they start first. `plan` is the
    recipe's evaluation plan, if it is loaded already.
    """
    jobs = [job for job in unfinished(recipe, run) if only is None or job in only]
    if recipe.launch.jobs == 1 or len(jobs) == 1:
        for job in jobs:
            _train_job(recipe, run, job, progress, plan)
        return
    _train_side_by_side(recipe, run, jobs, progress)


def _train_side_by_side(recipe: Recipe, run: Path, jobs: list[Job], progress: Progress) -> None:
    context = get_context("spawn")
    events: Any = context.Queue()  # no manager's process, which a SIGTERM to all would end
    pool = ProcessPoolExecutor(
        recipe.launch.jobs, mp_context=context, initializer=_begin_child, initargs=(events,)
    )
    futures: set[Future[None]] = {pool.submit(_train_in_child, recipe, run, job) for job in jobs}
    children = list((pool._processes or {}).values())
    try:
        with signals.deferred():
            is_told = False
            while futures:
                if signals.is_requested() and not is_told:
                    is_told = True
                    for future in futures:
                        future.cancel()  # those that have not begun
                    for child in children:
                        child.terminate()
                done, futures = wait(futures, timeout=0.5, return_when=FIRST_COMPLETED)
                while not events.empty():
                    progress(*events.get())
                for future in done:
                    with suppress(CancelledError):
                        future.result()
    except signals.Terminated:
        raise  # the children have ended by themselves
    except BaseException as error:  # Ctrl-C too: no child may go on training unseen
        if isinstance(error, BrokenProcessPool) and signals.is_requested():
            raise signals.Terminated from None  # all have saved: see `_train_in_child`
        for child in children:
            child.kill()
        if isinstance(error, BrokenProcessPool):
            raise RunFailure(
                "a training process was killed (out of memory?); "
                "run the same command again to resume, or lower launch.jobs"
            ) from None
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_events: Any = None  # in a child process: the queue for progress
_plan: EvaluationPlan | None = None  # in a child process: loaded for its first job


def _begin_child(events: Any) -> None:
    global _events
    log_to_stderr()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent ends its children
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own, of all processes, would outlive a killed child
    events.cancel_join_thread()
    _events = events


def _train_in_child(recipe: Recipe, run: Path, job: Job) -> None:
    global _plan
    signals.listen()  # before and after a job, SIGTERM simply ends the process
    try:
        if _plan is None and recipe.evaluate.attach == "inline":
            _plan = recipe_plan(recipe, run)
        _train_job(recipe, run, job, lambda *event: _events.put(event), _plan)
    except signals.Terminated:
        os._exit(0)  # all is saved; the parent waits for the process's end, not for a result
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.stdout.flush()


def _end_with_parent() -> None:
    """End this process with its parent: a killed run must not go on training unseen."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _train_job(
    recipe: Recipe, run: Path, job: Job, progress: Progress, plan: EvaluationPlan | None
) -> None:
    """Train one job in this process, or in the processes that the recipe asks for."""
    model, seed = job
    progress = _with_prefix(progress, f"{model} seed {seed}")
    if recipe.launch.starts_processes:
        from selfcorrect.train.distributed.parent import run_distributed

        child = current_process().name.rpartition("-")[2]  # SpawnProcess-1 and so on
        slot = int(child) % recipe.launch.jobs if child.isdecimal() else 0
        run_distributed(recipe, run, model, seed, progress, slot)
    else:
        from selfcorrect.train.job import run_job

        run_job(recipe, run, model, seed, progress, plan)


def _with_prefix(progress: Progress, prefix: str) -> Progress:
    return lambda stage, done, total: progress(f"{prefix}: {stage}", done, total)
