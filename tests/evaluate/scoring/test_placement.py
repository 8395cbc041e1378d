"""A model divided by a device_map (here: weights left on the disk) measures as an undivided one."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from selfcorrect.evaluate.scoring.engine import Sampling
from selfcorrect.evaluate.scoring.load_model import load_model
from selfcorrect.evaluate.scoring.packed import PackedEngine
from selfcorrect.evaluate.scoring.weights import CheckpointLoader, weights_digest
from selfcorrect.recipes.foundation.errors import InputError
from tests.support.tiny_gguf import write_gguf
from tests.support.tiny_models import tiny_model, tiny_tokenizer

REQUESTS = [
    ("<s>Human : who went ?", (" doctor", " the nurse told", " student")),
    ("<s>the man said", (" yes", " no")),
    ("<s>the man said that the woman", (" yes", " no")),
]
PLACEMENT = {"device_map": "auto", "max_memory": {"cpu": "30KB"}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        tiny_model(seed=seed).save_pretrained(root / str(seed))
        tiny_tokenizer().save_pretrained(root / str(seed))
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    base = load_model(root / "0", device="cpu")[0]
    get_peft_model(base, config).save_pretrained(root / "lora")
    return root


def results(model, tokenizer):
    engine = PackedEngine(model, tokenizer)
    prompts = [prompt for prompt, _ in REQUESTS]
    keys = [str(index) for index in range(len(prompts))]
    drawn = Sampling(6, temperature=1.0, seed=3)
    answers = engine.sample_then_score(
        prompts, keys, lambda i, s: (prompts[i] + s.text, REQUESTS[i][1]), drawn
    )
    texts = engine.sample(prompts, keys, Sampling(6, temperature=0.0, seed=3))
    return engine.score(REQUESTS), answers, texts, engine.device_kind


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["0", "lora"])
def test_offloaded_weights_give_the_same_numbers(folders, name, dtype, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    divided, tokenizer = load_model(folders / name, dtype=dtype, placement=PLACEMENT)
    assert any(parameter.is_meta for parameter in divided.parameters())  # on the disk
    undivided = load_model(folders / name, dtype=dtype, device="cpu")[0]
    assert weights_digest(divided) == weights_digest(undivided)
    got, expected = results(divided, tokenizer), results(undivided, tokenizer)
    assert not list(tmp_path.iterdir())  # peft would write a copy of the base
    assert got[1:] == expected[1:] and got[3] == "cpu"
    for scores, exact in zip(got[0], expected[0], strict=True):
        assert scores == pytest.approx(exact, abs=1e-5)


def test_checkpoints_of_a_run_are_divided_one_after_another(folders):
    loader = CheckpointLoader("cpu", PLACEMENT)
    for name in ("0", "1", "0"):
        model, _ = loader.load(folders / name)
        assert weights_digest(model) == weights_digest(tiny_model(seed=int(name)))


def test_wrong_placement_is_one_line(folders):
    with pytest.raises(InputError, match=r"cannot load the model: .*fastest.*; check device_map"):
        load_model(folders / "0", placement={"device_map": "fastest"})


@pytest.mark.parametrize("given", [{}, {"offload_folder": "offloaded"}])
def test_gguf_weights_on_the_disk_are_refused(given, tmp_path, monkeypatch):
    """transformers leaves some of them out of the offloaded files."""
    pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    write_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(InputError, match=r"tiny\.gguf: weights of a GGUF file cannot lie on the"):
        load_model(tmp_path / "tiny.gguf", placement={**PLACEMENT, **given})
