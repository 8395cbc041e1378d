"""Render dialogues, lists of turns of which the last is open, as the text a model expects."""

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
_MARK = "\ue000open\ue000"  # replaces the open text; occurs in no template and no item


def read_style(style: str) -> str:
    """Return a style for `render`: one of STYLES, or the text of the Jinja file that it names."""
    if style in STYLES:
        return style
    path = Path(style)
    if path.suffix not in (".jinja", ".jinja2"):
        raise InputError(f"style {style!r}: use {', '.join(STYLES)}, or a chat template (*.jinja)")
    template = read_text(path)
    if "messages" not in template:
        raise InputError(f"{path}: not a chat template (it does not use `messages`)")
    return template


def render(tokenizer: Any, turns: Sequence[Turn], style: str = "auto") -> str:
    """Return the dialogue as one string that ends inside the last, open assistant turn.

    Style "chat" uses the tokenizer's chat template, "plain" the paper's `Human:` and `Assistant:`,
    "auto" the template if there is one, else plain; any other style is the text of a chat template.
    The string holds all special tokens, including the beginning-of-text token of a plain dialogue
    if the tokenizer would add one, so tokenise it with `add_special_tokens=False`.

    Raises InputError if the chat template is missing, or if it refuses the turns.
    """
    if not turns or turns[-1].role != "assistant":
        raise ValueError("the last turn of a dialogue must be the open assistant turn")
    resolved = style_of(tokenizer, style)
    if resolved == "plain":
        return _render_plain(tokenizer, turns[:-1], turns[-1].text)
    template = None if resolved == "chat" else resolved
    return _render_chat(tokenizer, turns[:-1], turns[-1].text, template)


def style_of(tokenizer: Any, style: str = "auto") -> str:
    """Resolve "auto" for this tokenizer; InputError for a missing chat template."""
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if style == "auto":
        return "chat" if has_template else "plain"
    if style == "chat" and not has_template:
        name = getattr(tokenizer, "name_or_path", "") or "the model"
        raise InputError(f"{name}: the tokenizer has no chat template; use the plain style")
    return style


def stop_text(tokenizer: Any, style: str = "auto") -> str | None:
    """Return the string that ends a sample: in plain style, the start of the human's next turn."""
    return _HUMAN_AGAIN if style_of(tokenizer, style) == "plain" else None


def before_sample(turns: Sequence[Turn]) -> list[Turn]:
    """Return the dialogue up to the next text that the model samples, or all of it."""
    for index, turn in enumerate(turns):
        if turn.text.endswith(SAMPLE):
            return [*turns[:index], Turn(turn.role, turn.text.removesuffix(SAMPLE))]
    return list(turns)


def with_sample(tokenizer: Any, turns: Sequence[Turn], sample: str) -> list[Turn]:
    """Return the dialogue with the model's sample filled in at the first marker.

    Special tokens are removed from `sample`, so that a sample can neither end its turn nor open
    the next one. Trailing space is removed too.
    """
    special = _special_tokens(tokenizer)
    # Removing a token can create another from the parts around it.
    while present := [token for token in special if token in sample]:
        for token in present:
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
    """Return the template's prompt for a new assistant turn, and the open text after it.

    Templates end that prompt with or without the white space that precedes a turn's content, so
    a marked turn is rendered to find where content starts. If a template adds more to the prompt
    than to a finished turn (a reasoning tag), the addition is kept.
    """
    prompt = _apply(tokenizer, closed, template, add_generation_prompt=True)
    if not opened:
        return prompt
    marked = [*closed, Turn("assistant", _MARK)]
    finished = _apply(tokenizer, marked, template, add_generation_prompt=False)
    before, mark, _ = finished.partition(_MARK)
    return (before if mark and before.startswith(prompt) else prompt) + opened


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
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after `seconds`, in a main thread; keep an earlier timer."""
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
    """Return the beginning-of-text token if the tokenizer puts one before every text, else ""."""
    begin: str | None = tokenizer.bos_token
    if begin and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        return begin
    return ""
