"""Samples that depend on the prompt, its key and the seed, not on what else is in the batch."""
# ruff: noqa: TID253  -- all torch; imported only where a model is at hand

import hashlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from selfcorrect.evaluate.prompts.tokenized import turn_end
from selfcorrect.evaluate.scoring.engine import Sample, Sampling
from selfcorrect.evaluate.scoring.forwards import Forwards
from selfcorrect.recipes.foundation.errors import InputError, RunFailure


@dataclass(frozen=True, slots=True)
class SampledBatch:
    """The samples of a batch of R prompts, and the key-value cache that sampling left behind.

    `rows` (R lists of C tokens) are all tokens that the model has read or written, `padding[r]` of
    them padding on the left. `cache` (None if the model returns none) holds keys and values of the
    first columns. A sample may end before its row does. `log_probabilities` (R, steps) are the
    model's, of the written tokens.
    """

    samples: list[Sample]
    rows: list[list[int]]
    padding: list[int]
    cache: Any
    log_probabilities: np.ndarray


def sample_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[str],
    sampling: Sampling,
    stop: str | None = None,
) -> SampledBatch:
    """Sample one continuation for each tokenised prompt; temperature 0 takes the likeliest token.

    The Gumbel-max trick: the largest of logits / temperature plus Gumbel noise is a draw from the
    softmax. Each (seed, key) has its own stream of noise, so a sample is the same alone and in any
    batch (up to float rounding of the logits), and two checkpoints answer the same question with
    the same noise, which reduces the variance of their difference. Of the model's generation
    settings only the end tokens are used (no top-p, no penalties). A sample also ends before the
    string `stop`.

    Raises RunFailure if the model's logits are NaN.
    """
    device = next(model.parameters()).device
    ends = end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
        use_cache=True,
        return_dict_in_generate=True,
    )
    width = max(len(prompt) for prompt in prompts)
    padding = [width - len(prompt) for prompt in prompts]
    tokens = [[pad] * n + list(prompt) for n, prompt in zip(padding, prompts, strict=True)]
    mask = [[0] * n + [1] * (width - n) for n in padding]
    noise = GumbelNoise(keys, sampling.seed, sampling.temperature)
    with torch.no_grad(), only_settings(model, settings):
        generated = model.generate(
            input_ids=torch.tensor(tokens, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=settings,
            logits_processor=[noise],
            stopping_criteria=[StopText(tokenizer, stop, width)] if stop else [],
            synced_gpus=False,  # each rank samples its own texts
        )
    rows = generated.sequences.tolist()
    return SampledBatch(
        [_cut(tokenizer, row[width:], ends, stop) for row in rows],
        rows,
        padding,
        getattr(generated, "past_key_values", None),
        torch.stack(noise.drawn, dim=1).cpu().numpy().astype(np.float64),
    )


def sample_alone(
    forwards: Forwards,
    tokenizer: Any,
    prompt: Sequence[int],
    key: str,
    sampling: Sampling,
    stop: str | None = None,
) -> SampledBatch:
    """Sample one continuation by a whole forward for each token, as `Forwards.alone` reads rows.

    For models whose cache or batches give other log-probabilities. The noise is `sample_batch`'s.
    """
    ends = end_tokens(forwards.model, tokenizer)
    noise = GumbelNoise([key], sampling.seed, sampling.temperature)
    row = list(prompt)
    stops = StopText(tokenizer, stop, len(row)) if stop else None
    forwards.reset()
    while len(row) < len(prompt) + sampling.max_new_tokens:
        logits = forwards.row_logits(row, np.array([len(row) - 1]))
        row.append(int(noise(None, logits.float()).argmax()))
        if row[-1] in ends or (stops is not None and stops(torch.tensor([row]), None)):
            break
    drawn = torch.stack(noise.drawn, dim=1).cpu().numpy().astype(np.float64)
    return SampledBatch([_cut(tokenizer, row[len(prompt) :], ends, stop)], [row], [0], None, drawn)


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Return the ids that end a turn: of generation settings, tokenizer and chat template."""
    declared = getattr(model.generation_config, "eos_token_id", None)
    ends = set(declared if isinstance(declared, list) else [declared])
    with suppress(InputError):  # a template that refuses the shortest dialogue
        ends.update(turn_end(tokenizer).ids[-1:])
    return {int(end) for end in ends | {tokenizer.eos_token_id} if end is not None}


class GumbelNoise(LogitsProcessor):
    """Turn the greedy choice into sampling, with one noise stream per row.

    `drawn` collects the log-probability of each row's choice, a tensor (rows,) for every step.
    """

    def __init__(self, keys: Sequence[str], seed: int, temperature: float) -> None:
        self.drawn: list[torch.Tensor] = []
        self.temperature = temperature
        self.streams = [np.random.Generator(np.random.Philox(_digest(seed, key))) for key in keys]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return noisy scores (rows, vocabulary); called once for every new token."""
        if torch.isnan(scores).any():
            raise RunFailure("the model's logits are NaN while sampling: broken weights")
        noisy = scores
        if self.temperature > 0:
            uniform = np.stack([stream.random(scores.shape[-1]) for stream in self.streams])
            noise = -torch.log(-torch.log(torch.from_numpy(uniform)))
            noisy = scores.float() / self.temperature + noise.to(scores.device, torch.float32)
        choice = noisy.argmax(dim=-1, keepdim=True)
        logits = scores.float()
        self.drawn.append(logits.gather(-1, choice)[:, 0] - logits.logsumexp(dim=-1))
        return noisy


class StopText(StoppingCriteria):
    """End a row once its generated text contains `stop`."""

    def __init__(self, tokenizer: Any, stop: str, start: int) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.start = start
        # A token is at least one byte long, so these tokens hold any stop string just completed.
        self.window = len(stop.encode()) + 4

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Return whether each row has ended, shape (rows,)."""
        newest = input_ids[:, max(self.start, input_ids.shape[1] - self.window) :]
        ended = [self.stop in _text(self.tokenizer, row) for row in newest.tolist()]
        return torch.tensor(ended, device=input_ids.device)


@contextmanager
def only_settings(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Replace the model's generation settings, from which `generate` would fill missing values."""
    owner = model.get_base_model() if hasattr(model, "get_base_model") else model
    original = owner.generation_config
    try:
        owner.generation_config = settings
        yield
    finally:
        owner.generation_config = original


def batches(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, max_batch_tokens: int
) -> Iterator[list[int]]:
    """Yield prompt indices, longest first, within a bound on rows x final length."""
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    while order:
        size = max(1, max_batch_tokens // (len(prompts[order[0]]) + max_new_tokens))
        yield order[:size]
        order = order[size:]


def _cut(tokenizer: Any, row: list[int], ends: set[int], stop: str | None) -> Sample:
    """Return the sample in a generated row, which ends at the first end token or stop string."""
    count = next((i for i, token in enumerate(row) if token in ends), None)
    kept = row if count is None else row[:count]
    text = _text(tokenizer, kept)
    if stop and stop in text:
        lengths = range(len(kept) + 1)
        used = bisect_left(lengths, True, key=lambda n: stop in _text(tokenizer, kept[:n]))
        return Sample(text.split(stop)[0], False, used)
    return Sample(text, count is None, len(kept) + (count is not None))


def _text(tokenizer: Any, tokens: list[int]) -> str:
    text: str = tokenizer.decode(
        tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text


def _digest(seed: int, key: str) -> int:
    """Return a 128-bit number from seed and key."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{key}".encode()).digest()[:16])
