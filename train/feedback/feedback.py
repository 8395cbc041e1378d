"""Load feedback: preference pairs and prompts, from the society or from data.

A prompt is a list of messages; a last assistant message is open, to be continued. Dialogues are
rendered by the evaluation's own `render`, so a policy is trained and measured on the same format.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from selfcorrect.evaluate.prompts.dialogue import render
from selfcorrect.evaluate.prompts.stimuli import Turn
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.schema import Data, Source
from selfcorrect.recipes.society import feedback as society_feedback
from selfcorrect.recipes.society.world import make_world
from selfcorrect.train.feedback.files import read_rows

Messages = Sequence[dict[str, str]]
DIFFERENT_PROMPTS = "chosen and rejected differ before the last turn"
_HH_TURN = re.compile(r"\n\n(Human|Assistant):[ ]?")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preference:
    """Two continuations of a prompt, the preferred one first."""

    prompt: Messages
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Feedback:
    """Preference pairs, prompts of the policy stage, and the number of left-out rows by reason."""

    preferences: list[Preference]
    prompts: list[Messages]
    left_out: dict[str, int] = field(default_factory=dict)


def load_feedback(data: Data, seed: int) -> Feedback:
    """Return the feedback of a recipe; `seed` decides which rows a `limit` keeps.

    Pairs whose dialogues differ before the last turn are left out and counted. Raises InputError,
    with file and row, for data that cannot be loaded or is malformed.
    """
    if data.society is not None:
        world = make_world(data.society)
        drawn = society_feedback.preferences(world, data.society.pairs)
        return Feedback(
            [Preference(pair.messages, pair.chosen, pair.rejected) for pair in drawn],
            [p.messages for p in society_feedback.prompts(world, data.society.prompts)],
        )
    if data.preferences is None:
        raise InputError("data: give either society or preferences")
    pairs = [_preference(row, where) for where, row in _rows(data.preferences, "preferences", seed)]
    preferences = [pair for pair in pairs if pair is not None]
    if not preferences:
        raise InputError(
            f"data.preferences.path: {data.preferences.path}: {DIFFERENT_PROMPTS} in every pair"
        )
    left_out = {}
    if num_left_out := len(pairs) - len(preferences):
        left_out[DIFFERENT_PROMPTS] = num_left_out
        logger.warning(
            "%s: %d of %d pairs are left out: %s",
            data.preferences.path, num_left_out, len(pairs), DIFFERENT_PROMPTS,
        )  # fmt: skip
    if data.prompts is None:
        unique = {str(pair.prompt): pair.prompt for pair in preferences}
        return Feedback(preferences, list(unique.values()), left_out)
    prompts = [_prompt(row, where) for where, row in _rows(data.prompts, "prompts", seed)]
    return Feedback(preferences, prompts, left_out)


def _rows(source: Source, key: str, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a source, or a sample of `limit` rows, each with its file and number."""
    options = source.model_dump(include={"name", "data_dir", "split", "revision"})
    rows = read_rows(source.path, f"data.{key}.path", **options)
    chosen: Iterable[int] = range(len(rows))
    if source.limit is not None and source.limit < len(rows):
        chosen = np.random.default_rng(seed).permutation(len(rows))[: source.limit].tolist()
        rows = rows.select(chosen)
    for number, row in zip(chosen, rows, strict=True):
        yield f"{source.path}: row {number + 1}", row


# --- rows to dialogues -------------------------------------------------------------------------


def _preference(row: dict[str, Any], where: str) -> Preference | None:
    """Return a row's pair, or None if its dialogues differ before the last turn."""
    if "chosen" not in row or "rejected" not in row:
        raise InputError(
            f"{where}: preferences need the columns chosen and rejected, not {', '.join(row)}"
        )
    first = _dialogue(row["chosen"], row.get("prompt"), f"{where}: chosen")
    second = _dialogue(row["rejected"], row.get("prompt"), f"{where}: rejected")
    for side, turns in (("chosen", first), ("rejected", second)):
        if len(turns) < 2 or turns[-1]["role"] != "assistant":
            raise InputError(
                f"{where}: {side}: a dialogue needs a human turn and must end with the assistant's"
            )
    if first[:-1] != second[:-1]:
        return None
    return Preference(first[:-1], first[-1]["content"], second[-1]["content"])


def _prompt(row: dict[str, Any], where: str) -> Messages:
    """Return a row's prompt: column prompt, or text, or the only column."""
    known = [name for name in ("prompt", "text") if name in row]
    column = known[0] if known else next(iter(row))
    if not known and len(row) > 1:
        raise InputError(f"{where}: prompts need a column prompt or text, not {', '.join(row)}")
    value = row[column]
    if not value or (isinstance(value, str) and not value.strip()):
        raise InputError(f"{where}: {column} is empty")
    return _prompt_messages(value, f"{where}: {column}")


def _dialogue(value: Any, prompt: Any, where: str) -> list[dict[str, str]]:
    """Return a dialogue from messages, from text with Human: and Assistant: turns, or an answer.

    Messages that begin with the assistant's turn, and text beside a prompt, answer `prompt`. Other
    messages contain their prompt, as in UltraFeedback, where the column repeats it.
    """
    if isinstance(value, list):
        turns = _turns(value, where)
        answers = bool(prompt) and bool(turns) and turns[0]["role"] == "assistant"
        return [*_prompt_messages(prompt, where), *turns] if answers else turns
    if not isinstance(value, str):
        raise InputError(f"{where}: a dialogue is text or a list of messages")
    if prompt:
        return [*_prompt_messages(prompt, where), {"role": "assistant", "content": value}]
    return _written_turns(value, where)


def _prompt_messages(prompt: Any, where: str) -> list[dict[str, str]]:
    """Return a prompt's messages; plain text is one question."""
    if isinstance(prompt, list):
        return _turns(prompt, where)
    if not isinstance(prompt, str):
        raise InputError(f"{where}: a prompt is text or a list of messages")
    if _HH_TURN.match(prompt):
        return _written_turns(prompt, where)
    return [{"role": "user", "content": prompt}]


def _turns(messages: list[Any], where: str) -> list[dict[str, str]]:
    """Check messages; a first system message is put before the text of the first turn."""
    turns: list[dict[str, str]] = []
    system = ""
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise InputError(f"{where}: a message needs the keys role and content, both text")
        if role == "system" and not turns and not system:
            system = content
        elif role in ("user", "assistant"):
            begins = f"{system}\n\n" if system and not turns else ""
            turns.append({"role": role, "content": begins + content})
        else:
            raise InputError(
                f"{where}: role {role!r}: use user or assistant; system only for the first message"
            )
    if not turns:
        raise InputError(f"{where}: no messages")
    return turns


def _written_turns(text: str, where: str) -> list[dict[str, str]]:
    """Parse HH-RLHF's text format; consecutive turns of one speaker, which it has, are joined."""
    parts = _HH_TURN.split(text)
    if len(parts) < 3 or parts[0].strip():
        raise InputError(f"{where}: expected turns that begin with a blank line and Human:")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns: list[dict[str, str]] = []
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        if turns and turns[-1]["role"] == roles[name]:
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{text.strip()}".strip()
        else:
            turns.append({"role": roles[name], "content": text.strip()})
    return turns


# --- rendering ---------------------------------------------------------------------------------


def render_prompt(tokenizer: Any, messages: Messages) -> str:
    """Return the prompt as text with special tokens, for the policy to continue.

    The beginning-of-text token is omitted if the tokenizer adds it to every text, as TRL tokenizes
    prompts with special tokens.
    """
    turns = [Turn("human" if m["role"] == "user" else "assistant", m["content"]) for m in messages]
    if turns[-1].role == "human":
        turns.append(Turn("assistant", ""))
    text = render(tokenizer, turns)
    adds_begin = tokenizer.bos_token and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return text.removeprefix(tokenizer.bos_token) if adds_begin else text


def pair_ids(tokenizer: Any, pair: Preference) -> dict[str, list[int]]:
    """Return token ids of prompt and continuation, with end-of-text, for both continuations."""
    prompt = render_prompt(tokenizer, pair.prompt)
    needs_space = not (
        prompt[-1:].isspace() or prompt.endswith(tuple(tokenizer.all_special_tokens))
    )
    space = " " if needs_space else ""
    end = [tokenizer.eos_token_id]
    return {
        f"{side}_ids": tokenizer(prompt + space + text)["input_ids"] + end
        for side, text in (("chosen", pair.chosen), ("rejected", pair.rejected))
    }
