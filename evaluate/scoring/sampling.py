"""Samples that depend on the prompt, its key and the seed, not on what else is in the batch."""
# ruff: noqa: TID253  -- all torch; imported only where a model is at hand

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from selfcorrect.evaluate.prompts.tokenized import stop_tokens, turn_end
from selfcorrect.evaluate.scoring.draws import draw, noise_keys
from selfcorrect.evaluate.scoring.engine import Sample, Sampling
from selfcorrect.evaluate.scoring.forwards import Forwards
from selfcorrect.evaluate.scoring.precision import device_of
from selfcorrect.evaluate.scoring.slots import Row, Slots, sample_in_slots
from selfcorrect.recipes.foundation.errors import InputError


@dataclass(frozen=True, slots=True)
class SampledBatch:
    """The samples of a batch of R prompts, and the key-value cache that sampling left behind.

    `rows` (R lists) are each prompt's tokens and those of its sample. `cache` (None if the model
    returns none) has keys and values of at least all but the last of them, row r from column
    `padding[r]` on. `log_probabilities` (R lists) are the model's, of the written
    tokens; slots give none.
    """

    samples: list[Sample]
    rows: list[list[int]]
    padding: list[int]
    cache: Any
    log_probabilities: list[list[float]]


def sample_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[str],
    sampling: Sampling,
    stop: str | None = None,
) -> SampledBatch:
    """Sample one continuation for each tokenised prompt; temperature 0 takes the likeliest token.

    Each (seed, key) has its own noise (`draws.draw`), so a sample is the same alone and in any
    batch (up to float rounding of the logits), and two checkpoints answer the same question with
    the same noise, which reduces the variance of their difference. Of the model's generation
    settings only the end tokens are used (no top-p, no penalties). A sample also ends before the
    string `stop`.

    Raises RunFailure if the model's logits are NaN.
    """
    device = device_of(model)
    ends = end_tokens(model, tokenizer) | stop_tokens(tokenizer, stop)
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
    noise = Noise(keys, sampling, device)
    with torch.no_grad(), only_settings(model, settings):
        generated = model.generate(
            input_ids=torch.tensor(tokens, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=settings,
            logits_processor=[noise],
            stopping_criteria=[StopText(tokenizer, stop, width)] if stop else [],
            synced_gpus=False,  # each rank samples its own texts
        )
    written = [row[width:] for row in generated.sequences.tolist()]
    samples = [_cut(tokenizer, row, ends, stop) for row in written]
    return SampledBatch(
        samples,
        [
            [*prompt, *row[: sample.num_tokens]]
            for prompt, row, sample in zip(prompts, written, samples, strict=True)
        ],
        padding,
        getattr(generated, "past_key_values", None),
        noise.log_probabilities,
    )


def sample_slots(
    forwards: Forwards,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[str],
    sampling: Sampling,
    stop: str | None = None,
    *,
    num_slots: int,
) -> Iterator[tuple[list[int], SampledBatch]]:
    """Yield (prompt indices, their samples) as rows end and others take their slots.

    The samples are those of `sample_batch`, without log-probabilities, of a model that takes
    positions and a mask (`slots.error_of_slots`). Prompts are taken in their order.
    """
    ends = end_tokens(forwards.model, tokenizer) | stop_tokens(tokenizer, stop)
    text = StopText(tokenizer, stop, 0) if stop else None

    def has_ended(row: Row) -> bool:
        return row.tokens[-1] in ends or (
            text is not None and text.is_in(row.tokens[row.num_prompt :])
        )

    rows = [Row(index, list(prompt), len(prompt)) for index, prompt in enumerate(prompts)]
    num_columns = max(map(len, prompts)) + sampling.max_new_tokens
    slots = Slots(forwards, min(num_slots, len(rows)), num_columns)
    for ended, cache in sample_in_slots(slots, rows, keys, sampling, has_ended):
        samples = [_cut(tokenizer, row.tokens[row.num_prompt :], ends, stop) for row in ended]
        tokens = [
            row.tokens[: row.num_prompt + sample.num_tokens]
            for row, sample in zip(ended, samples, strict=True)
        ]
        batch = SampledBatch(samples, tokens, [0] * len(ended), cache, [])
        del cache
        yield [row.index for row in ended], batch
        del batch  # frees its cache


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
    ends = end_tokens(forwards.model, tokenizer) | stop_tokens(tokenizer, stop)
    noise = Noise([key], sampling, forwards.device)
    row = list(prompt)
    text = StopText(tokenizer, stop, len(row)) if stop else None
    forwards.reset()
    while len(row) < len(prompt) + sampling.max_new_tokens:
        logits = forwards.row_logits(row, np.array([len(row) - 1]))
        row.append(int(noise.choose(logits)))
        if row[-1] in ends or (text is not None and text.is_in(row[len(prompt) :])):
            break
    sample = _cut(tokenizer, row[len(prompt) :], ends, stop)
    row = row[: len(prompt) + sample.num_tokens]
    return SampledBatch([sample], [row], [0], None, noise.log_probabilities)


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Return the ids that end a turn: of generation settings, tokenizer and chat template."""
    declared = getattr(model.generation_config, "eos_token_id", None)
    ends = set(declared if isinstance(declared, list) else [declared])
    with suppress(InputError):  # a template that refuses the shortest dialogue
        ends.update(turn_end(tokenizer).ids[-1:])
    return {int(end) for end in ends | {tokenizer.eos_token_id} if end is not None}


class Noise(LogitsProcessor):
    """Turn the greedy choice into sampling, for rows that have all written equally many tokens.

    `log_probabilities` collects those of each row's choices.
    """

    def __init__(self, keys: Sequence[str], sampling: Sampling, device: torch.device) -> None:
        self.keys = noise_keys(keys, sampling.seed).to(device)
        self.temperature = sampling.temperature
        self.log_probabilities: list[list[float]] = [[] for _ in keys]

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the token of each row; called once for every new token."""
        step = len(self.log_probabilities[0])
        choice = draw(logits, self.keys, torch.full_like(self.keys, step), self.temperature)
        values = logits.float().gather(1, choice[:, None])[:, 0] - logits.float().logsumexp(dim=1)
        for row, value in zip(self.log_probabilities, values.tolist(), strict=True):
            row.append(value)
        return choice

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores (rows, vocabulary) of which the choice is the largest."""
        chosen = torch.full_like(scores, -torch.inf)
        return chosen.scatter_(1, self.choose(scores)[:, None], 0.0)


class StopText(StoppingCriteria):
    """End a row once its generated text contains `stop`."""

    def __init__(self, tokenizer: Any, stop: str, start: int) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.start = start
        # A token is at least one byte long, so these tokens hold any stop string just completed.
        self.window = len(stop.encode()) + 4

    def is_in(self, written: list[int]) -> bool:
        """Return whether the newest of the written tokens complete the string."""
        return self.stop in _text(self.tokenizer, written[-self.window :])

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Return whether each row has ended, shape (rows,)."""
        ended = [self.is_in(row) for row in input_ids[:, self.start :].tolist()]
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
    prompts: Sequence[Sequence[int]],
    order: Sequence[int],
    max_new_tokens: int,
    max_batch_tokens: int,
) -> Iterator[list[int]]:
    """Yield prompt indices in `order` (longest first) within a bound on rows x final length."""
    while order:
        size = max(1, max_batch_tokens // (len(prompts[order[0]]) + max_new_tokens))
        yield list(order[:size])
        order = order[size:]


def _cut(tokenizer: Any, row: list[int], ends: set[int], stop: str | None) -> Sample:
    """Return the sample in a generated row, which ends at the first end token or stop string."""
    count = next((i for i, token in enumerate(row) if token in ends), None)
    kept = row if count is None else row[:count]
    if count is not None and row[count] in stop_tokens(tokenizer, stop):
        return Sample(_text(tokenizer, kept), False, count + 1, stopped=True)
    text = _text(tokenizer, kept)
    if stop and stop in text:
        lengths = range(len(kept) + 1)
        used = bisect_left(lengths, True, key=lambda n: stop in _text(tokenizer, kept[:n]))
        return Sample(text.split(stop)[0], False, used, stopped=True)
    return Sample(text, count is None, len(kept) + (count is not None))


def _text(tokenizer: Any, tokens: list[int]) -> str:
    text: str = tokenizer.decode(
        tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text
