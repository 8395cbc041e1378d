"""Memory of a training step: against autograd, DeepSpeed's estimators, and numbers by hand."""

from typing import Any

import pytest
import torch

from selfcorrect.train.planning.memory import (
    Batch,
    Parallelism,
    activation_bytes,
    gradient_bytes_at_peak,
    held_bytes,
    kv_cache_bytes,
    saved_per_token,
    training_bytes,
)
from selfcorrect.train.planning.model_shape import GATED, MODEL_TYPES, Adapter, shape_of
from selfcorrect.train.planning.settings import LORA_TARGETS
from selfcorrect.train.trainers.guarded import leave_casts_to_autocast
from tests.support.estimates import LLAMA

SHAPE, HALF = shape_of(LLAMA, "llama"), Batch(1, 1, bf16=True)
SMALL = {
    "gpt2": {"n_embd": 64, "n_inner": 160, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
             "attn_pdrop": 0.0, "vocab_size": 50},
    "gpt_neox": {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4,
                 "vocab_size": 50},
    **{kind: {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 50,
              "pad_token_id": None} for kind in GATED},
}  # fmt: skip


def kept_by_autograd(
    fields: dict[str, Any],
    layers: int,
    lora: list[str] | str | None,
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
) -> float:
    """Return bytes that autograd keeps of a model's trunk, without its weights."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    given = {**fields, "n_layer": layers, "num_hidden_layers": layers}
    kind = given.pop("model_type")
    given.pop("num_hidden_layers" if kind == "gpt2" else "n_layer")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given)).base_model
    model.to(dtype)
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.0, target_modules=lora))
        leave_casts_to_autocast(model)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {size for p in model.parameters() for size in (p.shape, p.shape[::-1])}
    storages, alive = {}, []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        alive.append(tensor)
        is_copy = tensor.shape in shapes  # of a weight, by autocast
        if storage.data_ptr() not in weights and not is_copy:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
    ):
        model.train()(input_ids=torch.ones(2, 48, dtype=torch.long), use_cache=False)
    return sum(storages.values())


@pytest.mark.parametrize("lora", [None, "all-linear", "some"])
@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_activations_match_autograd(kind: str, lora: str | None) -> None:
    fields = {"model_type": kind, **SMALL[kind]}
    shape = shape_of(fields, kind)
    names: Any = lora
    if lora == "some":
        names = LORA_TARGETS.get(kind, ["q_proj", "v_proj"])
    targets = set(shape.matrices) if lora == "all-linear" else set(names or ())
    targets |= {name for name in shape.matrices if name.rpartition(".")[2] in targets}
    adapter = Adapter(4, frozenset(targets & set(shape.matrices))) if lora else None
    five, two = (kept_by_autograd(fields, layers, names) for layers in (5, 2))
    per_layer = (five - two) / 3 / (2 * 48) / 4
    assert sum(saved_per_token(shape, adapter)) == pytest.approx(per_layer, rel=0.02)


@pytest.mark.parametrize(
    ("lora", "held", "autocast"),
    [("all-linear", "bfloat16", True), (None, "float32", True), (None, "bfloat16", False)],
    ids=["adapter on a half base", "autocast", "pure"],
)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "olmo2", "gemma3_text", "gpt_neox", "gpt2"])
def test_activations_in_half_precision_match_autograd(
    kind: str, lora: str | None, held: str, autocast: bool
) -> None:
    """An input that several matrices read is kept once, unless autocast casts it for each."""
    fields = {"model_type": kind, **SMALL[kind]}
    given = (lora, getattr(torch, held), autocast)
    five, two = (kept_by_autograd(fields, layers, *given) for layers in (5, 2))
    shape = shape_of({**fields, "n_layer" if kind == "gpt2" else "num_hidden_layers": 3}, kind)
    adapter = Adapter(4, frozenset(shape.matrices)) if lora else None
    batch = Batch(2, 48, bf16=True, frozen=held, trained=held)
    planned = activation_bytes(shape, adapter, batch, Parallelism(gpu=False))
    outside = 2 * 48 * (4 * 2 + 2) * shape.hidden
    assert planned - outside == pytest.approx(five - two, rel=0.03)


def test_checkpointing_keeps_layer_inputs_and_one_layer() -> None:
    shape = shape_of({**LLAMA, "num_hidden_layers": 10}, "llama")
    parallelism = Parallelism(gpu=False)
    kept = activation_bytes(shape, None, Batch(1, 100, checkpointing=True), parallelism)
    assert kept == 100 * 4 * (10 * 8 + sum(saved_per_token(shape, None)) + 3 * 8)
    assert kept < activation_bytes(shape, None, Batch(1, 100), parallelism) / 3


def test_key_values_by_hand() -> None:
    shape = shape_of(LLAMA, "llama")  # one key-value head of 4, 2 layers, keys and values
    assert kv_cache_bytes(shape, 10, bf16=False) == 4 * 10 * 4 * 2 * 2


@pytest.mark.parametrize("processes", [2, 8])
@pytest.mark.parametrize("billions", [1.5, 72.7])
def test_zero_bytes_match_deepspeed_estimators(billions: float, processes: int) -> None:
    """Stage 2 to the byte; for stage 3 DeepSpeed counts 18 bytes, without the 16-bit gradients."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    parameters = int(billions * 1e9)
    two = estimate_zero2_model_states_mem_needs(parameters, processes, 1, cpu_offload=False)[1]
    three = estimate_zero3_model_states_mem_needs(
        parameters, 0, processes, 1, cpu_offload=False, cpu_offload_params=False
    )[1]
    ours = [
        sum(training_bytes(SHAPE, 0, parameters, Parallelism(processes, z), HALF)) for z in (2, 3)
    ]
    assert ours[0] == pytest.approx(two, rel=1e-6)
    assert ours[1] == pytest.approx(three + 2 * parameters / processes, rel=1e-6)


def test_training_bytes_by_hand() -> None:
    one, eight = Parallelism(1, 0), Parallelism(8, 0)
    plain = Batch(1, 1)
    assert training_bytes(SHAPE, 0, 100, one, plain) == (400, 400, 800)
    assert training_bytes(SHAPE, 0, 100, one, HALF) == (600, 400, 800)  # autocast's copy
    assert training_bytes(SHAPE, 0, 100, eight, plain) == (400, 800, 800)  # DDP's buckets
    assert training_bytes(SHAPE, 0, 100, Parallelism(8, 1), HALF) == (200, 250, 150)
    assert training_bytes(SHAPE, 90, 10, Parallelism(8, 3), HALF) == (25, 2.5 + 5, 15)
    pure = Batch(1, 1, trained="bfloat16")
    assert training_bytes(SHAPE, 0, 100, one, pure) == (200, 200, 400)
    on_half = Batch(1, 1, bf16=True, frozen="bfloat16")  # an adapter of 10 on a base of 90
    assert training_bytes(SHAPE, 90, 10, one, on_half) == (180 + 40 + 20, 40, 80)


def test_held_bytes_by_hand() -> None:
    """In 4 bits the layers' matrices have 4.127 bits a weight, embeddings and norms 16."""
    parameters, matrices = SHAPE.parameters, 2 * (2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 24)
    assert held_bytes(SHAPE, parameters, "float16") == 2 * parameters
    expected = 0.5158691 * matrices + 2 * (parameters - matrices)
    assert held_bytes(SHAPE, parameters, "4bit") == pytest.approx(expected, rel=1e-6)
    assert held_bytes(SHAPE, 0, "4bit") == 0


def test_gradients_replace_freed_activations() -> None:
    parallelism = Parallelism()
    assert gradient_bytes_at_peak(100, 70, Batch(1, 1), parallelism) == 30
    assert gradient_bytes_at_peak(100, 170, Batch(1, 1), parallelism) == 0
    assert gradient_bytes_at_peak(100, 70, Batch(1, 1, accumulates=True), parallelism) == 100
    assert gradient_bytes_at_peak(100, 70, Batch(1, 1), Parallelism(2, 0)) == 100
