"""The processes of one launch (`accelerate launch`, a distributed Trainer) sharing an evaluation.

Each scores its share of the items; the first one writes. Items are cut up in the same way for any
number of processes, so the files are the same to the byte.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from selfcorrect.recipes.foundation.signals import Terminated

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process's `rank` among `size`; each method is called by all of them, or none."""

    rank: int = 0
    size: int = 1

    def gather(self, make: Callable[[], T]) -> list[T]:
        """What `make` gives in each process, by rank; an error of any one is raised in all."""
        if self.size == 1:
            return [make()]
        from accelerate.utils import gather_object

        value: T | None = None
        failure: Exception | Terminated | None = None
        try:
            value = make()
        except (Exception, Terminated) as error:  # the others must not wait for ever
            failure = error
        found: list[tuple[Any, Exception | Terminated | None]] = gather_object([(value, failure)])
        for _, theirs in found:
            if theirs is not None:
                raise theirs
        return [value for value, _ in found]

    def agree(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first process: what looks at files may differ between them."""
        if self.size == 1:
            return make()
        return self.gather(lambda: make() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def wait(self) -> None:
        """Go on when all have come this far."""
        self.gather(lambda: None)


ALONE = Processes()


@contextmanager
def launched() -> Iterator[tuple[Processes, str | None]]:
    """The processes of this launch, and this one's device; (ALONE, None) without a launch.

    `accelerate launch` and torchrun say by environment variables how many there are.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE, None
        return
    from accelerate import PartialState

    from selfcorrect.evaluate.scoring.load_model import best_device

    state = PartialState(cpu=best_device() == "cpu")
    try:
        yield joined(), str(state.device)
    finally:
        state.destroy_process_group()


def joined() -> Processes:
    """The processes that this one was joined with, by accelerate or a Trainer; or ALONE."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return ALONE
    return Processes(distributed.get_rank(), distributed.get_world_size())
