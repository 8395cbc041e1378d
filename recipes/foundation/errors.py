"""The errors that end a command in one clear line, and what a machine has run out of."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import disk_usage


class _OneLine(Exception):
    """Its message is one line: line breaks in quoted text become spaces."""

    def __init__(self, message: object = "") -> None:
        super().__init__(" ".join(str(message).split()))


class InputError(_OneLine):
    """The user's input is wrong (exit 2). The message is one line: file, key, remedy."""


class RunFailure(_OneLine):
    """Something failed while running (exit 1). The message is one line: file, cause, remedy."""


def first_line(error: BaseException) -> str:
    """Return the first line of a library's message, or the error's kind if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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
    the free space of `folder`, where they were writing, decides.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return _FAULTS[-1][2]
        text = str(cause).lower()
        for numbers, words, explanation in _FAULTS:
            if getattr(cause, "errno", None) in numbers or any(word in text for word in words):
                return explanation
        cause = cause.__cause__ or cause.__context__
    if folder is None or not isinstance(error, OSError | RuntimeError):
        return None
    return _FAULTS[0][2] if folder.exists() and disk_usage(folder).free < 2**20 else None


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
        raise RunFailure(f"{folder}: {explanation}") from None
