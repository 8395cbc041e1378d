"""The ranks of a distributed job (`accelerate launch`, torchrun, a distributed Trainer).

Each rank scores its share of the items and rank 0 writes the files. Items are divided in the same
way for any number of ranks, so the files are the same to the byte.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from selfcorrect.recipes.foundation.signals import Terminated

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's `rank` among `size`. Every rank must call each method, or none may."""

    rank: int = 0
    size: int = 1

    def gather(self, make: Callable[[], T]) -> list[T]:
        """Return the value of `make` on every rank, by rank; an error on one is raised on all."""
        if self.size == 1:
            return [make()]
        from accelerate.utils import gather_object

        value: T | None = None
        failure: Exception | Terminated | None = None
        try:
            value = make()
        except (Exception, Terminated) as error:  # the other ranks must not wait for ever
            failure = error
        outcomes: list[tuple[Any, Exception | Terminated | None]] = gather_object(
            [(value, failure)]
        )
        for _, raised in outcomes:
            if raised is not None:
                raise raised
        return [value for value, _ in outcomes]

    def from_rank0(self, make: Callable[[], T]) -> T:
        """Return the value of `make` on rank 0: what ranks read from files may differ."""
        if self.size == 1:
            return make()
        return self.gather(lambda: make() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def barrier(self) -> None:
        """Return once every rank has called this."""
        self.gather(lambda: None)


SINGLE = Ranks()


@contextmanager
def distributed_ranks() -> Iterator[tuple[Ranks, str | None]]:
    """Join the ranks that `accelerate launch` or torchrun started, and yield this rank's device.

    Yields (SINGLE, None) if the environment variable WORLD_SIZE says that there is only one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield SINGLE, None
        return
    from accelerate import PartialState

    state = PartialState(cpu=best_device() == "cpu")
    try:
        yield current_ranks(), str(state.device)
    finally:
        state.destroy_process_group()


def current_ranks() -> Ranks:
    """Return the initialised torch.distributed group, or a group of one."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return SINGLE
    return Ranks(distributed.get_rank(), distributed.get_world_size())


def best_device() -> str:
    """Return this machine's fastest device: "cuda", "mps" or "cpu"."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
