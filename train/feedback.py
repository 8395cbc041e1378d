"""Human feedback as the stages need it: preference pairs and prompts.

A prompt is a list of messages; a last assistant message is open, to be continued. Everything is
rendered once, by the evaluation's own `render`, so a policy is trained on dialogues written exactly
as it is measured on them.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from selfcorrect.evaluate.dialogue import render
from selfcorrect.evaluate.stimuli import Turn
from selfcorrect.recipes.errors import InputError
from selfcorrect.recipes.schema import Data, Source
from selfcorrect.recipes.society import feedback as society_feedback
from selfcorrect.recipes.society.world import make_world

Messages = Sequence[dict[str, str]]
_HH_TURN = re.compile(r"\n\n(Human|Assistant):[ ]?")


@dataclass(frozen=True)
class Preference:
    """Two continuations of one prompt, the preferred one first."""

    prompt: Messages
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Feedback:
    """What the reward model learns from, and what PPO asks."""

    preferences: list[Preference]
    prompts: list[Messages]


def load_feedback(data: Data, seed: int) -> Feedback:
    """Feedback of a recipe; `seed` decides which rows a `limit` keeps."""
    if data.society is not None:
        world = make_world(data.society)
        pairs = society_feedback.preferences(world, data.society.pairs)
        prompts = society_feedback.prompts(world, data.society.prompts)
        return Feedback(
            [Preference(pair.messages, pair.chosen, pair.rejected) for pair in pairs],
            [prompt.messages for prompt in prompts],
        )
    if data.preferences is None:
        raise InputError("data: give either society or preferences")
    preferences = [
        _preference(row, f"{data.preferences.path}: row {number}")
        for number, row in enumerate(_rows(data.preferences, "data.preferences", seed))
    ]
    if data.prompts is None:
        unique = {str(pair.prompt): pair.prompt for pair in preferences}
        return Feedback(preferences, list(unique.values()))
    rows = _rows(data.prompts, "data.prompts", seed)
    found = [_prompt(row, f"{data.prompts.path}: row {n}") for n, row in enumerate(rows)]
    return Feedback(preferences, found)


def _rows(source: Source, key: str, seed: int) -> Iterable[dict[str, Any]]:
    from pathlib import Path

    from datasets import load_dataset

    path = Path(source.path)
    kinds = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    try:
        if suffix in kinds:
            if not path.is_file():
                raise InputError(f"{key}.path: no file {path}")
            rows = load_dataset(kinds[suffix], data_files=str(path), split="train")
        else:
            rows = load_dataset(
                source.path, source.name, split=source.split, revision=source.revision
            )
    except InputError:
        raise
    except Exception as error:  # whatever datasets raises, the user needs the key and the reason
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{key}.path: {source.path} cannot be loaded ({reason})") from None
    if not len(rows):
        raise InputError(f"{key}.path: {source.path} has no rows")
    if source.limit is not None and source.limit < len(rows):
        rows = rows.shuffle(seed=seed).select(range(source.limit))
    found: Iterable[dict[str, Any]] = rows
    return found


def _preference(row: dict[str, Any], where: str) -> Preference:
    if "chosen" not in row or "rejected" not in row:
        raise InputError(f"{where}: preferences need the columns chosen and rejected")
    first = _messages(row["chosen"], row.get("prompt"), where)
    second = _messages(row["rejected"], row.get("prompt"), where)
    prompt, answer = first[:-1], first[-1]
    if not prompt or answer["role"] != "assistant" or second[-1]["role"] != "assistant":
        raise InputError(f"{where}: a dialogue needs a human turn and ends with the assistant's")
    if second[:-1] != prompt:
        raise InputError(f"{where}: chosen and rejected differ before the last turn")
    return Preference(prompt, answer["content"], second[-1]["content"])


def _prompt(row: dict[str, Any], where: str) -> Messages:
    if not row.get("prompt"):
        raise InputError(f"{where}: prompts need a column prompt that is not empty")
    if isinstance(row["prompt"], str) and not _HH_TURN.match(row["prompt"]):
        return [{"role": "user", "content": row["prompt"]}]
    return _messages(row["prompt"], None, where)


def _messages(value: Any, prompt: Any, where: str) -> list[dict[str, str]]:
    """Messages from messages, from text with Human: and Assistant: turns, or an answer alone."""
    if isinstance(value, list) and all(isinstance(m, dict) and "content" in m for m in value):
        before = _messages(prompt, None, where) if prompt else []
        return [*before, *({"role": m["role"], "content": m["content"]} for m in value)]
    if not isinstance(value, str):
        raise InputError(f"{where}: a dialogue is text or a list of messages")
    if prompt:
        before = (
            [{"role": "user", "content": prompt}]
            if isinstance(prompt, str) and not _HH_TURN.match(prompt)
            else _messages(prompt, None, where)
        )
        return [*before, {"role": "assistant", "content": value}]
    parts = _HH_TURN.split(value)
    if len(parts) < 3 or parts[0].strip():
        raise InputError(f"{where}: expected turns that begin with a blank line and Human: ")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[name], "content": text.strip()}
        for name, text in zip(parts[1::2], parts[2::2], strict=True)
    ]


def render_prompt(tokenizer: Any, messages: Messages) -> str:
    """The prompt as text with its special tokens, ready for the policy to continue.

    The beginning-of-text token is left off where the tokenizer itself puts one before every text:
    TRL tokenises plain-text prompts with it.
    """
    turns = [Turn("human" if m["role"] == "user" else "assistant", m["content"]) for m in messages]
    if turns[-1].role == "human":
        turns.append(Turn("assistant", ""))
    text = render(tokenizer, turns)
    begin = tokenizer.bos_token
    if (
        begin
        and text.startswith(begin)
        and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    ):
        return text.removeprefix(begin)
    return text


def pair_ids(tokenizer: Any, pair: Preference) -> dict[str, list[int]]:
    """Token ids of both continuations with their prompt, the end-of-text token last."""
    prompt = render_prompt(tokenizer, pair.prompt)
    joined = prompt[-1:].isspace() or prompt.endswith(tuple(tokenizer.all_special_tokens))
    glue = "" if joined else " "
    end = [tokenizer.eos_token_id]
    return {
        f"{side}_ids": tokenizer(prompt + glue + text)["input_ids"] + end
        for side, text in (("chosen", pair.chosen), ("rejected", pair.rejected))
    }
