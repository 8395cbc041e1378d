"""Lock a folder that several processes or machines may work in.

The holder keeps an flock on `<folder>/.lock` and writes there who it is. The system releases the
lock when the process ends, however it ends. Some file systems keep locks to one machine, so the
holder also keeps counting in the file: a process of another machine counts as dead only after its
count has stood still for a while. Clocks are never compared.
"""

import json
import logging
import os
import platform
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
HEARTBEAT_SECONDS = 5.0  # between two counts of the holder
PATIENCE_SECONDS = 20.0  # without a count, until a process of another machine counts as dead
POLL_SECONDS = 0.5
QUIET_SECONDS = 2.0  # of waiting, before the wait is logged

logger = logging.getLogger(__name__)


@contextmanager
def hold_lock(folder: Path, wait_seconds: float = 0.0) -> Iterator[bool]:
    """Hold the folder's lock; yield False if another process still has it after `wait_seconds`.

    A longer wait is logged. Temporary files that killed processes left directly in the folder are
    removed. Raises RunFailure if the file system has no locks, and Terminated on SIGTERM.
    """
    descriptor = _acquire(folder / LOCK, wait_seconds)
    if descriptor is None:
        yield False
        return
    try:
        remove_leftovers(folder)
        with _counting(descriptor):
            yield True
    finally:
        os.close(descriptor)


def lock_holder(folder: Path) -> str:
    """Return who holds the folder's lock, in words, as far as the lock file says."""
    record = _read(folder / LOCK)
    if record is None:
        return "another process"
    words = f"process {record['process']} on {record['host']} (since {record['since']})"
    return "".join(letter for letter in words if letter.isprintable())[:200]  # anybody may write it


def _acquire(path: Path, wait_seconds: float) -> int | None:
    started, is_logged = time.monotonic(), False
    while (descriptor := _try_lock(path)) is None:
        _raise_if_terminated()
        waited = time.monotonic() - started
        if waited >= wait_seconds:
            return None
        if waited > QUIET_SECONDS and not is_logged:
            is_logged = True
            logger.warning("waiting for %s, working in %s", lock_holder(path.parent), path.parent)
        time.sleep(POLL_SECONDS)
    return descriptor


def _try_lock(path: Path) -> int | None:
    """Return the locked file's descriptor, or None if another process has the lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if _flock(descriptor, path) and not _is_held_elsewhere(path):
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _flock(descriptor: int, path: Path) -> bool:
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise RunFailure(
            f"{path.parent}: this file system cannot lock files ({error.strerror}), so processes "
            "cannot share the work here; mount it with flock, or use another file system"
        ) from None
    # The folder may have been removed and created again while its old lock was held.
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _is_held_elsewhere(path: Path) -> bool:
    """Return whether a process of another machine keeps counting, whose lock is not seen here."""
    left = _read(path)
    if left is None or left["boot"] == _boot():
        return False
    logger.warning(
        "%s: lock held by %s, on another host; waiting up to %g s to see whether it is alive",
        path.parent,
        lock_holder(path.parent),
        PATIENCE_SECONDS,
    )
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(1.0, PATIENCE_SECONDS / 10))
        _raise_if_terminated()
        now = _read(path)
        if now != left:
            return now is not None  # None: the holder has released the lock
    return False


@contextmanager
def _counting(descriptor: int) -> Iterator[None]:
    """Write the holder into the lock file and keep counting there; empty the file at the end."""
    holder = {
        "host": platform.node(),
        "process": os.getpid(),
        "since": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "boot": _boot(),
    }
    ended = threading.Event()

    def write(count: int) -> None:
        text = json.dumps({**holder, "count": count}).encode()
        with suppress(OSError):  # a full disk: the lock itself holds
            os.pwrite(descriptor, text, 0)
            os.ftruncate(descriptor, len(text))
            os.fsync(descriptor)

    def keep_counting() -> None:
        count = 0
        while not ended.wait(HEARTBEAT_SECONDS):
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
    """Return what the holder has written; None if the file is empty or incomplete."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {key: record[key] for key in ("host", "process", "since", "boot", "count")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


@cache
def _boot() -> str:
    """Return the running kernel's id, within which flock always holds: host names may be equal."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return platform.node()


def _raise_if_terminated() -> None:
    if signals.is_requested():
        raise signals.Terminated
