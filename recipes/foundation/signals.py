"""SIGTERM, which a cluster sends some time before it kills: the state is saved first."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(BaseException):
    """The system has asked this process to end. Like KeyboardInterrupt, it is not an error."""


_requested = False
_deferred = False


def listen() -> None:
    """Raise Terminated on SIGTERM from now on (later, if deferred). Call it in the main thread."""
    signal.signal(signal.SIGTERM, _on_sigterm)


def _on_sigterm(*_: Any) -> None:
    global _requested
    # A second signal must not interrupt the saving that the first one began.
    is_repeated, _requested = _requested, True
    if not _deferred and not is_repeated:
        raise Terminated


def request() -> None:
    """Note that this process is to end, on behalf of a process that received the signal."""
    global _requested
    _requested = True


def is_requested() -> bool:
    """Return whether this process is to end."""
    return _requested


@contextmanager
def deferred() -> Iterator[None]:
    """Let SIGTERM only make `is_requested` true inside the block; raise Terminated after it."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False
    if _requested:
        raise Terminated
