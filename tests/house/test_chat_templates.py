"""Chat templates, of a model or of the user, run in a sandbox with limits."""

from pathlib import Path

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
