"""A whole run: the folder, its jobs one after another or side by side, and how far they are."""

import math
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import (
    FIRST_COMPLETED,
    CancelledError,
    Future,
    ProcessPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import current_process, get_context, parent_process
from pathlib import Path
from typing import Any

from tqdm import tqdm

from selfcorrect.evaluate.measuring.inputs import FILE as INPUTS
from selfcorrect.evaluate.measuring.inputs import check_inputs
from selfcorrect.evaluate.measuring.run import recipe_plan
from selfcorrect.evaluate.run_folder import STAGE_RECORD
from selfcorrect.recipes.foundation import signals
from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from selfcorrect.recipes.foundation.locks import LOCK, hold_lock
from selfcorrect.recipes.foundation.messages import log_to_stderr
from selfcorrect.recipes.load import load_recipe, save_recipe
from selfcorrect.recipes.schema import Recipe
from selfcorrect.train.provenance import record_start

BENCHMARKS = "benchmarks"  # a society's own, in the run's folder
Job = tuple[str, int]  # model, seed
_events: Any = None  # in a child: where progress is told
Report = Callable[[Job, str, int, int], None]  # job, stage, steps done, steps in all


def open_run(recipe: Recipe, run: Path) -> None:
    """Make the run folder, or check that it is this recipe's.

    The ladder and the seeds may have grown, and evaluation and launch may have changed, but for
    the processes that share a batch; anything else belongs to another run.
    """
    old = check_folder(recipe, run)  # before a claim leaves a lock in somebody's folder
    if old == recipe and not unfinished(recipe, run):
        _open(recipe, run)  # writes nothing: a finished run may lie where nobody can write
        return
    with hold_lock(run, math.inf):
        _open(recipe, run)


def _is_ours(run: Path) -> bool:
    """Whether it is a run, or nothing yet, or what a run that was killed at once has left."""
    if (run / "recipe.yaml").is_file() or not run.exists():
        return True
    there = {path.name for path in run.iterdir() if not path.name.endswith(".part")}
    return not there or (LOCK in there and there <= {LOCK, BENCHMARKS, INPUTS})


def _open(recipe: Recipe, run: Path) -> None:
    path = run / "recipe.yaml"
    old = check_folder(recipe, run)
    new = old is None
    try:
        recipe_plan(recipe, run)  # conditions and benchmark files, before hours of training
    except InputError:
        if new:
            shutil.rmtree(run, ignore_errors=True)
        raise
    if old != recipe:
        save_recipe(recipe, path)
    check_inputs(recipe, run, training=bool(unfinished(recipe, run)))
    if unfinished(recipe, run):
        record_start(recipe, run)


def check_folder(recipe: Recipe, run: Path) -> Recipe | None:
    """The recipe that the run's folder holds, None where there is no run yet.

    Raises InputError where the folder is another recipe's, or no run's.
    """
    path = run / "recipe.yaml"
    if path.is_file():
        old = load_recipe(str(path))
        _check_same(old, recipe, run)
        return old
    if not _is_ours(run):
        raise InputError(f"{run}: not empty and no run (no recipe.yaml); choose another folder")
    return None


def _check_same(old: Recipe, new: Recipe, run: Path) -> None:
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    for section in ("data", "base", "reward", "policy"):
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
                "states depend; keep that, or use another name"
            )
    known = {model["name"]: model for model in before["models"]}
    for model in after["models"]:
        if known.get(model["name"], model) != model:
            raise InputError(f"{run}: its model {model['name']} is another one; rename yours")


def _first_difference(before: Any, after: Any, key: str) -> str | None:
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted({*before, *after}, key=str):
            found = _first_difference(before.get(name), after.get(name), f"{key}.{name}")
            if found:
                return found
        return None
    return key if before != after else None


def unfinished(recipe: Recipe, run: Path) -> list[Job]:
    """The jobs whose last stage has not ended, in the order in which they start."""
    jobs = [(model.name, seed) for model in reversed(recipe.models) for seed in recipe.seeds]
    return [job for job in jobs if not last_record(recipe, run, job).is_file()]


def last_record(recipe: Recipe, run: Path, job: Job) -> Path:
    """The file that the last stage of a job leaves."""
    return run / job[0] / f"seed-{job[1]}" / recipe.policy.method / STAGE_RECORD


def train_run(recipe: Recipe, run: Path, report: Report, only: set[Job] | None = None) -> None:
    """Train every model with every seed, `launch.jobs` at a time; finished parts are passed over.

    The largest models are listed last and take longest, so they start first.
    """
    wanted = [job for job in unfinished(recipe, run) if only is None or job in only]
    if recipe.launch.jobs == 1 or len(wanted) == 1:
        for job in wanted:
            _train_job(recipe, run, job, _reporter(report, job))
        return
    _side_by_side(recipe, run, wanted, report)


def _side_by_side(recipe: Recipe, run: Path, wanted: list[Job], report: Report) -> None:
    context = get_context("spawn")
    events: Any = context.Queue()  # no manager's process, which a SIGTERM to all would end
    pool = ProcessPoolExecutor(
        recipe.launch.jobs, mp_context=context, initializer=_begin_child, initargs=(events,)
    )
    waiting: set[Future[None]] = {pool.submit(_child, recipe, run, job) for job in wanted}
    children = list((pool._processes or {}).values())
    try:
        with signals.deferred():
            told = False
            while waiting:
                if signals.is_requested() and not told:
                    told = True
                    for future in waiting:
                        future.cancel()  # those that have not begun
                    for child in children:
                        child.terminate()
                done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                while not events.empty():
                    report(*events.get())
                for future in done:
                    with suppress(CancelledError):
                        future.result()
    except signals.Terminated:
        raise  # the children have ended their work by themselves
    except BaseException as error:  # Ctrl-C too: nothing may train on unseen
        if isinstance(error, BrokenProcessPool) and signals.is_requested():
            raise signals.Terminated from None  # once all have saved: see `_child`
        for child in children:
            child.kill()
        if isinstance(error, BrokenProcessPool):
            raise RunFailure(
                "a training process was killed (out of memory?); "
                "run the same command again to go on, or lower launch.jobs"
            ) from None
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_child(events: Any) -> None:
    global _events
    log_to_stderr()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent ends its children
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own, of all processes, would outlive a killed child
    events.cancel_join_thread()
    _events = events


def _child(recipe: Recipe, run: Path, job: Job) -> None:
    def send(job: Job, stage: str, done: int, total: int) -> None:
        _events.put((job, stage, done, total))

    signals.listen()  # before and after a job, SIGTERM simply ends the process
    try:
        _train_job(recipe, run, job, _reporter(send, job))
    except signals.Terminated:
        os._exit(0)  # all is saved; the parent waits for the process's end, not for a word
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.stdout.flush()


def _train_job(
    recipe: Recipe, run: Path, job: Job, notify: Callable[[str, int, int], None]
) -> None:
    """One job, in this process or in those that the recipe asks for."""
    if recipe.launch.starts_processes:
        from selfcorrect.train.distributed.parent import run_launched

        child = current_process().name.rpartition("-")[2]  # SpawnProcess-1 and so on
        slot = int(child) % recipe.launch.jobs if child.isdecimal() else 0
        run_launched(recipe, run, *job, notify, slot)
    else:
        from selfcorrect.train.job import run_job

        run_job(recipe, run, *job, notify)


def _end_with_parent() -> None:
    """A killed run must not train on unseen: when the parent is gone, so is the child."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _reporter(report: Report, job: Job) -> Callable[[str, int, int], None]:
    def notify(stage: str, done: int, total: int) -> None:
        report(job, stage, done, total)

    return notify
