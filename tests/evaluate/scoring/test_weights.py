"""Digests of weights, and loading one checkpoint after another into the same module."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from selfcorrect.evaluate.scoring.load_model import load_model
from selfcorrect.evaluate.scoring.weights import CheckpointLoader, files_digest, weights_digest
from selfcorrect.recipes.foundation.errors import InputError
from tests.support.tiny_models import save_model, tiny_model

torch.set_num_threads(1)

TOKENS = torch.tensor([[1, 7, 9, 8]])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def save(folder: Path, model) -> Path:
    save_model(folder, model)
    (folder / "checkpoint.json").write_text(json.dumps({"step": folder.name}))  # differs anyway
    return folder


def adapter(base: Path, seed: int):
    model, _ = load_model(base, device="cpu")
    torch.manual_seed(seed)
    wrapped = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return wrapped


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma", "gpt_neox"])
def test_swapped_weights_equal_those_of_a_fresh_model(tmp_path, architecture):
    folders = [save(tmp_path / str(s), tiny_model(architecture, seed=s)) for s in range(3)]
    loader = CheckpointLoader("cpu")
    first, tokenizer = loader.load(folders[0])
    for folder in folders[1:]:
        model, same = loader.load(folder)
        fresh, _ = load_model(folder, device="cpu")
        assert model is first and same is tokenizer and not model.training
        assert torch.equal(logits(model), logits(fresh))
        assert weights_digest(model) == weights_digest(fresh)
    assert loader.num_swapped == 2


def test_adapters_are_swapped_over_one_base(tmp_path):
    base = save(tmp_path / "base", tiny_model())
    folders = [save(tmp_path / f"a{s}", adapter(base, s)) for s in (1, 2)]
    loader = CheckpointLoader("cpu")
    first, _ = loader.load(folders[0])
    before = logits(first)
    model, _ = loader.load(folders[1])
    assert model is first and loader.num_swapped == 1
    assert torch.equal(logits(model), logits(load_model(folders[1], device="cpu")[0]))
    assert not torch.equal(logits(model), before)


def test_checkpoint_that_does_not_fit_is_loaded_fresh(tmp_path):
    first = save(tmp_path / "one", tiny_model())
    wider = save(tmp_path / "wider", tiny_model(context=99))  # another config
    loader = CheckpointLoader("cpu")
    loader.load(first)
    model, _ = loader.load(wider)
    assert loader.num_swapped == 0
    assert torch.equal(logits(model), logits(load_model(wider, device="cpu")[0]))
    cut = shutil.copytree(wider, tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot load the model"):
        loader.load(cut)
    model, _ = loader.load(first)  # not what the failed swap left half-written
    assert torch.equal(logits(model), logits(load_model(first, device="cpu")[0]))
    assert loader.num_swapped == 0


def test_digest_covers_weights_adapter_settings_and_base(tmp_path):
    base = save(tmp_path / "base", tiny_model())
    assert files_digest(base) == files_digest(shutil.copytree(base, tmp_path / "copy"))
    assert files_digest("a/b", "v1") != files_digest("a/b", "v2")
    folder = save(tmp_path / "adapter", adapter(base, 1))
    known = files_digest(folder)
    settings = folder / "adapter_config.json"
    written = json.loads(settings.read_text())
    written["base_model_name_or_path"] = str(tmp_path / "copy")  # the same files elsewhere
    settings.write_text(json.dumps(written))
    assert files_digest(folder) == known
    settings.write_text(json.dumps({**written, "lora_alpha": 99}))
    assert files_digest(folder) != known
    settings.write_text(json.dumps(written))
    weights = tmp_path / "copy" / "model.safetensors"
    flipped = bytearray(weights.read_bytes())
    flipped[-1] ^= 1
    weights.write_bytes(flipped)
    assert files_digest(folder) != known
