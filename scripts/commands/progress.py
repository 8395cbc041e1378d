"""Progress on the terminal: one bar per stage, with the time it has left."""

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from selfcorrect.recipes.foundation import progress

SPEED_SECONDS = 1800.0  # over which speed is averaged: a step may take minutes
QUIET_SECONDS = 15.0  # without a terminal: at most one line per job in this time


class Bars:
    """A progress callback whose stages may start with a job, as in "tiny seed 0: ppo".

    Use it as a context manager.
    """

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            console=self.console,
            speed_estimate_period=SPEED_SECONDS,
        )
        self.tasks: dict[str, TaskID] = {}
        self.last_line: dict[str, float] = {}  # seconds, by job

    def __enter__(self) -> "Bars":
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.console.is_terminal:
            self.progress.stop()

    def of(self, job: str) -> progress.Progress:
        """Return a progress callback that shows the stages of `job`."""

        def report(stage: str, done: float, total: int, /) -> None:
            self(f"{job}: {stage}", done, total)

        return report

    def __call__(self, stage: str, done: float, total: int, /) -> None:
        """Show that `done` of `total` units of `stage` are finished."""
        if stage not in self.tasks:
            # What was done before must not count as this process's speed.
            self.tasks[stage] = self.progress.add_task(stage, total=total, completed=int(done))
        self.progress.update(self.tasks[stage], completed=done, total=total)
        if not self.console.is_terminal:
            self._print_line(stage, done, total)

    def _print_line(self, stage: str, done: float, total: int) -> None:
        now, job = time.monotonic(), stage.partition(": ")[0]
        if done < total and now - self.last_line.get(job, 0.0) < QUIET_SECONDS:
            return
        self.last_line[job] = now
        [seconds] = (t.time_remaining for t in self.progress.tasks if t.id == self.tasks[stage])
        left = ""
        if seconds and done < total:
            minutes = seconds / 60
            left = f", about {minutes:.0f} min left" if minutes >= 1 else ", under a minute left"
        sys.stderr.write(f"{stage} {done:.{1 if done % 1 else 0}f}/{total}{left}\n")
        sys.stderr.flush()
