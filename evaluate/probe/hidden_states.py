"""What a model holds at the end of an option: hidden states of every layer, batch by batch."""
# ruff: noqa: TID253  -- all torch; imported only where a model is at hand

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from selfcorrect.evaluate.prompts.tokenized import PromptTooLong, Request, Tokens, continuations
from selfcorrect.evaluate.scoring.packed import context_length
from selfcorrect.recipes.foundation.errors import InputError, RunFailure

LARGEST_FLOAT32 = 2**30  # bytes; a larger array is kept in float16

Progress = Callable[[int, int], None]  # pairs done, pairs in all

_REQUESTS_AT_ONCE = 4096  # bounds the memory of token lists


def contrasts(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Request],
    *,
    max_batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> np.ndarray:
    """Half the difference between the two options' hidden states, for every layer.

    A pair is a prompt and its two options. A hidden state is read at an option's last token, after
    the prompt and the option: so half the difference is the first option's state less the mean
    of both, and its negative is the second's. Layer 0 is the embeddings, layer l what
    block l hands on, the last one after the final norm (transformers' `output_hidden_states`).

    Shape (pairs, layers, hidden); float32, or float16 where that would take more than
    LARGEST_FLOAT32 bytes. `max_batch_tokens` bounds rows x padded length of one forward and changes
    results only by float rounding. The model is used as it stands: hand it over in eval mode.

    Raises PromptTooLong (nothing is ever truncated), InputError for an empty prompt or option,
    and RunFailure, which names the layer, where a hidden state is not finite.
    """
    rows = _tokenise(model, tokenizer, pairs)
    found: np.ndarray | None = None
    done = 0
    for batch in _batches(rows, max_batch_tokens):
        states = _last_states(model, [row for index in batch for row in rows[index]])
        half = ((states[0::2] - states[1::2]) / 2).numpy()
        if found is None:
            shape = (len(pairs), *half.shape[1:])
            large = int(np.prod(shape)) * 4 > LARGEST_FLOAT32
            found = np.empty(shape, dtype=np.float16 if large else np.float32)
        _check_finite(half, "NaN or infinite: broken weights")
        with np.errstate(over="ignore"):
            found[batch] = half
        _check_finite(found[batch], f"too large for {found.dtype}: ask for fewer items")
        done += len(batch)
        if progress is not None:
            progress(done, len(pairs))
    if found is None:
        raise ValueError("no pair of options to read")
    return found


def _tokenise(model: Any, tokenizer: Any, pairs: Sequence[Request]) -> list[tuple[Tokens, Tokens]]:
    """Both options of every pair as tokens, each with its prompt before it."""
    context = context_length(model)
    rows: list[tuple[Tokens, Tokens]] = []
    for first in range(0, len(pairs), _REQUESTS_AT_ONCE):
        for one, other in continuations(tokenizer, pairs[first : first + _REQUESTS_AT_ONCE]):
            longest = max(len(one.tokens), len(other.tokens))
            if context is not None and longest > context:
                raise PromptTooLong(
                    len(rows),
                    f"prompt and option need {longest} tokens but the model's context "
                    f"holds {context}",
                )
            rows.append((one.tokens, other.tokens))
    return rows


def _batches(rows: Sequence[tuple[Tokens, Tokens]], max_batch_tokens: int) -> Iterator[list[int]]:
    """Indices of pairs by falling length; the two options of a pair share their batch."""
    lengths = [max(len(one), len(other)) for one, other in rows]
    waiting = sorted(range(len(rows)), key=lambda index: (-lengths[index], rows[index]))
    while waiting:
        size = max(1, max_batch_tokens // (2 * lengths[waiting[0]]))
        yield waiting[:size]
        waiting = waiting[size:]


@torch.no_grad()
def _last_states(model: Any, rows: Sequence[Tokens]) -> torch.Tensor:
    """Float32 hidden states at each row's last token, on the CPU: (rows, layers, hidden)."""
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    # Padding stands on the right, where a causal model never looks, whatever the tokenizer's side.
    padded = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = (torch.arange(width) < lengths[:, None]).long()
    device = next(model.parameters()).device
    # The body without the head: logits over a whole vocabulary would outweigh all layers.
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    body = whole.base_model
    options: dict[str, Any] = {"output_hidden_states": True}
    if "use_cache" in inspect.signature(body.forward).parameters:
        options["use_cache"] = False
    states = body(
        input_ids=padded.to(device), attention_mask=mask.to(device), **options
    ).hidden_states
    if states is None:
        raise InputError(f"{type(whole).__name__}: this architecture hands out no hidden states")
    last = (lengths - 1).to(device)
    everyone = torch.arange(len(rows), device=device)
    return torch.stack([layer[everyone, last].float().cpu() for layer in states], dim=1)


def _check_finite(half: np.ndarray, reason: str) -> None:
    """Stop at the lowest layer that is not finite: those above have it from there."""
    broken = ~np.isfinite(half).all(axis=(0, 2))
    if broken.any():
        raise RunFailure(f"hidden states of layer {np.argmax(broken)} are {reason}")
