"""Train a job in several processes: start them, follow their events, end them, report errors."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from selfcorrect.evaluate.run_folder import job_folder
from selfcorrect.recipes.foundation import signals
from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from selfcorrect.recipes.foundation.progress import Progress
from selfcorrect.recipes.schema import Recipe
from selfcorrect.train.distributed.settings import process_environment, write_settings

LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch"]
WORKER = "selfcorrect.train.distributed.worker"
LOG = "processes.log"  # in the job's folder: the output of the processes of the newest start


def run_distributed(
    recipe: Recipe, run: Path, model: str, seed: int, progress: Progress, slot: int = 0
) -> None:
    """Call `run_job` in the recipe's processes; `slot` numbers jobs that run at the same time.

    Raises the error that a process raised, and RunFailure if one was killed.
    """
    import torch

    from selfcorrect.train.job import hold_job
    from selfcorrect.train.provenance import threads_per_job

    on_gpu = torch.cuda.is_available()
    settings = write_settings(recipe.launch, run / "launch", on_gpu)
    log = job_folder(run, model, seed) / LOG
    with hold_job(log.parent):  # fails if another process trains here, whose log must stay
        pass
    arguments = ["-m", WORKER, str(run), model, str(seed), "--end-with-stdin"]
    with log.open("w", encoding="utf-8") as output:
        launcher = subprocess.Popen(
            [*LAUNCHER, "--config_file", str(settings), *arguments],
            env=process_environment(recipe.launch, threads_per_job(recipe), on_gpu, slot),
            stdin=subprocess.PIPE,  # closing it tells every process to end
            stdout=subprocess.PIPE,
            stderr=output,
            start_new_session=True,  # Ctrl-C reaches this process alone, which ends the others
            text=True,
        )
    try:
        with signals.deferred():
            _Processes(launcher, progress, log).follow()
    finally:
        _stop(launcher)


def _stop(launcher: subprocess.Popen[str]) -> None:
    """End the processes that still run, and wait until they are gone."""
    assert launcher.stdin is not None and launcher.stdout is not None
    with suppress(BrokenPipeError):
        launcher.stdin.close()
    if launcher.poll() is None:
        with suppress(subprocess.TimeoutExpired):
            launcher.wait(5)
        launcher.kill()
    launcher.wait()


class _Processes:
    """A job's processes, as the parent knows them from the events that they send."""

    def __init__(self, launcher: subprocess.Popen[str], progress: Progress, log: Path) -> None:
        self.launcher = launcher
        self.progress = progress
        self.log = log
        self.running: set[int] = set()  # process ids
        self.ends: list[dict[str, Any]] = []  # the last event of each ended process
        self.events: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.launcher.stdout is not None
        for line in self.launcher.stdout:
            self.events.put(line)
        self.events.put(None)

    def follow(self) -> None:
        """Pass on progress and SIGTERM until all processes have ended; raise their first error."""
        is_terminated = False
        while self._read_event(0.5):
            if signals.is_requested() and not is_terminated:
                is_terminated = True
                if not self.running:
                    return  # nothing has begun
                for process in self.running:
                    with suppress(ProcessLookupError):
                        os.kill(process, signal.SIGTERM)
            if self.launcher.poll() is not None and self.running:
                self._drain_events()
                break
            if any(end["ended"] != "done" for end in self.ends):
                if self.ends[0]["ended"] == "Exception":
                    # A killed process sends no event, but the others fail because of it.
                    time.sleep(1)
                    self._drain_events()
                break
        if not is_terminated:
            self._raise_error()

    def _read_event(self, seconds: float) -> bool:
        """Handle the next event, if one arrives in time; return False once no more will."""
        try:
            line = self.events.get(timeout=seconds)
        except queue.Empty:
            return True
        if line is None:
            return False
        try:
            event = json.loads(line)
        except ValueError:  # printed by a library
            return True
        if "stage" in event:
            self.progress(event["stage"], event["done"], event["total"])
        elif "ended" in event:
            self.ends.append(event)
            self.running.discard(event["pid"])
        else:
            self.running.add(event["pid"])
        return True

    def _drain_events(self) -> None:
        while not self.events.empty():
            self._read_event(0)

    def _raise_error(self) -> None:
        """Raise the first error, if any; a process that ended without an event was killed."""
        failed = [end for end in self.ends if end["ended"] not in ("done", "terminated")]
        for end in failed:
            if end["ended"] == "InputError":
                raise InputError(end["message"])
            if end["ended"] == "RunFailure":
                raise RunFailure(end["message"])
        if any(not _is_alive(process) for process in self.running):
            raise RunFailure(
                "a training process was killed (out of memory?); run the same command again to "
                f"resume; its output is in {self.log}"
            )
        if failed:
            raise RunFailure(f"{failed[0]['message']}; the traceback is in {self.log}")
        if any(end["ended"] == "terminated" for end in self.ends):
            raise signals.Terminated  # SIGTERM was sent to the processes directly
        if not self.ends or self.running:
            raise RunFailure(f"the training processes could not start; see {self.log}")


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError:
        return False
    return True
