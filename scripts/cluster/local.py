"""The jobs of a run on this machine, through submitit's local executor, in their order."""

import logging
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from selfcorrect.recipes.schema import Recipe
from selfcorrect.scripts.cluster.jobs import ClusterJob, Command
from selfcorrect.scripts.cluster.submit import LOGS, write_record

logger = logging.getLogger(__name__)

NO_LIMIT = 60 * 24 * 365  # minutes: this machine takes nobody's job away


def run_here(recipe: Recipe, jobs: list[ClusterJob], run: Path) -> list[str]:
    """Run all jobs, `launch.jobs` commands at a time; what went wrong, a line a command.

    A job begins when those it waits for have ended, well or not. Whatever ends this call has the commands at work save their states and end.
    """
    from submitit.local.local import LocalExecutor

    executor = LocalExecutor(run / LOGS)
    executor.update_parameters(timeout_min=NO_LIMIT)
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    left = {job.name: len(job.commands) for job in jobs}
    waiting = [(job, words) for job in jobs for words in job.commands]
    at_work: list[tuple[ClusterJob, Any]] = []
    ids: dict[str, str] = {}
    wrong = []
    try:
        while waiting or at_work:
            for job, words in list(waiting):
                if len(at_work) < recipe.launch.jobs and not any(left[name] for name in job.after):
                    waiting.remove((job, words))
                    handle = executor.submit(Command(words, job.leaves, devices))
                    at_work.append((job, handle))
                    ids.setdefault(job.name, handle.job_id)
                    write_record(run, "local", jobs, ids)
                    logger.info("%s begins, %s", job.name, handle.paths.stderr.relative_to(run))
            time.sleep(0.1)
            for job, handle in list(at_work):
                if handle.done():
                    at_work.remove((job, handle))
                    left[job.name] -= 1
                    reason = _what_is_wrong(handle)
                    wrong += [f"{job.name}: {reason}"] if reason else []
                    logger.info("%s %s", job.name, "failed" if reason else "done")
    finally:
        for _, handle in at_work:
            with suppress(ProcessLookupError):
                os.kill(int(handle.job_id), signal.SIGTERM)
        for _, handle in at_work:
            while not handle.done():
                time.sleep(0.1)
    return wrong


def _what_is_wrong(handle: Any) -> str | None:
    """The command's own last line where it failed; None where it did not."""
    if handle.paths.result_pickle.is_file() and handle.exception() is None:
        return None
    lines = (handle.stderr() or "").splitlines()
    said = [line for line in lines if line.startswith("selfcorrect: ")]
    return said[-1].removeprefix("selfcorrect: ") if said else f"see {handle.paths.stderr}"
