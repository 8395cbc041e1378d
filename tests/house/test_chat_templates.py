"""Chat templates, of a model or of the user, run in a sandbox with limits."""

import time
from pathlib import Path
from typing import Any

import pytest

from selfcorrect.evaluate.prompts.dialogue import read_style, render
from selfcorrect.evaluate.prompts.stimuli import Turn
from selfcorrect.recipes.foundation.errors import InputError
from tests.support.tiny_models import tiny_tokenizer

TURNS = [Turn("human", "who went ?"), Turn("assistant", "")]
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__['os'] }}",
    "{{ namespace.__init__.__globals__['os'] }}",
    "{{ ('%s' | attr('__class__')).mro() }}",
    "{% set x = messages.append(1) %}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ lipsum.__globals__['os'] }}",
]


@pytest.mark.parametrize("template", ESCAPES)
@pytest.mark.parametrize("own", [False, True], ids=["of the model", "of the user"])
def test_template_cannot_escape_its_sandbox(tmp_path: Path, template: str, own: bool) -> None:
    tokenizer = tiny_tokenizer()
    text = "{% for m in messages %}{{ m['content'] }}{% endfor %}" + template
    style = "chat"
    if own:
        (tmp_path / "own.jinja").write_text(text)
        style = read_style(str(tmp_path / "own.jinja"))
    else:
        tokenizer.chat_template = text
    with pytest.raises(InputError, match="the chat template refuses this dialogue") as caught:
        render(tokenizer, TURNS, style)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
         "more than 0.2 seconds"),
        ("{{ messages[0]['content'] * 1000000 }}", "more than the limit of 4,000,000"),
        ("{{ 1 // 0 }}", "refuses"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses"),
    ],
    ids=["range", "loops", "size", "error", "recursion"],
)  # fmt: skip
def test_excessive_template_is_stopped_in_one_line(
    monkeypatch: pytest.MonkeyPatch, template: str, message: str
) -> None:
    monkeypatch.setattr("selfcorrect.evaluate.prompts.dialogue.TEMPLATE_SECONDS", 0.2)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=message) as caught:
        render(tokenizer, TURNS, "chat")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_time_in_which_nothing_runs_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine may be suspended, or busy with other processes."""
    tokenizer = tiny_tokenizer(chat=True)
    expected, apply = render(tokenizer, TURNS, "chat"), tokenizer.apply_chat_template

    def suspended(*args: Any, **settings: Any) -> Any:
        time.sleep(0.5)
        return apply(*args, **settings)

    monkeypatch.setattr("selfcorrect.evaluate.prompts.dialogue.TEMPLATE_SECONDS", 0.3)
    monkeypatch.setattr(tokenizer, "apply_chat_template", suspended)
    assert render(tokenizer, TURNS, "chat") == expected
