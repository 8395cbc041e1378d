"""Read hidden states of every layer at the end of each option, batch by batch."""
# ruff: noqa: TID253 - all of this file is torch; it is itself imported only where needed.

import inspect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from selfcorrect.evaluate.prompts.tokenized import PromptTooLong, Request, Tokens, continuations
from selfcorrect.evaluate.scoring.packed import context_length
from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from selfcorrect.recipes.foundation.progress import Progress, no_progress

LARGEST_FLOAT32 = 2**30  # bytes; a larger array is stored in float16

_REQUESTS_AT_ONCE = 4096  # bounds the memory of token lists


def contrasts(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Request],
    *,
    max_batch_tokens: int = 4096,
    progress: Progress = no_progress,
) -> np.ndarray:
    """Return half the difference between the hidden states of a pair's two options, by layer.

    A pair is a prompt and its two options. A hidden state is read at an option's last token, with
    the prompt before it. So half the difference is the first option's state minus the mean of
    both, and its negative belongs to the second option. Layer 0 is the embeddings, layer l the
    output of block l, the last after the final norm (transformers' `output_hidden_states`).

    The shape is (pairs, layers, hidden), in float32, or in float16 if float32 would take more than
    LARGEST_FLOAT32 bytes. `max_batch_tokens` bounds rows x length of a forward pass and changes
    results only by float rounding: the rows of a pass have one length, as some models read a row
    differently beside a longer one. The model must be in eval mode.

    Raises PromptTooLong (nothing is truncated), InputError for an empty prompt or option, and
    RunFailure naming the layer if a hidden state is not finite.
    """
    rows = _tokenise(model, tokenizer, pairs)
    result: np.ndarray | None = None
    done = 0
    for batch in _batches(rows, max_batch_tokens):
        first, second = zip(*(rows[index] for index in batch), strict=True)
        half = ((_last_states(model, first) - _last_states(model, second)) / 2).numpy()
        if result is None:
            shape = (len(pairs), *half.shape[1:])
            large = int(np.prod(shape)) * 4 > LARGEST_FLOAT32
            result = np.empty(shape, dtype=np.float16 if large else np.float32)
        _check_finite(half, "NaN or infinite: the weights are broken")
        with np.errstate(over="ignore"):
            result[batch] = half
        _check_finite(result[batch], f"too large for {result.dtype}: use fewer items")
        done += len(batch)
        progress("hidden states", done, len(pairs))
    if result is None:
        raise ValueError("no pairs to read")
    return result


def _tokenise(model: Any, tokenizer: Any, pairs: Sequence[Request]) -> list[tuple[Tokens, Tokens]]:
    """Return both options of every pair as tokens, each with its prompt before it."""
    context = context_length(model)
    rows: list[tuple[Tokens, Tokens]] = []
    for start in range(0, len(pairs), _REQUESTS_AT_ONCE):
        for first, second in continuations(tokenizer, pairs[start : start + _REQUESTS_AT_ONCE]):
            longest = max(len(first.tokens), len(second.tokens))
            if context is not None and longest > context:
                raise PromptTooLong(
                    len(rows),
                    f"prompt and option need {longest} tokens, but the model's context "
                    f"holds {context}",
                )
            rows.append((first.tokens, second.tokens))
    return rows


def _batches(rows: Sequence[tuple[Tokens, Tokens]], max_batch_tokens: int) -> Iterator[list[int]]:
    """Yield indices of pairs: in each batch, first and second options have one length each."""

    def lengths(index: int) -> tuple[int, int]:
        first, second = rows[index]
        return len(first), len(second)

    order = sorted(range(len(rows)), key=lambda index: (lengths(index), rows[index]))
    for longest_row, group in itertools.groupby(order, key=lengths):
        alike = list(group)
        size = max(1, max_batch_tokens // max(longest_row))
        for start in range(0, len(alike), size):
            yield alike[start : start + size]


@torch.no_grad()
def _last_states(model: Any, rows: Sequence[Tokens]) -> torch.Tensor:
    """Return float32 hidden states at the rows' last tokens, on the CPU: (rows, layers, hidden).

    All rows have one length.
    """
    ids = torch.tensor(rows, device=next(model.parameters()).device)
    # Run the body without the head: logits over the vocabulary would outweigh all layers.
    full_model = model.get_base_model() if hasattr(model, "get_base_model") else model
    body = full_model.base_model
    options: dict[str, Any] = {"output_hidden_states": True}
    if "use_cache" in inspect.signature(body.forward).parameters:
        options["use_cache"] = False
    body(input_ids=ids[:1, :1], **options)  # dynamic rotary embeddings remember longer rows
    states = body(input_ids=ids, attention_mask=torch.ones_like(ids), **options).hidden_states
    if states is None:
        name = type(full_model).__name__
        raise InputError(f"{name}: this architecture returns no hidden states; use another model")
    return torch.stack([layer[:, -1].float().cpu() for layer in states], dim=1)


def _check_finite(half: np.ndarray, reason: str) -> None:
    """Raise RunFailure naming the lowest layer that is not finite; it spreads to all above."""
    broken = ~np.isfinite(half).all(axis=(0, 2))
    if broken.any():
        raise RunFailure(f"hidden states of layer {np.argmax(broken)} are {reason}")
