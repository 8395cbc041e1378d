"""The one type of progress callback."""

from typing import Protocol


class Progress(Protocol):
    """Called as `progress(stage, done, total)`: `done` of `total` units of `stage` are finished.

    `done` has a fraction within a unit that takes long.
    """

    def __call__(self, stage: str, done: float, total: int, /) -> None:
        """Report that `done` of `total` units of `stage` are finished."""


def no_progress(stage: str, done: float, total: int, /) -> None:
    """Ignore the report."""
