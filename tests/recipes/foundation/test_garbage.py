"""Searches for garbage are spared in a block, and are as before after it."""

import gc
from collections.abc import Iterator
from contextlib import suppress

import pytest

from selfcorrect.recipes.foundation.garbage import garbage_collection_off, garbage_of_new_objects


@pytest.fixture(autouse=True)
def nothing_frozen() -> Iterator[None]:
    """The tests' own freezing (conftest.py) ends for a test, and is there again after it."""
    gc.unfreeze()
    yield
    gc.enable()
    gc.freeze()


@pytest.mark.parametrize("error", [None, KeyError])
def test_only_new_objects_are_searched(error: type[Exception] | None) -> None:
    with suppress(KeyError), garbage_of_new_objects():
        assert gc.get_freeze_count()
        new = [object()]
        assert any(found is new for found in gc.get_objects())
        if error:
            raise error
    assert not gc.get_freeze_count()


def test_what_somebody_else_has_frozen_stays_frozen() -> None:
    gc.freeze()
    with garbage_of_new_objects():
        count = gc.get_freeze_count()
        assert count
    assert gc.get_freeze_count() == count


@pytest.mark.parametrize("is_on", [True, False])
def test_collection_is_off_in_the_block_and_as_before_after_it(is_on: bool) -> None:
    if not is_on:
        gc.disable()
    with suppress(KeyError), garbage_collection_off():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled() == is_on
