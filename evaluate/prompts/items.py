"""The items of an experiment: their wording, options, and the facts that metrics need."""

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

    `cluster` names the unit that is resampled for error bars (a BBQ template, an occupation, a
    student); a cluster lies in one `category`. `weight` is the number of equal population units
    that the item represents. `fields` fill the placeholders of the stimuli. `options` are the exact
    continuations of the open assistant turn that are scored, with a leading space if there is one.
    `facts` are for the metrics; each becomes a column of the results.
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
    """The items to score, and the number left out of a metric by reason."""

    items: list[Item]
    left_out: dict[str, int] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all items and `left_out`."""
        digest = hashlib.sha256(json.dumps(self.left_out, sort_keys=True).encode())
        names = [item_field.name for item_field in fields(Item)]
        encode = json.JSONEncoder(sort_keys=True).encode
        for item in self.items:  # `asdict` copies every value, which is five times as slow
            digest.update(encode({name: getattr(item, name) for name in names}).encode())
        return digest.hexdigest()

    @cached_property
    def fact_types(self) -> dict[str, set[type]]:
        """The types of each fact's values over all items, in the order of the facts."""
        types: dict[str, set[type]] = {}
        for item in self.items:
            for name, value in item.facts.items():
                types.setdefault(name, set()).add(type(value))
        return types


def systematic_sample(sizes: Sequence[int] | np.ndarray, num_draws: int, seed: int) -> np.ndarray:
    """Return how often each unit is drawn in a systematic sample of `num_draws`.

    Units lie end to end on a line, each as long as its size, and points at equal distances from a
    random start select them. A unit's expected share of the sample is its share of the total, and
    any run of neighbouring units gets its proportional number of draws to within one: the order of
    the units is the stratification. If `num_draws` reaches the total, every unit is drawn as often
    as its size, which is the whole population.
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    total = int(sizes.sum())
    if num_draws >= total:
        return sizes.copy()
    start = np.random.default_rng(seed).random()
    points = (start + np.arange(num_draws)) * (total / num_draws)
    drawn = np.searchsorted(np.cumsum(sizes), points, side="right")
    return np.bincount(drawn, minlength=len(sizes))
