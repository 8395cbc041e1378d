"""A whole run: the folder, its jobs one after another or side by side, and how far they are."""

import os
import platform
import shutil
import signal
import subprocess
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
from multiprocessing import get_context, parent_process
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

from selfcorrect.evaluate.inputs import check_inputs
from selfcorrect.evaluate.offline import recipe_plan
from selfcorrect.recipes import termination
from selfcorrect.recipes.errors import InputError, RunFailure
from selfcorrect.recipes.load import load_recipe, save_recipe
from selfcorrect.recipes.schema import Recipe
from selfcorrect.recipes.seals import write_record

LAST = Path("ppo") / "stage.json"  # what the last stage of a job leaves
Job = tuple[str, int]  # model, seed
Report = Callable[[Job, str, int, int], None]  # job, stage, steps done, steps in all


def open_run(recipe: Recipe, run: Path) -> None:
    """Make the run folder, or check that it is this recipe's.

    The ladder and the seeds may have grown, and evaluation and launch may have changed; anything
    else belongs to another run.
    """
    path = run / "recipe.yaml"
    new = not path.is_file()
    if not new:
        _check_same(load_recipe(str(path)), recipe, run)
    elif run.exists() and any(run.iterdir()):
        raise InputError(f"{run}: not empty and no run (no recipe.yaml); choose another folder")
    try:
        recipe_plan(recipe, run)  # conditions and benchmark files, before hours of training
    except InputError:
        if new:
            shutil.rmtree(run, ignore_errors=True)
        raise
    if new or load_recipe(str(path)) != recipe:
        save_recipe(recipe, path)
    check_inputs(recipe, run, training=bool(unfinished(recipe, run)))
    if unfinished(recipe, run):
        write_record(run / "run.json", run_facts(recipe))


def _check_same(old: Recipe, new: Recipe, run: Path) -> None:
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    for section in ("data", "base", "reward", "ppo"):
        key = _first_difference(before[section], after[section], section)
        if key:
            raise InputError(
                f"{run}: holds a run of another recipe, which differs in {key}; "
                "use another name or --runs-dir, or delete the folder"
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


def run_facts(recipe: Recipe) -> dict[str, Any]:
    """What run.json says: versions, hardware, seeds, the code's commit where it is a checkout."""
    from selfcorrect.train.job import threads_per_job, versions

    return {
        "name": recipe.name,
        "seeds": recipe.seeds,
        "models": [model.name for model in recipe.models],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "jobs": recipe.launch.jobs,
        "threads_per_job": threads_per_job(recipe),
        "versions": versions(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def unfinished(recipe: Recipe, run: Path) -> list[Job]:
    """The jobs whose last stage has not ended, in the order in which they start."""
    jobs = [(model.name, seed) for model in reversed(recipe.models) for seed in recipe.seeds]
    return [job for job in jobs if not (run / job[0] / f"seed-{job[1]}" / LAST).is_file()]


def train_run(recipe: Recipe, run: Path, report: Report, only: set[Job] | None = None) -> None:
    """Train every model with every seed, `launch.jobs` at a time; finished parts are passed over.

    The largest models are listed last and take longest, so they start first.
    """
    wanted = [job for job in unfinished(recipe, run) if only is None or job in only]
    if recipe.launch.jobs == 1 or len(wanted) == 1:
        from selfcorrect.train.job import run_job

        for model, seed in wanted:
            run_job(recipe, run, model, seed, _reporter(report, (model, seed)))
        return
    with get_context("spawn").Manager() as manager:
        _side_by_side(recipe, run, wanted, report, manager)


def _side_by_side(
    recipe: Recipe, run: Path, wanted: list[Job], report: Report, manager: SyncManager
) -> None:
    events: Any = manager.Queue()
    pool = ProcessPoolExecutor(recipe.launch.jobs, mp_context=get_context("spawn"))
    waiting: set[Future[None]] = {pool.submit(_child, recipe, run, job, events) for job in wanted}
    children = list((pool._processes or {}).values())
    try:
        with termination.deferred():
            told = False
            while waiting:
                if termination.is_asked() and not told:
                    told = True
                    for future in waiting:
                        future.cancel()  # those that have not begun
                    for child in children:
                        child.terminate()
                done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                while not events.empty():
                    report(*events.get())
                for future in done:
                    with suppress(termination.Terminated, CancelledError):
                        future.result()
    except termination.Terminated:
        raise  # the children have ended their work by themselves
    except BaseException as error:  # Ctrl-C too: nothing may train on unseen
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


def _child(recipe: Recipe, run: Path, job: Job, events: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent ends its children
    termination.listen()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from selfcorrect.train.job import run_job

    def send(job: Job, stage: str, done: int, total: int) -> None:
        events.put((job, stage, done, total))

    run_job(recipe, run, job[0], job[1], _reporter(send, job))
    sys.stdout.flush()


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
