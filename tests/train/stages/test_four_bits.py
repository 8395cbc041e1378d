"""Frozen weights in 4 bits, on a GPU or, where users may not, on a CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from selfcorrect.evaluate.measuring.cell_files import read_settings
from selfcorrect.evaluate.measuring.run import evaluate_run
from selfcorrect.evaluate.run_folder import find_checkpoints
from selfcorrect.evaluate.scoring import load_model as loading
from selfcorrect.evaluate.scoring import precision
from selfcorrect.evaluate.scoring.load_model import load_model
from selfcorrect.evaluate.scoring.precision import held_in
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.load import check_recipe
from selfcorrect.train.planning.memory import held_bytes
from selfcorrect.train.planning.model_shape import shape_of
from selfcorrect.train.ppo.reward_models import new_reward_model
from selfcorrect.train.run import prepare_run, train_run
from tests.support.feedback_runs import recipe_content, write_bbq
from tests.support.tiny_gguf import write_gguf
from tests.support.tokenizer_forms import byte_level

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]
LORA = {"r": 2, "target_modules": "all-linear"}
SHAPE = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 640,
}  # fmt: skip


@pytest.fixture(autouse=True)
def lifted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let 4 bits pass on a CPU too; skip where bitsandbytes is missing."""
    pytest.importorskip("bitsandbytes")
    if torch.cuda.is_available():
        return
    # On a CPU it repacks weights whenever a state is saved, and rounds them again.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    for module in (precision, loading):
        monkeypatch.setattr(module, "check_dtype", lambda *_: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("model"), byte_level()
    fields: dict[str, Any] = {**SHAPE, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def stored_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of all weights, with the scales of those in 4 bits."""
    total = 0
    for weight in model.parameters():
        total += weight.numel() * weight.element_size()
        if (state := getattr(weight, "quant_state", None)) is not None:
            total += state.absmax.numel() + 4 * state.state2.absmax.numel()
    return total


def test_weights_take_what_plan_says_and_compute_nearly_the_same(model: Path) -> None:
    held, tokenizer = load_model(model, dtype="4bit")
    full, _ = load_model(model, dtype="float32")
    assert held_in(held) == "4bit"
    shape = shape_of({**SHAPE, "vocab_size": len(tokenizer)}, "model")
    assert stored_bytes(held) == pytest.approx(
        held_bytes(shape, shape.parameters, "4bit"), rel=0.01
    )
    ids = torch.arange(3, 60, device=held.device)[None]
    with torch.no_grad():
        seen = torch.stack([held(ids).logits.float().flatten(), full(ids).logits.flatten()])
    assert 0.9 < torch.corrcoef(seen)[0, 1] < 0.99999


def test_head_of_a_reward_model_stays_float32(model: Path) -> None:
    made = new_reward_model(model, dtype="4bit")
    assert made.score.weight.dtype == torch.float32
    with torch.no_grad():
        scores = made(input_ids=torch.arange(3, 60, device=made.device)[None]).logits
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("method", ["ppo", "grpo", "dpo", "sft"])
def test_adapters_train_on_four_bits_and_are_measured_there(
    model: Path, method: str, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    content = recipe_content(write_bbq(tmp_path / "data"), str(model))
    content["policy"] |= {"method": method, "lora": LORA}
    if method == "grpo":
        content["policy"]["trainer"]["num_generations"] = 4
    if method == "ppo":
        trainer = {"max_steps": 1, "per_device_train_batch_size": 4}
        content["reward"] = {"functions": {"model": 1.0}, "lora": LORA, "trainer": trainer}
    content["precision"] = {"frozen": "4bit"}
    content["evaluate"]["limit"] = 4
    recipe, run = check_recipe(content, "small"), tmp_path / "run"
    train_run(recipe, run, plan=prepare_run(recipe, run))
    evaluate_run(recipe, run)
    first, last = find_checkpoints(run)
    assert first.dtype == last.dtype == "4bit"
    weights = [load_file(c.folder / "adapter_model.safetensors") for c in (first, last)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert {weight.dtype for weight in weights[1].values()} == {torch.float32}
    (cell,) = last.evaluation.glob("*.parquet")
    assert read_settings(cell)["origin"]["dtype"] == "4bit"
    if method != "ppo":
        return

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage.endswith(": ppo") and done == 1:
            raise KeyboardInterrupt

    cut = tmp_path / "cut"
    plan = prepare_run(recipe, cut)
    with pytest.raises(KeyboardInterrupt):
        train_run(recipe, cut, interrupt, plan=plan)
    train_run(recipe, cut)
    resumed = load_file(find_checkpoints(cut)[-1].folder / "adapter_model.safetensors")
    assert all(torch.equal(weights[1][name], resumed[name]) for name in weights[1])


def test_a_gguf_file_in_four_bits_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(InputError, match=r"tiny\.gguf: a GGUF file cannot be held in 4bit"):
        load_model(tmp_path / "tiny.gguf", dtype="4bit")
