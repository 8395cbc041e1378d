"""Sample many prompts in the slots of one batch: a row that has ended makes room for the next.

Each slot has its row's keys and values from column 0 on, in buffers that are written in place. So
rows need no padding on the left and may be of any age. The model is given positions and a mask.
"""
# ruff: noqa: TID253  -- all torch; imported only where a model is at hand

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from selfcorrect.evaluate.scoring.draws import draw, noise_keys
from selfcorrect.evaluate.scoring.engine import Sampling
from selfcorrect.evaluate.scoring.forwards import (
    Forwards,
    largest_error,
    log_probabilities,
    padded,
)
from selfcorrect.evaluate.scoring.reordered import ReorderedLinears
from selfcorrect.evaluate.scoring.tree_attention import tree_attention_mask

_REFILL = 4  # ended rows are replaced once they are one in so many: prompts are read together
_SHORTEST = 8  # tokens of the shortest row of a trial
_TRIED = 4  # tokens at the end of each row of a trial that are compared


@dataclass(eq=False)
class Row:
    """One prompt (an index) with the tokens that the model has read and written for it."""

    index: int
    tokens: list[int]
    num_prompt: int


@dataclass
class _Columns:
    """Where the next forward writes: `slots` (N,), `columns` (N, L), and the width it reads.

    `width` 0: the forward reads its own tokens only.
    """

    slots: torch.Tensor
    columns: torch.Tensor
    width: int = 0


class _SlotLayer(DynamicLayer):
    """Keys and values (slots, heads, columns, dimensions) of one layer."""

    def __init__(self, num_slots: int, num_columns: int, target: list[_Columns]) -> None:
        super().__init__()
        self.shape = num_slots, num_columns
        self.target = target

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the states, and return those that the forward may read."""
        (target,) = self.target
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            num_slots, num_columns = self.shape
            self.keys, self.values = (
                states.new_zeros(num_slots, states.shape[1], num_columns, states.shape[3])
                for states in (key_states, value_states)
            )
        cells = target.slots[:, None], slice(None), target.columns
        self.keys[cells] = key_states.transpose(1, 2)
        self.values[cells] = value_states.transpose(1, 2)
        if not target.width:
            return key_states, value_states
        return self.keys[:, :, : target.width], self.values[:, :, : target.width]

    def get_seq_length(self) -> int:
        """Return how many columns the next forward reads besides its own tokens."""
        return max(0, self.target[0].width - 1)


class Slots:
    """A batch of rows that are sampled token by token, at most `num_slots` at a time."""

    def __init__(self, forwards: Forwards, num_slots: int, num_columns: int) -> None:
        self.forwards = forwards
        self.target: list[_Columns] = []
        layer = partial(_SlotLayer, num_slots, num_columns, self.target)
        self.cache = Cache(layer_class_to_replicate=layer)  # type: ignore[arg-type]
        self.rows: list[Row | None] = [None] * num_slots
        self.reordered = ReorderedLinears(forwards.model, num_slots)

    def read(self, prompts: Sequence[Row]) -> torch.Tensor:
        """Put prompts into free slots; return the logits after each, (prompts, vocabulary)."""
        width = max(len(row.tokens) for row in prompts)
        most = max(1, self.forwards.batch_tokens // width)
        if len(prompts) > most:
            return torch.cat([self.read(prompts[:most]), self.read(prompts[most:])])
        free = [slot for slot, row in enumerate(self.rows) if row is None]
        slots = free[: len(prompts)]
        for slot, row in zip(slots, prompts, strict=True):
            self.rows[slot] = row
        lengths = torch.tensor([len(row.tokens) for row in prompts])
        columns = torch.arange(width).repeat(len(prompts), 1)
        # A node of padding is its own subtree; the path of a row ends with the row.
        ends = torch.where(columns < lengths[:, None], lengths[:, None] - 1, columns)
        return self._forward(
            _Columns(torch.tensor(slots), columns),
            columns == lengths[:, None] - 1,
            padded([np.array(row.tokens) for row in prompts], width),
            tree_attention_mask(ends.to(self.forwards.device), self.forwards.dtype),
        )

    def step(self) -> torch.Tensor:
        """Read the newest token of every slot; return the logits after each (slots, vocabulary).

        A row that has ended is read once more, and an empty slot reads token 0.
        """
        tokens = [row.tokens[-1] if row else 0 for row in self.rows]
        last = torch.tensor([len(row.tokens) - 1 if row else 0 for row in self.rows])[:, None]
        width = int(last.max()) + 1
        mask = torch.zeros(len(self.rows), 1, 1, width, dtype=self.forwards.dtype)
        beyond = torch.arange(width) > last
        mask[:, 0, 0].masked_fill_(beyond, torch.finfo(mask.dtype).min)
        with self.reordered:
            return self._forward(
                _Columns(torch.arange(len(self.rows)), last, width),
                torch.ones_like(last, dtype=torch.bool),
                torch.tensor(tokens)[:, None],
                mask,
            )

    @torch.no_grad()  # a generator under it would keep what it yielded last
    def _forward(
        self, target: _Columns, keep: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        device = self.forwards.device
        target.slots, target.columns = target.slots.to(device), target.columns.to(device)
        self.target[:] = [target]
        logits, _ = self.forwards.logits(
            keep,
            use_cache=True,
            in_float32=False,  # for few rows it takes half as long again, and samples need less
            input_ids=tokens,
            position_ids=target.columns,
            attention_mask=mask,
            past_key_values=self.cache,
        )
        if not self.cache.layers or not all(layer.is_initialized for layer in self.cache.layers):
            raise ValueError("it does not fill the cache that it is given")
        return logits

    def take(self, rows: Sequence[Row]) -> DynamicCache:
        """Return a cache of these rows, from column 0, and free their slots."""
        slots = [self.rows.index(row) for row in rows]
        width = max(len(row.tokens) for row in rows) - 1
        # All slots, as after the last prompts: a view is enough, read before the next step.
        index = slice(None) if slots == list(range(len(self.rows))) else slots
        cache = DynamicCache()
        for layer in self.cache.layers:
            taken = DynamicLayer()
            taken.lazy_initialization(layer.keys, layer.values)  # DynamicCache(...) would copy
            taken.keys = layer.keys[index, :, :width]
            taken.values = layer.values[index, :, :width]
            cache.layers.append(taken)
        for slot in slots:
            self.rows[slot] = None
        return cache

    def shrink(self) -> None:
        """Remove the free slots."""
        kept = [slot for slot, row in enumerate(self.rows) if row is not None]
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[slot] for slot in kept]
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[kept], layer.values[kept]


def error_of_slots(
    forwards: Forwards, row: Sequence[int], num_slots: int, num_columns: int
) -> float:
    """Return how far log-probabilities of rows in slots are off those of rows alone.

    A row of `num_columns` tokens, one of half as many, and short ones in the other slots are read
    up to their last tokens, which are then given one by one, as if the model had written them.
    """
    longest = np.resize(row, num_columns)
    lengths = [num_columns, max(_SHORTEST, num_columns // 2), *[_SHORTEST] * num_slots][:num_slots]
    rows = [np.roll(longest, i)[:length].tolist() for i, length in enumerate(lengths)]
    expected = {}
    forwards.reset()
    for i in reversed(range(min(3, num_slots))):  # rotary embeddings may grow with the longest
        first = len(rows[i]) - _TRIED
        logits = forwards.row_logits(rows[i][:-1], np.arange(first - 1, len(rows[i]) - 1))
        expected[i] = log_probabilities(logits, np.arange(_TRIED), np.array(rows[i][first:]))
    forwards.reset()
    slots = Slots(forwards, num_slots, num_columns)
    given = [Row(i, tokens[:-_TRIED], len(tokens)) for i, tokens in enumerate(rows)]
    logits = torch.cat([slots.read(part) for part in (given[:1], given[1:2], given[2:]) if part])
    errors = np.zeros((len(expected), _TRIED))
    for step in range(_TRIED):
        if step:
            logits = slots.step()
        written = np.array([tokens[step - _TRIED] for tokens in rows])
        values = log_probabilities(logits, np.arange(num_slots), written)
        for i in expected:
            errors[i, step] = abs(values[i] - expected[i][step])
        for slot, token in zip(given, written.tolist(), strict=True):
            slot.tokens.append(token)
    return largest_error(errors, forwards)


def sample_in_slots(
    slots: Slots,
    prompts: Sequence[Row],
    keys: Sequence[str],
    sampling: Sampling,
    has_ended: Callable[[Row], bool],
) -> Iterator[tuple[list[Row], Any]]:
    """Yield rows that have ended, with a cache of all their tokens but the last, until all have.

    `prompts` are taken in their order.
    """
    waiting = list(prompts)
    noise = noise_keys(keys, sampling.seed).to(slots.forwards.device)
    ended: list[Row] = []

    def write(rows: list[Row | None], logits: torch.Tensor) -> None:
        """Draw a token for each row that has not ended."""
        here = [i for i, row in enumerate(rows) if row is not None and row not in ended]
        active = [row for row in rows if row is not None and row not in ended]
        if len(here) < len(rows):
            logits = logits[here]
        indices = [row.index for row in active]
        steps = torch.tensor([len(row.tokens) - row.num_prompt for row in active])
        chosen = draw(logits, noise[indices], steps.to(logits.device), sampling.temperature)
        for row, token in zip(active, chosen.tolist(), strict=True):
            row.tokens.append(token)
            is_full = len(row.tokens) - row.num_prompt == sampling.max_new_tokens
            if is_full or has_ended(row):
                ended.append(row)

    while waiting or any(slots.rows):
        num_free = sum(row is None for row in slots.rows)
        new, waiting = waiting[:num_free], waiting[num_free:]
        if new:
            write(list(new), slots.read(new))
        slots.shrink()
        while _REFILL * len(ended) < len(slots.rows):
            write(slots.rows, slots.step())
        yield ended, slots.take(ended)
        ended = []
