"""Four ways to compute the log-probabilities that packs ask for, fastest first.

Each takes packs and yields float64 arrays: `packed` runs a whole trie as one row, with a tree
attention mask and depths as positions; `prefixed` runs shared prefixes once and continues from
their key-value cache; `plain` runs every path of the tries as a row of a batch; `alone` runs each
option in a forward of its own, and is right by definition. `trials.Ways` finds out which of the
others equal it for a model.
"""
# ruff: noqa: TID253  -- all torch; imported only where a model is at hand

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from selfcorrect.evaluate.scoring.limits import LARGEST_LOGITS
from selfcorrect.evaluate.scoring.precision import device_of
from selfcorrect.evaluate.scoring.token_trie import Pack, shared_length
from selfcorrect.evaluate.scoring.tree_attention import (
    SEVERAL_BLOCKS,
    AttentionToEarlierNodes,
    tree_attention_mask,
)

_LARGEST_SOFTMAX = 2**22  # numbers in one piece of the normaliser, to stay in the cache
# Weights of the LM head that are held in float32 at once: on a CPU, what its cache holds.
_NUMBERS_CONVERTED = {"cpu": 2**20, "gpu": 2**25}


class Forwards:
    """Batched forwards of one model, which must be in eval mode.

    `batch_tokens` bounds rows x padded length of one forward. It changes speed and memory, and
    results only by float rounding.
    """

    def __init__(self, model: Any, batch_tokens: int) -> None:
        self.model = model
        self.batch_tokens = batch_tokens
        self.device = device_of(model)
        self.dtype = next(model.parameters()).dtype
        self.vocabulary = model.get_input_embeddings().weight.shape[0]
        architecture = type(model.get_base_model() if hasattr(model, "get_base_model") else model)
        self.accepts = set(inspect.signature(architecture.forward).parameters)
        # Only models that use transformers' own slicing take a boolean mask for `logits_to_keep`;
        # for others (remote code) all logits are computed, then selected.
        self._slices = "logits_to_keep" in self.accepts and hasattr(
            sys.modules[architecture.__module__], "slice_logits_to_keep"
        )
        # Layers on several GPUs: an index on the CPU suits the tensors of each of them.
        self._index_device = torch.device("cpu") if _spans_devices(model) else self.device

    @torch.no_grad()
    def packed(self, packs: Sequence[Pack]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (index, wanted values) of each pack; the model must take a 4D attention mask."""
        order = sorted(range(len(packs)), key=lambda i: -len(packs[i]))
        num_wanted = [len(np.unique(pack.wanted_nodes)) for pack in packs]
        for batch in self._batches(order, [len(pack) for pack in packs], num_wanted):
            tries = [packs[i] for i in batch]
            yield from zip(batch, self.run_tries(tries, [0] * len(batch)), strict=True)

    def run_tries(
        self,
        tries: Sequence[Pack],
        starts: Sequence[int],
        cached: torch.Tensor | None = None,
        **inputs: Any,
    ) -> list[np.ndarray]:
        """Return the wanted values of tries that are run as rows, each from node `starts[row]` on.

        `cached`: see `tree_attention_mask`.
        """
        width = max(len(tree) - start for tree, start in zip(tries, starts, strict=True))
        wanted = [np.unique(tree.wanted_nodes) for tree in tries]
        # A padding node is its own subtree: it attends to itself, and no node attends to it.
        ends = np.tile(np.arange(width, dtype=np.int32), (len(tries), 1))
        keep = np.zeros((len(tries), width), dtype=bool)
        for row, (tree, start) in enumerate(zip(tries, starts, strict=True)):
            # Skipped nodes are one path, the first of the trie: later subtrees stay intervals.
            ends[row, : len(tree) - start] = tree.ends[start:] - start
            keep[row, wanted[row] - start] = True
        tokens = [tree.tokens[start:] for tree, start in zip(tries, starts, strict=True)]
        depths = [tree.depths[start:] for tree, start in zip(tries, starts, strict=True)]
        mask = tree_attention_mask(torch.from_numpy(ends).to(self.device), self.dtype, cached)
        on_cpu = self.device.type == "cpu"
        in_blocks = on_cpu and cached is None and width > SEVERAL_BLOCKS
        with AttentionToEarlierNodes() if in_blocks else nullcontext():
            logits, _ = self.logits(
                torch.from_numpy(keep),
                input_ids=padded(tokens, width),
                position_ids=padded(depths, width),
                attention_mask=mask,
                **inputs,
            )
        offsets = np.cumsum([0, *map(len, wanted)])
        rows = [
            offset + np.searchsorted(nodes, tree.wanted_nodes)
            for offset, nodes, tree in zip(offsets, wanted, tries, strict=False)
        ]
        tokens_of_rows = np.concatenate([tree.wanted_tokens for tree in tries])
        values = log_probabilities(logits, np.concatenate(rows), tokens_of_rows)
        return np.split(values, np.cumsum([len(tree_rows) for tree_rows in rows])[:-1])

    @torch.no_grad()
    def plain(self, packs: Sequence[Pack]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the same values, with every path of a trie run as a row of its own."""
        for index, pack in enumerate(packs):
            rows = paths(pack)
            values = np.full(len(pack.wanted_nodes), np.nan)
            lengths = [len(row) for row in rows]
            order = sorted(range(len(rows)), key=lambda i: -lengths[i])
            for batch in self._batches(order, lengths, lengths):
                self._run_rows(values, pack, [rows[i] for i in batch])
            yield index, values

    @torch.no_grad()
    def run_paths(self, pack: Pack) -> np.ndarray:
        """Return the values of a pack with all its paths as the rows of one forward."""
        values = np.full(len(pack.wanted_nodes), np.nan)
        self._run_rows(values, pack, paths(pack))
        return values

    @torch.no_grad()
    def alone(self, packs: Sequence[Pack]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the same values, each option read alone: no padding, mask, position or cache.

        Options are read from the shortest to the longest, because rotary embeddings may grow with
        the longest row so far.
        """
        for index, pack in enumerate(packs):
            self.reset()
            values = np.full(len(pack.wanted_nodes), np.nan)
            options, option = np.unique(pack.wanted_options, return_inverse=True)
            last = np.zeros(len(options), dtype=np.int64)
            np.maximum.at(last, option, pack.wanted_nodes)
            nodes = np.arange(len(pack))
            ends = np.unique(last)
            for end in ends[np.argsort(pack.depths[ends], kind="stable")]:
                path = np.flatnonzero((nodes <= end) & (pack.ends >= end))
                wanted = np.flatnonzero(last[option] == end)
                rows = np.searchsorted(path, pack.wanted_nodes[wanted])
                logits = self.row_logits(pack.tokens[path], np.unique(rows))
                values[wanted] = log_probabilities(
                    logits, np.searchsorted(np.unique(rows), rows), pack.wanted_tokens[wanted]
                )
            yield index, values

    @torch.no_grad()
    def reset(self) -> None:
        """Read one token, after which rotary embeddings that grow (dynamic NTK) are as at first."""
        self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device))

    @torch.no_grad()
    def row_logits(self, tokens: Sequence[int] | np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """Return the logits (N, vocabulary) at N ascending positions of one row, read alone."""
        row = torch.as_tensor(np.asarray(tokens, dtype=np.int64))[None]
        keep = torch.zeros_like(row, dtype=torch.bool)
        keep[0, torch.as_tensor(positions)] = True
        return self.logits(keep, input_ids=row)[0]

    @torch.no_grad()
    def prefixed(self, packs: Sequence[Pack]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the same values; shared prefixes are run once, then continued from the cache."""
        for index, pack in enumerate(packs):
            values = np.full(len(pack.wanted_nodes), np.nan)
            groups = _prefix_groups(pack)
            while groups:
                # Prefixes of one length need no padding between cache and continuation.
                length = len(groups[0].prefix)
                same_length = [group for group in groups if len(group.prefix) == length]
                groups = [group for group in groups if len(group.prefix) != length]
                for batch in self._group_batches(same_length):
                    self._run_groups(values, pack, batch)
            yield index, values

    def _run_groups(self, values: np.ndarray, pack: Pack, groups: list["_PrefixGroup"]) -> None:
        length = len(groups[0].prefix)
        cache = self._run_rows(values, pack, [group.prefix for group in groups], use_cache=True)
        suffixes = [row[length:] for group in groups for row in group.rows]
        if any(len(suffix) for suffix in suffixes):  # else all rows are single tokens
            parents = [i for i, group in enumerate(groups) for _ in group.rows]
            cache.batch_select_indices(torch.tensor(parents, device=self._index_device))
            self._run_rows(values, pack, suffixes, length, past_key_values=cache)

    def _run_rows(
        self,
        values: np.ndarray,
        pack: Pack,
        rows: Sequence[np.ndarray],
        num_cached: int = 0,
        **inputs: Any,
    ) -> Any:
        """Run rows of nodes, each after `num_cached` tokens; fill in `values`, return the cache."""
        width = max(len(row) for row in rows)
        logit_rows, keep = _kept_logits(pack, rows)
        inside = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
        before = torch.ones(len(rows), num_cached, dtype=torch.long)
        logits, cache = self.logits(
            keep,
            input_ids=padded([pack.tokens[row] for row in rows], width),
            attention_mask=torch.cat([before, inside.long()], dim=1),
            **inputs,
        )
        logit_row = np.array([logit_rows.get(int(node), -1) for node in pack.wanted_nodes])
        known = np.flatnonzero(logit_row >= 0)
        values[known] = log_probabilities(logits, logit_row[known], pack.wanted_tokens[known])
        return cache

    def _group_batches(self, groups: list["_PrefixGroup"]) -> Iterator[list["_PrefixGroup"]]:
        batch: list[_PrefixGroup] = []
        for group in groups:
            rows = sum(len(g.rows) for g in [*batch, group])
            longest = max(len(row) for g in [*batch, group] for row in g.rows)
            if batch and rows * longest > self.batch_tokens:
                yield batch
                batch = []
            batch.append(group)
        if batch:
            yield batch

    def _batches(
        self, order: Sequence[int], lengths: Sequence[int], wanted: Sequence[int]
    ) -> Iterator[list[int]]:
        """Yield runs of `order` (longest first) within the bounds on tokens and on logits."""
        batch: list[int] = []
        num_logits = 0
        for index in order:
            tokens = (len(batch) + 1) * lengths[batch[0] if batch else index]
            num_logits += wanted[index] * self.vocabulary
            if batch and (tokens > self.batch_tokens or num_logits > LARGEST_LOGITS):
                yield batch
                batch, num_logits = [], wanted[index] * self.vocabulary
            batch.append(index)
        if batch:
            yield batch

    def logits(
        self,
        keep: torch.Tensor,
        use_cache: bool = False,
        in_float32: bool = True,
        **inputs: Any,
    ) -> tuple[torch.Tensor, Any]:
        """Return the logits (N, vocabulary) at the N positions in `keep`, and the cache.

        `in_float32` False leaves the LM head of a 16-bit model as it is.
        """
        arguments = {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }
        keep = keep.to(self._index_device)
        if "use_cache" in self.accepts:
            arguments["use_cache"] = use_cache
        if self._slices:
            arguments["logits_to_keep"] = keep
        with float32_head(self.model) if self._slices and in_float32 else nullcontext():
            output = self.model(**arguments)
        logits = output.logits if self._slices else output.logits[keep]
        return logits, getattr(output, "past_key_values", None)


def _spans_devices(model: Any) -> bool:
    """Return whether a model's layers run on several devices, and let its masks stay on the CPU."""
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(places - {"cpu", "disk"}) < 2:
        return False
    hook = getattr(model, "_hf_hook", None)
    for part in getattr(hook, "hooks", [hook]):
        skipped = getattr(part, "skip_keys", None) or []
        if part is not None:
            names = [skipped] if isinstance(skipped, str) else skipped
            part.skip_keys = [*names, "logits_to_keep"]
    return True


@contextmanager
def reported_forwards(
    model: Any, expected: float, report: Callable[[float], None] | None
) -> Iterator[None]:
    """Call `report` after each layer with the share of the `expected` forwards that have run.

    On a CPU, one forward of a large model takes a minute.
    """
    if report is None:
        yield
        return
    stacks = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    layers = next((list(stack) for stack in stacks if len(stack)), [model])
    num_run = 0

    def count(*_: Any) -> None:
        nonlocal num_run
        num_run += 1
        report(num_run / len(layers) / max(expected, 1.0))

    handles = [layer.register_forward_hook(count) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def float32_head(model: Any) -> Iterator[None]:
    """Compute the LM head of a 16-bit model in float32 in the block.

    bfloat16 logits of 16 and more are 0.125 apart, which would be most of the error of a
    log-probability. Heads that are no plain linear layer stay as they are.
    """
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.weight.dtype.itemsize != 2:
        yield
        return

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        weight, hidden = head.weight, hidden.float()
        most = _NUMBERS_CONVERTED["cpu" if hidden.device.type == "cpu" else "gpu"]
        num_rows = max(1, most // weight.shape[1])
        logits = hidden.new_empty(*hidden.shape[:-1], len(weight))
        for piece, part in zip(weight.split(num_rows), logits.split(num_rows, -1), strict=True):
            part.copy_(torch.nn.functional.linear(hidden, piece.float()))
        return logits if head.bias is None else logits.add_(head.bias.float())

    # A hook of accelerate brings offloaded weights, and calls the forward that it has replaced.
    name = "_old_forward" if hasattr(head, "_hf_hook") else "forward"
    before = vars(head).get(name)
    setattr(head, name, forward)
    try:
        yield
    finally:
        if before is None:
            delattr(head, name)
        else:
            setattr(head, name, before)


@dataclass(frozen=True, slots=True)
class _PrefixGroup:
    """Rows (as nodes of a pack) that share `prefix`."""

    prefix: np.ndarray
    rows: list[np.ndarray]


def _prefix_groups(pack: Pack) -> list[_PrefixGroup]:
    """Group rows whose shared prefix is at least half as long as the longest of them."""
    groups: list[_PrefixGroup] = []
    rows: list[np.ndarray] = []
    common = 0
    for path in paths(pack):
        if rows:
            shared = shared_length(rows[0][:common], path)
            longest = max(len(path), *(len(row) for row in rows))
            # A prefix leaves at least one token to every row: a forward needs one.
            shared = min(shared, len(path) - 1, *(len(row) - 1 for row in rows))
            if 2 * shared >= longest:
                rows.append(path)
                common = shared
                continue
            groups.append(_PrefixGroup(rows[0][:common], rows))
        rows, common = [path], max(1, len(path) - 1)
    if rows:
        groups.append(_PrefixGroup(rows[0][:common], rows))
    return groups


def paths(pack: Pack) -> list[np.ndarray]:
    """Return the nodes from the root to each leaf, in preorder of the leaves."""
    rows: list[np.ndarray] = []
    path = np.empty(0, dtype=np.int64)
    nodes = np.arange(len(pack))
    for leaf in np.flatnonzero(pack.ends == nodes):
        # The nodes that are new since the last leaf are neighbours in preorder.
        first = 0 if not rows else int(rows[-1][-1]) + 1
        path = np.concatenate([path[: pack.depths[first]], nodes[first : leaf + 1]])
        rows.append(path)
    return rows


def _kept_logits(pack: Pack, rows: Sequence[np.ndarray]) -> tuple[dict[int, int], torch.Tensor]:
    """Return the logits row of each wanted node, and the mask of positions whose logits to keep.

    The mask has the shape of the padded `rows`. A node in several rows is kept in the first.
    """
    wanted = np.zeros(len(pack), dtype=bool)
    wanted[pack.wanted_nodes] = True
    width = max(len(row) for row in rows)
    keep = torch.zeros(len(rows), width, dtype=torch.bool)
    logit_rows: dict[int, int] = {}
    for index, row in enumerate(rows):
        for position in np.flatnonzero(wanted[row]):
            node = int(row[position])
            if node not in logit_rows:
                logit_rows[node] = len(logit_rows)
                keep[index, position] = True
    return logit_rows, keep


def padded(rows: Sequence[np.ndarray], width: int) -> torch.Tensor:
    """Return rows of tokens or positions as one tensor, padded on the right with 0."""
    table = np.zeros((len(rows), width), dtype=np.int64)
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    return torch.from_numpy(table)


def log_probabilities(logits: torch.Tensor, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return log p(token) in `rows` of the logits (N, vocabulary), as float64; NaN stays NaN."""
    size = max(1, _LARGEST_SOFTMAX // logits.shape[-1])
    pieces = [piece.float().logsumexp(dim=-1) for piece in logits.split(size)]
    normaliser = torch.cat(pieces) if pieces else logits.new_empty(0)
    row = torch.from_numpy(rows.astype(np.int64)).to(logits.device)
    token = torch.from_numpy(tokens.astype(np.int64)).to(logits.device)
    values = logits[row, token].float() - normaliser[row]
    result: np.ndarray = values.cpu().numpy().astype(np.float64)
    return result


def largest_error(errors: np.ndarray, forwards: Forwards) -> float:
    """Return the largest of `errors` (rows, tokens), or in 16 bits the largest mean of a row.

    Rounding to 16 bits has heavy tails; a wrong mask or position changes most tokens of a row.
    """
    in_16_bits = forwards.dtype.itemsize == 2
    return float((errors.mean(axis=1) if in_16_bits else errors).max())
