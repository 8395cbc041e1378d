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

from selfcorrect.evaluate.offline import recipe_plan
from selfcorrect.recipes import termination
from selfcorrect.recipes.errors import InputError, RunFailure
from selfcorrect.recipes.load import load_recipe, save_recipe
from selfcorrect.recipes.schema import Recipe
from selfcorrect.recipes.society.benchmarks import write_benchmarks
from selfcorrect.recipes.society.world import make_world
from selfcorrect.recipes.whole_files import write_json

LAST = Path("ppo") / "stage.json"  # what the last stage of a job leaves
Job = tuple[str, int]  # model, seed
Report = Callable[[Job, str, int, int], None]  # job, stage, steps done, steps in all


def open_run(recipe: Recipe, run: Path) -> None:
    """Make the run folder, or check that it is this recipe's.

    The ladder and the seeds may have grown, and evaluation and launch may have changed, but for
    the processes that share a batch; anything else belongs to another run.
    """
    path = run / "recipe.yaml"
    new = not path.is_file()
    if not new:
        _check_same(load_recipe(str(path)), recipe, run)
    elif run.exists() and any(run.iterdir()):
        raise InputError(f"{run}: not empty and no run (no recipe.yaml); choose another folder")
    try:
        if recipe.data.society is not None and not (run / "benchmarks").is_dir():
            write_benchmarks(make_world(recipe.data.society), run / "benchmarks")
        recipe_plan(recipe, run)  # conditions and benchmark files, before hours of training
    except InputError:
        if new:
            shutil.rmtree(run, ignore_errors=True)
        raise
    if new or load_recipe(str(path)) != recipe:
        save_recipe(recipe, path)
    if unfinished(recipe, run):
        write_json(run / "run.json", run_facts(recipe))


def _check_same(old: Recipe, new: Recipe, run: Path) -> None:
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    for section in ("data", "base", "reward", "ppo"):
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
        "processes": recipe.launch.processes,
        "deepspeed": recipe.launch.deepspeed,
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
        for job in wanted:
            _train_job(recipe, run, job, _reporter(report, job))
        return
    with get_context("spawn").Manager() as manager:
        _side_by_side(recipe, run, wanted, report, manager)


def _side_by_side(
    recipe: Recipe, run: Path, wanted: list[Job], report: Report, manager: SyncManager
) -> None:
    events: Any = manager.Queue()
    slots: Any = manager.Queue()
    for slot in range(recipe.launch.jobs):
        slots.put(slot)
    context = get_context("spawn")
    pool = ProcessPoolExecutor(recipe.launch.jobs, context, _take_slot, (slots,))
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

    def send(job: Job, stage: str, done: int, total: int) -> None:
        events.put((job, stage, done, total))

    _train_job(recipe, run, job, _reporter(send, job))
    sys.stdout.flush()


_slot = 0  # which of the jobs at work side by side this process does


def _take_slot(slots: Any) -> None:
    global _slot
    _slot = slots.get()


def _train_job(
    recipe: Recipe, run: Path, job: Job, notify: Callable[[str, int, int], None]
) -> None:
    """One job, in this process or in those that the recipe asks for."""
    if recipe.launch.starts_processes:
        from selfcorrect.train.launched import run_launched

        run_launched(recipe, run, *job, notify, _slot)
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
