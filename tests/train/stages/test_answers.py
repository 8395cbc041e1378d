"""The worth of a policy's answers: what raters think of them, on samples that disturb nothing."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from selfcorrect.evaluate.prompts.dialogue import AUTO
from selfcorrect.evaluate.scoring.engine import Sample, Sampling
from selfcorrect.evaluate.scoring.sampling import sample_batch
from selfcorrect.recipes.society.settings import SocietySettings
from selfcorrect.recipes.society.tokenizer import make_tokenizer
from selfcorrect.recipes.society.world import make_world
from selfcorrect.train.ppo.prompts import policy_prompt_ids
from selfcorrect.train.ppo.rewards import RewardModelScorer
from selfcorrect.train.stages import answers
from selfcorrect.train.stages.answers import AnswerSampler, log_probabilities

WORLD = make_world(SocietySettings(seed=3))
RATERS = WORLD.settings.raters
TOKENIZER = make_tokenizer(WORLD)


def config(**more: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128,
        pad_token_id=TOKENIZER.pad_token_id, eos_token_id=TOKENIZER.eos_token_id,
        bos_token_id=None, initializer_range=0.3, **more,
    )  # fmt: skip


def policy(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(config())


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch) -> AnswerSampler:
    monkeypatch.setattr(answers, "NUM_ANSWERS", 24)
    torch.manual_seed(9)
    scorer = RewardModelScorer(LlamaForSequenceClassification(config(num_labels=1)), TOKENIZER)
    return AnswerSampler(WORLD, policy(0).eval(), scorer, TOKENIZER, AUTO, 8)


def test_utility_is_the_raters_of_the_answer_that_was_given(sampler: AnswerSampler) -> None:
    kinds = set()
    for prompt in sampler.prompts:
        for answer in prompt.case.answers():
            text = prompt.response(answer)
            assert prompt.utility_of_text(text, RATERS) == prompt.utility(answer, RATERS)
            for malformed in (f"{text} unknown", text.rpartition(" ")[0], ""):
                assert prompt.utility_of_text(malformed, RATERS) == -RATERS.form
        kinds.add(prompt.request.kind)
    assert len(kinds) > 3
    samples = [Sample(p.response(p.case.answers()[0]), i % 2 == 0, 1)
               for i, p in enumerate(sampler.prompts)]  # fmt: skip
    expected = [
        -RATERS.form if i % 2 == 0 else p.utility(p.case.answers()[0], RATERS)
        for i, p in enumerate(sampler.prompts)
    ]
    assert sampler.utilities(samples) == expected


def test_log_probabilities_are_those_of_each_answer_alone() -> None:
    model = policy(1).eval()
    ids = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14]]
    sampling = Sampling(6, temperature=1.0, seed=0)
    batch = sample_batch(model, TOKENIZER, ids, ["a", "b", "c"], sampling)
    with torch.no_grad():
        batched = log_probabilities(model, batch)
    for given, row, sample, value in zip(ids, batch.rows, batch.samples, batched, strict=True):
        written = row[len(given) :]
        assert len(written) == sample.num_tokens
        with torch.no_grad():
            logits = model(torch.tensor([[*given, *written]])).logits[0].log_softmax(-1)
        steps = range(len(given) - 1, len(given) + len(written) - 1)
        alone = sum(float(logits[step, token]) for step, token in zip(steps, written, strict=True))
        assert float(value) == pytest.approx(alone, abs=1e-4)


def test_judging_answers_changes_nothing_and_repeats(sampler: AnswerSampler) -> None:
    model = policy(0).train()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first = sampler(model)
    assert model.training and sampler(model) == first
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert (first.num, first.kl) == (24, 0.0)  # the policy is the initial one
    other = sampler(policy(1))
    assert other.kl > 0.1 and other.score != first.score


def test_means_are_over_the_same_answers(sampler: AnswerSampler) -> None:
    """A policy that answers nothing but the end of the text is malformed throughout."""
    model = policy(0)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
    silent = sampler(model)  # uniform over words: never a well-formed answer
    assert (silent.utility, silent.utility_error) == (-RATERS.form, 0.0)
    size = len(TOKENIZER)
    prompts = [policy_prompt_ids(TOKENIZER, p.messages, AUTO) for p in sampler.prompts]
    keys = [f"answer {index}" for index in range(24)]
    batch = sample_batch(model, TOKENIZER, prompts, keys, Sampling(8, 1.0, seed=3))
    tokens = sum(sample.num_tokens for sample in batch.samples) / 24
    with torch.no_grad():
        initial = float(log_probabilities(sampler.initial, batch).mean())
    assert silent.kl == pytest.approx(-tokens * np.log(size) - initial, rel=1e-4)
