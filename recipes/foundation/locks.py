"""Who works in a folder, where several processes or machines look at the same one.

Whoever works there holds flock on `<folder>/.lock`, which says who it is. The system lets go of a
lock when its process ends, however it ends. But some file systems keep locks to one machine: so the
holder goes on counting in the file, and what a process of another machine has left there is watched
for a while before that process is taken for dead. Clocks are never compared.
"""

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from selfcorrect.recipes.foundation import signals
from selfcorrect.recipes.foundation.atomic_files import remove_leftovers
from selfcorrect.recipes.foundation.errors import RunFailure

LOCK = ".lock"
BEAT_SECONDS = 5.0  # between two counts of a holder
PATIENCE_SECONDS = 20.0  # without a count, until another machine's process is taken for dead
POLL_SECONDS = 0.5
QUIET_SECONDS = 2.0  # of waiting, before it is said


@contextmanager
def claimed(folder: Path, wait_seconds: float = 0.0) -> Iterator[bool]:
    """Hold the folder inside; gives False where another process does so for `wait_seconds` more.

    Whoever waits says so, and goes on as soon as the other process has ended. What killed processes
    left half-written directly in the folder is removed. Raises RunFailure where the file system has
    no locks.
    """
    descriptor = _acquired(folder / LOCK, wait_seconds)
    if descriptor is None:
        yield False
        return
    try:
        remove_leftovers(folder)
        with _counting(descriptor):
            yield True
    finally:
        os.close(descriptor)


def holder(folder: Path) -> str:
    """Who holds the folder, in words, as far as its lock says so."""
    said = _read(folder / LOCK)
    if said is None:
        return "another process"
    words = f"process {said['process']} on {said['host']}, since {said['since']}"
    shown = "".join(letter for letter in words if letter.isprintable())  # anybody may write there
    return f"{shown[:200]},"


def _acquired(path: Path, wait_seconds: float) -> int | None:
    started, said = time.monotonic(), False
    while (descriptor := _attempt(path)) is None:
        _end_if_asked()
        waited = time.monotonic() - started
        if waited >= wait_seconds:
            return None
        if waited > QUIET_SECONDS and not said:
            said = True
            say(f"waiting for {holder(path.parent)} which is at work in {path.parent}")
        time.sleep(POLL_SECONDS)
    return descriptor


def _attempt(path: Path) -> int | None:
    """The lock, as an open file's descriptor; None where another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if _locked(descriptor, path) and not _lives_elsewhere(path):
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _locked(descriptor: int, path: Path) -> bool:
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise RunFailure(
            f"{path.parent}: this file system cannot lock files ({error.strerror}), so processes "
            "cannot share the work here; mount it with flock, or use another"
        ) from None
    # A folder may have been removed, and made anew, while its old lock was held.
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _lives_elsewhere(path: Path) -> bool:
    """Whether a process of another machine goes on counting, though its lock is not seen here."""
    left = _read(path)
    if left is None or left["boot"] == _boot():
        return False
    say(f"{path.parent}: {holder(path.parent)} did not let go; is it alive?")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(1.0, PATIENCE_SECONDS / 10))
        _end_if_asked()
        now = _read(path)
        if now != left:
            return now is not None  # nothing: it has let go by itself
    return False


@contextmanager
def _counting(descriptor: int) -> Iterator[None]:
    """Say in the lock's file who holds it, and keep counting; nothing stands there afterwards."""
    about = {
        "host": platform.node(),
        "process": os.getpid(),
        "since": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "boot": _boot(),
    }
    ended = threading.Event()

    def write(count: int) -> None:
        text = json.dumps({**about, "count": count}).encode()
        with suppress(OSError):  # a full disk: the lock itself holds
            os.pwrite(descriptor, text, 0)
            os.ftruncate(descriptor, len(text))
            os.fsync(descriptor)

    def keep_counting() -> None:
        count = 0
        while not ended.wait(BEAT_SECONDS):
            count += 1
            write(count)

    write(0)
    thread = threading.Thread(target=keep_counting, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(OSError):
            os.ftruncate(descriptor, 0)


def _read(path: Path) -> dict[str, Any] | None:
    """What a holder has written; None for nothing, or what is not whole."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return {key: said[key] for key in ("host", "process", "since", "boot", "count")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


@cache
def _boot() -> str:
    """The running kernel, within which flock always holds: names of machines may be the same."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return platform.node()


def _end_if_asked() -> None:
    if signals.is_asked():
        raise signals.Terminated


def say(line: str) -> None:
    """Tell whoever is looking on, beside the progress shown."""
    sys.stderr.write(f"selfcorrect: {line}\n")
    sys.stderr.flush()
