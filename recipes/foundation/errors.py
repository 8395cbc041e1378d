"""The errors that end a command in one clear line, and where other errors come from.

An error is classed by its origin, not by its Python type alone: an OSError may be a file's, a
connection's, or a library's way of saying that it knows no such model.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import disk_usage
from textwrap import shorten
from typing import Any

from pydantic import ValidationError


class _OneLine(Exception):
    """Its message is one line: line breaks in quoted text become spaces."""

    def __init__(self, message: object = "") -> None:
        super().__init__(" ".join(str(message).split()))


class InputError(_OneLine):
    """The user's input is wrong (exit 2). The message is one line: file, key, remedy."""


class RunFailure(_OneLine):
    """Something failed while running (exit 1). The message is one line: file, cause, remedy."""


def reason_of(error: BaseException) -> str:
    """Return the message of a library's error on one line of at most 300 characters.

    The first line alone may hold no reason ("1 validation error for ModelConfig"). Tracebacks in a
    message are left out. An error without a message has that of its cause, or its kind.
    """
    if isinstance(error, BaseExceptionGroup):
        return reason_of(error.exceptions[0])
    if isinstance(error, ValidationError):
        text = "; ".join(map(_problem_of, error.errors()))
        return shorten(f"{error.title}: {text}", 300, placeholder=" ...")
    text = " ".join(re.split(r"\n\s*Traceback \(most recent", str(error))[0].split())
    if not text and error.__cause__ is not None:
        return reason_of(error.__cause__)
    if not text:
        return type(error).__name__
    if isinstance(error, KeyError):  # its message is the key alone
        text = f"KeyError: {text}"
    return shorten(text, 300, placeholder=" ...")


def _problem_of(problem: Any) -> str:
    key = ".".join(map(str, problem["loc"]))
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message


# Libraries whose errors are those of a connection; the hub's client inherits from one of them.
_CONNECTS = {
    "aiohttp", "http", "httpcore", "httpcore2", "httpx", "httpx2", "requests", "socket", "ssl",
    "urllib", "urllib3",
}  # fmt: skip
_OF_CONNECTIONS = {
    errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
    errno.ENOTCONN,
}  # fmt: skip

_RERUN = "finished work is kept; run the same command again"

# System error numbers, the words that libraries use for them, and our explanation.
_FAULTS = (
    (
        {errno.ENOSPC, errno.EDQUOT},
        ("no space left", "disk quota exceeded", "os error 28"),
        f"no space left on the disk; make room: {_RERUN}",
    ),
    (
        {errno.EROFS},
        ("read-only file system", "os error 30"),
        "the file system is read-only; mount it for writing, or choose another folder",
    ),
    (
        {errno.EMFILE, errno.ENFILE},
        ("too many open files", "os error 24"),
        f"too many open files; raise the limit (ulimit -n): {_RERUN}",
    ),
    (
        {errno.ENOMEM},
        ("allocate memory", "not enough memory", "out of memory", "failed to map segment",
         "can't start new thread"),
        f"not enough memory; lower launch.jobs or the batch sizes, or raise the limit: {_RERUN}",
    ),
)  # fmt: skip


def machine_fault(error: BaseException, folder: Path | None = None) -> str | None:
    """Explain an error that the machine caused (disk, memory, open files); None for any other.

    torch and safetensors raise errors of their own for a full disk, some without saying so: then
    the free space of `folder`, where they were writing, decides. What a server says of its own
    memory and disk is not the machine's fault.
    """
    is_remote = is_from_network(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return _FAULTS[-1][2]
        text = "" if is_remote else str(cause).lower()
        for numbers, words, explanation in _FAULTS:
            if getattr(cause, "errno", None) in numbers or any(word in text for word in words):
                return explanation
        cause = cause.__cause__ or cause.__context__
    if folder is None or is_remote or not isinstance(error, OSError | RuntimeError):
        return None
    return _FAULTS[0][2] if folder.exists() and disk_usage(folder).free < 2**20 else None


def is_from_network(error: BaseException) -> bool:
    """Return whether a connection failed: its error is of a library that makes them, or says so.

    A file on a network disk has a name, and counts as a file. A broken pipe is a process's.
    """
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    if modules & _CONNECTS:
        return True
    if not isinstance(error, OSError) or error.filename is not None:
        return False
    if error.errno in _OF_CONNECTIONS:
        return True
    return isinstance(error, ConnectionError | TimeoutError) and not isinstance(
        error, BrokenPipeError
    )


def is_from_outside(error: BaseException) -> bool:
    """Return whether the machine or a connection caused an error, not the input being read."""
    return machine_fault(error) is not None or is_from_network(error)


def outside_cause(error: BaseException) -> str | None:
    """Return one line for an error of the machine, a connection, a file, or a library's OSError.

    None for any other, which is a fault in a program.
    """
    name = getattr(error, "filename", None)
    if fault := machine_fault(error):
        return f"{name or 'the machine'}: {fault}"
    if is_from_network(error):
        return f"network: {reason_of(error)}"
    if not isinstance(error, OSError):
        return None
    if error.errno is None:  # not the system's: a library uses the type, such as for a wrong name
        package = raised_in(error).partition(".")[0] or type(error).__name__
        return f"{package}: {reason_of(error)}"
    return f"{name or 'the machine'}: {error.strerror or reason_of(error)}"


def raised_in(error: BaseException) -> str:
    """Return the name of the module whose code raised an error, "" if that is not known."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))


@contextmanager
def explain_machine_faults(folder: Path) -> Iterator[None]:
    """Raise RunFailure, in one line, in place of any error that the machine caused."""
    try:
        yield
    except (InputError, RunFailure):
        raise
    except Exception as error:
        explanation = machine_fault(error, folder)
        if explanation is None:
            raise
        name = getattr(error, "filename", None) or folder
        raise RunFailure(f"{name}: {explanation}") from None
