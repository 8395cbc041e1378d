"""Searches for garbage, which take longer than the work where many objects last."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def garbage_collection_off() -> Iterator[None]:
    """Make many lasting objects without cycle searches, which take up to a third of the time."""
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()


@contextmanager
def garbage_of_new_objects() -> Iterator[None]:
    """Search only objects made in the block, not all modules and whatever else is there already."""
    if gc.get_freeze_count():  # frozen by somebody else, whose objects are not ours to unfreeze
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
