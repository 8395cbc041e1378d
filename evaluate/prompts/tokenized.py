"""The only way from dialogues to token ids: what is measured is what was trained.

Text is tokenised here alone, in evaluation and in every stage of training, and nothing is added to
it: `dialogue.render` has written the special tokens.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from selfcorrect.evaluate.prompts.dialogue import (
    AUTO,
    BEGINNING,
    Style,
    beginning_ids,
    render,
    render_answer,
    special_tokens,
    text_after_answer,
)
from selfcorrect.evaluate.prompts.stimuli import Turn
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


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """The end of a finished assistant turn.

    `ids` end with the token that ends the turn, `rest` follow it in a dialogue (a line break, say).
    `text` is all that the template writes.
    """

    text: str
    ids: list[int]
    rest: list[int]


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of texts that hold their special tokens (`dialogue.render`)."""
    if not texts:
        return []
    bare = [text.removeprefix(BEGINNING) for text in texts]
    ids: list[list[int]] = tokenizer(bare, add_special_tokens=False)["input_ids"]
    if bare == list(texts):
        return ids
    first = beginning_ids(tokenizer)
    return [
        [*first, *row] if text.startswith(BEGINNING) else row
        for text, row in zip(texts, ids, strict=True)
    ]


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the SHA-256 of all that turns a dialogue into ids: template, special tokens, tokens.

    A tokenizer that is not of the tokenizers library is known by its vocabulary alone.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is not None:
        # What precedes are truncation and padding, which change with every call.
        contents = core.to_str().partition('"added_tokens"')[2]
    else:
        contents = json.dumps(getattr(tokenizer, "get_vocab", dict)(), sort_keys=True)
    facts = [getattr(tokenizer, name, None) for name in ("chat_template", "special_tokens_map")]
    text = json.dumps([*facts, beginning_ids(tokenizer)], sort_keys=True, default=str)
    return hashlib.sha256(f"{text}\0{contents}".encode(errors="surrogatepass")).hexdigest()


def prompt_ids(tokenizer: Any, turns: Sequence[Turn], style: Style = AUTO) -> list[int]:
    """Return the ids of a dialogue up to where its last, open turn goes on."""
    return token_ids(tokenizer, [render(tokenizer, turns, style)])[0]


def end_of_text_id(tokenizer: Any) -> int | None:
    """Return the token that ends a text: the separator of an encoder that names no other."""
    end: int | None = tokenizer.eos_token_id
    return end if end is not None else getattr(tokenizer, "sep_token_id", None)


def turn_end(tokenizer: Any, style: Style = AUTO) -> TurnEnd:
    """Return the template's end of an assistant turn, with the end-of-text token if it has none.

    Without an end-of-text token, an encoder's separator ends a text; without both, nothing does.
    """
    end_of_text = end_of_text_id(tokenizer)
    text = text_after_answer(tokenizer, style)
    ids = continued_ids(tokenizer, "a", text)
    special = {tokenizer.convert_tokens_to_ids(token) for token in special_tokens(tokenizer)}
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    special |= {index for index, token in added if token.content.strip()}
    ends = [i for i, token in enumerate(ids) if token == end_of_text]
    ends = ends or [i for i, token in enumerate(ids) if token in special]
    if not ends:
        return TurnEnd(text, [] if end_of_text is None else [end_of_text], [])
    return TurnEnd(text, ids[: ends[0] + 1], ids[ends[0] + 1 :])


def stop_tokens(tokenizer: Any, stop: str | None) -> set[int]:
    """Return the id of a stop string that is a token of its own, which decoded text may lack."""
    if stop is None:
        return set()
    known = getattr(tokenizer, "added_tokens_decoder", {})
    return {index for index, token in known.items() if token.content == stop}


def answer_ids(
    tokenizer: Any, turns: Sequence[Turn], answer: str, style: Style, end: TurnEnd
) -> tuple[list[int], list[int]]:
    """Return the ids of the prompt, as `prompt_ids`, and those that answer it, without its end."""
    prompt, text = render_answer(tokenizer, turns, answer, style, end.text)
    return _ids_of_both(tokenizer, prompt, text)


def continued_ids(tokenizer: Any, prompt: str, text: str) -> list[int]:
    """Return the ids of `text` after those of `prompt`, whose own ids do not change."""
    return _ids_of_both(tokenizer, prompt, text)[1]


def _ids_of_both(tokenizer: Any, prompt: str, text: str) -> tuple[list[int], list[int]]:
    """Return the ids of `prompt`, and those of `text` after it.

    If the tokenizer merges across the boundary, or begins every text with a space of its own, the
    text is tokenised after another one, such that it reads the same.
    """
    given, whole = token_ids(tokenizer, [prompt, prompt + text])
    if whole[: len(given)] == given:
        return given, whole[len(given) :]
    wanted = tokenizer.decode(whole)
    for before in ("a", "\n"):
        first, both = token_ids(tokenizer, [before, before + text])
        if both[: len(first)] == first and tokenizer.decode(given + both[len(first) :]) == wanted:
            return given, both[len(first) :]
    return given, token_ids(tokenizer, [text])[0]


def continuations(tokenizer: Any, requests: Sequence[Request]) -> list[list[Continuation]]:
    """Tokenise every option of every request, with the boundary where the tokenizer allows it.

    Prompt and option are tokenised as one string, because a tokenizer may merge across the
    boundary. The given part is the longest common prefix of the tokenised prompt and all its
    tokenised options; what follows is scored, for every option of the request. So with `... "` and
    `yes`, a merged token `"yes` is scored, and the other options are scored from their own
    quotation mark on: the options stay comparable.

    """
    texts = [prompt + option for prompt, options in requests for option in ("", *options)]
    tokenised = iter(token_ids(tokenizer, texts))
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
    first, last = min(sequences), max(sequences)  # what these two share, all between them share
    pairs = enumerate(zip(first, last, strict=False))
    return next((index for index, (a, b) in pairs if a != b), len(first))


def opening(text: str) -> str:
    """Return the first words of a prompt on one line, for messages."""
    line = " ".join(text.split())
    return repr(line if len(line) <= 60 else line[:57] + "...")
