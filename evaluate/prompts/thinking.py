"""Chat templates that let a model think in a block of its own before it answers.

An answer is asked for at once in the template's own form without thoughts: the prompt that it
writes with its switch off (Qwen3, SmolLM3), or else a closed, empty block after the prompt
(DeepSeek-R1). A turn of reasoning is written inside the block. What a template does is found out by
rendering a short dialogue, not by the model's name.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from selfcorrect.evaluate.prompts.dialogue import (
    THOUGHT_TAGS,
    Style,
    Thinking,
    around_content,
    render,
    style_of,
    template_text,
)
from selfcorrect.evaluate.prompts.stimuli import SAMPLE, Turn

SWITCHES = ("enable_thinking", "thinking")  # arguments of templates
_ASKED = [Turn("human", "a")]


def with_thinking(tokenizer: Any, style: Style) -> Style:
    """Return the style with what its template does with thoughts, if it has a block for them.

    An argument of the style that is the template's switch stays as it is: with
    `enable_thinking: false` nothing is written into the block, and reasoning is a part of the
    answer, as with other models.
    """
    if style_of(tokenizer, style) == "plain":
        return style
    template = template_text(tokenizer, style)
    tags = next(
        (pair for pair in THOUGHT_TAGS if pair[0] in template and pair[1] in template), None
    )
    if tags is None:
        return style
    start, end = tags
    switch = next((name for name in SWITCHES if re.search(rf"\b{name}\b", template)), None)

    def prompt(arguments: Mapping[str, Any]) -> str:
        turns = [*_ASKED, Turn("assistant", SAMPLE)]
        return render(tokenizer, turns, replace(style, arguments=arguments))

    def switched(value: bool) -> Mapping[str, Any]:
        return {**style.arguments, switch: value} if switch else style.arguments

    is_given = switch in style.arguments
    on, off = (style.arguments if is_given else switched(value) for value in (True, False))
    prompt_on, prompt_off = prompt(on), prompt(off)
    block = re.compile(rf"(?:{re.escape(start)}(\s*))?{re.escape(end)}(\s*)\Z")
    is_open = re.compile(rf"{re.escape(start)}(\s*)\Z")
    finished = around_content(tokenizer, _ASKED, style)[0]
    closed = block.search(prompt(switched(False))) or block.search(finished)
    opened = is_open.search(prompt_on)
    if not (closed or opened or prompt_on != prompt_off):
        return style  # the template only removes blocks that others have written
    inner, after = (closed[1] or "", closed[2]) if closed else ("\n\n", "\n\n")
    middle = (len(inner) + 1) // 2
    opening, closing = start + inner[:middle], inner[middle:] + end + after
    if opened:  # thoughts end as the prompt begins them
        opening, closing = "", opened[1] + end + after
    if block.search(prompt_off) or not (closed or is_open.search(prompt_off)):
        empty = ""
    elif is_open.search(prompt_off):
        empty = closing
    else:
        empty = start + inner + end + after
    return replace(
        style,
        thinking=Thinking(
            on=None if block.search(prompt_on) else on,
            off=off,
            opening=opening,
            closing=closing,
            empty=empty,
            end=end,
        ),
    )
