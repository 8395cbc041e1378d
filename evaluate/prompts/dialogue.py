"""Render dialogues, lists of turns of which the last is open, as the text a model expects."""

import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from selfcorrect.evaluate.prompts.stimuli import SAMPLE, ThoughtfulTurn, Turn
from selfcorrect.recipes.foundation.atomic_files import read_text
from selfcorrect.recipes.foundation.errors import InputError

STYLES = ("auto", "chat", "plain")

_ROLES = {"system": "system", "human": "user", "assistant": "assistant"}
_NAMES = {"human": "Human", "assistant": "Assistant"}
_HUMAN_AGAIN = "\n\nHuman:"
LONGEST_PROMPT = 4_000_000  # characters; no context holds a tenth of it
TEMPLATE_SECONDS = 10.0
CLOCK = "strftime_now"  # the only way of a template to the time
_MARK = "\ue000open\ue000"  # replaces the open text; occurs in no template and no item
# Tags around a model's thoughts, in templates and in its own text.
THOUGHT_TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
)
# Stands for first tokens that the tokenizer adds but does not read from a text.
BEGINNING = "\ue000beginning\ue000"


# Parameters of `apply_chat_template` itself: no template can have an argument of such a name.
NOT_ARGUMENTS = frozenset(
    "conversation messages chat_template add_generation_prompt continue_final_message tokenize "
    "padding truncation max_length return_tensors return_dict return_assistant_tokens_mask "
    "tokenizer_kwargs sanitize_control_tokens".split()
)


@dataclass(frozen=True)
class Thinking:
    """How a template with a block for thoughts is asked to think, and not to (thinking.py).

    `off` are its arguments for an answer at once, after whose prompt `empty` is written; `on` those
    for thoughts, which `opening` and `closing` surround (None: the style's arguments forbid them).
    `end` is the tag that ends thoughts.
    """

    on: Mapping[str, Any] | None
    off: Mapping[str, Any]
    opening: str
    closing: str
    empty: str
    end: str


@dataclass(frozen=True)
class Style:
    """How dialogues are written, in training as in evaluation.

    `template` is "chat" (the tokenizer's chat template), "plain" (the paper's `Human:` and
    `Assistant:`), "auto" (the template if there is one, else plain), or the text of a template.
    `arguments` are passed to the template. `date` (ISO) is the day that a template gets if it asks
    for the time; None: the present moment. `thinking` is set in evaluation alone: training leaves
    it to the template and its arguments.
    """

    template: str = "auto"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    date: str | None = None
    thinking: Thinking | None = None


AUTO = Style()


def read_style(
    style: str, arguments: Mapping[str, Any] | None = None, date: str | None = None
) -> Style:
    """Return the style of a recipe's keys; `style` is one of STYLES, or a Jinja file."""
    for name in arguments or {}:
        if name in NOT_ARGUMENTS:
            raise InputError(
                f"chat_template_kwargs.{name}: this is set by the program itself; remove the key"
            )
    if style in STYLES:
        return Style(style, arguments or {}, date)
    path = Path(style)
    if path.suffix not in (".jinja", ".jinja2"):
        raise InputError(f"style {style!r}: use {', '.join(STYLES)}, or a chat template (*.jinja)")
    template = read_text(path)
    if "messages" not in template:
        raise InputError(f"{path}: not a chat template (it does not use `messages`)")
    return Style(template, arguments or {}, date)


def render(tokenizer: Any, turns: Sequence[Turn], style: Style | str = AUTO) -> str:
    """Return the dialogue as one string that ends inside the last, open assistant turn.

    If that turn ends in `SAMPLE`, the model is to write on; otherwise the string ends where an
    answer follows. The two differ if a template begins a finished turn with more than its prompt
    for a new turn (an empty reasoning block, the name of a channel): a model writes that by itself.

    The string holds all special tokens, including the beginning-of-text token of a plain dialogue
    if the tokenizer would add one: tokenise it with `tokenized.token_ids`, which adds none.

    Raises InputError if the chat template is missing, or if it refuses the turns.
    """
    if not turns or turns[-1].role != "assistant":
        raise ValueError("the last turn of a dialogue must be the open assistant turn")
    style = style if isinstance(style, Style) else Style(style)
    closed, opened = turns[:-1], turns[-1].text.removesuffix(SAMPLE)
    if style_of(tokenizer, style) == "plain":
        return _render_plain(tokenizer, closed, opened)
    if style.thinking is not None:
        return _render_thinking(tokenizer, closed, turns[-1], style, style.thinking)
    prompt = _apply(tokenizer, closed, style, add_generation_prompt=True)
    if not opened and turns[-1].text == SAMPLE:
        return prompt
    before, _ = around_content(tokenizer, closed, style)
    # Templates end their prompt with or without the white space that precedes a turn's content. If
    # one adds more to the prompt than to a finished turn, the addition is kept, and closed if it
    # opens a block for thoughts (DeepSeek-R1): an answer stands behind it.
    lead = before[len(prompt) :] if before.startswith(prompt) else _closing(prompt)
    return prompt + (lead if opened or lead.strip() else "") + opened


def _closing(prompt: str) -> str:
    """Return what closes the block for thoughts that a prompt opens, "" if it opens none."""
    ends = (end for start, end in THOUGHT_TAGS if prompt.rstrip().endswith(start))
    return next((f"\n{end}\n\n" for end in ends), "")


def _render_thinking(
    tokenizer: Any, closed: Sequence[Turn], last: Turn, style: Style, thinking: Thinking
) -> str:
    """Return a dialogue whose open turn is answered at once, or holds thoughts."""
    thought = last.thought if isinstance(last, ThoughtfulTurn) else None
    arguments = thinking.off if thought is None or thinking.on is None else thinking.on
    style = replace(style, arguments=arguments)
    prompt = _apply(tokenizer, closed, style, add_generation_prompt=True)
    if thought is None:
        return prompt + thinking.empty + last.text.removesuffix(SAMPLE)
    if thought.endswith(SAMPLE):
        return prompt + thinking.opening + thought.removesuffix(SAMPLE)
    return prompt + thinking.opening + thought + thinking.closing + last.text


def render_answer(
    tokenizer: Any, turns: Sequence[Turn], answer: str, style: Style, end: str
) -> tuple[str, str]:
    """Return the prompt of the open turn, and what the model has to write to give `answer`.

    The second string is the template's own turn, up to `end`, the text with which the template ends
    a turn (`text_after_answer`): it begins with the channel or reasoning block that a finished turn
    has. An answer continues the text of an open turn after a space.
    """
    *closed, last = turns
    prompt = render(tokenizer, [*closed, Turn("assistant", last.text + SAMPLE)], style)
    needs_space = last.text and not (last.text[-1].isspace() or answer[:1].isspace())
    content = Turn("assistant", last.text + (" " if needs_space else "") + answer)
    if style_of(tokenizer, style) != "plain":
        finished = _apply(tokenizer, [*closed, content], style, add_generation_prompt=False)
        if finished.startswith(prompt) and finished.endswith(end):
            return prompt, finished[len(prompt) : len(finished) - len(end)]
    text = render(tokenizer, [*closed, content], style)
    return prompt, text[len(prompt) :]


def text_after_answer(tokenizer: Any, style: Style) -> str:
    """Return what the chat template writes after an answer's last word; "" in plain style."""
    if style_of(tokenizer, style) == "plain":
        return ""
    return around_content(tokenizer, [Turn("human", "a")], style)[1]


def style_of(tokenizer: Any, style: Style | str = AUTO) -> str:
    """Return "plain", "chat" or the text of a template; InputError for a missing template."""
    template = style.template if isinstance(style, Style) else style
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if template == "auto":
        return "chat" if has_template else "plain"
    if template == "chat" and not has_template:
        name = getattr(tokenizer, "name_or_path", "") or "the model"
        raise InputError(f"{name}: the tokenizer has no chat template; use the plain style")
    return template


def reads_clock(tokenizer: Any, style: Style) -> bool:
    """Return whether dialogues of this style depend on the date."""
    return CLOCK in template_text(tokenizer, style)


def template_text(tokenizer: Any, style: Style) -> str:
    """Return the text of the chat template that the style means, "None" if there is none."""
    uses_own = style.template in ("auto", "chat")
    return str(getattr(tokenizer, "chat_template", None) if uses_own else style.template)


def stop_text(tokenizer: Any, style: Style | str = AUTO) -> str | None:
    """Return the string that ends an answer: in plain style, the start of the human's next turn."""
    return _HUMAN_AGAIN if style_of(tokenizer, style) == "plain" else None


def before_sample(turns: Sequence[Turn]) -> list[Turn]:
    """Return the dialogue up to the next text that the model samples, or all of it."""
    for index, turn in enumerate(turns):
        if _is_sampled(turn):
            return list(turns[: index + 1])
    return list(turns)


def _is_sampled(turn: Turn) -> bool:
    return turn.text.endswith(SAMPLE) or is_thinking(turn)


def is_thinking(turn: Turn) -> bool:
    """Return whether the model is to write thoughts in this turn."""
    return isinstance(turn, ThoughtfulTurn) and turn.thought.endswith(SAMPLE)


def with_thoughts(turns: Sequence[Turn]) -> list[Turn]:
    """Return the dialogue with its last turn of reasoning as the thoughts of the answer.

    That is a sampled turn that begins with words of its own, right before the final question, which
    is left out: a template forgets the thoughts of earlier turns. A sampled turn without such words
    is an answer, and stays.
    """
    if len(turns) < 3 or not turns[-3].text.endswith(SAMPLE) or turns[-3].text == SAMPLE:
        return list(turns)
    return [*turns[:-3], ThoughtfulTurn("assistant", turns[-1].text, turns[-3].text)]


def unsampled(turns: Sequence[Turn]) -> list[Turn]:
    """Return the dialogue as if the model wrote nothing where it samples."""
    return [_filled(turn, "") for turn in turns]


def _filled(turn: Turn, sample: str) -> Turn:
    """Return the turn with a sample at its marker, if it has one."""
    if isinstance(turn, ThoughtfulTurn):
        return replace(turn, thought=_with_text(turn.thought, sample))
    return Turn(turn.role, _with_text(turn.text, sample))


def _with_text(text: str, sample: str) -> str:
    return (text.removesuffix(SAMPLE) + sample).rstrip() if text.endswith(SAMPLE) else text


def with_sample(tokenizer: Any, turns: Sequence[Turn], sample: str) -> list[Turn]:
    """Return the dialogue with the model's sample filled in at the first marker.

    Special tokens are removed from `sample`, so that a sample can neither end its turn nor open
    the next one. Trailing space is removed too.
    """
    special = special_tokens(tokenizer)
    # Removing a token can create another from the parts around it.
    while present := [token for token in special if token in sample]:
        for token in present:
            sample = sample.replace(token, "")
    filled = list(turns)
    for index, turn in enumerate(turns):
        if _is_sampled(turn):
            filled[index] = _filled(turn, sample)
            break
    return filled


def special_tokens(tokenizer: Any) -> set[str]:
    """Return the texts of all special tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}


def around_content(tokenizer: Any, closed: Sequence[Turn], style: Style) -> tuple[str, str]:
    """Return what the template writes before and after the content of a finished last turn."""
    marked = [*closed, Turn("assistant", _MARK)]
    finished = _apply(tokenizer, marked, style, add_generation_prompt=False)
    before, mark, after = finished.partition(_MARK)
    if not mark:
        name = getattr(tokenizer, "name_or_path", "") or "the model"
        raise InputError(
            f"{name}: the chat template drops what the assistant's turn begins with, so no answer "
            "can be prefilled; use another template, or --style plain"
        )
    return before, after


def _apply(
    tokenizer: Any, turns: Sequence[Turn], style: Style, *, add_generation_prompt: bool
) -> str:
    messages = [{"role": _ROLES[turn.role], "content": turn.text} for turn in turns]
    name = getattr(tokenizer, "name_or_path", "") or "the model"
    template = style_of(tokenizer, style)
    date = style.date if reads_clock(tokenizer, style) else None
    try:
        with _time_limit(TEMPLATE_SECONDS), _fixed_clock(date):
            text: str = tokenizer.apply_chat_template(
                messages,
                chat_template=None if template == "chat" else template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **style.arguments,
            )
    except Exception as error:  # templates are untrusted programs, which may raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{name}: the chat template refuses this dialogue ({reason})") from None
    if len(text) > LONGEST_PROMPT:
        raise InputError(
            f"{name}: the chat template renders a dialogue of {len(text):,} characters, more than "
            f"the limit of {LONGEST_PROMPT:,}; use another template, or --style plain"
        )
    return text


@contextmanager
def _fixed_clock(date: str | None) -> Iterator[None]:
    """Let `strftime_now`, a template's only way to the time, tell midnight of `date`."""
    if date is None:
        yield
        return
    from transformers.utils import chat_template_utils

    midnight = datetime.fromisoformat(date)
    original = chat_template_utils.datetime
    chat_template_utils.datetime = SimpleNamespace(now=lambda: midnight)
    try:
        yield
    finally:
        chat_template_utils.datetime = original


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after `seconds` of work, in a main thread.

    The process's CPU time counts, not the clock: a machine may be suspended or busy. An earlier
    timer is kept.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"it takes more than {seconds:g} seconds")

    handler, started = signal.signal(signal.SIGVTALRM, stop), time.process_time()
    left, interval = signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler or signal.SIG_DFL)
        if left:
            rest = max(left - (time.process_time() - started), 1e-3)
            signal.setitimer(signal.ITIMER_VIRTUAL, rest, interval)


def _render_plain(tokenizer: Any, closed: Sequence[Turn], opened: str) -> str:
    parts = [
        turn.text if turn.role == "system" else f"\n\n{_NAMES[turn.role]}: {turn.text}"
        for turn in closed
    ]
    last = "\n\nAssistant:" + (f" {opened}" if opened else "")
    return "".join([_beginning(tokenizer), *parts, last])


def _beginning(tokenizer: Any) -> str:
    """Return the text of the tokens that the tokenizer puts before every text, "" if none."""
    ids = beginning_ids(tokenizer)
    if not ids:
        return ""
    text = "".join(tokenizer.convert_ids_to_tokens(ids))
    is_read_back = tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    return text if is_read_back else BEGINNING


def beginning_ids(tokenizer: Any) -> list[int]:
    """Return the tokens that the tokenizer puts before every text."""
    framed = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    starts = range(len(framed) - len(bare) + 1)
    matches = (i for i in starts if bare and framed[i : i + len(bare)] == bare)
    return list(framed[: next(matches, int(framed[:1] == [tokenizer.bos_token_id]))])
