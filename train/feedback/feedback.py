"""Load feedback: preference pairs and prompts, from the society, a benchmark, or data.

A prompt is a list of messages; a last assistant message is open, to be continued. Dialogues become
tokens by the evaluation's own functions, so a policy is trained and measured on the same ids.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from selfcorrect.evaluate.prompts.dialogue import AUTO, Style
from selfcorrect.evaluate.prompts.stimuli import Turn
from selfcorrect.evaluate.prompts.tokenized import answer_ids, turn_end
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.schema import Data, Source
from selfcorrect.recipes.society import feedback as society_feedback
from selfcorrect.recipes.society.raters import Preference as RatedPreference
from selfcorrect.recipes.society.raters import RatedPrompt
from selfcorrect.recipes.society.settings import Raters
from selfcorrect.recipes.society.world import World, make_world
from selfcorrect.train.feedback.benchmark import Source as BenchmarkSource
from selfcorrect.train.feedback.files import read_rows
from selfcorrect.train.feedback.kept_rows import keep_rows

Messages = Sequence[dict[str, str]]
DIFFERENT_PROMPTS = "chosen and rejected differ before the last turn"
ROLES: dict[str, Literal["system", "human", "assistant"]] = {
    "system": "system",
    "user": "human",
    "assistant": "assistant",
}
EQUAL_SIDES = "chosen and rejected are the same"
SYSTEM_COLUMNS = ("system", "system_prompt")
_HH_START = re.compile(r"\s*(Human|Assistant):")
_HH_TURN = re.compile(r"(?:\A\s*|\r?\n\r?\n)(Human|Assistant):[ ]?")
_LINE_TURN = re.compile(r"(?:\A\s*|\r?\n)(Human|Assistant):[ ]?")
_BLANK_LINE = re.compile(r"\r?\n\r?\n")
_WRITTEN_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:""")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preference:
    """Two continuations of a prompt, the preferred one first."""

    prompt: Messages
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Feedback:
    """Preference pairs, prompts of the policy stage, and the number of left-out rows by reason.

    `rated` are the prompts with what the simulated `raters` know about them, empty where there are
    none. `world` is the society that they come from, None for other data.
    """

    preferences: list[Preference]
    prompts: list[Messages]
    left_out: dict[str, int] = field(default_factory=dict)
    rated: Sequence[RatedPrompt[Any]] = ()
    raters: Raters | None = None
    world: World | None = None


def load_feedback(data: Data, seed: int) -> Feedback:
    """Return the feedback of a recipe; `seed` decides which rows a `limit` keeps.

    Pairs whose dialogues differ before the last turn, or nowhere, are left out and counted. Raises
    InputError, with file and row, for data that cannot be loaded or is malformed.
    """
    if data.society is not None:
        world = make_world(data.society)
        pairs = society_feedback.preferences(world, data.society.pairs)
        rated = society_feedback.prompts(world, data.society.prompts)
        return _rated_feedback(data, pairs, data.society.pairs, rated, world)
    if data.feedback is not None:
        source = BenchmarkSource(data)
        num_pairs = data.feedback.pairs
        asked = source.prompts(data.feedback.prompts)
        return _rated_feedback(data, source.preferences(num_pairs), num_pairs, asked)
    assert data.preferences is not None
    rows = list(_rows(data.preferences, "preferences", seed))
    repeated = _prompts_are_repeated([row for _, row in rows])
    found = [_preference(row, where, repeated) for where, row in rows]
    path = data.preferences.path
    preferences, left_out = keep_rows(str(path), "pairs", found, _reason_against)
    if not preferences:
        raise InputError(f"data.preferences.path: {path}: {', '.join(left_out)} in every pair")
    if data.prompts is None:
        unique = {str(pair.prompt): pair.prompt for pair in preferences}
        return Feedback(preferences, list(unique.values()), left_out)
    prompts = [_prompt(row, where) for where, row in _rows(data.prompts, "prompts", seed)]
    return Feedback(preferences, prompts, left_out)


def _rated_feedback(
    data: Data,
    drawn: Iterable[RatedPreference],
    num_drawn: int,
    prompts: Iterable[RatedPrompt[Any]],
    world: World | None = None,
) -> Feedback:
    """Return the feedback of simulated raters, who leave out the pairs with two equal sides."""
    pairs = [Preference(pair.messages, pair.chosen, pair.rejected) for pair in drawn]
    num_equal = num_drawn - len(pairs)
    left_out = {EQUAL_SIDES: num_equal} if num_equal else {}
    rated = list(prompts)
    return Feedback(
        pairs, [prompt.messages for prompt in rated], left_out, rated, data.raters, world
    )


def _reason_against(pair: Preference | str) -> str | None:
    """Return why a row's pair cannot be used, None if it can."""
    if isinstance(pair, str):
        return pair
    return EQUAL_SIDES if pair.chosen.strip() == pair.rejected.strip() else None


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


def _preference(row: dict[str, Any], where: str, repeated: bool) -> Any:
    """Return a row's pair, or why it has none: its dialogues differ before the last turn."""
    if "chosen" not in row or "rejected" not in row:
        raise InputError(
            f"{where}: preferences need the columns chosen and rejected, not {', '.join(row)}"
        )
    prompt = _given_prompt(row, where)
    first, second = (
        _dialogue(row[side], prompt, row.get("prompt"), repeated, f"{where}: {side}")
        for side in ("chosen", "rejected")
    )
    for side, turns in (("chosen", first), ("rejected", second)):
        if len(turns) < 2 or turns[-1]["role"] != "assistant":
            raise InputError(
                f"{where}: {side}: a dialogue needs a human turn and must end with the assistant's"
            )
    if first[:-1] != second[:-1]:
        return DIFFERENT_PROMPTS
    return Preference(first[:-1], first[-1]["content"], second[-1]["content"])


def _prompt(row: dict[str, Any], where: str) -> Messages:
    """Return a row's prompt: column prompt, or text, or the only column."""
    columns = [name for name in row if name not in SYSTEM_COLUMNS]
    known = [name for name in ("prompt", "text") if name in row]
    if not known and len(columns) != 1:
        raise InputError(f"{where}: prompts need a column prompt or text, not {', '.join(row)}")
    column = known[0] if known else columns[0]
    if _is_empty(row[column]):
        raise InputError(f"{where}: {column} is empty")
    turns = _prompt_turns(row[column], f"{where}: {column}")
    return _with_system(turns, _system_turn(row, where), where)


def _given_prompt(row: dict[str, Any], where: str) -> list[dict[str, str]]:
    """Return the turns of the column prompt; a system message in a column of its own is first."""
    given, system = row.get("prompt"), _system_turn(row, where)
    turns = [] if _is_empty(given) else _prompt_turns(given, f"{where}: prompt")
    own = [turn for turn in turns if turn["role"] == "system"]
    _check_system(own, system, f"{where}: prompt")
    return turns if own else [*system, *turns]


def _dialogue(
    value: Any, prompt: Sequence[dict[str, str]], text: Any, repeated: bool, where: str
) -> list[dict[str, str]]:
    """Return a dialogue from messages, from text with Human: and Assistant: turns, or an answer.

    `prompt` holds the turns of the row's other columns. A dialogue that begins with the human turn
    contains them and must repeat them; other turns and plain text answer them. `text` is the column
    prompt, and `repeated` says whether plain texts repeat it.
    """
    system = [turn for turn in prompt[:1] if turn["role"] == "system"]
    asked = prompt[len(system) :]
    if isinstance(value, list):
        turns = _turns(value, where)
    elif not isinstance(value, str):
        raise InputError(f"{where}: a dialogue is text or a list of messages")
    elif not asked or _is_dialogue(value):
        turns = _written_turns(value, where)
    else:
        _refuse_written_messages(value, where)
        if repeated:
            value = value.strip()[len(text.strip()) :].strip()
        turns = [{"role": "assistant", "content": value}]
    begins = next(turn["role"] for turn in turns if turn["role"] != "system")
    if asked and begins == "assistant":
        turns = [*asked, *turns]
    elif asked:
        turns = _with_prompt(turns, asked, text, where)
    return _with_system(turns, system, where)


def _with_prompt(
    turns: Sequence[dict[str, str]],
    asked: Sequence[dict[str, str]],
    text: Any,
    where: str,
) -> list[dict[str, str]]:
    """Return a dialogue that contains its prompt; raises InputError if it has another one."""
    own = [turn for turn in turns if turn["role"] != "system"]
    system = list(turns[: len(turns) - len(own)])
    if len(asked) > 1 and asked[-1] == {"role": "assistant", "content": ""}:
        asked = asked[:-1]  # "Assistant:", which the dialogue's last turn completes
    *before, last = asked
    if _same(own[: len(asked)], asked):
        return [*system, *asked, *own[len(asked) :]]
    opened = own[len(before)] if len(own) > len(before) else {"role": "", "content": ""}
    if (
        last["role"] == opened["role"] == "assistant"
        and _same(own[: len(before)], before)
        and opened["content"].startswith(last["content"].strip())
    ):  # the prompt ends in a turn that the dialogue completes
        rest = opened["content"].removeprefix(last["content"].strip())
        return [*system, *asked, {"role": "assistant", "content": rest}, *own[len(asked) :]]
    # The column may also hold the last question only, or the dialogue in a format of its own.
    said = [_words(turn["content"]) for turn in own[:-1]]
    if _same(own[:-1][-len(asked) :], asked) or (
        isinstance(text, str)
        and (_words(text) in " ".join(said) or all(turn in _words(text) for turn in said))
    ):
        return list(turns)
    raise InputError(
        f"{where}: the dialogue does not begin with the turns of the column prompt; "
        "correct the column, or remove it"
    )


def _same(turns: Sequence[dict[str, str]], others: Sequence[dict[str, str]]) -> bool:
    """Return whether turns are the same but for blanks."""
    return [(turn["role"], _words(turn["content"])) for turn in turns] == [
        (turn["role"], _words(turn["content"])) for turn in others
    ]


def _words(text: str) -> str:
    return " ".join(text.split())


def _is_empty(value: Any) -> bool:
    return not value or (isinstance(value, str) and not value.strip())


def _prompts_are_repeated(rows: Sequence[dict[str, Any]]) -> bool:
    """Return whether plain texts begin with their prompt: both sides of every row that has some.

    A single answer may repeat its question, so all rows decide together.
    """
    found = False
    for row in rows:
        prompt, sides = row.get("prompt"), [row.get("chosen"), row.get("rejected")]
        texts = [side for side in sides if isinstance(side, str) and not _is_dialogue(side)]
        if _is_empty(prompt) or not isinstance(prompt, str) or len(texts) < len(sides):
            continue
        start = prompt.strip()
        ends = [text.strip()[len(start) :] for text in texts if text.strip().startswith(start)]
        if len(ends) < len(sides) or not all(end and not end[0].isalnum() for end in ends):
            return False
        found = True
    return found


def _prompt_turns(prompt: Any, where: str) -> list[dict[str, str]]:
    """Return a prompt's turns; plain text is one question."""
    if isinstance(prompt, list):
        return _turns(prompt, where)
    if not isinstance(prompt, str):
        raise InputError(f"{where}: a prompt is text or a list of messages")
    _refuse_written_messages(prompt, where)
    if _HH_START.match(prompt):
        return _written_turns(prompt, where)
    return [{"role": "user", "content": prompt}]


def _turns(messages: list[Any], where: str) -> list[dict[str, str]]:
    """Check messages; only the first may be a system message."""
    turns: list[dict[str, str]] = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise InputError(f"{where}: a message needs the keys role and content, both text")
        if role not in ("user", "assistant") and (role != "system" or turns):
            raise InputError(
                f"{where}: role {role!r}: use user or assistant; system only for the first message"
            )
        turns.append({"role": role, "content": content})
    if all(turn["role"] == "system" for turn in turns):
        raise InputError(f"{where}: no messages")
    return turns


def _system_turn(row: dict[str, Any], where: str) -> list[dict[str, str]]:
    """Return the system message of a row's own column for it, or nothing."""
    given = {name: row[name] for name in SYSTEM_COLUMNS if not _is_empty(row.get(name))}
    for name, text in given.items():
        if not isinstance(text, str):
            raise InputError(f"{where}: {name} must be text")
    if len(set(given.values())) > 1:
        raise InputError(f"{where}: {' and '.join(given)} differ; keep one of these columns")
    return [{"role": "system", "content": text} for text in set(given.values())]


def _with_system(
    turns: Sequence[dict[str, str]], system: Sequence[dict[str, str]], where: str
) -> list[dict[str, str]]:
    """Put the system message before the text of the first turn: `system`, or the dialogue's own."""
    own = [turn for turn in turns if turn["role"] == "system"]
    _check_system(own, system, where)
    first, *rest = turns[len(own) :]
    begins = "".join(f"{turn['content']}\n\n" for turn in (own or system))
    return [{"role": first["role"], "content": begins + first["content"]}, *rest]


def _check_system(
    own: Sequence[dict[str, str]], given: Sequence[dict[str, str]], where: str
) -> None:
    if own and given and not _same(own, given):
        raise InputError(f"{where}: its system message differs from the row's; keep one")


def _refuse_written_messages(text: str, where: str) -> None:
    """Raise InputError for a list of messages that a table without lists has turned into text."""
    if _WRITTEN_MESSAGES.match(text):
        raise InputError(
            f"{where}: a list of messages in a text column; save the data as .jsonl or .parquet"
        )


def _is_dialogue(text: str) -> bool:
    """Return whether a text is turns of a dialogue, not an answer."""
    start = _HH_START.match(text)
    return start is not None and (start[1] == "Assistant" or len(_turn_parts(text)) > 3)


def _turn_parts(text: str) -> list[str]:
    """Split a text at its turns: what precedes them, then each speaker and what they say.

    Turns begin after a blank line, as in HH-RLHF; on a new line in a text that has none of these.
    """
    parts = _HH_TURN.split(text)
    return parts if len(parts) > 3 or _BLANK_LINE.match(text) else _LINE_TURN.split(text)


def _written_turns(text: str, where: str) -> list[dict[str, str]]:
    """Parse HH-RLHF's text format; consecutive turns of one speaker, which it has, are joined."""
    _refuse_written_messages(text, where)
    parts = _turn_parts(text)
    if len(parts) < 3 or parts[0].strip():
        raise InputError(
            f"{where}: expected turns that begin with a blank line and Human:, or an answer beside "
            "a column prompt"
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    turns: list[dict[str, str]] = []
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        if turns and turns[-1]["role"] == roles[name]:
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{text.strip()}".strip()
        else:
            turns.append({"role": roles[name], "content": text.strip()})
    return turns


# --- tokens --------------------------------------------------------------------------------------


def open_turns(messages: Messages) -> list[Turn]:
    """Return the turns of a prompt, of which the last is the open assistant turn."""
    turns = [Turn(ROLES[m["role"]], m["content"]) for m in messages]
    return turns if turns[-1].role == "assistant" else [*turns, Turn("assistant", "")]


def pair_ids(
    tokenizer: Any, pairs: Iterable[Preference], style: Style = AUTO
) -> list[dict[str, list[int]]]:
    """Return token ids of prompt and continuation, as finished turns, for both continuations."""
    end = turn_end(tokenizer, style)
    rows = []
    for pair in pairs:
        turns, sides = open_turns(pair.prompt), {"chosen": pair.chosen, "rejected": pair.rejected}
        row = {}
        for side, text in sides.items():
            prompt, answer = answer_ids(tokenizer, turns, text, style, end)
            row[f"{side}_ids"] = [*prompt, *answer, *end.ids, *end.rest]
        rows.append(row)
    return rows
