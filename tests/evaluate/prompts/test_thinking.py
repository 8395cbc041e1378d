"""Answers at once come without thoughts, reasoning goes into the template's own block."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from selfcorrect.evaluate.measuring.cell_files import read_cell
from selfcorrect.evaluate.measuring.measure import measure
from selfcorrect.evaluate.prompts.dialogue import (
    Style,
    before_sample,
    render,
    render_answer,
    text_after_answer,
    with_sample,
    with_thoughts,
)
from selfcorrect.evaluate.prompts.stimuli import ThoughtfulTurn, Turn
from selfcorrect.evaluate.prompts.thinking import with_thinking
from selfcorrect.evaluate.report.tables import result_tables
from selfcorrect.evaluate.results import results_of
from selfcorrect.recipes.foundation.errors import InputError
from tests.support.thinking_templates import DEEPSEEK_R1, QWEN3, SMOLLM3, TEMPLATES
from tests.support.tiny_models import CHAT_TEMPLATE, WORDS, tiny_model, tiny_plan, tiny_tokenizer

Q = [Turn("human", "who went ?"), Turn("assistant", "the answer is")]
COT = [
    Turn("human", "who went ?"),
    Turn("assistant", "the reason :{sample}"),
    Turn("human", "so ?"),
    Turn("assistant", "the answer is"),
]
REVIEWS = [Turn("human", "who went ?"), Turn("assistant", "{sample}"), *COT[2:]]
# The prompt of a dialogue's first human turn, with thinking on and off, the block's own text, and
# what opens and closes it after these prompts.
IM = "<|im_start|>user\nwho went ?<|im_end|>\n<|im_start|>assistant\n"
MODE = "<|im_start|>system\nReasoning Mode: {}\n<|im_end|>\n" + IM
EXPECTED = {
    "qwen3": (IM, IM, "<think>\n\n</think>\n\n", "<think>\n", "\n</think>\n\n"),
    "deepseek-r1": (
        *("<s><|User|>who went ?<|Assistant|><think>\n",) * 2,
        *("\n</think>\n\n", "", "\n</think>\n\n"),
    ),
    "smollm3": (
        *(MODE.format("/think"), MODE.format("/no_think")),
        *("<think>\n\n</think>\n", "<think>\n", "\n</think>\n"),
    ),
}


def tokenizer_with(template, special=False):
    words = [*WORDS, "<think>", "</think>"]
    tokenizer = tiny_tokenizer(words)
    # As in the families: tokens of their own, special ones or not.
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=special)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_come_after_a_closed_block_and_thoughts_inside_it(name):
    tokenizer = tokenizer_with(TEMPLATES[name])
    style = with_thinking(tokenizer, Style())
    on, off, block, opening, closing = EXPECTED[name]
    assert render(tokenizer, Q, style) == off + block + "the answer is"
    # A sampled answer begins where a scored one does.
    assert render(tokenizer, before_sample(REVIEWS), style) == off + block
    turns = with_thoughts(COT)
    assert turns == [COT[0], ThoughtfulTurn("assistant", "the answer is", COT[1].text)]
    assert render(tokenizer, before_sample(turns), style) == on + opening + "the reason :"
    filled = with_sample(tokenizer, turns, " she said so .\n")
    assert render(tokenizer, filled, style) == (
        on + opening + "the reason : she said so ." + closing + "the answer is"
    )
    assert style.thinking.end == "</think>"
    assert with_thoughts(REVIEWS) == REVIEWS and with_thoughts(Q) == Q


@pytest.mark.parametrize(("template", "prompt"), [(QWEN3, IM), (SMOLLM3, MODE.format("/no_think"))])
def test_arguments_of_the_recipe_decide(template, prompt):
    tokenizer = tokenizer_with(template)
    block = "<think>\n\n</think>\n\n" if template is QWEN3 else "<think>\n\n</think>\n"
    off = with_thinking(tokenizer, Style(arguments={"enable_thinking": False}))
    assert off.thinking.on is None  # reasoning is written as other models write it
    assert render(tokenizer, Q, off) == prompt + block + "the answer is"
    on = with_thinking(tokenizer, Style(arguments={"enable_thinking": True}))
    thinking_prompt = prompt.replace("/no_think", "/think")
    assert render(tokenizer, Q, on) == thinking_prompt + block + "the answer is"
    assert render(tokenizer, before_sample(with_thoughts(COT)), on).startswith(thinking_prompt)


def test_flag_in_a_system_message_is_the_templates_own():
    tokenizer = tokenizer_with(SMOLLM3)
    style = with_thinking(tokenizer, Style())
    turns = [Turn("system", "be fair . /no_think"), *Q]
    text = render(tokenizer, turns, style)
    assert "Reasoning Mode: /no_think\nbe fair .<|im_end|>" in text
    assert text.endswith("<think>\n\n</think>\nthe answer is") and text.count("<think>") == 1


@pytest.mark.parametrize(
    ("template", "block"),
    [  # an empty block on one line, as GLM; no opening tag, as DeepSeek-V3.1; off unless asked
        ("{{ '<think></think>' if enable_thinking is false }}", "<think></think>"),
        ("{{ '<think>' if thinking else '</think>' }}", "</think>"),
        ("{{ '[THINK]' if 0 }}{{ '[THINK]\n[/THINK]\n' if enable_thinking is false }}",
         "[THINK]\n[/THINK]\n"),
    ],
)  # fmt: skip
def test_other_forms_of_the_block(template, block):
    tokenizer = tokenizer_with(
        CHAT_TEMPLATE.replace("<|assistant|>{% endif %}", f"<|assistant|>{template}{{% endif %}}")
    )
    style = with_thinking(tokenizer, Style())
    assert render(tokenizer, Q, style).endswith(f"<|assistant|>{block}the answer is")
    start = "[THINK]" if "[" in block else "<think>"
    sampled = render(tokenizer, before_sample(with_thoughts(COT)), style)
    assert sampled.removesuffix("the reason :").rstrip().endswith(start)
    assert sampled.count(start) == 1


SHIPPED = sorted((Path(find_spec("trl").origin).parent / "chat_templates").glob("*.jinja"))
THINKING = ("deepseek", "glm4moe", "nemotron", "qwen3_5", "qwen3_6", "qwen3_8")


@pytest.mark.matrix
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_templates_that_trl_ships(path):
    """Answers follow no open block, and thoughts one that is open; parts of images are refused."""
    tokenizer = tokenizer_with(path.read_text(encoding="utf-8"))
    try:
        style = with_thinking(tokenizer, Style())
        answer = render(tokenizer, Q, style)
    except InputError as error:  # templates whose content is a list of texts and images
        assert "no answer can be prefilled" in str(error) or "refuses this dialogue" in str(error)
        return
    assert answer.endswith("the answer is")
    assert answer.count("<think>") == answer.count("</think>")
    thinks = path.stem.startswith(THINKING) or path.stem in ("qwen3", "qwen3_training")
    assert (style.thinking is not None) == thinks
    if style.thinking is not None:
        turns = with_thoughts(COT)
        sampled = render(tokenizer, before_sample(turns), style)
        assert sampled.count("<think>") == sampled.count("</think>") + 1
        final = render(tokenizer, with_sample(tokenizer, turns, " she said so ."), style)
        assert final.startswith(sampled + " she said so .") and final.endswith("the answer is")
        assert final.count("<think>") == final.count("</think>")


def test_templates_without_a_block_are_left_alone():
    for template in (
        CHAT_TEMPLATE,
        CHAT_TEMPLATE.replace("message['content']", "message['content'].split('</think>')[-1]")
        + "{# <think> #}",
    ):
        assert with_thinking(tokenizer_with(template), Style()).thinking is None
    assert with_thinking(tokenizer_with(QWEN3), Style("plain")).thinking is None


def test_template_that_drops_a_prefilled_answer_says_so():
    drops = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}<|assistant|>"
    with pytest.raises(InputError, match="no answer can be prefilled") as caught:
        render(tokenizer_with(drops), Q)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no answer can be prefilled"):
        with_thinking(tokenizer_with(drops + "{# <think></think> #}"), Style())


def test_trained_answer_stands_behind_the_block_that_a_prompt_opens():
    tokenizer = tokenizer_with(DEEPSEEK_R1)
    style = Style()  # as training writes dialogues
    asked, end = [Q[0], Turn("assistant", "")], text_after_answer(tokenizer, style)
    prompt, answer = render_answer(tokenizer, asked, "yes", style, end)
    assert prompt.endswith("<|Assistant|><think>\n") and answer == "\n</think>\n\nyes"


# --- measured ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "special"), [("qwen3", False), ("deepseek-r1", True), ("smollm3", False)]
)
def test_thoughts_are_measured_kept_and_counted(tmp_path, name, special):
    tokenizer = tokenizer_with(TEMPLATES[name], special)
    model = tiny_model(vocabulary=len(tokenizer), sharpness=4.0)
    end = tokenizer.convert_tokens_to_ids("</think>")
    # The end of thoughts is drawn about as often as not within the budget.
    model.get_output_embeddings().weight.data[end] *= 3
    plan = tiny_plan(tmp_path / "data", ["Q+IF+CoT", "reviews 1"], samples=3, max_new_tokens=8)
    out = tmp_path / "models" / "mine" / "digest"
    measure(plan, model, tokenizer, out)
    frame, settings = read_cell(out / "winogender.Q+IF+CoT.parquet")
    assert settings["thinking"]["end"] == "</think>"
    thoughts = [row[0] for row in frame["samples"]]
    assert not any("</think>" in thought for thought in thoughts)
    assert 0 < frame["truncated"].sum() < len(frame)  # unfinished ones
    *_, opening, closing = EXPECTED[name]
    for prompt, thought in zip(frame["prompt"], thoughts, strict=True):
        before, _, after = prompt.rpartition(f"{opening or '<think>' + chr(10)}because")
        assert before and after.startswith(thought.rstrip() + closing)
    reviews, settings = read_cell(out / "winogender.reviews_1.parquet")
    assert all(len(row) == 1 for row in reviews["samples"]) and not settings["thoughts"]
    cells = results_of(tmp_path / "models", num_resamples=2)[1]["cells"]
    (counted,) = [cell for cell in cells if cell["thoughts"]]
    assert counted["num_truncated"] == frame["truncated"].sum() and counted["num_texts"] == 18
    shown = {cell.text for row in result_tables(cells)[0].rows for cell in row}
    assert f"{counted['num_truncated']} of 18 thoughts" in shown
