"""Adapters that change shapes or share weights are exact; the others are refused in a line."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from selfcorrect.evaluate.scoring.load_model import ADAPTER, base_of, load_model
from selfcorrect.evaluate.scoring.packed import PackedEngine
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.schema import Model
from selfcorrect.train.stages.base import load_given_model
from tests.support.tiny_models import tiny_config, tiny_tokenizer

SIZE = len(tiny_tokenizer())
CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}
QV: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], **CAUSAL}
REQUESTS = [("who went home ?", (" yes", " no")), ("the doctor told", (" her", " his"))]


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, **QV, **settings})


def save_adapter(
    folder: Path, config: Any, *, tied: bool = False, rows: int = SIZE, tokens: int = 0,
    architecture: str = "llama", **saving: Any,
) -> Any:  # fmt: skip
    """Save `base`, whose embeddings have `rows`, and a random `adapter`; return the adapted model.

    The adapter is made after `tokens` are added, or after |tokens| unused rows are cut.
    """
    torch.manual_seed(0)
    settings = tiny_config(architecture, rows)
    settings.tie_word_embeddings = tied
    base = AutoModelForCausalLM.from_config(settings)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(8 if parameter.ndim == 2 else 1)
    base.save_pretrained(folder / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    tokenizer.add_tokens([f"new{i}" for i in range(tokens)])
    if tokens:
        model.resize_token_embeddings(rows + tokens, mean_resizing=False)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(folder / "adapter", **saving)
    tokenizer.save_pretrained(folder / "adapter")
    return adapted.eval()


@torch.no_grad()
def right_scores(model: Any, tokenizer: Any) -> list[float]:
    scores = []
    for prompt, options in REQUESTS:
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        for option in options:
            ids = tokenizer(prompt + option, add_special_tokens=False)["input_ids"]
            values = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(values[i - 1, ids[i]].item() for i in range(start, len(ids))))
    return scores


EMBED, BOTH = ["embed_tokens"], ["embed_tokens", "lm_head"]
EXACT = {
    "plain": {"config": lora()},
    "dora": {"config": lora(use_dora=True)},
    "rslora": {"config": lora(use_rslora=True)},
    "ia3": {"config": peft.IA3Config(feedforward_modules=[], **QV)},
    "loha": {"config": peft.LoHaConfig(r=2, **QV)},
    "vera": {"config": peft.VeraConfig(r=2, **QV)},
    "gpt2": {
        "config": LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, **CAUSAL),
        "architecture": "gpt2", "tokens": 2, "tied": True,
    },
    "fewer tokens": {"config": lora(), "rows": SIZE + 16, "tokens": -6},
    "fewer tokens, tied": {"config": lora(), "rows": SIZE + 16, "tokens": -6, "tied": True},
}  # fmt: skip
for tied in (False, True):
    name = ", tied" if tied else ""
    EXACT |= {
        f"more tokens{name}": {"config": lora(), "tokens": 2, "tied": tied},
        f"saved{name}": {"config": lora(modules_to_save=BOTH), "tokens": 2, "tied": tied},
        f"saved embeddings{name}": {"config": lora(modules_to_save=EMBED), "tied": tied},
        f"trained tokens{name}": {
            "config": lora(trainable_token_indices=[5, SIZE]), "tokens": 2, "tied": tied
        },
        f"adapted head{name}": {
            "config": lora(target_modules=["q_proj", "lm_head"]), "tied": tied
        },
        f"adapted embeddings{name}": {
            "config": lora(target_modules=["q_proj", "embed_tokens"]), "tied": tied
        },
        f"both adapted, more tokens{name}": {
            "config": lora(target_modules=["q_proj", *BOTH]), "tokens": 2, "tied": tied
        },
    }  # fmt: skip
EXACT["adapted embeddings, more tokens, tied"] = {
    "config": lora(target_modules=["q_proj", "embed_tokens"]), "tokens": 2, "tied": True
}  # fmt: skip
EXACT["tied adapters"] = {
    "config": lora(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
    "tied": True,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", EXACT)
def test_adapter_is_exact_when_loaded_scored_and_merged(kind: str, tmp_path: Path) -> None:
    adapted = save_adapter(tmp_path, **EXACT[kind])
    model, tokenizer = load_model(tmp_path / "adapter", dtype="float32", device="cpu")
    ids = torch.tensor([[5, 6, 7, 8, max(tokenizer.get_vocab().values())]])
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, expected)
    scores = PackedEngine(model, tokenizer).score(REQUESTS)
    right = right_scores(adapted, tokenizer)
    assert [v for row in scores for v in row] == pytest.approx(right, abs=1e-4)
    merged, _ = load_given_model(Model(name="m", path=str(tmp_path / "adapter")))
    merged.save_pretrained(tmp_path / "merged")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(read(input_ids=ids).logits, expected, atol=1e-4)


PROMPTED = {
    "PROMPT_TUNING": peft.PromptTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "P_TUNING": peft.PromptEncoderConfig(num_virtual_tokens=3, **CAUSAL),
    "PREFIX_TUNING": peft.PrefixTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "MULTITASK_PROMPT_TUNING": peft.MultitaskPromptTuningConfig(
        num_virtual_tokens=3, num_tasks=2, **CAUSAL
    ),
    "POLY": peft.PolyConfig(r=2, n_tasks=2, **QV),
}


@pytest.mark.parametrize("kind", PROMPTED)
def test_adapter_of_prompts_or_tasks_is_refused(kind: str, tmp_path: Path) -> None:
    save_adapter(tmp_path, PROMPTED[kind])
    with pytest.raises(InputError, match=f"type {kind} put virtual tokens") as caught:
        load_model(tmp_path / "adapter", device="cpu")
    assert str(caught.value).count(str(tmp_path)) == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("config", "saving", "message"),
    [
        (lora(), {"save_embedding_layers": False}, "save_embedding_layers=True"),
        (lora(target_modules=["q_proj", "embed_tokens"]), {}, "lacks the embeddings or the head"),
    ],
)
def test_new_tokens_that_were_not_saved_are_missed(
    config: Any, saving: dict, message: str, tmp_path: Path
) -> None:
    save_adapter(tmp_path, config, tokens=2, **saving)
    with pytest.raises(InputError, match=message):
        load_model(tmp_path / "adapter", device="cpu")


def test_adapter_of_a_larger_base_is_refused(tmp_path: Path) -> None:
    """peft would leave out the layers that this base does not have."""
    save_adapter(tmp_path, lora())
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(InputError, match="weights for 4 modules, of which the base model has 2"):
        load_model(tmp_path / "adapter", device="cpu")


def test_adapter_with_missing_weights_is_refused(tmp_path: Path) -> None:
    """peft would only warn, and keep their random initial values."""
    save_adapter(tmp_path, lora())
    settings = json.loads((tmp_path / "adapter" / ADAPTER).read_text())
    settings["target_modules"] = ["q_proj", "v_proj", "k_proj"]
    (tmp_path / "adapter" / ADAPTER).write_text(json.dumps(settings))
    with pytest.raises(InputError, match="missing adapter keys"):
        load_model(tmp_path / "adapter", device="cpu")


def test_adapter_that_cannot_be_merged_is_not_trained_further(tmp_path: Path) -> None:
    save_adapter(tmp_path, peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, **CAUSAL))
    with pytest.raises(InputError, match=r"models: m: .*ADAPTION_PROMPT.* cannot be merged"):
        load_given_model(Model(name="m", path=str(tmp_path / "adapter")))


def test_base_is_a_hub_revision_a_file_or_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(tmp_path, lora())
    file = tmp_path / "adapter" / ADAPTER
    settings = json.loads(file.read_text())

    def name_base(name: str, **more: str) -> None:
        file.write_text(json.dumps({**settings, "base_model_name_or_path": name, **more}))

    asked = []

    def record_base(source: str, dtype: str, options: dict[str, Any], *_: Any) -> Any:
        asked.append((source, options))
        raise InputError("stop")

    monkeypatch.setattr("selfcorrect.evaluate.scoring.load_model._load_weights", record_base)
    name_base("some/model", revision="v2")
    with pytest.raises(InputError, match="stop"):
        load_model(tmp_path / "adapter")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    name_base(str(tmp_path / "model.gguf"))
    with pytest.raises(InputError, match="stop"):
        load_model(tmp_path / "adapter")
    code = {"trust_remote_code": False}
    assert asked == [
        ("some/model", {**code, "revision": "v2"}),
        (str(tmp_path), {**code, "gguf_file": "model.gguf"}),
    ]
    folder = tmp_path / "gguf"
    folder.mkdir()
    shutil.move(tmp_path / "model.gguf", folder)
    name_base(str(folder))
    with pytest.raises(InputError, match=r"no config\.json.*\.gguf file"):
        base_of(file)
