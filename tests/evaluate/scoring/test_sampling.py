"""Scores after the model's own text: from the cache they are what reading it all again gives."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig

from selfcorrect.evaluate.measuring.measure import measure
from selfcorrect.evaluate.prompts.tokenized import PromptTooLong
from selfcorrect.evaluate.scoring import cached, packed
from selfcorrect.evaluate.scoring.engine import Engine
from selfcorrect.evaluate.scoring.packed import Scorer
from selfcorrect.recipes.foundation.errors import RunFailure
from tests.evaluate.measuring.test_measure import make_plan
from tests.evaluate.scoring.test_packing import OTHERS, TOKENS
from tests.evaluate.scoring.test_scoring import KEYS, PROMPTS, merging_tokenizer
from tests.support.tiny_models import ARCHITECTURES, tiny_model, tiny_tokenizer

torch.set_num_threads(1)

DRAWN = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3}
OPTIONS = [(" yes", " no"), (" the man", " the old woman", " that")]


def final_question(index, sample):
    """One option set of single words, one that branches; every row its own prompt and length."""
    closed = f"{PROMPTS[index]} {sample.text}".rstrip()
    return f"{closed} . who is fair ? Assistant : the answer is", OPTIONS[index % 2]


def both_ways(scorer, then=final_question, prompts=PROMPTS, keys=KEYS, **changes):
    """(from the cache, by `sample` and `score`), and how many tokens the first way scored with."""
    drawn = {**DRAWN, **changes}
    whole = Engine.sample_then_score(scorer, prompts, keys, then, **drawn)
    return scorer.sample_then_score(prompts, keys, then, **drawn), whole


def assert_same(live, whole, within=1e-5):
    assert [sample for sample, _ in live] == [sample for sample, _ in whole]
    for (_, one), (_, other) in zip(live, whole, strict=True):
        assert one == pytest.approx(other, abs=within)
        assert len(set(other)) == len(other)


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("selfcorrect")]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("batch_tokens", [1, 150, 4096])
def test_scores_from_the_cache_equal_those_of_whole_prompts(architecture, batch_tokens, caplog):
    model = tiny_model(architecture, sharpness=3.0)
    scorer = Scorer(model, tiny_tokenizer(), batch_tokens=batch_tokens)
    live, whole = both_ways(scorer)
    assert_same(live, whole)
    assert scorer._live and not warnings(caplog)
    assert scorer.sample(PROMPTS, KEYS, **DRAWN) == [sample for sample, _ in live]
    # Some rows ended early, so that the cache behind them was stale.
    assert len({sample.num_tokens for sample, _ in live}) > 1


def test_each_question_is_asked_once_and_only_what_is_new_is_run(monkeypatch):
    model, tokenizer = tiny_model(sharpness=3.0), tiny_tokenizer()
    with torch.no_grad():  # so that no text loses a special token and parts from the cache
        model.lm_head.weight[tokenizer.all_special_ids] = 0
    scorer = Scorer(model, tokenizer)
    both_ways(scorer, temperature=0.0)  # tries the cache out
    asked, run = [], []

    def then(index, sample):
        asked.append(index)
        return final_question(index, sample)

    def logits(keep, **inputs):
        run.append((inputs["input_ids"].shape, inputs["past_key_values"].get_seq_length()))
        return type(scorer._forwards).logits(scorer._forwards, keep, **inputs)

    monkeypatch.setattr(scorer._forwards, "logits", logits)
    scorer.sample_then_score(PROMPTS, KEYS, then, **{**DRAWN, "temperature": 0.0})
    assert sorted(asked) == list(range(len(PROMPTS)))
    [((rows, width), columns)] = run
    assert rows == len(PROMPTS) and columns >= 80  # the longest prompt and its text were there
    # The last token written, ". who is fair ? Assistant : the answer is", and of " the man",
    # " the old woman", " that" what another word follows: "the", "old".
    assert width == 1 + 10 + 2


def test_samples_that_are_empty_cut_or_ended(caplog):
    model = tiny_model()
    with torch.no_grad():  # every token nearly equally likely
        model.lm_head.weight.mul_(0.01)
    prompts, keys = ["<s> the", "<s> who is fair ?"] * 50, [str(i) for i in range(100)]

    def then(index, sample):
        return f"{prompts[index]} {sample.text}".rstrip() + " fair please", OPTIONS[index % 2]

    scorer = Scorer(model, tiny_tokenizer())
    live, whole = both_ways(scorer, then, prompts, keys, max_new_tokens=20, stop="group")
    assert_same(live, whole)
    samples = [sample for sample, _ in live]
    assert any(s.truncated for s in samples) and any(not s.truncated for s in samples)
    uncut = scorer.sample(prompts, keys, max_new_tokens=20, temperature=1.0, seed=3)
    assert any("group" in sample.text for sample in uncut)
    assert any(sample.text == "" for sample in samples)
    assert scorer._live and not warnings(caplog)


def test_a_batch_in_which_every_text_is_empty():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    drawn = {"max_new_tokens": 4, "temperature": 0.0}
    [first] = Scorer(model, tokenizer).sample(PROMPTS[:1], ["k"], **{**DRAWN, **drawn})
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(first.text.split()[0])
    scorer = Scorer(model, tokenizer)
    live, whole = both_ways(scorer, prompts=PROMPTS[:1] * 3, keys=["k"] * 3, **drawn)
    assert_same(live, whole)
    assert {(s.text, s.truncated, s.num_tokens) for s, _ in live} == {("", False, 1)}
    assert scorer._live


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_merge_across_the_end_of_the_text_is_read_anew(temperature):
    tokenizer = merging_tokenizer()
    model = tiny_model(vocabulary=8, sharpness=1.0)
    model.generation_config.eos_token_id = None  # here `"` has the number that it has elsewhere
    scorer = Scorer(model, tokenizer)
    prompts, keys = ["xx", "xyx", "x"] * 20, [str(i) for i in range(60)]

    def then(index, sample):
        # A text that ends in `"` loses this token to `"y`; and two tokens `"` and `y`, which the
        # model can write, come back as one.
        return f"{prompts[index]}{sample.text}yes", ("es", "nn", "s")

    live, whole = both_ways(scorer, then, prompts, keys, temperature=temperature)
    assert_same(live, whole)
    assert scorer._live
    if temperature:
        texts = [sample.text for sample, _ in live]
        assert any(text.endswith('"') for text in texts) and any('"y' in text for text in texts)


def test_a_dialogue_that_is_written_anew_in_front_is_read_whole():
    scorer = Scorer(tiny_model(sharpness=3.0), tiny_tokenizer())

    def then(index, sample):
        prompt, options = final_question(index, sample)
        return prompt.replace("<s>", "<s> please" if index % 2 else ""), options

    assert_same(*both_ways(scorer, then))
    assert scorer._live


@pytest.mark.parametrize("window", [200, 16])
def test_a_sliding_window_is_gone_on_with_as_far_as_it_reaches(window, caplog):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(**TOKENS, **shape, **heads, sliding_window=window)
    scorer = Scorer(random_model(config), tiny_tokenizer(), batch_tokens=80)
    live, whole = both_ways(scorer)
    assert_same(live, whole, within=1e-4)
    if window == 200:
        assert scorer._live and not warnings(caplog)
    else:
        assert scorer._live is None
        [message] = warnings(caplog)
        assert "looks back 16 tokens" in message


def test_a_batch_beyond_the_window_is_read_whole_after_others_were_not():
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(**TOKENS, **shape, **heads, sliding_window=40)
    scorer = Scorer(random_model(config), tiny_tokenizer())

    def final(index, sample):
        return f"{prompts[index]} {sample.text}".rstrip() + " the answer is", OPTIONS[0]

    for prompts, keys in [(PROMPTS[:2], KEYS[:2]), (PROMPTS[4:5], KEYS[4:5])]:
        assert_same(*both_ways(scorer, final, prompts, keys), within=1e-4)
        assert scorer._live


def random_model(config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(8)
    return model


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_cannot_go_on_read_the_question_whole_and_say_so_once(name, caplog):
    scorer = Scorer(random_model(OTHERS[name][0]), tiny_tokenizer())
    for _ in range(2):
        live, whole = both_ways(scorer)
        assert live == whole
    assert scorer._live is False
    assert len(warnings(caplog)) == 1


def refuses(*_, **__):
    raise ValueError("no masks\nafter a cache")


def is_off(forwards, drawn, asked, window):
    found = cached.score_after(forwards, drawn, asked, window)
    return [(one, values + 0.01) for one, values in found]


@pytest.mark.parametrize(
    ("wrong", "said"), [(refuses, "no masks after a cache"), (is_off, "off by 0.01 a token")]
)
def test_a_cache_that_gives_other_scores_is_found_out(wrong, said, monkeypatch, caplog):
    monkeypatch.setattr(packed, "score_after", wrong)
    scorer = Scorer(tiny_model(sharpness=3.0), tiny_tokenizer())
    for _ in range(2):
        live, whole = both_ways(scorer)
        assert live == whole
    [message] = warnings(caplog)
    assert said in message and "\n" not in message


@pytest.mark.parametrize("lost", ["all", "columns"])
def test_a_cache_that_is_not_handed_out_whole_is_done_without(lost, monkeypatch, caplog):
    def with_less(*args, **settings):
        drawn = scoring_draw(*args, **settings)
        if lost == "all":
            return replace(drawn, cache=None)
        drawn.cache.crop(-5)
        return drawn

    scoring_draw = packed.draw
    monkeypatch.setattr(packed, "draw", with_less)
    scorer = Scorer(tiny_model(sharpness=3.0), tiny_tokenizer())
    live, whole = both_ways(scorer)
    assert live == whole
    [message] = warnings(caplog)
    assert "hands out no cache" in message


def test_too_many_logits_for_one_forward_are_scored_in_several(monkeypatch):
    scorer = Scorer(tiny_model(sharpness=3.0), tiny_tokenizer())
    assert_same(*both_ways(scorer))
    monkeypatch.setattr(cached, "LARGEST_LOGITS", 10)
    live, whole = both_ways(scorer)
    assert [scores for _, scores in live] == [
        pytest.approx(scores, abs=1e-5) for _, scores in whole
    ]


def test_one_batchs_cache_lives_at_a_time(monkeypatch):
    caches, alive = [], []

    def counted(*args, **settings):
        alive.append(sum(cache() is not None for cache in caches))
        drawn = scoring_draw(*args, **settings)
        caches.append(weakref.ref(drawn.cache))
        return drawn

    scoring_draw = packed.draw
    monkeypatch.setattr(packed, "draw", counted)
    scorer = Scorer(tiny_model(), tiny_tokenizer(), batch_tokens=80)
    gc.disable()  # a cycle that waits for the collector is memory too
    try:
        scorer.sample_then_score(PROMPTS, KEYS, final_question, **DRAWN)
        scorer.sample(PROMPTS, KEYS, **DRAWN)
    finally:
        gc.enable()
    assert len(caches) >= 6 and set(alive) == {0}


def test_bfloat16_goes_on_from_the_cache_too(caplog):
    tokenizer = tiny_tokenizer()
    scorer = Scorer(tiny_model(sharpness=2.0).bfloat16(), tokenizer)
    live, whole = both_ways(scorer)
    assert scorer._live and scorer._way == scorer._forwards.packed and not warnings(caplog)
    exact = Scorer(tiny_model(sharpness=2.0), tokenizer)
    for index, ((sample, one), (_, other)) in enumerate(zip(live, whole, strict=True)):
        [right] = exact.score([final_question(index, sample)])  # the same text, in float32
        assert one == pytest.approx(other, abs=0.1)
        assert one == pytest.approx(right, abs=0.1)


def test_errors_are_those_of_score():
    scorer = Scorer(tiny_model(context=60), tiny_tokenizer())

    def too_long(index, sample):
        return (f"<s> {'the ' * 70}" if index == 1 else "<s> the", (" a", " b"))

    with pytest.raises(PromptTooLong, match="context holds 60") as caught:
        scorer.sample_then_score(["<s> the"] * 3, ["a", "b", "c"], too_long, **DRAWN)
    assert caught.value.index == 1
    assert scorer.sample_then_score([], [], too_long, **DRAWN) == []


def test_nan_after_the_text_is_named(monkeypatch):
    def not_a_number(forwards, drawn, asked, window):
        found = cached.score_after(forwards, drawn, asked, window)
        return [(one, np.full_like(values, np.nan)) for one, values in found]

    scorer = Scorer(tiny_model(), tiny_tokenizer())
    both_ways(scorer)
    monkeypatch.setattr(packed, "score_after", not_a_number)
    with pytest.raises(RunFailure, match="NaN for the prompt"):
        both_ways(scorer)


def test_a_cell_asks_its_final_question_in_the_last_round(tmp_path, monkeypatch):
    called = []
    for name in ("sample", "sample_then_score", "score"):
        method = getattr(Scorer, name)

        def spy(self, *args, name=name, method=method, **settings):
            called.append(name)
            return method(self, *args, **settings)

        monkeypatch.setattr(Scorer, name, spy)
    cells = make_plan(tmp_path / "data", ["reviews 2"])
    measure(cells, tiny_model(), tiny_tokenizer(), tmp_path / "out")
    assert called == ["sample", "sample_then_score"]
