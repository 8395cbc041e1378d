"""What measuring asks of a model, whoever runs it: scores of given continuations, and samples."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from selfcorrect.evaluate.prompts.tokenized import PromptTooLong, Request, opening
from selfcorrect.recipes.foundation.errors import RunFailure


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled text without special tokens.

    `truncated` says that the model was cut off at `max_new_tokens` before it ended by itself;
    `num_tokens` counts what it generated, its end token included.
    """

    text: str
    truncated: bool
    num_tokens: int


class Engine(ABC):
    """A model, its tokenizer, which renders the dialogues, and how many tokens it can read."""

    tokenizer: Any
    context: int | None  # None: no bound

    @abstractmethod
    def score(self, requests: Sequence[Request]) -> list[list[float]]:
        """Natural-log probability of each option's tokens given its prompt, in the order asked.

        Raises PromptTooLong (nothing is ever truncated), InputError for an empty prompt or
        option, and RunFailure when the model answers NaN.
        """

    @abstractmethod
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
        """One text per prompt, drawn with (seed, key), the same whatever else is asked.

        A text ends with the model's own end token, at `max_new_tokens`, or at the string `stop`,
        which is cut off. Temperature 0 takes the likeliest token.
        """

    def sample_then_score(
        self,
        prompts: Sequence[str],
        keys: Sequence[str],
        then: Callable[[int, Sample], Request],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        stop: str | None = None,
    ) -> list[tuple[Sample, list[float]]]:
        """The texts of `sample`, and the scores of what is asked after each of them.

        `then`, called once with each prompt's place and sample, in any order, says what that is.
        An engine may go on from what it has read and written, instead of reading it again.
        """
        samples = self.sample(
            prompts,
            keys,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            stop=stop,
        )
        scores = self.score([then(index, sample) for index, sample in enumerate(samples)])
        return list(zip(samples, scores, strict=True))

    def check_room(self, prompts: Sequence[str], num_tokens: int) -> None:
        """Raises PromptTooLong for the first prompt after which `num_tokens` do not fit."""
        self._tokens_with_room(prompts, num_tokens)

    def score_kept(self, key: str, requests: Callable[[], Sequence[Request]]) -> list[list[float]]:
        """Scores of requests that stand under `key`; an engine may have kept them prepared."""
        return self.score(requests())

    def _tokens_with_room(self, prompts: Sequence[str], num_tokens: int) -> list[list[int]]:
        if not prompts:
            return []
        tokenised = self.tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
        for index, tokens in enumerate(tokenised):
            self._check_length(index, len(tokens) + num_tokens, prompts[index])
        return tokenised

    def _check_length(self, index: int, length: int, prompt: str | None = None) -> None:
        if self.context is not None and length > self.context:
            what = "the prompt" if prompt is None else f"the prompt {opening(prompt)}"
            raise PromptTooLong(
                index, f"{what} needs {length} tokens but the model's context holds {self.context}"
            )

    def _refuse_nan(self, requests: Sequence[Request], scores: Sequence[Sequence[float]]) -> None:
        for (prompt, _), row in zip(requests, scores, strict=True):
            if any(math.isnan(value) for value in row):
                raise RunFailure(
                    f"the model's logits are NaN for the prompt {opening(prompt)}: broken weights"
                )
