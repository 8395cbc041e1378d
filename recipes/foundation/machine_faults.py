"""What the machine has run out of, said in one line with the remedy, whatever a library raises."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import disk_usage

from selfcorrect.recipes.foundation.errors import InputError, RunFailure

AGAIN = "what was finished is kept; run the same command again"

# Numbers of the system's errors, what libraries write of them, and what is said instead.
_FAULTS = (
    (
        {errno.ENOSPC, errno.EDQUOT},
        ("no space left", "disk quota exceeded", "os error 28"),
        f"no space left on the disk; make room: {AGAIN}",
    ),
    (
        {errno.EROFS},
        ("read-only file system", "os error 30"),
        "the file system is read-only; mount it for writing, or choose another folder",
    ),
    (
        {errno.EMFILE, errno.ENFILE},
        ("too many open files", "os error 24"),
        f"too many open files; raise the limit (ulimit -n): {AGAIN}",
    ),
    (
        {errno.ENOMEM},
        ("allocate memory", "not enough memory", "out of memory", "failed to map segment",
         "can't start new thread"),
        f"not enough memory; lower launch.jobs or the batch sizes, or raise the limit: {AGAIN}",
    ),
)  # fmt: skip


def machine_fault(error: BaseException, folder: Path | None = None) -> str | None:
    """What is said of an error behind which the machine stands; None for any other.

    torch and safetensors report a full disk as errors of their own, some without its name; `folder`
    is where they were writing.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError):
            return _FAULTS[-1][2]
        text = str(seen).lower()
        for numbers, words, said in _FAULTS:
            if getattr(seen, "errno", None) in numbers or any(word in text for word in words):
                return said
        seen = seen.__cause__ or seen.__context__
    if folder is None or not isinstance(error, OSError | RuntimeError):
        return None
    return _FAULTS[0][2] if folder.exists() and disk_usage(folder).free < 2**20 else None


@contextmanager
def machine_faults_are_said(folder: Path) -> Iterator[None]:
    """RunFailure with one line where the machine is behind whatever a library raises."""
    try:
        yield
    except (InputError, RunFailure):
        raise
    except Exception as error:
        said = machine_fault(error, folder)
        if said is None:
            raise
        raise RunFailure(f"{folder}: {said}") from None
