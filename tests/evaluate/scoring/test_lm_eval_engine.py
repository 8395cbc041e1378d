import pytest
import torch

from selfcorrect.evaluate.prompts.tokenized import PromptTooLong
from selfcorrect.evaluate.scoring.engine import Sampling
from selfcorrect.evaluate.scoring.lm_eval import LmEvalEngine, engine_loader
from selfcorrect.evaluate.scoring.packed import PackedEngine
from selfcorrect.evaluate.scoring.weights import files_digest
from selfcorrect.recipes.foundation.errors import InputError
from tests.support.tiny_models import tiny_model, tiny_tokenizer

REQUESTS = [
    ("<s>Human : who went ?", (" doctor", " the nurse told", " student")),
    ("<s>the man said", (" yes", " no")),
]


@pytest.fixture(scope="module")
def pair():
    hf = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed")
    model, tokenizer = tiny_model(), tiny_tokenizer()
    lm = hf.HFLM(
        pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=3, add_bos_token=False
    )
    return LmEvalEngine(lm), PackedEngine(model, tokenizer)


def test_scores_equal_those_of_the_packed_engine(pair):
    engine, packed = pair
    for scores, exact in zip(engine.score(REQUESTS), packed.score(REQUESTS), strict=True):
        assert scores == pytest.approx(exact, abs=1e-4)


def test_greedy_samples_agree_and_random_ones_depend_on_the_key_alone(pair):
    engine = pair[0]
    prompts = [prompt for prompt, _ in REQUESTS]
    likeliest, random = Sampling(6, temperature=0.0, seed=3), Sampling(6, temperature=1.0, seed=3)
    greedy = [[s.text.strip() for s in e.sample(prompts, ["a", "b"], likeliest)] for e in pair]
    assert greedy[0] == greedy[1]
    state = torch.get_rng_state()
    both = engine.sample(prompts, ["a", "b"], random)
    assert torch.equal(state, torch.get_rng_state())
    assert both[1:] == engine.sample(prompts[1:], ["b"], random)
    assert both[1:] != engine.sample(prompts[1:], ["c"], random)


def test_prompt_beyond_the_context_is_refused(pair):
    with pytest.raises(PromptTooLong):
        pair[0].score([("<s>" + " the" * 300, (" yes", " no"))])


def test_engine_names_and_digests(tmp_path):
    with pytest.raises(InputError, match="unknown engine 'fast'"):
        engine_loader("fast")
    assert files_digest("a/b", "v1") != files_digest("a/b", "v2")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    first = files_digest(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert files_digest(str(tmp_path)) != first
