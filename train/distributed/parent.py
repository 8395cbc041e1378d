"""A job in processes of its own: started, listened to, ended when asked, its errors in one line."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from selfcorrect.recipes.foundation import signals
from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from selfcorrect.recipes.schema import Recipe
from selfcorrect.train.distributed.settings import environment, write_settings

Notify = Callable[[str, int, int], None]  # stage, steps done, steps in all
LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch"]
LOG = "processes.log"  # in the job's folder: what the processes of the newest start have printed


def run_launched(
    recipe: Recipe, run: Path, model: str, seed: int, notify: Notify, slot: int = 0
) -> None:
    """`run_job` in the recipe's processes; `slot` counts jobs that run at the same time.

    Raises what a process raised; RunFailure, too, where one was killed.
    """
    import torch

    from selfcorrect.train.job import only_one
    from selfcorrect.train.provenance import threads_per_job

    on_gpu = torch.cuda.is_available()
    settings = write_settings(recipe.launch, run / "launch", on_gpu)
    log = run / model / f"seed-{seed}" / LOG
    with only_one(log.parent):  # rank 0 holds it later; another's log stays as it is
        pass
    program = [
        "-m",
        "selfcorrect.train.distributed.worker",
        str(run),
        model,
        str(seed),
        "--end-with-stdin",
    ]
    with log.open("w", encoding="utf-8") as output:
        launcher = subprocess.Popen(
            [*LAUNCHER, "--config_file", str(settings), *program],
            env=environment(recipe.launch, threads_per_job(recipe), on_gpu, slot),
            stdin=subprocess.PIPE,  # its end tells every process to end
            stdout=subprocess.PIPE,
            stderr=output,
            start_new_session=True,  # Ctrl-C reaches this process, which ends them
            text=True,
        )
    try:
        with signals.deferred():
            _Job(launcher, notify, log).follow()
    finally:
        _stop(launcher)


def _stop(launcher: subprocess.Popen[str]) -> None:
    """End what still runs of a launch, and see it gone."""
    assert launcher.stdin is not None and launcher.stdout is not None
    with suppress(BrokenPipeError):
        launcher.stdin.close()
    if launcher.poll() is None:
        with suppress(subprocess.TimeoutExpired):
            launcher.wait(5)
        launcher.kill()
    launcher.wait()


class _Job:
    """What the parent knows of a job's processes from what they tell."""

    def __init__(self, launcher: subprocess.Popen[str], notify: Notify, log: Path) -> None:
        self.launcher = launcher
        self.notify = notify
        self.log = log
        self.running: set[int] = set()  # process ids
        self.ends: list[dict[str, Any]] = []
        self.told: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.launcher.stdout is not None
        for line in self.launcher.stdout:
            self.told.put(line)
        self.told.put(None)

    def follow(self) -> None:
        """Until all have ended: hand on progress, SIGTERM and what went wrong."""
        asked = False
        while self._hear(0.5):
            if signals.is_asked() and not asked:
                asked = True
                if not self.running:
                    return  # nothing has begun
                for process in self.running:
                    with suppress(ProcessLookupError):
                        os.kill(process, signal.SIGTERM)
            if self.launcher.poll() is not None and self.running:
                self._hear_out()
                break
            if any(end["ended"] != "done" for end in self.ends):
                if self.ends[0]["ended"] == "Exception":
                    time.sleep(1)  # one that was killed has no last word, but the others complain
                    self._hear_out()
                break
        if not asked:
            self._raise()

    def _hear(self, seconds: float) -> bool:
        """Take in one line, if one comes in time; False when no more will."""
        try:
            line = self.told.get(timeout=seconds)
        except queue.Empty:
            return True
        if line is None:
            return False
        try:
            event = json.loads(line)
        except ValueError:  # a library's
            return True
        if "stage" in event:
            self.notify(event["stage"], event["done"], event["total"])
        elif "ended" in event:
            self.ends.append(event)
            self.running.discard(event["pid"])
        else:
            self.running.add(event["pid"])
        return True

    def _hear_out(self) -> None:
        while not self.told.empty():
            self._hear(0)

    def _raise(self) -> None:
        """The first error, if any; a process that went without a word was killed."""
        failed = [end for end in self.ends if end["ended"] not in ("done", "asked")]
        for end in failed:
            if end["ended"] == "InputError":
                raise InputError(end["message"])
            if end["ended"] == "RunFailure":
                raise RunFailure(end["message"])
        if any(not _is_alive(process) for process in self.running):
            raise RunFailure(
                "a training process was killed (out of memory?); run the same command again to go "
                f"on; what it printed is in {self.log}"
            )
        if failed:
            raise RunFailure(f"{failed[0]['message']}; the whole error is in {self.log}")
        if any(end["ended"] == "asked" for end in self.ends):
            raise signals.Terminated  # somebody else has asked them
        if not self.ends or self.running:
            raise RunFailure(f"the training processes could not start; see {self.log}")


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError:
        return False
    return True
