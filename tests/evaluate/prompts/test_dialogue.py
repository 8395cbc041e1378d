"""Dialogues are written as the model's template, or the plain style, has them."""

import pytest

from selfcorrect.evaluate.prompts.dialogue import before_sample, render, stop_text, with_sample
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


def test_an_empty_open_turn_leaves_the_space_to_the_options():
    assert render(tiny_tokenizer(), [ONE[0], Turn("assistant", "")]).endswith("\n\nAssistant:")


def test_plain_style_writes_the_beginning_token_where_the_tokenizer_adds_one():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", None, [("<s>", 1)])
    text = render(tokenizer, ONE)
    assert text.startswith("<s>\n\nHuman:")
    written = tokenizer(text, add_special_tokens=False)["input_ids"]
    added = tokenizer(text.removeprefix("<s>"))["input_ids"]
    assert written == added


def test_the_chat_template_is_used_where_there_is_one():
    text = render(tiny_tokenizer(chat=True), COT)
    assert text == (
        "<s><|user|>who is fair ?</s><|assistant|>the reason : {sample}</s>"
        "<|user|>the answer ?</s><|assistant|>the answer is"
    )


def test_the_open_text_stands_where_the_template_would_put_it():
    spaced = with_template(
        "{% for m in messages %}{{ m.role }} : {{ m.content }} </s> {% endfor %}"
        "{% if add_generation_prompt %}assistant :{% endif %}"
    )
    assert render(spaced, ONE) == "user : who is fair ? </s> assistant : the answer is"
    assert render(spaced, [ONE[0], Turn("assistant", "")]).endswith("</s> assistant :")


def test_what_a_template_adds_to_the_generation_prompt_is_kept():
    reasoning = with_template(
        CHAT_TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|>think {% endif %}")
    )
    assert render(reasoning, ONE).endswith("<|assistant|>think the answer is")


def test_a_missing_or_refusing_template_is_one_clear_line():
    with pytest.raises(InputError, match="no chat template"):
        render(tiny_tokenizer(), ONE, "chat")
    with pytest.raises(InputError, match=r"refuses this dialogue.*no such role"):
        render(with_template("{{ raise_exception('no such role') }}"), ONE)


def test_the_sample_is_asked_for_before_and_put_in_after():
    assert before_sample(COT) == [COT[0], Turn("assistant", "the reason : ")]
    filled = with_sample(tiny_tokenizer(), COT, "she said so . \n")
    assert filled == [COT[0], Turn("assistant", "the reason : she said so ."), *COT[2:]]
    assert before_sample(ONE) == with_sample(tiny_tokenizer(), ONE, "unused") == ONE


def test_a_sample_cannot_smuggle_in_special_tokens():
    filled = with_sample(tiny_tokenizer(), COT, "yes </s><|user|>no <|assistant|>")
    assert filled[1].text == "the reason : yes no"
    filled = with_sample(tiny_tokenizer(), COT, "yes <</s>/s>")
    assert filled[1].text == "the reason : yes"


def test_only_plain_dialogues_need_a_stop_text():
    assert stop_text(tiny_tokenizer()) == "\n\nHuman:"
    assert stop_text(tiny_tokenizer(chat=True)) is None
