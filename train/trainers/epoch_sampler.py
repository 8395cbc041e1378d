"""Order of the prompts, as a function of seed and epoch alone."""

# ruff: noqa: TID253  (all of this file is torch)

from collections.abc import Iterator
from typing import Any

from torch.utils.data import Sampler


class EpochSampler(Sampler):
    """TRL's sampler, reseeded in each epoch, so that a resumed run sees the same order."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        """Reseed the order for an epoch; the Trainer calls it as each one begins."""
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed((self.sampler.seed or 0) + epoch)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)
