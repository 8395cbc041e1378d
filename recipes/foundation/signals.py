"""SIGTERM, as a cluster sends it some time before it kills: what was reached is saved first."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(BaseException):
    """The system has asked this process to end. Like KeyboardInterrupt, nobody's error."""


_asked = False
_deferred = False


def listen() -> None:
    """From now on a SIGTERM raises Terminated, or waits where it is deferred; for a main thread."""
    signal.signal(signal.SIGTERM, _heard)


def _heard(*_: Any) -> None:
    global _asked
    again, _asked = _asked, True  # a second one must not break off what the first one began
    if not _deferred and not again:
        raise Terminated


def ask() -> None:
    """Note that this process is to end, which another one has heard for it."""
    global _asked
    _asked = True


def is_asked() -> bool:
    """Whether this process is to end."""
    return _asked


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, a SIGTERM only makes `is_asked` true; Terminated is raised at the end, after it."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False
    if _asked:
        raise Terminated
