"""Defaults and limits against the libraries; footprints of the policy by setting and method."""

import dataclasses
from typing import Any

import pytest

from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.load import load_recipe
from selfcorrect.recipes.schema import Recipe
from selfcorrect.train.planning import memory
from selfcorrect.train.planning.devices import GPUS
from selfcorrect.train.planning.estimate import USABLE, devices_for_evaluation
from selfcorrect.train.planning.known_models import KNOWN_MODELS
from selfcorrect.train.planning.memory import Footprint, Parallelism, kv_cache_bytes
from selfcorrect.train.planning.model_shape import shape_of
from selfcorrect.train.planning.settings import (
    LORA_RANK,
    LORA_TARGETS,
    POLICY_DEFAULTS,
    TRAINER_DEFAULTS,
    Lengths,
    evaluation_devices,
    held_by,
    stage_footprints,
)
from tests.support.estimates import LENGTHS, LLAMA, overridden, recipe_with


def test_devices_that_hold_a_model_together_while_it_is_measured() -> None:
    """72.7 billion parameters in bfloat16 are 145 GB: four H100 hold them, and the cache."""
    given = ["policy.method=ppo", "evaluate.attach=off", "evaluate.dtype=bfloat16"]
    shape = shape_of(KNOWN_MODELS["Qwen/Qwen2.5-72B"], "72b")
    parallelism = Parallelism(gpu=True, processes=4)

    def evaluation(*more: str) -> Footprint:
        recipe = load_recipe("qwen25-full", [*given, *more])
        return stage_footprints(recipe, shape, LENGTHS, parallelism)[-1]

    alone = evaluation()
    assert alone.stage == "evaluation" and devices_for_evaluation(alone, GPUS["h100"]) == 4
    tensor = "evaluate.engine_args.tensor_parallel_size=2"
    for settings, count in [
        (["evaluate.engine_args.device_map=auto"], 4),
        (["evaluate.engine=vllm", tensor], 2),
        (["evaluate.engine=vllm", tensor, "evaluate.engine_args.pipeline_parallel_size=4"], 8),
    ]:
        divided = evaluation(*settings)
        assert divided.parts["weights"] == alone.parts["weights"] / count
        assert (
            evaluation_devices(load_recipe("qwen25-full", [*given, *settings]).evaluate, 4) == count
        )
    with pytest.raises(InputError, match="tensor_parallel_size"):
        evaluation("evaluate.engine=vllm", "evaluate.engine_args.tensor_parallel_size=0")


def test_defaults_are_those_of_the_libraries() -> None:
    import peft.utils.constants as constants
    from peft import LoraConfig
    from transformers import TrainingArguments
    from trl import RewardConfig, SFTConfig

    from selfcorrect.train.ppo.config import PPOConfig
    from selfcorrect.train.stages import base, corpus, policy, reward

    def defaults(config: type, ours: dict[str, Any]) -> dict[str, Any]:
        return {field.name: field.default for field in dataclasses.fields(config)} | ours

    sft = defaults(SFTConfig, base.SFT_DEFAULTS)
    fit = defaults(RewardConfig, reward.DEFAULTS)
    ppo = defaults(PPOConfig, {})
    for key, value in TRAINER_DEFAULTS.items():
        if key == "bf16":  # None here: off in the first two stages, on a GPU in PPO
            assert (sft[key], fit[key], ppo[key]) == (False, False, None)
            continue
        for config in (sft, fit):
            default = config[key]
            assert default == value or (key == "optim" and str(default.value) == value), key
    for key, value in POLICY_DEFAULTS.items():
        if key == "num_generations":
            assert policy.GRPO_DEFAULTS[key] == value
        elif key not in ("num_train_epochs", "max_length", "optim"):
            assert ppo[key] == value, key
    plain = defaults(TrainingArguments, corpus.DEFAULTS)
    assert plain["per_device_train_batch_size"] == TRAINER_DEFAULTS["per_device_train_batch_size"]
    assert LoraConfig().r == LORA_RANK
    peft_targets = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    for model_type, targets in LORA_TARGETS.items():
        assert peft_targets[model_type] == targets


def test_tile_sizes_are_trls() -> None:
    from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    assert memory.TILE_TOKENS == TOKEN_CHUNK_SIZE
    assert memory.TILE_WORDS == _CHUNKED_LOGPROB_CHUNK_SIZE


def policy_footprint(recipe: Recipe, parallelism: Parallelism, size: str = "1b") -> Footprint:
    shape = shape_of(KNOWN_MODELS[f"EleutherAI/pythia-{size}"], size)
    footprints = stage_footprints(recipe, shape, LENGTHS, parallelism)
    return next(stage for stage in footprints if stage.stage == "policy")


def test_settings_change_the_footprint_in_the_right_direction() -> None:
    usual = policy_footprint(recipe_with(), Parallelism()).total
    for smaller in ({"critic": "shared"}, {"beta": 0.0}, {"gradient_checkpointing": True},
                    {"per_device_train_batch_size": 2}):  # fmt: skip
        assert policy_footprint(recipe_with(**smaller), Parallelism()).total < usual, smaller
    assert policy_footprint(recipe_with(lora={"r": 8}), Parallelism()).total < usual / 2
    gathered, divided = (
        recipe_with(ds3_gather_for_generation=gathers, steps_per_generation=1)
        for gathers in (True, False)
    )
    zero3 = Parallelism(8, 3)
    assert (
        policy_footprint(divided, zero3, "12b").total
        <= policy_footprint(gathered, zero3, "12b").total
        < policy_footprint(gathered, Parallelism(), "12b").total
    )


def test_grpo_has_no_critic() -> None:
    ppo, grpo = (recipe_with(method, steps_per_generation=1) for method in ("ppo", "grpo"))
    footprint = policy_footprint(grpo, Parallelism())
    assert footprint.parts["critic"] == 0
    assert footprint.parts["reference"] > 0 and footprint.parts["reward model"] > 0
    assert footprint.total < policy_footprint(ppo, Parallelism()).total
    with pytest.raises(InputError, match=r"policy\.trainer\.num_generations: 8 does not divide"):
        policy_footprint(recipe_with("grpo", per_device_train_batch_size=4), Parallelism())


def test_fine_tuned_policy_loads_one_model() -> None:
    recipe = recipe_with("sft", bf16=True)
    footprint = policy_footprint(recipe, Parallelism())
    assert set(footprint.parts) == {"weights", "gradients", "optimizer", "activations", "logits"}
    assert footprint.total < policy_footprint(recipe_with("grpo"), Parallelism()).total
    adapter = policy_footprint(recipe_with("sft", lora={"r": 8}, bf16=True), Parallelism())
    assert adapter.total < footprint.total / 2
    dpo = policy_footprint(recipe_with("dpo", bf16=True), Parallelism())
    assert set(dpo.parts) == {*footprint.parts, "reference"}
    assert dpo.parts["activations"] > 1.9 * footprint.parts["activations"]  # two texts a pair
    assert dpo.parts["weights"] == footprint.parts["weights"]
    shape = shape_of(KNOWN_MODELS["EleutherAI/pythia-1b"], "1b")
    assert dpo.parts["reference"] == 4 * shape.parameters
    with_adapter = policy_footprint(recipe_with("dpo", lora={"r": 8}, bf16=True), Parallelism())
    assert "reference" not in with_adapter.parts
    inline = overridden(recipe_with("sft", per_device_train_batch_size=1, lora={"r": 1}),
                        ["evaluate.attach=inline"])  # fmt: skip
    assert policy_footprint(inline, Parallelism()).moment == "measuring"


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_a_rollout_batch_is_sampled_at_once(method: str) -> None:
    small, large = (
        recipe_with(method, steps_per_generation=n, per_device_train_batch_size=4) for n in (2, 64)
    )
    shape = shape_of(KNOWN_MODELS["EleutherAI/pythia-1b"], "1b")
    footprint = policy_footprint(large, Parallelism())
    assert footprint.moment == "generating"
    tokens = 4 * 64 * (200 + 512)
    assert footprint.parts["KV cache"] == kv_cache_bytes(shape, tokens, bf16=True)
    assert policy_footprint(small, Parallelism()).total < footprint.total


@pytest.mark.parametrize(
    ("size", "most"), [("3B", 20), ("7B", 40), ("14B", USABLE * GPUS["h100"].memory / 1e9)]
)
def test_ppo_with_an_adapter_fits_one_gpu(size: str, most: float) -> None:
    """Policy, critic, reference and reward model of Qwen2.5 in one process, in GB."""
    recipe = load_recipe("qwen25-lora", ["launch.processes=1", "launch.deepspeed=null"])
    shape = shape_of(KNOWN_MODELS[f"Qwen/Qwen2.5-{size}"], size)
    lengths = Lengths(149.0, 880, 46.0, 144)  # of HH-RLHF
    totals = {}
    for frozen in ("auto", "4bit", "float32"):
        changed = overridden(recipe, [f"precision.frozen={frozen}"])
        stages = stage_footprints(changed, shape, lengths, Parallelism())
        totals[frozen] = max(stage.total for stage in stages) / 1e9
    assert totals["4bit"] < 0.6 * totals["auto"] and totals["auto"] < 0.6 * totals["float32"]
    assert totals["auto"] <= most


def test_precision_follows_the_recipe_and_the_device() -> None:
    """A small model is float32, 4 bits need a GPU, a reference computes as the policy does."""
    adapter, pure = recipe_with(lora={"r": 8}), recipe_with()
    pure = overridden(pure, ["precision.trained=bfloat16", "precision.frozen=bfloat16"])
    shape = shape_of(KNOWN_MODELS["EleutherAI/pythia-1b"], "1b")
    footprint = policy_footprint(adapter, Parallelism(gpu=False))
    assert footprint.parts["reward model"] == 2 * shape.backbone
    slow = policy_footprint(adapter, Parallelism(gpu=False, fast="float32"))
    assert slow.parts["reward model"] == 4 * shape.backbone
    assert held_by(adapter, shape_of(LLAMA, "tiny"), Parallelism()).frozen == "float32"
    half = policy_footprint(pure, Parallelism(gpu=False))
    assert half.parts["reference"] == 2 * shape.parameters
    assert half.parts["optimizer"] == 4 * shape.parameters
    four = overridden(adapter, ["precision.frozen=4bit"])
    with pytest.raises(InputError, match=r"precision\.frozen: 4bit needs a CUDA GPU"):
        policy_footprint(four, Parallelism(gpu=False))
