"""Find out by trying which forwards are right for a model, and for packs of which size.

The reference is each row alone: its tokens, and nothing else, in a forward of its own. A faster
forward is compared with it on a trial that is as large as the packs it vouches for. Some models
differ beyond a size only: layers that look back a number of places by index or by position, sparse
attention that keeps a number of tokens, rotary embeddings that change with the longest row of a
forward. So a forward is used up to the size at which it was right, and a slower one beyond.
"""
# ruff: noqa: TID253  -- all torch; imported only where a model is at hand

import logging
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from selfcorrect.evaluate.prompts.tokenized import Continuation
from selfcorrect.evaluate.scoring.forwards import Forwards, paths
from selfcorrect.evaluate.scoring.token_trie import Pack, trie

logger = logging.getLogger(__name__)

# What a model can raise that does not support a kind of forward.
UNSUPPORTED = (
    RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError
)  # fmt: skip

_MARGIN = 1.1  # a trial's rows are longer than those it is made for: slightly longer ones follow
_SCORED = 8  # tokens at the end of each row of a trial that are compared
_SURE = 0.75  # of the longest row at which a trial is right is used, where longer ones are wrong
_SHORTEST = 8  # tokens of the shortest row of a trial


class Size(NamedTuple):
    """The sizes of a pack that can make a forward wrong: its longest row, largest tree, nodes."""

    row: int
    tree: int
    nodes: int

    def within(self, limit: "Size") -> bool:
        """Return whether no size is beyond `limit`."""
        return all(mine <= bound for mine, bound in zip(self, limit, strict=True))

    def union(self, other: "Size") -> "Size":
        """Return the larger of both in each size."""
        return Size(*map(max, self, other))


_NOTHING, _ANYTHING = Size(0, 0, 0), Size(*[sys.maxsize] * 3)


def size_of(pack: Pack) -> Size:
    """Return the sizes of a pack."""
    roots = np.flatnonzero(pack.depths == 0)
    return Size(int(pack.depths.max()) + 1, int((pack.ends[roots] - roots).max()) + 1, len(pack))


@dataclass
class Way:
    """A forward that is right for packs `within` a size; larger ones are tried until `is_final`.

    `name` is its method of `Forwards`.
    """

    name: str
    description: str
    within: Size = _NOTHING
    is_final: bool = False
    reason: str = ""
    _warned: bool = field(default=False, repr=False)


@dataclass
class Trials:
    """What has been found out about a model by trying.

    It depends on the model's code and settings, not on what its weights are: the checkpoints that
    are read into one model in memory, or that it passes through in training, share it.
    """

    packed: Way = field(default_factory=partial(Way, "packed", "in packs"))
    prefixed: Way = field(default_factory=partial(Way, "prefixed", "with cached prefixes"))
    plain: Way = field(default_factory=partial(Way, "plain", "row by row"))
    alone: Way = field(
        default_factory=partial(Way, "alone", "one row at a time", _ANYTHING, is_final=True)
    )
    continues_cache: "Checks" = field(default_factory=lambda: Checks())
    in_slots: "Checks" = field(default_factory=lambda: Checks())
    in_mixed_batches: "Checks" = field(default_factory=lambda: Checks())
    in_even_batches: "Checks" = field(default_factory=lambda: Checks())


class Ways:
    """Assign packs to the fastest forward that is right for them, and warn of slower ones."""

    def __init__(self, forwards: Forwards, context: int | None, name: str, trials: Trials) -> None:
        self.forwards = forwards
        self.context = context
        self.name = name
        self.packed, self.prefixed = trials.packed, trials.prefixed
        self.plain, self.alone = trials.plain, trials.alone
        self.tolerance = _tolerance(forwards)

    def run(self, way: Way, packs: Sequence[Pack]) -> Iterable[tuple[int, np.ndarray]]:
        """Yield the index and wanted values of each pack."""
        values: Iterable[tuple[int, np.ndarray]] = getattr(self.forwards, way.name)(packs)
        return values

    @torch.no_grad()
    def assign(self, packs: Sequence[Pack]) -> list[tuple[Way, list[int]]]:
        """Return forwards with the indices of their packs; sizes that are new are tried first."""
        sizes = [size_of(pack) for pack in packs]
        rest = list(range(len(packs)))
        assigned = []
        for way in (self.packed, self.prefixed, self.plain, self.alone):
            while not way.is_final:
                new = [packs[i] for i in rest if not sizes[i].within(way.within)]
                if not new:
                    break
                self._try(way, new)
            here = [i for i in rest if sizes[i].within(way.within)]
            rest = [i for i in rest if not sizes[i].within(way.within)]
            if here:
                assigned.append((way, here))
        self._warn([way for way, _ in assigned])
        return assigned

    def give_up(self, way: Way, error: Exception) -> None:
        """Stop using a forward that raised an error."""
        way.within, way.is_final, way.reason = _NOTHING, True, reason_of(error)

    def _try(self, way: Way, packs: Sequence[Pack]) -> None:
        """Try a forward on a trial as large as the packs, and note up to which size it is right."""
        largest = max(packs, key=lambda pack: size_of(pack)[1:])
        row = max((_longest_row(pack) for pack in packs), key=len)
        length = math.ceil(_MARGIN * len(row))
        if self.context is not None:
            length = max(len(row), min(length, self.context))
        row = np.resize(row, length)
        if self._is_right(way, row, largest):
            return
        way.is_final = True
        if way is not self.packed:
            # Wrong for some rows beyond the packs' limit: which ones, a few rows cannot tell (a
            # sparse layer keeps other tied tokens), and the next way is only slower.
            way.within = _NOTHING
            return
        if not self._is_right(way, row[:_SHORTEST]) or self._is_right(way, row):
            return  # wrong for all rows, or only for so many nodes
        right, wrong = _SHORTEST, length
        while wrong - right > max(1, right // 16):
            middle = (right + wrong) // 2
            if self._is_right(way, row[:middle], is_noted=False):
                right = middle
            else:
                wrong = middle
        # A layer that sees all tokens of a row but one or two may change this row's scores by less
        # than the tolerance, and those of another row by more.
        right = max(_SHORTEST, int(_SURE * right))
        # Packs of shorter rows may still have as many nodes.
        shorter = [pack for pack in packs if size_of(pack).row <= right]
        largest_left = max(shorter, key=lambda pack: size_of(pack)[1:], default=None)
        self._is_right(way, row[:right], largest_left)

    def _is_right(
        self, way: Way, row: np.ndarray, pack: Pack | None = None, is_noted: bool = True
    ) -> bool:
        """Compare a forward with rows alone, on branches of `row` and on rows of `pack`.

        Where it is right, it is used for packs of that size from now on, if `is_noted`.
        """
        if way is self.packed and "position_ids" not in self.forwards.accepts:
            way.reason = "its forward takes no position_ids"
            return False
        rows = [] if pack is None else [pack.tokens[path] for path in paths(pack)]
        count = 3 if way is self.packed else 12  # slower forwards are rare and may well be wrong
        some = set(np.linspace(0, len(rows) - 1, count, dtype=int))
        if way is self.packed:
            tries = [trie([_scored(tokens) for tokens in _branches(row)])]
            if rows:  # all of the pack, of which some rows are compared, in the same batch
                options = [_scored(r) if i in some else _unscored(r) for i, r in enumerate(rows)]
                tries.append(trie(options))
        else:
            compared = [*_branches(row), *(rows[i] for i in sorted(some) if rows)]
            tries = [trie([_scored(tokens) for tokens in compared])]
        expected = dict(self.forwards.alone(tries))
        try:
            if way is self.packed:
                values = dict(enumerate(self.forwards.run_tries(tries, [0] * len(tries))))
            elif way is self.plain:
                values = {0: self.forwards.run_paths(tries[0])}
            else:
                values = dict(self.run(way, tries))
        except UNSUPPORTED as refusal:
            way.reason = reason_of(refusal)
            return False
        error = max(self._error(tries[i], values[i], expected[i]) for i in expected)
        if error > self.tolerance:  # NaN is reported later
            way.reason = f"its scores are off by {error:.2g}"
            return False
        for tree in tries if is_noted else ():
            size = size_of(tree)
            way.within = way.within.union(
                size if way is self.packed else Size(size.row, *_ANYTHING[1:])
            )
        return True

    def _error(self, tree: Pack, values: np.ndarray, expected: np.ndarray) -> float:
        """Return the largest error of a token, or in 16 bits of a row's mean.

        Rounding to 16 bits has heavy tails; a wrong mask or position changes most tokens of a row.
        """
        errors = np.abs(values - expected)
        if self.forwards.dtype.itemsize > 2:
            return float(errors.max())
        options = np.asarray(tree.wanted_options)
        counts = np.bincount(options)
        return float((np.bincount(options, errors)[counts > 0] / counts[counts > 0]).max())

    def _warn(self, ways: Sequence[Way]) -> None:
        for way in ways[1:] if ways[0] is self.packed else ways:
            if way is self.packed or way._warned:
                continue
            way._warned = True
            limit = self.packed.within.row
            logger.warning(
                "%s cannot be scored in packs%s (%s): scoring %s, which is slower",
                self.name,
                f" of rows beyond {limit} tokens" if limit else "",
                self.packed.reason,
                way.description,
            )


@dataclass
class Checks:
    """The sizes up to which results of a faster way were compared and equal.

    After three failures nothing larger is tried.
    """

    right: tuple[int, ...] = ()
    failures: int = 0

    @property
    def may_try(self) -> bool:
        """Return whether a size that is not known may be tried."""
        return self.failures < 3

    def knows(self, size: tuple[int, ...]) -> bool:
        """Return whether no size is larger than those that were right."""
        return bool(self.right) and all(a <= b for a, b in zip(size, self.right, strict=True))

    def note(self, size: tuple[int, ...]) -> None:
        """Note that results of this size were right."""
        self.right = tuple(map(max, size, self.right)) if self.right else size


def _tolerance(forwards: Forwards) -> float:
    """Return how far log-probabilities may differ by rounding, which varies with matrix shapes."""
    tf32 = forwards.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    if forwards.dtype == torch.float32 and not tf32:
        return 2e-4  # seen: 2e-5 in models of 1e8 parameters; a wrong mask can be off by 1e-3 only
    eps = 2**-10 if forwards.dtype == torch.float32 else torch.finfo(forwards.dtype).eps
    return 4 * math.sqrt(eps)


def reason_of(error: Exception) -> str:
    """Return the beginning of an error's message on one line."""
    return " ".join(str(error).split())[:120] or type(error).__name__


def _longest_row(pack: Pack) -> np.ndarray:
    node = int(pack.depths.argmax())
    nodes = np.arange(node + 1)
    return pack.tokens[: node + 1][pack.ends[nodes] >= node]


def _branches(row: np.ndarray) -> list[np.ndarray]:
    """Return rows of the length of `row`, half of it, a quarter and so on, two of each length.

    All begin as `row`. Of two with the same length, one parts from it in the middle, the other at
    its last token, so that shared prefixes and lengths of every scale are tried.
    """
    rows, length = [], len(row)
    while length >= min(_SHORTEST, len(row)):
        for part in (length - 1, length // 2 + 1):
            branch = row[:length].copy()
            others = row[row != row[min(part, length - 1)]]
            branch[min(part, length - 1)] = others[0] if len(others) else row[0]
            rows.append(branch)
        length //= 2
    return rows


def _scored(row: np.ndarray) -> Continuation:
    """Return a row as an option whose last tokens are scored; what follows it is its first."""
    tokens = (*row.tolist(), int(row[0]))
    return Continuation(tokens, max(1, len(tokens) - _SCORED))


def _unscored(row: np.ndarray) -> Continuation:
    tokens = (*row.tolist(), int(row[0]))
    return Continuation(tokens, len(tokens))
