"""Dialogues are rendered by the model's template or in the plain style."""

import pytest

from selfcorrect.evaluate.prompts.dialogue import (
    AUTO,
    Style,
    before_sample,
    reads_clock,
    render,
    render_answer,
    stop_text,
    text_after_answer,
    with_sample,
)
from selfcorrect.evaluate.prompts.stimuli import Turn
from selfcorrect.recipes.foundation.errors import InputError
from tests.support.tiny_models import CHAT_TEMPLATE, tiny_tokenizer

ONE = [Turn("human", "who is fair ?"), Turn("assistant", "the answer is")]
COT = [
    Turn("human", "who is fair ?"),
    Turn("assistant", "the reason : {sample}"),
    Turn("human", "the answer ?"),
    Turn("assistant", "the answer is"),
]


def with_template(template: str):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_plain_style_is_the_papers():
    text = "\n\nHuman: who is fair ?\n\nAssistant: the answer is"
    assert render(tiny_tokenizer(), ONE) == text
    assert render(tiny_tokenizer(chat=True), ONE, "plain") == text


def test_empty_open_turn_ends_without_a_space():
    assert render(tiny_tokenizer(), [ONE[0], Turn("assistant", "")]).endswith("\n\nAssistant:")


def test_plain_style_has_the_beginning_token_that_the_tokenizer_adds():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", None, [("<s>", 1)])
    text = render(tokenizer, ONE)
    assert text.startswith("<s>\n\nHuman:")
    written = tokenizer(text, add_special_tokens=False)["input_ids"]
    added = tokenizer(text.removeprefix("<s>"))["input_ids"]
    assert written == added


def test_chat_template_is_used_if_there_is_one():
    text = render(tiny_tokenizer(chat=True), COT)
    assert text == (
        "<s><|user|>who is fair ?</s><|assistant|>the reason : {sample}</s>"
        "<|user|>the answer ?</s><|assistant|>the answer is"
    )


def test_open_text_is_where_the_template_puts_content():
    spaced = with_template(
        "{% for m in messages %}{{ m.role }} : {{ m.content }} </s> {% endfor %}"
        "{% if add_generation_prompt %}assistant :{% endif %}"
    )
    assert render(spaced, ONE) == "user : who is fair ? </s> assistant : the answer is"
    assert render(spaced, [ONE[0], Turn("assistant", "")]).endswith("</s> assistant :")


def test_template_additions_to_the_generation_prompt_are_kept():
    reasoning = with_template(
        CHAT_TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|>think {% endif %}")
    )
    assert render(reasoning, ONE).endswith("<|assistant|>think the answer is")


def test_answers_stand_where_the_template_puts_them_and_samples_begin_at_its_prompt():
    channel = with_template(
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}a :{% endif %}"
        "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    asked = "<|user|>who is fair ?</s><|assistant|>"
    assert render(channel, [ONE[0], Turn("assistant", "")]) == asked + "a :"
    assert render(channel, ONE) == asked + "a :the answer is"
    assert render(channel, [ONE[0], Turn("assistant", "{sample}")]) == asked
    end = text_after_answer(channel, AUTO)
    assert end == "</s>"
    assert render_answer(channel, [ONE[0], Turn("assistant", "")], "yes", AUTO, end) == (
        asked,
        "a :yes",
    )
    assert render_answer(channel, ONE, "yes", AUTO, end) == (asked + "a :the answer is", " yes")


def test_answer_is_the_templates_own_turn():
    """Also where the template moves or cuts what an answer holds."""
    splits = with_template(
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}a {% endif %}"
        "{{ m.content.replace('a ', '') | trim }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    end = text_after_answer(splits, AUTO)
    asked = [ONE[0], Turn("assistant", "")]
    assert render_answer(splits, asked, " a yes ", AUTO, end)[1] == "a yes"


def test_date_of_a_template_is_that_of_the_style():
    dated = with_template("{{ strftime_now('%d %b %Y %H') }}" + CHAT_TEMPLATE)
    assert reads_clock(dated, AUTO) and not reads_clock(dated, Style("plain"))
    assert render(dated, ONE, Style("auto", {}, "2024-07-26")).startswith("26 Jul 2024 00<s>")
    assert not render(dated, ONE).startswith("26 Jul 2024")  # the clock goes on
    assert not reads_clock(tiny_tokenizer(chat=True), AUTO)
    assert reads_clock(tiny_tokenizer(), Style("{{ strftime_now('%d') }}{{ messages }}"))


def test_missing_or_refusing_template_is_a_one_line_error():
    with pytest.raises(InputError, match="no chat template"):
        render(tiny_tokenizer(), ONE, "chat")
    with pytest.raises(InputError, match=r"refuses this dialogue.*no such role"):
        render(with_template("{{ raise_exception('no such role') }}"), ONE)


def test_sample_is_asked_for_and_filled_in_at_its_marker():
    assert before_sample(COT) == COT[:2]
    assert render(tiny_tokenizer(), before_sample(COT)).endswith("\n\nAssistant: the reason : ")
    filled = with_sample(tiny_tokenizer(), COT, "she said so . \n")
    assert filled == [COT[0], Turn("assistant", "the reason : she said so ."), *COT[2:]]
    assert before_sample(ONE) == with_sample(tiny_tokenizer(), ONE, "unused") == ONE


def test_special_tokens_are_removed_from_samples():
    filled = with_sample(tiny_tokenizer(), COT, "yes </s><|user|>no <|assistant|>")
    assert filled[1].text == "the reason : yes no"
    filled = with_sample(tiny_tokenizer(), COT, "yes <</s>/s>")
    assert filled[1].text == "the reason : yes"


def test_only_plain_dialogues_need_a_stop_text():
    assert stop_text(tiny_tokenizer()) == "\n\nHuman:"
    assert stop_text(tiny_tokenizer(chat=True)) is None
