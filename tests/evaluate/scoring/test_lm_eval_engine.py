import pytest
import torch
from peft import LoraConfig, get_peft_model

from selfcorrect.evaluate.prompts.tokenized import PromptTooLong
from selfcorrect.evaluate.scoring.engine import Sampling
from selfcorrect.evaluate.scoring.lm_eval import LmEvalEngine, engine_loader
from selfcorrect.evaluate.scoring.load_model import load_model
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


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_adapters_are_measured_as_by_the_packed_engine(tmp_path, dtype):
    """Also where the model has more embeddings than the tokenizer has tokens, as Qwen has."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    tokenizer = tiny_tokenizer()
    tiny_model(vocabulary=len(tokenizer) + 8).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = load_model(tmp_path / "base", device="cpu")[0]
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    loader = engine_loader("lm-eval:hf", {"batch_size": 2})
    for name in ("base", "adapter"):
        engine = loader.load(str(tmp_path / name), dtype=dtype)
        assert engine.dtype == (dtype or "float32")
        exact = PackedEngine(*load_model(tmp_path / name, dtype=dtype or "auto")).score(REQUESTS)
        for scores, expected in zip(engine.score(REQUESTS), exact, strict=True):
            assert scores == pytest.approx(expected, abs=0.2 if dtype else 1e-4)
    with pytest.raises(InputError, match=r"lm-eval:hf or packed"):
        engine_loader("lm-eval:vllm").load(str(tmp_path / "adapter"))


def test_engine_names_and_digests(tmp_path):
    with pytest.raises(InputError, match="unknown engine 'fast'"):
        engine_loader("fast")
    assert files_digest("a/b", "v1") != files_digest("a/b", "v2")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    first = files_digest(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert files_digest(str(tmp_path)) != first
