"""The three ways to compute what packs want from a causal LM, fastest first.

Each takes packs and returns the log-probabilities wanted of each, in float64 arrays:
`packed` runs a whole trie as one row, with an ancestor mask and depths as positions; `prefixed`
runs shared prefixes once and their continuations after the key-value cache; `plain` runs every
path of the tries by itself. Which of them a model takes rightly, `scoring.Scorer` finds out.
"""
# ruff: noqa: TID253  -- all torch; imported only where a model is at hand

import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from selfcorrect.evaluate.scoring.token_trie import Pack

LARGEST_LOGITS = 2**26  # numbers in the logits of one forward
_LARGEST_SOFTMAX = 2**22  # numbers in one piece of the normaliser, to stay in the cache


class Forwards:
    """A model as it stands (hand it over in eval mode), and how much it takes at once.

    `batch_tokens` bounds rows x padded length of one forward; it changes speed and memory, and
    results only by float rounding.
    """

    def __init__(self, model: Any, batch_tokens: int) -> None:
        self.model = model
        self.batch_tokens = batch_tokens
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.vocabulary = model.get_input_embeddings().weight.shape[0]
        architecture = type(model.get_base_model() if hasattr(model, "get_base_model") else model)
        self.accepts = set(inspect.signature(architecture.forward).parameters)
        # A boolean mask for `logits_to_keep` is only understood where transformers' own slicing
        # is used; elsewhere (remote code) all logits are computed and the wanted ones picked.
        self._slices = "logits_to_keep" in self.accepts and hasattr(
            sys.modules[architecture.__module__], "slice_logits_to_keep"
        )

    @torch.no_grad()
    def packed(self, packs: Sequence[Pack]) -> Iterator[tuple[int, np.ndarray]]:
        """(index of the pack, values wanted of it); needs a model that takes masks of its own."""
        order = sorted(range(len(packs)), key=lambda i: -len(packs[i]))
        wanted = [np.unique(packs[i].wanted_nodes) for i in range(len(packs))]
        for batch in self._batches(order, [len(p) for p in packs], [len(w) for w in wanted]):
            width = len(packs[batch[0]])
            tokens = padded([packs[i].tokens for i in batch], width, 0)
            depths = padded([packs[i].depths for i in batch], width, 0)
            # A padding node is its own subtree: it sees itself, and nobody sees it.
            ends = torch.arange(width, dtype=torch.int32).repeat(len(batch), 1)
            keep = torch.zeros(len(batch), width, dtype=torch.bool)
            for row, i in enumerate(batch):
                ends[row, : len(packs[i])] = torch.from_numpy(packs[i].ends)
                keep[row, wanted[i]] = True
            logits, _ = self.logits(
                keep,
                input_ids=tokens,
                position_ids=depths,
                attention_mask=ancestors(ends.to(self.device), self.dtype),
            )
            yield from self._picked(logits, batch, packs, wanted)

    @torch.no_grad()
    def plain(self, packs: Sequence[Pack]) -> Iterator[tuple[int, np.ndarray]]:
        """The same values from every path of each trie run as a row of its own."""
        for index, pack in enumerate(packs):
            paths = _paths(pack)
            values = np.full(len(pack.wanted_nodes), np.nan)
            lengths = [len(path) for path in paths]
            order = sorted(range(len(paths)), key=lambda i: -lengths[i])
            for batch in self._batches(order, lengths, lengths):
                rows = [paths[i] for i in batch]
                places, keep = _places(pack, rows, 0)
                width = lengths[batch[0]]
                inside = torch.arange(width) < torch.tensor([lengths[i] for i in batch])[:, None]
                logits, _ = self.logits(
                    keep,
                    input_ids=padded([pack.tokens[row] for row in rows], width, 0),
                    position_ids=torch.arange(width).expand(len(batch), -1),
                    attention_mask=inside.long(),
                )
                self._fill(values, logits, pack, places)
            yield index, values

    @torch.no_grad()
    def prefixed(self, packs: Sequence[Pack]) -> Iterator[tuple[int, np.ndarray]]:
        """The same values, shared prefixes run once, their continuations after the cache."""
        for index, pack in enumerate(packs):
            values = np.full(len(pack.wanted_nodes), np.nan)
            families = _families(pack)
            while families:
                # Prefixes of one length need no padding between cache and continuation.
                length = len(families[0].prefix)
                alike = [f for f in families if len(f.prefix) == length]
                families = [f for f in families if len(f.prefix) != length]
                for some in self._family_batches(alike):
                    self._run_families(values, pack, some)
            yield index, values

    def _run_families(self, values: np.ndarray, pack: Pack, families: list["_Family"]) -> None:
        length = len(families[0].prefix)
        prefixes = [family.prefix for family in families]
        rows = [row for family in families for row in family.rows]
        places, keep = _places(pack, prefixes, 0)
        logits, cache = self.logits(
            keep,
            use_cache=True,
            input_ids=padded([pack.tokens[prefix] for prefix in prefixes], length, 0),
            position_ids=torch.arange(length).expand(len(prefixes), -1),
            attention_mask=torch.ones(len(prefixes), length, dtype=torch.long),
        )
        self._fill(values, logits, pack, places)
        suffixes = [row[length:] for row in rows]
        width = max(len(suffix) for suffix in suffixes)
        if width == 0:  # rows of a single token
            return
        parents = [i for i, family in enumerate(families) for _ in family.rows]
        cache.batch_select_indices(torch.tensor(parents, device=self.device))
        places, keep = _places(pack, suffixes, length)
        inside = torch.arange(width) < torch.tensor([len(s) for s in suffixes])[:, None]
        logits, _ = self.logits(
            keep,
            input_ids=padded([pack.tokens[suffix] for suffix in suffixes], width, 0),
            position_ids=torch.arange(length, length + width).expand(len(rows), -1),
            attention_mask=torch.cat(
                [torch.ones(len(rows), length, dtype=torch.long), inside.long()], dim=1
            ),
            past_key_values=cache,
        )
        self._fill(values, logits, pack, places)

    def _family_batches(self, families: list["_Family"]) -> Iterator[list["_Family"]]:
        held: list[_Family] = []
        for family in families:
            rows = sum(len(f.rows) for f in [*held, family])
            longest = max(len(row) for f in [*held, family] for row in f.rows)
            if held and rows * longest > self.batch_tokens:
                yield held
                held = []
            held.append(family)
        if held:
            yield held

    def _batches(
        self, order: Sequence[int], lengths: Sequence[int], wanted: Sequence[int]
    ) -> Iterator[list[int]]:
        """Neighbours in `order` (longest first), within the bounds on tokens and on logits."""
        batch: list[int] = []
        logits = 0
        for index in order:
            more = logits + wanted[index] * self.vocabulary
            tokens = (len(batch) + 1) * lengths[batch[0] if batch else index]
            if batch and (tokens > self.batch_tokens or more > LARGEST_LOGITS):
                yield batch
                batch, more = [], wanted[index] * self.vocabulary
            batch.append(index)
            logits = more
        if batch:
            yield batch

    def logits(
        self, keep: torch.Tensor, use_cache: bool = False, **inputs: Any
    ) -> tuple[torch.Tensor, Any]:
        """Logits (N, vocabulary) at the N marked positions, row by row, and the cache."""
        if "position_ids" not in self.accepts:
            del inputs["position_ids"]
        given = {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }
        keep = keep.to(self.device)
        if "use_cache" in self.accepts:
            given["use_cache"] = use_cache
        if self._slices:
            given["logits_to_keep"] = keep
        output = self.model(**given)
        logits = output.logits if self._slices else output.logits[keep]
        return logits, getattr(output, "past_key_values", None)

    def _picked(
        self,
        logits: torch.Tensor,
        batch: Sequence[int],
        packs: Sequence[Pack],
        wanted: Sequence[np.ndarray],
    ) -> Iterator[tuple[int, np.ndarray]]:
        starts = np.cumsum([0, *(len(wanted[i]) for i in batch)])
        at = [
            start + np.searchsorted(wanted[i], packs[i].wanted_nodes)
            for start, i in zip(starts, batch, strict=False)
        ]
        tokens = np.concatenate([packs[i].wanted_tokens for i in batch])
        values = log_probabilities(logits, np.concatenate(at), tokens)
        lengths = np.cumsum([len(places) for places in at])[:-1]
        yield from zip(batch, np.split(values, lengths), strict=True)

    def _fill(
        self, values: np.ndarray, logits: torch.Tensor, pack: Pack, places: dict[int, int]
    ) -> None:
        """Put in the values of the nodes whose logits lie at `places`."""
        at = np.array([places.get(int(node), -1) for node in pack.wanted_nodes])
        here = np.flatnonzero(at >= 0)
        values[here] = log_probabilities(logits, at[here], pack.wanted_tokens[here])


@dataclass(frozen=True, slots=True)
class _Family:
    """Rows (as nodes of a pack) that share `prefix`."""

    prefix: np.ndarray
    rows: list[np.ndarray]


def _families(pack: Pack) -> list[_Family]:
    """Rows by the longest prefix worth running by itself: at least half of the longest of them."""
    families: list[_Family] = []
    held: list[np.ndarray] = []
    common = 0
    for path in _paths(pack):
        if held:
            length = min(common, len(path))
            differ = np.flatnonzero(held[0][:length] != path[:length])
            shared = int(differ[0]) if len(differ) else length
            longest = max(len(path), *(len(row) for row in held))
            # A prefix leaves at least one token to every row: a forward needs one.
            shared = min(shared, len(path) - 1, *(len(row) - 1 for row in held))
            if 2 * shared >= longest:
                held.append(path)
                common = shared
                continue
            families.append(_Family(held[0][:common], held))
        held, common = [path], max(1, len(path) - 1)
    if held:
        families.append(_Family(held[0][:common], held))
    return families


def _paths(pack: Pack) -> list[np.ndarray]:
    """The nodes from the root to each leaf, in preorder of the leaves."""
    paths: list[np.ndarray] = []
    path = np.empty(0, dtype=np.int64)
    nodes = np.arange(len(pack))
    for leaf in np.flatnonzero(pack.ends == nodes):
        # The nodes that are new since the last leaf are neighbours in preorder.
        first = 0 if not len(paths) else int(paths[-1][-1]) + 1
        path = np.concatenate([path[: pack.depths[first]], nodes[first : leaf + 1]])
        paths.append(path)
    return paths


def _places(
    pack: Pack, rows: Sequence[np.ndarray], offset: int
) -> tuple[dict[int, int], torch.Tensor]:
    """Which positions of the padded rows hold wanted nodes, and each node's place among them."""
    wanted = np.zeros(len(pack), dtype=bool)
    wanted[pack.wanted_nodes] = True
    width = max(len(row) for row in rows)
    keep = torch.zeros(len(rows), width, dtype=torch.bool)
    places: dict[int, int] = {}
    count = 0
    for index, row in enumerate(rows):
        for position in np.flatnonzero(wanted[row]):
            node = int(row[position])
            if node in places:  # another row has it already
                continue
            places[node] = count
            keep[index, position] = True
            count += 1
    return places, keep


def padded(rows: Sequence[np.ndarray], width: int, value: int) -> torch.Tensor:
    """Rows of tokens or positions as one tensor, filled up on the right."""
    table = np.full((len(rows), width), value, dtype=np.int64)
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    return torch.from_numpy(table)


def ancestors(
    ends: torch.Tensor, dtype: torch.dtype, held: torch.Tensor | None = None
) -> torch.Tensor:
    """The additive mask (B, 1, L, C + L) of tries in preorder: 0 for a node and its ancestors.

    `held` (B, C) marks the columns of a cache before them that all nodes of a row see.
    """
    nodes = torch.arange(ends.shape[1], device=ends.device)
    seen = (nodes[:, None] >= nodes) & (nodes[:, None] <= ends[:, None, :])
    if held is not None:
        before = held.to(ends.device)[:, None, :].expand(-1, len(nodes), -1)
        seen = torch.cat([before, seen], dim=2)
    mask = torch.full(seen.shape, torch.finfo(dtype).min, dtype=dtype, device=ends.device)
    return mask.masked_fill_(seen, 0.0)[:, None]


def log_probabilities(logits: torch.Tensor, at: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """log p(token) at rows `at` of the logits (N, vocabulary), float64; NaN stays NaN."""
    size = max(1, _LARGEST_SOFTMAX // logits.shape[-1])
    pieces = [piece.float().logsumexp(dim=-1) for piece in logits.split(size)]
    normaliser = torch.cat(pieces) if pieces else logits.new_empty(0)
    where = torch.from_numpy(at.astype(np.int64)).to(logits.device)
    token = torch.from_numpy(tokens.astype(np.int64)).to(logits.device)
    values = logits[where, token].float() - normaliser[where]
    picked: np.ndarray = values.cpu().numpy().astype(np.float64)
    return picked
