"""Draw tokens at random with noise that is a function of (seed, key, step, token) alone.

A draw from p is a race: word i arrives after E_i / p_i, where the E_i are independent exponential
variables, and the first to arrive is drawn (the Gumbel-max trick, with E = exp(-noise)). To make
E_i for all words would take longer than the model's own step. So the earliest E are made first, as
the first `_POINTS` points of a Poisson process in which every word has points at rate 1. A word
without a point among them has E_i = t + Exp(1), where t is the time of the last one, since
exponential variables have no memory. Only words that are likely enough to win after t need such a
number: a few, which one look at the logits finds. Nothing is approximate.
"""
# ruff: noqa: TID253  -- all torch; imported only where a model is at hand

import hashlib
from collections.abc import Sequence

import torch

from selfcorrect.recipes.foundation.errors import RunFailure

_POINTS = 64
_LONGEST = 17.0  # no number of `_exponential` is as large
_GOLDEN, _FIRST, _SECOND = (  # SplitMix64's constants as signed numbers
    number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def noise_keys(keys: Sequence[str], seed: int) -> torch.Tensor:
    """Return the 64 bits (as int64, shape (keys,)) that name the noise of each key."""
    digests = [hashlib.sha256(f"{seed}|{key}".encode()).digest() for key in keys]
    return torch.tensor([int.from_bytes(digest[:8], signed=True) for digest in digests])


def draw(
    logits: torch.Tensor, keys: torch.Tensor, steps: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return a token for each row of `logits` (R, V): a draw from softmax(logits / temperature).

    `keys` (R,) are `noise_keys`; `steps` (R,) counts the tokens that a row has drawn before. Place
    in the batch and device make no difference but rounding. Temperature 0 takes the likeliest.

    Raises RunFailure for logits that are NaN.
    """
    top = logits.amax(dim=-1).float()
    if not torch.isfinite(top).all():
        raise RunFailure("the model's logits are NaN while sampling: broken weights")
    if temperature == 0:
        return logits.argmax(dim=-1)
    streams = keys + steps * 2**32 * _GOLDEN  # words and points are counters below 2**32
    words, times = _points(streams, logits.shape[-1])
    known = words < logits.shape[-1]
    scores = logits.gather(1, words.where(known, 0)).float() / temperature - times.log()
    best, index = scores.where(known, -torch.inf).max(dim=1)
    choice = words.gather(1, index[:, None])[:, 0]
    # A word without a point arrives after `last`. It must beat the words with points, and the
    # likeliest word, which arrives before `last + _LONGEST`.
    last = times[:, -1]
    to_beat = torch.maximum(best, top / temperature - (last + _LONGEST).log())
    limit = temperature * (to_beat + last.log())
    limit -= limit.abs() * torch.finfo(logits.dtype).eps  # the next line rounds it
    rows, late = (logits >= limit.to(logits.dtype)[:, None]).nonzero(as_tuple=True)
    arrivals = last[rows] + _exponential(_hash(streams[rows], late))
    late_scores = logits[rows, late].float() / temperature - arrivals.log()
    best = best.scatter_reduce(0, rows, late_scores, "amax")
    wins = late_scores == best[rows]
    choice[rows[wins]] = late[wins]
    return choice


def _points(streams: torch.Tensor, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return words and times (R, _POINTS) of each row's earliest points, in their order.

    Words are drawn from the next power of two, so that a padded vocabulary has the same points.
    """
    bits = max(1, (vocabulary - 1).bit_length())
    counters = torch.arange(_POINTS, device=streams.device) + 2**31  # beyond those of words
    numbers = _hash(streams[:, None], counters)
    return numbers & (2**bits - 1), _exponential(numbers).cumsum(dim=1) / 2**bits


def _hash(streams: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
    """Return 64 random bits for each pair, as int64: SplitMix64 (Steele et al. 2014).

    Integers wrap around and are shifted logically, so every device gives the same bits.
    """
    bits = streams + counters * _GOLDEN
    bits = (bits ^ (bits >> 30 & 2**34 - 1)) * _FIRST
    bits = (bits ^ (bits >> 27 & 2**37 - 1)) * _SECOND
    return bits ^ (bits >> 31 & 2**33 - 1)


def _exponential(bits: torch.Tensor) -> torch.Tensor:
    """Return exponential variables in float32, made of the upper 23 bits, without rounding."""
    uniform = ((bits >> 41 & 2**23 - 1).float() + 0.5) * 2**-23
    return -uniform.log()
