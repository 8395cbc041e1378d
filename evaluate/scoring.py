"""Exact log-probabilities of given continuations, and samples, from a causal LM in memory."""
# ruff: noqa: TID253  -- all torch; imported only where a model is at hand

import inspect
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch

from selfcorrect.evaluate.sampling import Sample, sample
from selfcorrect.recipes.errors import InputError, RunFailure

Request = tuple[str, tuple[str, ...]]  # a prompt, and the options to score after it
Tokens = tuple[int, ...]

_REQUESTS_AT_ONCE = 4096  # bounds the memory of token lists, whatever the number of items


class PromptTooLong(InputError):
    """A prompt does not fit the model's context. `index` is its place in the sequence asked for."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


@dataclass(frozen=True, slots=True)
class Continuation:
    """One option as tokens: `tokens[start:]` is scored given `tokens[:start]`."""

    tokens: Tokens
    start: int

    @property
    def row(self) -> Tokens:
        """What the model has to read: everything but the last token."""
        return self.tokens[:-1]


def continuations(tokenizer: Any, requests: Sequence[Request]) -> list[list[Continuation]]:
    """Tokenise every option of every request, with the boundary where the tokenizer allows it.

    Prompt and option are tokenised as one string, because a tokenizer may merge across the
    boundary. The given part is the longest run of tokens which all options' tokenisations and
    the prompt's own begin with; whatever follows is scored, for every option of the request.
    So with `... "` and `yes`, a merged token `"yes` is scored whole, and the other options pay
    for their own quotation mark: the options stay comparable.

    Special tokens are read from the text (`dialogue.render` writes them) and never added.
    """
    texts = [prompt + option for prompt, options in requests for option in ("", *options)]
    tokenised = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    found = []
    for prompt, options in requests:
        own, *whole = [tuple(next(tokenised)) for _ in range(1 + len(options))]
        start = _shared_length([own, *whole])
        if not all(whole):
            raise InputError(f"an option of the prompt {_opening(prompt)} is empty")
        if start == 0 or any(len(tokens) == start for tokens in whole):
            raise InputError(
                f"the prompt {_opening(prompt)} leaves nothing to condition on or nothing to "
                "score: prompt and options must each have a token of their own"
            )
        found.append([Continuation(tokens, start) for tokens in whole])
    return found


class Scorer:
    """Scores options and draws samples with one model; deterministic for given inputs.

    `max_batch_tokens` bounds rows x padded length of one forward; it changes speed and memory,
    and results only by float rounding. The model is used as it stands: hand it over in eval mode.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_batch_tokens: int = 4096) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_batch_tokens = max_batch_tokens
        self.device = next(model.parameters()).device
        self.context = context_length(model)
        architecture = type(model.get_base_model() if hasattr(model, "get_base_model") else model)
        self._accepts = set(inspect.signature(architecture.forward).parameters)
        # A boolean mask for `logits_to_keep` is only understood where transformers' own slicing
        # is used; elsewhere (remote code) all logits are computed and the wanted ones picked.
        self._slices = "logits_to_keep" in self._accepts and hasattr(
            sys.modules[architecture.__module__], "slice_logits_to_keep"
        )

    def score(self, requests: Sequence[Request]) -> list[list[float]]:
        """Natural-log probability of each option's tokens given its prompt, in the order asked.

        Raises PromptTooLong (nothing is ever truncated), InputError for an empty prompt or
        option, and RunFailure when the model answers NaN.
        """
        scores: list[list[float]] = []
        for first in range(0, len(requests), _REQUESTS_AT_ONCE):
            chunk = requests[first : first + _REQUESTS_AT_ONCE]
            asked = continuations(self.tokenizer, chunk)
            for index, options in enumerate(asked, first):
                self._check_length(index, requests[index][0], max(len(o.row) for o in options))
            scores += self._score_continuations(asked)
        return scores

    def sample(
        self,
        prompts: Sequence[str],
        keys: Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        stop: str | None = None,
    ) -> list[Sample]:
        """One sample per prompt, a function of (prompt, key, seed) alone: see sampling.py."""
        tokenised = self.check_room(prompts, max_new_tokens)
        return sample(
            self.model,
            self.tokenizer,
            tokenised,
            keys,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            stop=stop,
            max_batch_tokens=self.max_batch_tokens,
        )

    def check_room(self, prompts: Sequence[str], num_tokens: int) -> list[list[int]]:
        """The prompts' tokens; PromptTooLong when `num_tokens` more do not fit the context."""
        tokenised: list[list[int]] = self.tokenizer(list(prompts), add_special_tokens=False)[
            "input_ids"
        ]
        for index, tokens in enumerate(tokenised):
            self._check_length(index, prompts[index], len(tokens) + num_tokens)
        return tokenised

    def _check_length(self, index: int, prompt: str, length: int) -> None:
        if self.context is not None and length > self.context:
            raise PromptTooLong(
                index,
                f"the prompt {_opening(prompt)} needs {length} tokens "
                f"but the model's context holds {self.context}",
            )

    def _score_continuations(self, asked: list[list[Continuation]]) -> list[list[float]]:
        hosts = _host_rows({option.row for options in asked for option in options})
        wanted: dict[Tokens, dict[tuple[int, int], float]] = {row: {} for row in hosts.values()}
        for options in asked:
            for option in options:
                for at in range(option.start, len(option.tokens)):
                    wanted[hosts[option.row]][at - 1, option.tokens[at]] = math.nan
        for rows in self._batches(list(wanted)):
            self._fill([(row, wanted[row]) for row in rows])
        return [
            [
                math.fsum(
                    wanted[hosts[option.row]][at - 1, option.tokens[at]]
                    for at in range(option.start, len(option.tokens))
                )
                for option in options
            ]
            for options in asked
        ]

    def _batches(self, rows: list[Tokens]) -> Iterator[list[Tokens]]:
        """Rows by falling length, so that padding is small and memory peaks first."""
        rows = sorted(rows, key=lambda row: (-len(row), row))
        while rows:
            size = max(1, self.max_batch_tokens // len(rows[0]))
            yield rows[:size]
            rows = rows[size:]

    @torch.no_grad()
    def _fill(self, batch: list[tuple[Tokens, dict[tuple[int, int], float]]]) -> None:
        """One forward over the batch's rows; fills in log p(token | row up to position)."""
        width = max(len(row) for row, _ in batch)
        # Padding stands on the right, where a causal model never looks.
        padded = torch.tensor([[*row, *[0] * (width - len(row))] for row, _ in batch])
        lengths = torch.tensor([len(row) for row, _ in batch])
        keep = torch.zeros(padded.shape, dtype=torch.bool)
        for index, (_, wanted) in enumerate(batch):
            keep[index, [position for position, _ in wanted]] = True
        mask = torch.arange(width) < lengths[:, None]
        logits = self._logits(padded, mask.long(), keep)
        normaliser = torch.logsumexp(logits, dim=-1)
        place = torch.full(padded.shape, -1)
        place[keep] = torch.arange(int(keep.sum()))
        cells = [(i, key) for i, (_, wanted) in enumerate(batch) for key in wanted]
        at = place[[i for i, _ in cells], [key[0] for _, key in cells]].to(logits.device)
        tokens = torch.tensor([key[1] for _, key in cells], device=logits.device)
        values = (logits[at, tokens] - normaliser[at]).tolist()
        for (i, key), value in zip(cells, values, strict=True):
            row, wanted = batch[i]
            if math.isnan(value):
                text = _opening(self.tokenizer.decode(row))
                raise RunFailure(
                    f"the model's logits are NaN for the prompt {text}: broken weights"
                )
            wanted[key] = value

    def _logits(self, tokens: torch.Tensor, mask: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """Float32 logits (N, vocabulary) at the N marked positions, row by row."""
        inputs = {"input_ids": tokens, "attention_mask": mask}
        if "position_ids" in self._accepts:
            inputs["position_ids"] = torch.arange(tokens.shape[1]).expand_as(tokens)
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        keep = keep.to(self.device)
        options: dict[str, Any] = {"use_cache": False} if "use_cache" in self._accepts else {}
        if self._slices:
            options["logits_to_keep"] = keep
        logits = self.model(**inputs, **options).logits
        return (logits if self._slices else logits[keep]).float()


def context_length(model: Any) -> int | None:
    """How many tokens the model can read, None where its config sets no bound."""
    config = model.config.get_text_config(decoder=True)
    length = getattr(config, "max_position_embeddings", None)
    return int(length) if length else None


def _host_rows(rows: set[Tokens]) -> dict[Tokens, Tokens]:
    """For every row the row that is run for it: itself, or a longer one that begins with it.

    In lexicographic order a row that begins any other begins the very next one.
    """
    hosts: dict[Tokens, Tokens] = {}
    following: Tokens = ()
    for row in sorted(rows, reverse=True):
        hosts[row] = hosts[following] if following[: len(row)] == row else row
        following = row
    return hosts


def _shared_length(sequences: list[Tokens]) -> int:
    """Length of the longest common prefix."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*sequences)))  # noqa: B905


def _opening(text: str) -> str:
    """The first words of a prompt, on one line, for messages."""
    line = " ".join(text.split())
    return repr(line if len(line) <= 60 else line[:57] + "...")
