"""PackedEngine: scores equal plain forwards, and samples do not depend on the batch."""

import math

import numpy as np
import pytest
import torch

from selfcorrect.evaluate.prompts.tokenized import PromptTooLong, continuations
from selfcorrect.evaluate.scoring import draws
from selfcorrect.evaluate.scoring.engine import Sampling
from selfcorrect.evaluate.scoring.packed import PackedEngine
from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from tests.support.scoring_cases import (
    KEYS,
    PROMPTS,
    REQUESTS,
    merging_tokenizer,
    plain_log_probability,
)
from tests.support.tiny_models import ARCHITECTURES, tiny_model, tiny_tokenizer

torch.set_num_threads(1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("max_batch_tokens", [1, 100, 4096])
def test_scores_equal_one_plain_forward_each(architecture, max_batch_tokens):
    model, tokenizer = tiny_model(architecture), tiny_tokenizer()
    engine = PackedEngine(model, tokenizer, batch_tokens=max_batch_tokens)
    for (prompt, options), scores in zip(REQUESTS, engine.score(REQUESTS), strict=True):
        plain = [plain_log_probability(model, tokenizer, prompt, option) for option in options]
        assert scores == pytest.approx(plain, abs=1e-5)
        assert len(set(plain)) == len(plain)  # the model does tell them apart


def test_models_without_logits_to_keep_score_the_same():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    engine = PackedEngine(model, tokenizer)
    expected = engine.score(REQUESTS)
    engine._forwards._slices = False
    assert engine.score(REQUESTS) == [pytest.approx(row, abs=1e-6) for row in expected]


def test_shared_tokens_run_in_one_row():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    rows = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    requests = [
        ("<s> the answer is (", (" a", " b", " c")),
        ("<s> the answer is", (" ( a", " ( b", " yes")),  # "the answer is" begins a row above
    ]
    PackedEngine(model, tokenizer).score(requests)
    assert rows[-1] == (1, 5)  # the ones before try the model out


def test_merge_across_the_boundary_is_scored_whole():
    tokenizer = merging_tokenizer()
    model = tiny_model(vocabulary=8)
    [[yes, no]] = continuations(tokenizer, [('xx"', ("yes", "n"))])
    assert yes.tokens == (1, 1, 7, 4, 5)  # x x "y e s
    assert no.tokens == (1, 1, 2, 6)  # x x " n
    assert yes.start == no.start == 2
    with torch.no_grad():
        logs = torch.log_softmax(model(torch.tensor([[1, 1, 7, 4, 5]])).logits[0].double(), -1)
    [[score, _]] = PackedEngine(model, tokenizer).score([('xx"', ("yes", "n"))])
    assert score == pytest.approx(float(logs[1, 7] + logs[2, 4] + logs[3, 5]), abs=1e-5)


def test_scores_are_deterministic_bitwise():
    engine = PackedEngine(tiny_model("gpt2"), tiny_tokenizer())
    assert engine.score(REQUESTS) == engine.score(REQUESTS)


def test_probabilities_of_all_single_tokens_sum_to_one():
    tokenizer = tiny_tokenizer()
    words = tuple(" " + token for token in tokenizer.get_vocab())
    [scores] = PackedEngine(tiny_model(), tokenizer).score([("<s> the doctor", words)])
    assert math.fsum(math.exp(score) for score in scores) == pytest.approx(1, abs=1e-5)


def test_prompt_beyond_the_context_is_refused_with_its_index():
    engine = PackedEngine(tiny_model(context=16), tiny_tokenizer())
    fits = ("<s> " + "the " * 15, (" a", " b"))  # 16 tokens to read, then the option's only one
    assert len(engine.score([fits])[0]) == 2
    too_long = ("<s> " + "the " * 16, (" a", " b"))
    with pytest.raises(PromptTooLong, match=r"17 tokens.*context holds 16") as caught:
        engine.score([fits, too_long])
    assert caught.value.index == 1
    with pytest.raises(PromptTooLong):
        engine.sample([fits[0]], ["k"], Sampling(1, temperature=0, seed=0))


def test_empty_prompts_and_options_are_refused():
    engine = PackedEngine(tiny_model(), tiny_tokenizer())
    with pytest.raises(InputError, match="nothing to condition on"):
        engine.score([("", (" a", " b"))])
    with pytest.raises(InputError, match="nothing to score"):
        engine.score([("<s> the", ("", " b"))])


def test_nan_logits_are_named():
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    engine = PackedEngine(model, tiny_tokenizer())
    with pytest.raises(RunFailure, match=r"NaN.*the doctor told"):
        engine.score(REQUESTS[:1])
    with pytest.raises(RunFailure, match="NaN"):
        engine.sample(["<s> the"], ["k"], Sampling(2, temperature=1, seed=0))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sample_alone_equals_sample_in_a_batch_of_eight(architecture, temperature):
    engine = PackedEngine(tiny_model(architecture, sharpness=3.0), tiny_tokenizer())
    sampling = Sampling(12, temperature, seed=3)
    together = engine.sample(PROMPTS, KEYS, sampling)
    alone = [engine.sample([p], [k], sampling)[0] for p, k in zip(PROMPTS, KEYS, strict=True)]
    assert together == alone
    if temperature:
        assert len({s.text for s in together}) == len(together)


def test_key_and_seed_change_the_sample_generation_config_does_not():
    model = tiny_model(sharpness=1.0)
    engine = PackedEngine(model, tiny_tokenizer())

    def draw(key: str = "k", seed: int = 0) -> str:
        [sample] = engine.sample(["<s> the"], [key], Sampling(12, temperature=1, seed=seed))
        return sample.text

    first = draw()
    assert draw() == first
    assert len({first, draw(key="other"), draw(seed=1)}) == 3
    model.generation_config.do_sample = True
    model.generation_config.top_k = 1
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.max_length = 3
    before = model.generation_config
    assert draw() == first
    assert model.generation_config is before and before.top_k == 1


def test_samples_end_at_the_end_token_or_the_stop_text():
    tokenizer, model = tiny_tokenizer(), tiny_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token equally likely
    engine = PackedEngine(model, tokenizer)
    sampling = Sampling(20, temperature=1.0, seed=0)
    drawn = engine.sample(["<s> the"] * 200, list(map(str, range(200))), sampling)
    ended = [s for s in drawn if not s.truncated]
    cut = [s for s in drawn if s.truncated]
    assert ended and cut
    assert all(s.num_tokens == sampling.max_new_tokens for s in cut)
    assert not any("</s>" in s.text or "<pad>" in s.text for s in drawn)
    assert min(s.num_tokens for s in ended) < sampling.max_new_tokens
    words = [word for s in drawn for word in s.text.split()]
    assert len(set(words)) > 40  # an even spread over the vocabulary's words

    stopped = engine.sample(["<s> the"] * 200, list(map(str, range(200))), sampling, stop="group")
    for before, after in zip(drawn, stopped, strict=True):
        assert after.text == before.text.split("group")[0]
        if "group" in before.text:
            assert not after.truncated
            assert after.num_tokens <= before.num_tokens


def dense_draw(logits, keys, steps, temperature):
    """The same race with a number for every word."""
    streams = keys + steps * 2**32 * draws._GOLDEN
    words, times = draws._points(streams, logits.shape[-1])
    every = torch.arange(logits.shape[-1])
    arrivals = times[:, -1:] + draws._exponential(draws._hash(streams[:, None], every))
    for row, (places, moments) in enumerate(zip(words.tolist(), times, strict=True)):
        for word, moment in reversed(list(zip(places, moments, strict=True))):
            if word < logits.shape[-1]:
                arrivals[row, word] = moment
    return (logits.float() / temperature - arrivals.log()).argmax(dim=1)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_draws_are_those_of_a_race_of_all_words(temperature):
    torch.manual_seed(0)
    keys = draws.noise_keys([str(i) for i in range(300)], seed=1)
    steps = torch.arange(300) % 7
    for vocabulary, spread in [(2, 1.0), (250, 0.0), (3000, 3.0), (3000, 30.0)]:
        logits = torch.randn(300, vocabulary) * spread
        chosen = draws.draw(logits, keys, steps, temperature)
        assert chosen.equal(dense_draw(logits, keys, steps, temperature))
        rounded = logits.bfloat16()
        coarse = draws.draw(rounded, keys, steps, temperature)
        assert coarse.equal(draws.draw(rounded.float(), keys, steps, temperature))
        some = torch.tensor([250, 3, 7])  # the same rows in another batch
        assert draws.draw(logits[some], keys[some], steps[some], temperature).equal(chosen[some])
        wider = torch.cat([logits, torch.full((300, 1), -1e4)], dim=1)
        if vocabulary == 3000:  # a word more, of no probability
            assert draws.draw(wider, keys, steps, temperature).equal(chosen)


def test_draws_follow_the_softmax():
    keys = draws.noise_keys([str(i) for i in range(20_000)], seed=0)
    scores = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(len(keys), -1)
    expected = torch.softmax(scores[0] / 0.5, -1).numpy()
    drawn = [draws.draw(scores, keys, torch.full_like(keys, step), 0.5) for step in (0, 1)]
    for tokens in drawn:
        shares = np.bincount(tokens.numpy(), minlength=4) / len(keys)
        assert shares == pytest.approx(expected, abs=4 * 0.5 / math.sqrt(len(keys)))
    same = (drawn[0] == drawn[1]).float().mean()  # steps are independent
    assert float(same) == pytest.approx((expected**2).sum(), abs=4 * 0.5 / math.sqrt(len(keys)))
