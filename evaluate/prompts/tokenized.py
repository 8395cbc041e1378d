"""Tokenise prompts and options, and place the boundary between given and scored tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from selfcorrect.recipes.foundation.errors import InputError

Request = tuple[str, tuple[str, ...]]  # a prompt, and the options to score after it
Tokens = tuple[int, ...]


class PromptTooLong(InputError):
    """A prompt does not fit the model's context. `index` is its index among the requests."""

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
        """The tokens that the model reads: all but the last."""
        return self.tokens[:-1]


def continuations(tokenizer: Any, requests: Sequence[Request]) -> list[list[Continuation]]:
    """Tokenise every option of every request, with the boundary where the tokenizer allows it.

    Prompt and option are tokenised as one string, because a tokenizer may merge across the
    boundary. The given part is the longest common prefix of the tokenised prompt and all its
    tokenised options; what follows is scored, for every option of the request. So with `... "` and
    `yes`, a merged token `"yes` is scored, and the other options are scored from their own
    quotation mark on: the options stay comparable.

    Special tokens are read from the text (`dialogue.render` writes them) and never added.
    """
    texts = [prompt + option for prompt, options in requests for option in ("", *options)]
    tokenised = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    result = []
    for prompt, options in requests:
        prompt_tokens, *option_tokens = [tuple(next(tokenised)) for _ in range(1 + len(options))]
        start = _shared_length([prompt_tokens, *option_tokens])
        if not all(option_tokens):
            raise InputError(f"an option of the prompt {opening(prompt)} is empty")
        if start == 0 or any(len(tokens) == start for tokens in option_tokens):
            raise InputError(
                f"the prompt {opening(prompt)} leaves nothing to condition on or nothing to "
                "score; prompt and options need at least one token each"
            )
        result.append([Continuation(tokens, start) for tokens in option_tokens])
    return result


def _shared_length(sequences: list[Tokens]) -> int:
    """Return the length of the longest common prefix."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*sequences)))  # noqa: B905


def opening(text: str) -> str:
    """Return the first words of a prompt on one line, for messages."""
    line = " ".join(text.split())
    return repr(line if len(line) <= 60 else line[:57] + "...")
