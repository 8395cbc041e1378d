"""Dialogues as text: a list of turns, the last one open, written the way a model expects it."""

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selfcorrect.evaluate.prompts.stimuli import SAMPLE, Turn
from selfcorrect.recipes.foundation.atomic_files import read_text
from selfcorrect.recipes.foundation.errors import InputError

STYLES = ("auto", "chat", "plain")

_ROLES = {"system": "system", "human": "user", "assistant": "assistant"}
_NAMES = {"human": "Human", "assistant": "Assistant"}
_HUMAN_AGAIN = "\n\nHuman:"
LONGEST_PROMPT = 4_000_000  # characters; no context holds a tenth of it
TEMPLATE_SECONDS = 10.0
_MARK = "\ue000open\ue000"  # stands in for the open text; no template and no item holds it


def read_style(style: str) -> str:
    """A style as `render` takes it: one of STYLES, or the text of the Jinja file named."""
    if style in STYLES:
        return style
    path = Path(style)
    if path.suffix not in (".jinja", ".jinja2"):
        raise InputError(f"style {style!r}: give {', '.join(STYLES)}, or a chat template (*.jinja)")
    template = read_text(path)
    if "messages" not in template:
        raise InputError(f"{path}: not a chat template: it never speaks of `messages`")
    return template


def render(tokenizer: Any, turns: Sequence[Turn], style: str = "auto") -> str:
    """The dialogue as one string that ends inside the last, open assistant turn.

    "chat" writes the tokenizer's chat template, "plain" the paper's `Human:` and `Assistant:`,
    "auto" the template where there is one and plain text otherwise; any other style is itself a
    chat template, as text. All special tokens stand in
    the text, the beginning-of-text token of a plain dialogue included (where the tokenizer would
    add one by itself), so the result is tokenised with `add_special_tokens=False`.

    Raises InputError when a template is demanded and there is none, or when it refuses the turns.
    """
    if not turns or turns[-1].role != "assistant":
        raise ValueError("a dialogue to render ends in an open assistant turn")
    resolved = style_of(tokenizer, style)
    if resolved == "plain":
        return _render_plain(tokenizer, turns[:-1], turns[-1].text)
    template = None if resolved == "chat" else resolved
    return _render_chat(tokenizer, turns[:-1], turns[-1].text, template)


def style_of(tokenizer: Any, style: str = "auto") -> str:
    """What "auto" means for this tokenizer; InputError for a missing chat template."""
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if style == "auto":
        return "chat" if has_template else "plain"
    if style == "chat" and not has_template:
        name = getattr(tokenizer, "name_or_path", "") or "the model"
        raise InputError(f"{name}: its tokenizer has no chat template; use the plain style")
    return style


def stop_text(tokenizer: Any, style: str = "auto") -> str | None:
    """What ends a sample besides an end token: in plain text, the model taking the human's turn."""
    return _HUMAN_AGAIN if style_of(tokenizer, style) == "plain" else None


def before_sample(turns: Sequence[Turn]) -> list[Turn]:
    """The dialogue up to where the model next writes; without such a place, all of it."""
    for index, turn in enumerate(turns):
        if turn.text.endswith(SAMPLE):
            return [*turns[:index], Turn(turn.role, turn.text.removesuffix(SAMPLE))]
    return list(turns)


def with_sample(tokenizer: Any, turns: Sequence[Turn], sample: str) -> list[Turn]:
    """The dialogue with the model's own text in the first place that waits for one.

    What the tokenizer would read as special tokens is taken out of `sample`, wherever it came
    from: a sample must not be able to end its turn, or open the next. Trailing space goes too.
    """
    special = _special_tokens(tokenizer)
    while found := [token for token in special if token in sample]:  # taking one out can join two
        for token in found:
            sample = sample.replace(token, "")
    filled = list(turns)
    for index, turn in enumerate(turns):
        if turn.text.endswith(SAMPLE):
            filled[index] = Turn(turn.role, (turn.text.removesuffix(SAMPLE) + sample).rstrip())
            break
    return filled


def _special_tokens(tokenizer: Any) -> set[str]:
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}


def _render_chat(tokenizer: Any, closed: Sequence[Turn], opened: str, template: str | None) -> str:
    """The template's prompt for a new assistant turn, then the open text.

    Templates end that prompt with or without the white space that they write before a turn's
    content. So the content's true place is looked up by rendering a marked turn. A template that
    adds more to the prompt than to a finished turn (a reasoning tag) keeps what it adds.
    """
    prompt = _apply(tokenizer, closed, template, add_generation_prompt=True)
    if not opened:
        return prompt
    marked = [*closed, Turn("assistant", _MARK)]
    finished = _apply(tokenizer, marked, template, add_generation_prompt=False)
    before, found, _ = finished.partition(_MARK)
    return (before if found and before.startswith(prompt) else prompt) + opened


def _apply(
    tokenizer: Any, turns: Sequence[Turn], template: str | None, *, add_generation_prompt: bool
) -> str:
    messages = [{"role": _ROLES[turn.role], "content": turn.text} for turn in turns]
    name = getattr(tokenizer, "name_or_path", "") or "the model"
    try:
        with _time_limit(TEMPLATE_SECONDS):
            text: str = tokenizer.apply_chat_template(
                messages,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
    except Exception as error:  # a template is a stranger's program: it may raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{name}: the chat template refuses this dialogue ({reason})") from None
    if len(text) > LONGEST_PROMPT:
        raise InputError(
            f"{name}: the chat template makes {len(text):,} characters of one dialogue, more than "
            f"the limit of {LONGEST_PROMPT:,}; use another template, or --style plain"
        )
    return text


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError inside after so long, in a main thread; a timer set before goes on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"it takes more than {seconds:g} seconds")

    handler, started = signal.signal(signal.SIGALRM, stop), time.monotonic()
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)
        if left:
            rest = max(left - (time.monotonic() - started), 1e-3)
            signal.setitimer(signal.ITIMER_REAL, rest, interval)


def _render_plain(tokenizer: Any, closed: Sequence[Turn], opened: str) -> str:
    parts = [
        turn.text if turn.role == "system" else f"\n\n{_NAMES[turn.role]}: {turn.text}"
        for turn in closed
    ]
    last = "\n\nAssistant:" + (f" {opened}" if opened else "")
    return "".join([_beginning(tokenizer), *parts, last])


def _beginning(tokenizer: Any) -> str:
    """The beginning-of-text token, if the tokenizer puts one before every text."""
    begin: str | None = tokenizer.bos_token
    if begin and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        return begin
    return ""
