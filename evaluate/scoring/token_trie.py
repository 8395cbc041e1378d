"""Token tries as packs: what many continuations share is computed once, in one forward.

Prompts that are to be scored have much in common: the options of one question, its conditions, the
four questions of a BBQ block. Sorted, all their token rows are the preorder of a trie. A pack is
a run of that preorder which fits a budget: each distinct prefix is one node with its depth as
position, and a node may look at its ancestors alone. In preorder the subtree of a node is an
interval, so `end`, the last node of each subtree, says all: u is an ancestor of v, or v itself,
if and only if u <= v <= end[u].
"""

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np

from selfcorrect.evaluate.prompts.tokenized import Continuation

T = TypeVar("T")

_NONE = np.iinfo(np.int64).max
_RECENT_CHARACTERS = 2**22  # as tokens they take up to 35 bytes a character


@dataclass(frozen=True, slots=True)
class Pack:
    """A trie of L nodes in preorder, and the V log-probabilities to compute on it.

    `tokens`, `depths` and `ends` have shape (L,), the others (V,). Value k is the log-probability
    of `wanted_tokens[k]` after the path to node `wanted_nodes[k]`; it is a term of option
    `wanted_options[k]`, numbered across all requests.
    """

    tokens: np.ndarray
    depths: np.ndarray
    ends: np.ndarray
    wanted_nodes: np.ndarray
    wanted_tokens: np.ndarray
    wanted_options: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Packing:
    """The packs of some requests; request i has `num_options[i]` options, `lengths[i]` tokens."""

    packs: list[Pack]
    num_options: list[int]
    lengths: list[int]


class PackingCache:
    """What measuring makes of items, tokenizer and architecture, in memory for the next checkpoint.

    Packings and prompts are kept for all models with the same tokenizer: some hundred bytes a
    prompt. Of what holds a model's own text the newest is kept, since checkpoints of a run often
    write the same.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, ...], Any] = {}
        self._recent: dict[tuple[str, ...], Any] = {}  # the oldest first
        self._num_characters = 0
        self._of_models: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()

    def get(self, key: tuple[str, ...], make: Callable[[], T]) -> T:
        """Return the value of `key`, made on first use."""
        if key not in self._kept:
            self._kept[key] = make()
        value: T = self._kept[key]
        return value

    def recent(
        self, keys: Sequence[tuple[str, ...]], make: Callable[[list[int]], Sequence[T]]
    ) -> list[T]:
        """Return the values of keys; `make` makes those of the keys (indices) that are not kept.

        Kept are the values used last, while their keys and texts have few characters.
        """
        missing = [index for index, key in enumerate(keys) if key not in self._recent]
        made = dict(zip(missing, make(missing) if missing else (), strict=True))
        values = [made[i] if i in made else self._recent[key] for i, key in enumerate(keys)]
        for key, value in zip(keys, values, strict=True):
            if self._recent.pop(key, None) is None:
                self._num_characters += _num_characters(key, value)
            self._recent[key] = value
        while self._num_characters > _RECENT_CHARACTERS:
            oldest = next(iter(self._recent))
            self._num_characters -= _num_characters(oldest, self._recent.pop(oldest))
        return values

    def of_model(self, model: Any, key: str, make: Callable[[], T]) -> T:
        """Return what `make` has made of a model in memory, which may get other weights."""
        values = self._of_models.setdefault(model, {})
        if key not in values:
            values[key] = make()
        value: T = values[key]
        return value


def _num_characters(key: tuple[str, ...], value: Any) -> int:
    return sum(map(len, key)) + (len(value) if isinstance(value, str) else 0)


def pack(requests: Sequence[Sequence[Continuation]], pack_tokens: int) -> Packing:
    """Return packs of at most `pack_tokens` nodes; a longer row is a pack of its own."""
    return Packing(
        _packs(requests, pack_tokens),
        [len(request) for request in requests],
        [max(len(option.row) for option in request) for request in requests],
    )


def trie(options: Sequence[Continuation]) -> Pack:
    """Return one trie of all the options, however large."""
    return _packs([options], sys.maxsize)[0]


def _packs(requests: Sequence[Sequence[Continuation]], pack_tokens: int) -> list[Pack]:
    options = [option for request in requests for option in request]
    rows, row_of = _distinct_rows(options)
    wanted: list[list[int]] = [[] for _ in rows]
    for index, row in enumerate(row_of):
        wanted[row].append(index)
    return [
        _pack(rows[first:last], wanted[first:last], options)
        for first, last in _runs(rows, pack_tokens)
    ]


def _distinct_rows(options: Sequence[Continuation]) -> tuple[list[np.ndarray], list[int]]:
    """Return the distinct token rows in lexicographic order, and each option's row."""
    # As big-endian bytes, rows sort and hash at the speed of memory.
    keys = [np.array(option.row, dtype=">u4").tobytes() for option in options]
    order = sorted(set(keys))
    row_of = {key: index for index, key in enumerate(order)}
    return [np.frombuffer(key, dtype=">u4").astype(np.int64) for key in order], [
        row_of[key] for key in keys
    ]


def _runs(rows: Sequence[np.ndarray], pack_tokens: int) -> list[tuple[int, int]]:
    """Cut the sorted rows into runs [first, last) whose tries fit, where little is shared."""
    shared = [0] + [shared_length(a, b) for a, b in itertools.pairwise(rows)]
    added = [len(row) - length for row, length in zip(rows, shared, strict=True)]
    total = list(itertools.accumulate(added))

    def size(first: int, last: int) -> int:
        """Return the number of nodes of the trie of rows first..last."""
        return len(rows[first]) + total[last] - total[first]

    runs, first = [], 0
    for index in range(len(rows)):
        while index > first and size(first, index) > pack_tokens:
            # A cut repeats the shared prefix: take the cheapest cut in the later half.
            half = size(first, index - 1) / 2
            later = [i for i in range(first + 1, index) if size(first, i - 1) >= half]
            cut = min([*later, index], key=lambda i: (shared[i], -i))
            runs.append((first, cut))
            first = cut
    return [*runs, (first, len(rows))]


def shared_length(a: np.ndarray, b: np.ndarray) -> int:
    """Return the length of the common prefix."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length


def _pack(
    rows: Sequence[np.ndarray], wanted: Sequence[Sequence[int]], options: Sequence[Continuation]
) -> Pack:
    """Return the trie of sorted, distinct rows; `wanted` lists the options of each row."""
    lengths = np.array([len(row) for row in rows])
    shared = np.array([0] + [shared_length(a, b) for a, b in itertools.pairwise(rows)])
    columns = np.arange(lengths.max())
    table = np.zeros((len(rows), len(columns)), dtype=np.int64)
    inside = columns < lengths[:, None]
    table[inside] = np.concatenate(rows)
    new = inside & (columns >= shared[:, None])
    starts = np.concatenate([[0], np.cumsum(new.sum(axis=1))])
    # The node of a row at a column is the newest one there: its own, or that of the row it shares.
    numbers = np.cumsum(new.ravel()).reshape(new.shape) - 1
    node = np.maximum.accumulate(np.where(new, numbers, -1), axis=0)
    # A subtree ends where the first later row leaves the path at or above the node.
    leaves = np.where(columns >= shared[:, None], starts[:-1, None], _NONE)
    leaves = np.concatenate([leaves[1:], np.full((1, len(columns)), starts[-1])])
    ends = np.minimum.accumulate(leaves[::-1], axis=0)[::-1] - 1
    nodes, tokens, owners = [], [], []
    for row, indices in enumerate(wanted):
        for index in indices:
            option = options[index]
            positions = range(option.start, len(option.tokens))
            nodes += [node[row, position - 1] for position in positions]
            tokens += [option.tokens[position] for position in positions]
            owners += [index] * len(positions)
    return Pack(
        tokens=table[new].astype(np.int32),
        depths=np.nonzero(new)[1].astype(np.int32),
        ends=np.minimum(ends[new], starts[-1] - 1).astype(np.int32),
        wanted_nodes=np.array(nodes, dtype=np.int32),
        wanted_tokens=np.array(tokens, dtype=np.int32),
        wanted_options=np.array(owners, dtype=np.int32),
    )
