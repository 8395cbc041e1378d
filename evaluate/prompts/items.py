"""The items of an experiment: what is asked, which answers are scored, what the metrics need."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property

import numpy as np

Fact = str | int | float | None


@dataclass(frozen=True, slots=True)
class Item:
    """One question with its possible answers, before any condition is applied.

    `cluster` names what is resampled for error bars (a BBQ template, an occupation, a student), and
    lies in one `category`. `weight` is how many equal units of the population the item stands for.
    `fields` fill the placeholders of the stimuli. `options` are the exact continuations of the open
    assistant turn that are scored, leading space included where there is one. `facts` are what the
    metrics need; each becomes a column of the results.
    """

    id: str
    cluster: str
    category: str
    weight: float
    fields: dict[str, str]
    options: tuple[str, ...]
    facts: dict[str, Fact]


@dataclass(frozen=True)
class LoadedItems:
    """The items to be scored, and how many are left out of a metric for which reason."""

    items: list[Item]
    left_out: dict[str, int] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over every item, and over what is left out."""
        digest = hashlib.sha256(json.dumps(self.left_out, sort_keys=True).encode())
        names = [known.name for known in fields(Item)]
        encode = json.JSONEncoder(sort_keys=True).encode
        for item in self.items:  # `asdict` would copy every value: five times as slow
            digest.update(encode({name: getattr(item, name) for name in names}).encode())
        return digest.hexdigest()

    @cached_property
    def fact_types(self) -> dict[str, set[type]]:
        """The types of each fact's values over all items, in the order of the facts."""
        found: dict[str, set[type]] = {}
        for item in self.items:
            for name, value in item.facts.items():
                found.setdefault(name, set()).add(type(value))
        return found


def systematic_sample(sizes: Sequence[int] | np.ndarray, wanted: int, seed: int) -> np.ndarray:
    """How often each unit falls into a systematic sample of `wanted` draws.

    Units lie end to end on a line, each as long as its size, and `wanted` points at equal distances
    from one random start are thrown on it: a unit's expected share of the sample is its share of
    the total, and any run of neighbouring units gets its proportional number of draws to within
    one. So the order of the units is the stratification. With `wanted` at or above the total, every
    unit is drawn as often as its size: the whole population.
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    total = int(sizes.sum())
    if wanted >= total:
        return sizes.copy()
    start = np.random.default_rng(seed).random()
    points = (start + np.arange(wanted)) * (total / wanted)
    drawn = np.searchsorted(np.cumsum(sizes), points, side="right")
    return np.bincount(drawn, minlength=len(sizes))
