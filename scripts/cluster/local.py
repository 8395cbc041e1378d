"""Run the jobs of a run on this machine, through submitit's local executor."""

import logging
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from selfcorrect.recipes.series import Measured
from selfcorrect.scripts.cluster.jobs import ClusterJob, Command
from selfcorrect.scripts.cluster.submit import LOGS, write_record

logger = logging.getLogger(__name__)

NO_LIMIT = 60 * 24 * 365  # minutes: this machine ends no job


def run_here(recipe: Measured, jobs: list[ClusterJob], run: Path) -> list[str]:
    """Run all jobs, `launch.jobs` commands at a time; return the errors, a line for each command.

    A job begins when the jobs before it have ended, even if they failed. If this call is
    interrupted, the running commands save their states and end.
    """
    from submitit.local.local import LocalExecutor

    executor = LocalExecutor(run / LOGS)
    executor.update_parameters(timeout_min=NO_LIMIT)
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    num_left = {job.name: len(job.commands) for job in jobs}
    waiting = [(job, command) for job in jobs for command in job.commands]
    running: list[tuple[ClusterJob, Any]] = []
    ids: dict[str, str] = {}
    errors = []
    try:
        while waiting or running:
            for job, command in list(waiting):
                is_ready = not any(num_left[name] for name in job.after)
                if len(running) < recipe.launch.jobs and is_ready:
                    waiting.remove((job, command))
                    handle = executor.submit(Command(command, job.record, devices))
                    running.append((job, handle))
                    ids.setdefault(job.name, handle.job_id)
                    write_record(run, "local", jobs, ids)
                    logger.info("%s begins, %s", job.name, handle.paths.stderr.relative_to(run))
            time.sleep(0.1)
            for job, handle in list(running):
                if handle.done():
                    running.remove((job, handle))
                    num_left[job.name] -= 1
                    error = _error_of(handle)
                    errors += [f"{job.name}: {error}"] if error else []
                    logger.info("%s %s", job.name, "failed" if error else "done")
    finally:
        for _, handle in running:
            with suppress(ProcessLookupError):
                os.kill(int(handle.job_id), signal.SIGTERM)
        for _, handle in running:
            while not handle.done():
                time.sleep(0.1)
    return errors


def _error_of(handle: Any) -> str | None:
    """Return the last line of the command's error output, or None if the command succeeded."""
    if handle.paths.result_pickle.is_file() and handle.exception() is None:
        return None
    lines = (handle.stderr() or "").splitlines()
    messages = [line for line in lines if line.startswith("selfcorrect: ")]
    return messages[-1].removeprefix("selfcorrect: ") if messages else f"see {handle.paths.stderr}"
