"""Scores after the model's own text, with the cache of keys and values that writing it left behind.

The final question follows a prompt and a text that the model has in its cache already. Of each row
only what the cache does not hold is run: a trie of the options, after the longest prefix that final
prompt and cache agree on. They may part early: the text is cut at its end and tokenised again as
part of a string, and a chat template may close the turn. Nothing is cropped: columns that are
padding or stale are masked, so rows keep their own lengths in one forward.
"""
# ruff: noqa: TID253  -- all torch; imported only where a model is at hand

from collections.abc import Sequence

import numpy as np
import torch

from selfcorrect.evaluate.prompts.tokenized import Continuation
from selfcorrect.evaluate.scoring.forwards import (
    LARGEST_LOGITS,
    Forwards,
    ancestors,
    log_probabilities,
    padded,
)
from selfcorrect.evaluate.scoring.sampling import Drawn
from selfcorrect.evaluate.scoring.token_trie import Pack, trie


@torch.no_grad()
def score_after(
    forwards: Forwards, drawn: Drawn, asked: Sequence[Sequence[Continuation]], window: int | None
) -> list[tuple[Pack, np.ndarray]] | None:
    """Each row's trie and its wanted values; uses up `drawn.cache`.

    None where this batch is too much: what comes behind the cache would reach beyond `window`
    columns, or the logits would be too many. Raises ValueError where there is no cache to go on
    with, or one that does not hold every column.
    """
    columns = len(drawn.rows[0]) - 1  # the last token that was drawn was never read
    cache = drawn.cache
    if not hasattr(cache, "get_seq_length") or cache.get_seq_length() != columns:
        raise ValueError("it hands out no cache of all that it has read")
    tries = [trie(options) for options in asked]
    reused = [
        _reused(row[padding:columns], options)
        for row, padding, options in zip(drawn.rows, drawn.padding, asked, strict=True)
    ]
    width = max(len(one) - held for one, held in zip(tries, reused, strict=True))
    wanted = [np.unique(one.wanted_nodes) for one in tries]
    if sum(map(len, wanted)) * forwards.vocabulary > LARGEST_LOGITS:
        return None
    if window is not None and columns + width > window:
        return None
    # What is held is one path, the first nodes of the trie; a subtree behind it keeps its interval.
    ends = torch.arange(width).repeat(len(tries), 1)
    keep = torch.zeros(len(tries), width, dtype=torch.bool)
    for row, (one, held) in enumerate(zip(tries, reused, strict=True)):
        ends[row, : len(one) - held] = torch.from_numpy(one.ends[held:] - held)
        keep[row, wanted[row] - held] = True
    first = torch.tensor(drawn.padding)
    last = first + torch.tensor(reused)
    column = torch.arange(columns)
    seen = (column >= first[:, None]) & (column < last[:, None])
    logits, _ = forwards.logits(
        keep,
        input_ids=padded([one.tokens[n:] for one, n in zip(tries, reused, strict=True)], width, 0),
        position_ids=padded(
            [one.depths[n:] for one, n in zip(tries, reused, strict=True)], width, 0
        ),
        attention_mask=ancestors(ends.to(forwards.device), forwards.dtype, seen),
        past_key_values=cache,
    )
    starts = np.cumsum([0, *map(len, wanted)])
    found = []
    for one, start, nodes in zip(tries, starts, wanted, strict=False):
        at = start + np.searchsorted(nodes, one.wanted_nodes)
        found.append((one, log_probabilities(logits, at, one.wanted_tokens)))
    return found


def _reused(held: Sequence[int], options: Sequence[Continuation]) -> int:
    """How many tokens of the final prompt need not be run: those in the cache, in their places.

    The token before the first that is scored is always run: its logits are wanted.
    """
    first = options[0]
    limit = min(len(held), first.start - 1)
    return next((i for i in range(limit) if held[i] != first.tokens[i]), limit)
