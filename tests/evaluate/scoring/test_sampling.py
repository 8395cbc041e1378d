"""Scores continued from the cache of the model's own text equal those of whole prompts."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from selfcorrect.evaluate.measuring.measure import measure
from selfcorrect.evaluate.prompts.tokenized import PromptTooLong
from selfcorrect.evaluate.scoring import cached, packed
from selfcorrect.evaluate.scoring.engine import Engine, Sampling
from selfcorrect.evaluate.scoring.packed import PackedEngine
from selfcorrect.evaluate.scoring.slots import Slots
from selfcorrect.recipes.foundation.errors import RunFailure
from tests.support.scoring_cases import (
    KEYS,
    PROMPTS,
    UNPACKABLE,
    merging_tokenizer,
    random_model,
    sliding_window_model,
)
from tests.support.tiny_models import ARCHITECTURES, tiny_model, tiny_plan, tiny_tokenizer

torch.set_num_threads(1)

SAMPLING = Sampling(max_new_tokens=12, temperature=1.0, seed=3)
GREEDY = replace(SAMPLING, temperature=0.0)
OPTIONS = [(" yes", " no"), (" the man", " the old woman", " that")]


def final_question(index, sample):
    """One option set of single words, one that branches; every row its own prompt and length."""
    closed = f"{PROMPTS[index]} {sample.text}".rstrip()
    return f"{closed} . who is fair ? Assistant : the answer is", OPTIONS[index % 2]


def both_ways(
    engine, then=final_question, prompts=PROMPTS, keys=KEYS, sampling=SAMPLING, stop=None
):
    """The answers continued from the cache, and those of `sample` and then `score`."""
    expected = Engine.sample_then_score(engine, prompts, keys, then, sampling, stop)
    return engine.sample_then_score(prompts, keys, then, sampling, stop), expected


def assert_same(continued, expected, within=1e-5):
    assert [sample for sample, _ in continued] == [sample for sample, _ in expected]
    for (_, scores), (_, exact) in zip(continued, expected, strict=True):
        assert scores == pytest.approx(exact, abs=within)
        assert len(set(exact)) == len(exact)


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("selfcorrect")]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("batch_tokens", [1, 400, 4096])  # 1, 4 and 8 slots
def test_scores_from_the_cache_equal_those_of_whole_prompts(architecture, batch_tokens, caplog):
    model = tiny_model(architecture, sharpness=3.0)
    engine = PackedEngine(model, tiny_tokenizer(), batch_tokens=batch_tokens)
    continued, expected = both_ways(engine)
    assert_same(continued, expected)
    assert engine._continues_cache.right and not warnings(caplog)
    assert engine.sample(PROMPTS, KEYS, SAMPLING) == [sample for sample, _ in continued]
    # Some rows ended early, so that the cache behind them was stale.
    assert len({sample.num_tokens for sample, _ in continued}) > 1


@pytest.mark.parametrize("wrong", ["error", "raises"])
def test_samples_without_slots_are_the_same(wrong, monkeypatch):
    model = tiny_model("gemma2", sharpness=3.0)
    expected = PackedEngine(model, tiny_tokenizer()).sample(PROMPTS, KEYS, SAMPLING)

    def refused(*_):
        if wrong == "raises":
            raise TypeError("no mask with a cache")
        return 0.01

    monkeypatch.setattr(packed, "error_of_slots", refused)
    engine = PackedEngine(model, tiny_tokenizer())
    assert engine.sample(PROMPTS, KEYS, SAMPLING) == expected
    assert engine._in_slots.failures == 1 and engine._batched[0].right


def test_only_tokens_beyond_the_cache_are_run(monkeypatch):
    model, tokenizer = tiny_model(sharpness=3.0), tiny_tokenizer()
    with torch.no_grad():  # so that no text loses a special token and parts from the cache
        model.lm_head.weight[tokenizer.all_special_ids] = 0
    engine = PackedEngine(model, tokenizer)
    both_ways(engine, sampling=GREEDY)  # tries the cache out
    questions, runs = [], []

    def then(index, sample):
        questions.append(index)
        return final_question(index, sample)

    def logits(keep, **inputs):
        cache = inputs["past_key_values"]
        if isinstance(cache, DynamicCache):  # not that of the slots
            runs.append((inputs["input_ids"].shape, cache.get_seq_length()))
        return type(engine._forwards).logits(engine._forwards, keep, **inputs)

    monkeypatch.setattr(engine._forwards, "logits", logits)
    engine.sample_then_score(PROMPTS, KEYS, then, GREEDY)
    assert sorted(questions) == list(range(len(PROMPTS)))
    [((rows, width), columns)] = runs
    assert rows == len(PROMPTS) and columns >= 80  # the longest prompt and its text were there
    # The last token written, ". who is fair ? Assistant : the answer is", and of " the man",
    # " the old woman", " that" what another word follows: "the", "old".
    assert width == 1 + 10 + 2


def test_continues_after_empty_truncated_and_ended_samples(caplog):
    model = tiny_model()
    with torch.no_grad():  # every token nearly equally likely
        model.lm_head.weight.mul_(0.01)
    prompts, keys = ["<s> the", "<s> who is fair ?"] * 50, [str(i) for i in range(100)]

    def then(index, sample):
        return f"{prompts[index]} {sample.text}".rstrip() + " fair please", OPTIONS[index % 2]

    engine = PackedEngine(model, tiny_tokenizer())
    longer = replace(SAMPLING, max_new_tokens=20)
    continued, expected = both_ways(engine, then, prompts, keys, longer, stop="group")
    assert_same(continued, expected)
    samples = [sample for sample, _ in continued]
    assert any(s.truncated for s in samples) and any(not s.truncated for s in samples)
    uncut = engine.sample(prompts, keys, longer)
    assert any("group" in sample.text for sample in uncut)
    assert any(sample.text == "" for sample in samples)
    assert engine._continues_cache.right and not warnings(caplog)


def test_continues_after_a_batch_of_empty_samples():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    short = Sampling(max_new_tokens=4, temperature=0.0, seed=3)
    [first] = PackedEngine(model, tokenizer).sample(PROMPTS[:1], ["k"], short)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(first.text.split()[0])
    engine = PackedEngine(model, tokenizer)
    continued, expected = both_ways(engine, prompts=PROMPTS[:1] * 3, keys=["k"] * 3, sampling=short)
    assert_same(continued, expected)
    assert {(s.text, s.truncated, s.num_tokens) for s, _ in continued} == {("", False, 1)}
    assert engine._continues_cache.right


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_merge_across_the_end_of_the_sample_is_run_again(temperature):
    tokenizer = merging_tokenizer()
    model = tiny_model(vocabulary=8, sharpness=1.0)
    model.generation_config.eos_token_id = None  # here `"` has the number that it has elsewhere
    engine = PackedEngine(model, tokenizer)
    prompts, keys = ["xx", "xyx", "x"] * 20, [str(i) for i in range(60)]

    def then(index, sample):
        # A text that ends in `"` loses this token to `"y`; and two tokens `"` and `y`, which the
        # model can write, come back as one.
        return f"{prompts[index]}{sample.text}yes", ("es", "nn", "s")

    continued, expected = both_ways(
        engine, then, prompts, keys, replace(SAMPLING, temperature=temperature)
    )
    assert_same(continued, expected)
    assert engine._continues_cache.right
    if temperature:
        texts = [sample.text for sample, _ in continued]
        assert any(text.endswith('"') for text in texts) and any('"y' in text for text in texts)


def test_prompt_that_differs_from_its_start_is_run_whole():
    engine = PackedEngine(tiny_model(sharpness=3.0), tiny_tokenizer())

    def then(index, sample):
        prompt, options = final_question(index, sample)
        return prompt.replace("<s>", "<s> please" if index % 2 else ""), options

    assert_same(*both_ways(engine, then))
    assert engine._continues_cache.right


@pytest.mark.parametrize("window", [200, 16])
def test_cache_is_continued_within_the_sliding_window(window, caplog):
    engine = PackedEngine(sliding_window_model(window), tiny_tokenizer(), batch_tokens=80)
    continued, expected = both_ways(engine)
    assert_same(continued, expected, within=1e-4)
    if window == 200:
        assert engine._continues_cache.right and not warnings(caplog)
    else:
        assert not engine._continues_cache.right
        [record] = [r for r in warnings(caplog) if "cannot be scored in packs" in r]
        assert "beyond 12 tokens" in record  # three quarters of the window


def test_batch_beyond_the_window_is_run_whole_after_others_were_continued():
    engine = PackedEngine(sliding_window_model(40), tiny_tokenizer())

    def final(index, sample):
        return f"{prompts[index]} {sample.text}".rstrip() + " the answer is", OPTIONS[0]

    for prompts, keys in [(PROMPTS[:2], KEYS[:2]), (PROMPTS[4:5], KEYS[4:5])]:
        assert_same(*both_ways(engine, final, prompts, keys), within=1e-4)
        assert engine._continues_cache.right


@pytest.mark.parametrize("name", UNPACKABLE)
def test_models_that_cannot_continue_their_cache_warn_once(name, caplog):
    engine = PackedEngine(random_model(UNPACKABLE[name][0]), tiny_tokenizer())
    for _ in range(2):
        continued, expected = both_ways(engine)
        assert continued == expected
    assert not engine._continues_cache.right
    assert len(set(warnings(caplog))) == len(warnings(caplog)) > 0


def refuses(*_, **__):
    raise ValueError("no masks\nafter a cache")


def is_off(*arguments):
    return [(tree, values + 0.01) for tree, values in cached.score_after(*arguments)]


@pytest.mark.parametrize(
    ("wrong", "fragment"), [(refuses, "no masks after a cache"), (is_off, "off by 0.01 a token")]
)
def test_cache_that_gives_other_scores_is_not_used(wrong, fragment, monkeypatch, caplog):
    monkeypatch.setattr(packed, "score_after", wrong)
    engine = PackedEngine(tiny_model(sharpness=3.0), tiny_tokenizer())
    for _ in range(2):
        continued, expected = both_ways(engine)
        assert continued == expected
    [message] = warnings(caplog)
    assert fragment in message and "\n" not in message


@pytest.mark.parametrize("lost", ["all", "columns"])
def test_missing_or_shortened_cache_is_not_used(lost, monkeypatch, caplog):
    def with_less(*arguments, **settings):
        for rows, sampled in sample_slots(*arguments, **settings):
            if lost == "columns":
                sampled.cache.crop(-5)
            yield rows, replace(sampled, cache=None) if lost == "all" else sampled

    sample_slots = packed.sample_slots
    monkeypatch.setattr(packed, "sample_slots", with_less)
    engine = PackedEngine(tiny_model(sharpness=3.0), tiny_tokenizer())
    continued, expected = both_ways(engine)
    assert continued == expected
    [message] = warnings(caplog)
    assert "returns no cache" in message


def test_too_many_logits_for_one_forward_are_split(monkeypatch):
    engine = PackedEngine(tiny_model(sharpness=3.0), tiny_tokenizer())
    assert_same(*both_ways(engine))
    monkeypatch.setattr(cached, "LARGEST_LOGITS", 10)
    continued, expected = both_ways(engine)
    assert [scores for _, scores in continued] == [
        pytest.approx(scores, abs=1e-5) for _, scores in expected
    ]


def test_only_one_batch_cache_is_alive_at_a_time(monkeypatch):
    caches, alive = [], []

    def take(slots, rows):
        alive.append(sum(cache() is not None for cache in caches))
        cache = take_from(slots, rows)
        caches.append(weakref.ref(cache))
        return cache

    take_from = Slots.take
    monkeypatch.setattr(Slots, "take", take)
    engine = PackedEngine(tiny_model(), tiny_tokenizer(), batch_tokens=80)
    gc.disable()  # a cycle that waits for the collector is memory too
    try:
        engine.sample_then_score(PROMPTS, KEYS, final_question, SAMPLING)
        engine.sample(PROMPTS, KEYS, SAMPLING)
    finally:
        gc.enable()
    assert len(caches) >= 6 and set(alive) == {0}


def test_bfloat16_continues_the_cache(caplog):
    tokenizer = tiny_tokenizer()
    engine = PackedEngine(tiny_model(sharpness=2.0).bfloat16(), tokenizer)
    continued, expected = both_ways(engine)
    assert (
        engine._continues_cache.right
        and engine._ways.packed.within.row
        >= max(engine.prepare([final_question(4, continued[4][0])]).lengths)
        and not warnings(caplog)
    )
    exact = PackedEngine(tiny_model(sharpness=2.0), tokenizer)
    for index, ((sample, scores), (_, rescored)) in enumerate(
        zip(continued, expected, strict=True)
    ):
        [precise] = exact.score([final_question(index, sample)])  # the same text, in float32
        assert scores == pytest.approx(rescored, abs=0.1)
        assert scores == pytest.approx(precise, abs=0.1)


def test_sample_then_score_raises_as_score_does():
    engine = PackedEngine(tiny_model(context=60), tiny_tokenizer())

    def too_long(index, sample):
        return (f"<s> {'the ' * 70}" if index == 1 else "<s> the", (" a", " b"))

    with pytest.raises(PromptTooLong, match="context holds 60") as caught:
        engine.sample_then_score(["<s> the"] * 3, ["a", "b", "c"], too_long, SAMPLING)
    assert caught.value.index == 1
    assert engine.sample_then_score([], [], too_long, SAMPLING) == []


def test_nan_after_the_sample_names_the_prompt(monkeypatch):
    def not_a_number(*arguments):
        scored = cached.score_after(*arguments)
        return [(tree, np.full_like(values, np.nan)) for tree, values in scored]

    engine = PackedEngine(tiny_model(), tiny_tokenizer())
    both_ways(engine)
    monkeypatch.setattr(packed, "score_after", not_a_number)
    with pytest.raises(RunFailure, match="NaN for the prompt"):
        both_ways(engine)


def test_cell_scores_with_its_last_round_of_sampling(tmp_path, monkeypatch):
    called = []
    for name in ("sample", "sample_then_score", "score"):
        method = getattr(PackedEngine, name)

        def spy(self, *args, name=name, method=method, **settings):
            called.append(name)
            return method(self, *args, **settings)

        monkeypatch.setattr(PackedEngine, name, spy)
    cells = tiny_plan(tmp_path / "data", ["reviews 2"])
    measure(cells, tiny_model(), tiny_tokenizer(), tmp_path / "out")
    assert called == ["sample", "sample_then_score"]
