"""Who measures what, where several processes or machines look at the same folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selfcorrect.recipes.errors import RunFailure


@contextmanager
def claimed(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Hold the folder's lock inside; gives False where another process holds it (or waits for it).

    The system lets go of the lock when its process ends, however it ends: there are no stale ones.
    On network file systems it holds between machines where the mount supports flock (NFS does).

    Raises RunFailure where the file system has no locks.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise RunFailure(
                f"{folder}: this file system cannot lock files ({error.strerror}), so processes "
                "cannot share the work here; mount it with flock, or use another"
            ) from None
        yield True
