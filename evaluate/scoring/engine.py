"""The interface of all scoring backends: log-probabilities of given continuations, and samples."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from selfcorrect.evaluate.prompts.tokenized import (
    PromptTooLong,
    Request,
    opening,
    token_ids,
)
from selfcorrect.recipes.foundation.errors import RunFailure

# The version of the packed engine's random draws. Bump it when the same logits would give other
# tokens: cells with samples of another version are measured again.
DRAWS = 2

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the model's own text is drawn.

    `max_new_tokens` bounds each turn that the model writes. `temperature` divides the logits; 0
    takes the likeliest token. `draws` is the number of samples per question: a plan asks for them,
    an engine gets one prompt and one key for each.
    """

    max_new_tokens: int
    temperature: float
    seed: int
    draws: int = 1


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled text without special tokens.

    `truncated`: the model was cut off at `max_new_tokens` before it ended its text. `num_tokens`
    counts the generated tokens, the end token included. `stopped`: the string `stop` ended it.
    """

    text: str
    truncated: bool
    num_tokens: int
    stopped: bool = False


class Engine(ABC):
    """A model with the tokenizer that renders its dialogues, and its context length in tokens."""

    tokenizer: Any
    context: int | None  # None: no bound
    dtype: str | None = None  # in which weights are held; None: known to the model alone
    on_progress: Callable[[float], None] | None = None
    """An engine may call it with the share of the current call that is done."""

    @abstractmethod
    def score(self, requests: Sequence[Request]) -> list[list[float]]:
        """Return the log-probability (nats) of each option's tokens given its prompt, in order.

        Raises PromptTooLong (nothing is ever truncated), InputError for an empty prompt or
        option, and RunFailure if the model's logits are NaN.
        """

    @abstractmethod
    def sample(
        self,
        prompts: Sequence[str],
        keys: Sequence[str],
        sampling: Sampling,
        stop: str | None = None,
    ) -> list[Sample]:
        """Draw one text per prompt from (seed, key), whatever else is in the batch.

        A text ends with the model's end token, at `max_new_tokens`, or before the string `stop`.
        """

    def sample_then_score(
        self,
        prompts: Sequence[str],
        keys: Sequence[str],
        then: Callable[[int, Sample], Request],
        sampling: Sampling,
        stop: str | None = None,
    ) -> list[tuple[Sample, list[float]]]:
        """Draw the texts of `sample`, and score the request that follows each of them.

        `then` maps a prompt's index and its sample to that request. It is called once for each
        prompt, in any order. An engine may continue from its cache of prompt and sample.
        """
        samples = self.sample(prompts, keys, sampling, stop)
        scores = self.score([then(index, sample) for index, sample in enumerate(samples)])
        return list(zip(samples, scores, strict=True))

    def score_kept(self, key: str, requests: Callable[[], Sequence[Request]]) -> list[list[float]]:
        """Score the requests named `key`; an engine may keep their tokens for the next call."""
        return self.score(requests())

    def kept(self, key: str, make: Callable[[], T]) -> T:
        """Return what `make` makes for every model with this tokenizer; an engine may keep it."""
        return make()

    def recent(
        self, keys: Sequence[tuple[str, ...]], make: Callable[[list[int]], Sequence[T]]
    ) -> list[T]:
        """Return what `make` makes of the keys at some indices; an engine may keep the newest."""
        return list(make(list(range(len(keys)))))

    def items_at_once(self, tokens: float, is_sampled: bool) -> int | None:
        """Return how many items of about so many tokens a call is to measure; None: any number.

        An engine whose results depend on it by rounding returns the same number in every call.
        """
        return None

    def check_room(self, prompts: Sequence[str], num_tokens: int) -> list[list[int]]:
        """Return the prompts' tokens; PromptTooLong if the model cannot write `num_tokens` more."""
        tokenised = self.recent(
            [("tokens", prompt) for prompt in prompts],
            lambda indices: token_ids(self.tokenizer, [prompts[i] for i in indices]),
        )
        for index, tokens in enumerate(tokenised):
            self._check_length(index, len(tokens) + num_tokens, prompts[index])
        return tokenised

    def _check_length(self, index: int, length: int, prompt: str | None = None) -> None:
        if self.context is not None and length > self.context:
            subject = "the prompt" if prompt is None else f"the prompt {opening(prompt)}"
            raise PromptTooLong(
                index,
                f"{subject} needs {length} tokens but the model's context holds {self.context}",
            )

    def _by_request(
        self, requests: Sequence[Request], values: Iterable[float]
    ) -> list[list[float]]:
        """Return the options' values request by request; RunFailure for NaN."""
        remaining = iter(values)
        scores = [[next(remaining) for _ in options] for _, options in requests]
        for (prompt, _), row in zip(requests, scores, strict=True):
            if any(math.isnan(value) for value in row):
                raise RunFailure(
                    f"the model's logits are NaN for the prompt {opening(prompt)}: broken weights"
                )
        return scores


class EngineLoader(ABC):
    """Load models, or the checkpoints of a run, one after another for an engine.

    Making one raises InputError if the engine's library is not installed.
    """

    @abstractmethod
    def load(
        self,
        model: str,
        revision: str | None = None,
        dtype: str | None = None,
        room: Callable[[Any], int] | None = None,
    ) -> Engine:
        """Return the engine with a model folder, an adapter's folder, a hub name or a GGUF file.

        `dtype` is the type in which weights are held; None: as they were saved. `room` returns the
        tokens of the longest dialogue for a tokenizer. The engine returned before must no longer
        be used. Raises InputError, in one line, for everything that cannot be loaded.
        """

    @abstractmethod
    def close(self) -> None:
        """Free memory and end processes; loading again starts afresh."""
