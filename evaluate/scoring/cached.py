"""Scores after the model's own text, continued from the key-value cache that sampling left behind.

The final question follows a prompt and a text that are in the cache already. For each row only
the tokens that the cache lacks are run: a trie of the options, after the longest prefix on which
final prompt and cache agree. They may differ early: the text is cut at its end and tokenised again
as part of a string, and a chat template may close the turn. Nothing is cropped: columns that hold
padding or stale tokens are masked, so rows keep their own lengths in one forward.
"""
# ruff: noqa: TID253  -- all torch; imported only where a model is at hand

from collections.abc import Sequence

import numpy as np
import torch

from selfcorrect.evaluate.prompts.tokenized import Continuation
from selfcorrect.evaluate.scoring.forwards import Forwards
from selfcorrect.evaluate.scoring.limits import LARGEST_LOGITS
from selfcorrect.evaluate.scoring.sampling import SampledBatch
from selfcorrect.evaluate.scoring.token_trie import Pack


@torch.no_grad()
def score_after(
    forwards: Forwards,
    sampled: SampledBatch,
    requests: Sequence[Sequence[Continuation]],
    tries: Sequence[Pack],
) -> list[tuple[Pack, np.ndarray]] | None:
    """Return each row's trie and its wanted values; `sampled.cache` is used up.

    `requests` holds the options that follow each text, `tries` the same as a trie each. Returns
    None for a batch whose logits would exceed their limit. Raises ValueError if there is no cache,
    or one that lacks columns.
    """
    cache = sampled.cache
    num_columns = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
    if num_columns < _num_columns(sampled):
        raise ValueError("it returns no cache of all the tokens that it has read")
    reused = [
        _num_reused(row[:-1], options)  # the last token was never read
        for row, options in zip(sampled.rows, requests, strict=True)
    ]
    num_wanted = sum(len(np.unique(tree.wanted_nodes)) for tree in tries)
    if num_wanted * forwards.vocabulary > LARGEST_LOGITS:
        return None
    first = torch.tensor(sampled.padding)
    last = first + torch.tensor(reused)
    column = torch.arange(num_columns)
    cached = (column >= first[:, None]) & (column < last[:, None])
    values = forwards.run_tries(tries, reused, cached, past_key_values=cache)
    return list(zip(tries, values, strict=True))


def sizes_after(
    sampled: SampledBatch, requests: Sequence[Sequence[Continuation]]
) -> tuple[int, ...]:
    """Return the sizes of a batch that can make `score_after` wrong for a model.

    They are the columns of the cache, those of them that are padding, and the longest final row.
    """
    longest = max(len(option.row) for options in requests for option in options)
    return _num_columns(sampled), max(sampled.padding), longest


def _num_columns(sampled: SampledBatch) -> int:
    """Return how many columns hold padding, prompts and texts without their last tokens."""
    return max(
        padding + len(row) - 1 for padding, row in zip(sampled.padding, sampled.rows, strict=True)
    )


def _num_reused(cached: Sequence[int], options: Sequence[Continuation]) -> int:
    """Return how many leading tokens of the final prompt are in the cache, at their positions.

    The token before the first scored one is always run: its logits are needed.
    """
    first = options[0]
    limit = min(len(cached), first.start - 1)
    return next((i for i in range(limit) if cached[i] != first.tokens[i]), limit)
