"""How far a run is, on the terminal: one bar a job, with the time its stage has left."""

import sys
import time
from types import TracebackType

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

QUIET_SECONDS = 15.0  # where the output is no terminal: a line a job at most this often


class Bars:
    """Shows (job, stage, done, total) reports; call it with each. A context manager."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            TextColumn("so far"),
            TimeElapsedColumn(),
            console=self.console,
        )
        self.tasks: dict[tuple[str, str], TaskID] = {}
        self.last: dict[str, float] = {}

    def __enter__(self) -> "Bars":
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.console.is_terminal:
            self.progress.stop()

    def __call__(self, name: str, stage: str, done: int, total: int) -> None:
        """Show that `name` has done `done` of `total` steps of `stage`."""
        if not self.console.is_terminal:
            self._line(name, stage, done, total)
            return
        key = (name, stage)
        if key not in self.tasks:
            self.tasks[key] = self.progress.add_task(f"{name} {stage}", total=total)
        self.progress.update(self.tasks[key], completed=done, total=total)

    def _line(self, name: str, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - self.last.get(name, 0.0) < QUIET_SECONDS:
            return
        self.last[name] = now
        sys.stderr.write(f"{name}: {stage} {done}/{total}\n")
        sys.stderr.flush()
