"""Ids trained on are ids measured on, for tokenizers and chat templates of every form."""

import pytest
from transformers import LlamaConfig, LlamaForSequenceClassification

from selfcorrect.evaluate.prompts.dialogue import Style, before_sample, render
from selfcorrect.evaluate.prompts.stimuli import SAMPLE, Turn
from selfcorrect.evaluate.prompts.tokenized import continuations, token_ids, turn_end
from selfcorrect.evaluate.scoring.packed import PackedEngine
from selfcorrect.evaluate.scoring.sampling import end_tokens
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.train.feedback.feedback import Preference, pair_ids
from selfcorrect.train.ppo.prompts import policy_prompt_ids
from selfcorrect.train.ppo.rewards import RewardModelScorer
from selfcorrect.train.stages.base import preferred_rows
from selfcorrect.train.stages.policy import NOT_READ, fitting_prompts, scorable_prompts
from tests.support.tiny_models import tiny_model
from tests.support.tokenizer_forms import ANSWER, QUESTION, TEMPLATES, TOKENIZERS, tokenizer_with

STYLE = Style("auto", {"enable_thinking": True}, "2024-07-26")
USER = [{"role": "user", "content": QUESTION}]
DIALOGUES = {
    "one turn": USER,
    "later turn": [*USER, {"role": "assistant", "content": "he was ."}, *USER],
    "open turn": [*USER, {"role": "assistant", "content": "so"}],
}


def turns_of(messages, text=""):
    roles = {"user": "human", "assistant": "assistant"}
    turns = [Turn(roles[m["role"]], m["content"]) for m in messages]
    if turns[-1].role == "human":
        turns.append(Turn("assistant", ""))
    return [*turns[:-1], Turn("assistant", turns[-1].text + text)]


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocabulary=512)


@pytest.fixture(scope="module")
def classifier():
    config = LlamaConfig(
        vocab_size=512, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_labels=1,
    )  # fmt: skip
    return LlamaForSequenceClassification(config)


@pytest.mark.parametrize("dialogue", DIALOGUES)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_trained_on_are_ids_measured_on(name, template, dialogue, model, classifier):
    tokenizer, messages = tokenizer_with(name, template), DIALOGUES[dialogue]
    pair = Preference(messages, ANSWER, "he was .")
    sampled_from = policy_prompt_ids(tokenizer, messages, STYLE)

    # Evaluation samples from the same ids as PPO.
    engine = PackedEngine(model, tokenizer)
    asked = before_sample([*turns_of(messages, SAMPLE), *turns_of(USER)])
    assert engine.check_room([render(tokenizer, asked, STYLE)], 4) == [sampled_from]

    # Fine-tuning begins with them, and learns an answer up to the end of its turn.
    (row,) = preferred_rows(tokenizer, [pair], STYLE)
    start = len(sampled_from)
    assert row["input_ids"][:start] == sampled_from
    assert row["completion_mask"] == [0] * start + [1] * (len(row["input_ids"]) - start)
    completion = row["input_ids"][start:]
    end = turn_end(tokenizer, STYLE)
    assert completion[-len(end.ids) :] == end.ids and completion[: -len(end.ids)]

    # The answer stands where evaluation places it.
    text = "" if dialogue != "open turn" else " "
    placed = render(tokenizer, turns_of(messages, text + ANSWER), STYLE)
    measured = token_ids(tokenizer, [placed])[0]
    learned = [*sampled_from, *completion[: -len(end.ids)]]
    assert tokenizer.decode(learned) == tokenizer.decode(measured)
    merges = measured[:start] != sampled_from  # across the boundary: ":" and " " of plain bytes
    assert learned == measured or merges
    if template != "reasoning in the prompt":  # whose "<think>\n" merges with the end of the block
        colon = token_ids(tokenizer, [":"])[0]
        assert merges == (name == "bytes" and sampled_from[-1:] == colon)
    (options,) = continuations(tokenizer, [(placed, (" b", " a"))])
    assert list(options[0].tokens[: start - merges]) == sampled_from[: start - merges]

    # The reward model reads PPO's completions as it was fitted on the pairs.
    scorer = RewardModelScorer(classifier, tokenizer, style=STYLE)
    pairs = pair_ids(tokenizer, [pair], STYLE)[0]
    read = scorer.token_ids([messages, messages], [completion, completion[: -len(end.ids)]])
    assert read == [pairs["chosen_ids"], learned]
    assert pairs["chosen_ids"] == [*learned, *end.ids, *end.rest]
    # An end of another kind is read as the template's own.
    scorer.end_ids.add(tokenizer.pad_token_id)
    other_end = [*completion[: -len(end.ids)], tokenizer.pad_token_id]
    assert scorer.token_ids([messages], [other_end]) == [pairs["chosen_ids"]]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_nothing_is_added_behind_a_text(name, template):
    tokenizer = tokenizer_with(name, template)
    bare = tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    framed = tokenizer(QUESTION)["input_ids"]
    ids = policy_prompt_ids(tokenizer, QUESTION, STYLE)
    assert ids[len(ids) - len(bare) :] == bare and framed[: len(ids)] == ids


@pytest.mark.parametrize("template", ["none", "zephyr", "space before content", "end of turn"])
@pytest.mark.parametrize("name", ["pieces, first", "pieces, always", "pieces, legacy", "bytes"])
def test_reward_model_of_another_vocabulary_reads_its_own_pairs(name, template, classifier):
    """The policy's channel is left out, its end token is not, and no space is lost or added."""
    tokenizer, policy = tokenizer_with(name, template), tokenizer_with("words", "channel")
    scorer = RewardModelScorer(classifier, tokenizer, policy, style=STYLE)
    for messages in DIALOGUES.values():
        pair = Preference(messages, ANSWER, "he was .")
        prompt = policy_prompt_ids(policy, messages, STYLE)
        completion = pair_ids(policy, [pair], STYLE)[0]["chosen_ids"][len(prompt) :]
        (read,) = scorer.token_ids([messages], [completion])
        assert read == pair_ids(tokenizer, [pair], STYLE)[0]["chosen_ids"]


def test_reward_model_without_an_end_token_reads_up_to_its_separator(classifier):
    """As BERT's: its texts are framed by [CLS] and [SEP], and it names no end of a text."""
    encoder = tokenizer_with("words, CLS and SEP", "none")
    encoder.bos_token = encoder.eos_token = None
    encoder.cls_token, encoder.sep_token = "[CLS]", "[SEP]"
    policy = tokenizer_with("words", "end of turn")
    pair = Preference(USER, ANSWER, "he was .")
    (read,) = pair_ids(encoder, [pair], STYLE)
    words = encoder.tokenize(f"\n\nHuman: {QUESTION}\n\nAssistant: {ANSWER}")
    assert encoder.convert_ids_to_tokens(read["chosen_ids"]) == ["[CLS]", *words, "[SEP]"]
    completion = preferred_rows(policy, [pair], STYLE)[0]
    ids = [i for i, m in zip(*completion.values(), strict=True) if m]
    scorer = RewardModelScorer(classifier, encoder, policy, style=STYLE)
    assert scorer.token_ids([USER], [ids]) == [read["chosen_ids"]]
    encoder.sep_token = None
    assert turn_end(encoder, STYLE).ids == []


@pytest.mark.parametrize("name", ["words", "bytes"])
def test_reward_model_of_the_same_vocabulary_reads_turns_of_its_own_template(name, classifier):
    """The policy's channel is no part of the answer; a space before a stop is."""
    policy, tokenizer = tokenizer_with("words", "channel"), tokenizer_with(name, "zephyr")
    policy.clean_up_tokenization_spaces = True
    pair = Preference(USER, ANSWER, "he was .")
    row = preferred_rows(policy, [pair], STYLE)[0]
    ids = [i for i, m in zip(*row.values(), strict=True) if m]
    scorer = RewardModelScorer(classifier, tokenizer, policy, style=STYLE)
    assert scorer.token_ids([USER], [ids]) == [pair_ids(tokenizer, [pair], STYLE)[0]["chosen_ids"]]


def test_prompt_that_fits_only_without_its_beginning_token_is_left_out():
    tokenizer = tokenizer_with("words, beginning and end token", "none")
    length = len(policy_prompt_ids(tokenizer, USER, STYLE))
    assert length == len(tokenizer.tokenize("Human: Assistant: \n\n \n\n" + QUESTION)) + 1
    kept, left_out = fitting_prompts([USER], [length], length + 4, 4)
    assert (kept, left_out) == ([USER], {})
    with pytest.raises(InputError, match=f"the shortest has {length} tokens"):
        fitting_prompts([USER], [length], length + 3, 4)


def test_prompt_whose_end_of_turn_outgrows_the_reward_model_is_left_out(classifier, monkeypatch):
    """The policy writes one end token, the reward model reads the line break after it too."""
    tokenizer = tokenizer_with("words", "end of turn")
    scorer = RewardModelScorer(classifier, tokenizer, style=STYLE)
    prompt = policy_prompt_ids(tokenizer, USER, STYLE)
    completion = [*token_ids(tokenizer, [ANSWER])[0], turn_end(tokenizer, STYLE).ids[-1]]
    longest = len(scorer.token_ids([USER], [completion])[0])
    assert longest == len(prompt) + len(completion) + 1
    monkeypatch.setattr(classifier.config, "max_position_embeddings", longest)
    assert scorable_prompts([USER], scorer, len(completion)) == ([USER], {})
    longer = [{"role": "user", "content": f"{QUESTION} {QUESTION}"}]
    assert scorable_prompts([longer, USER], scorer, len(completion)) == ([USER], {NOT_READ: 1})
    scorer([USER], [""], [completion])
    monkeypatch.setattr(classifier.config, "max_position_embeddings", longest - 1)
    with pytest.raises(InputError, match=f"context of {longest - 1}"):
        scorable_prompts([USER], scorer, len(completion))


@pytest.mark.parametrize(
    ("template", "end"), [("end of turn", "<end_of_turn>"), ("channel", "<|return|>"), ("none", "")]
)
def test_end_of_the_templates_turn_ends_a_sample(model, template, end):
    """Also if generation settings and tokenizer name another token."""
    tokenizer = tokenizer_with("words", template)
    named = {tokenizer.eos_token_id, model.generation_config.eos_token_id}
    added = {tokenizer.convert_tokens_to_ids(end)} if end else set()
    assert end_tokens(model, tokenizer) == named | added
