"""From a recipe to what the estimate needs: batch sizes, lengths, precision, adapters."""

from dataclasses import dataclass
from typing import Any

from selfcorrect.evaluate.scoring.limits import BATCH_TOKENS
from selfcorrect.evaluate.scoring.precision import resolved
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.schema import Evaluate, Recipe
from selfcorrect.train.planning.memory import Batch, Footprint, Parallelism, frozen_bytes
from selfcorrect.train.planning.model_shape import Adapter, ModelShape
from selfcorrect.train.planning.stage_memory import (
    Rollout,
    evaluation_footprint,
    fine_tuning_footprint,
    measuring_footprint,
    pretraining_footprint,
    reward_footprint,
    rollout_footprint,
)

# Defaults of the libraries and stages for keys that a recipe leaves out; tests compare them.
TRAINER_DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "num_train_epochs": 1,
    "max_steps": -1,
    "max_length": 1024,
    "bf16": None,
    "use_cpu": False,
    "optim": "adamw_torch_fused",
}
POLICY_DEFAULTS: dict[str, Any] = {
    **TRAINER_DEFAULTS,
    "num_iterations": 4,
    "max_completion_length": 512,
    "steps_per_generation": None,
    "generation_batch_size": None,
    "num_generations": 8,  # GRPO's; PPO has 1
    "beta": 0.05,
    "critic": "auto",
    "ds3_gather_for_generation": True,
}
LORA_RANK = 8  # peft's default
# peft's own choice where a recipe names no target_modules
LORA_TARGETS = {
    **{kind: ["q_proj", "v_proj"] for kind in ("llama", "mistral", "qwen2", "qwen3")},
    "gpt_neox": ["query_key_value"],
    "gpt2": ["c_attn"],
}


@dataclass(frozen=True)
class Lengths:
    """Mean and maximum tokens of the feedback's prompts and answers."""

    prompt: float
    longest_prompt: int
    answer: float
    longest_answer: int


@dataclass(frozen=True)
class Held:
    """The types in which a stage's weights are held: those that do not learn, and those that do."""

    frozen: str
    trained: str
    has_adapter: bool

    @property
    def policy(self) -> str:
        """The type of the trained model's weights, or of those under its adapter."""
        return self.frozen if self.has_adapter else self.trained


def held_by(
    recipe: Recipe, shape: ModelShape, parallelism: Parallelism, has_adapter: bool = False
) -> Held:
    """Return the types that the recipe's `precision` means for a model; DeepSpeed has its own."""
    frozen = "float32"
    if parallelism.zero == 0:
        frozen = resolved(recipe.precision.frozen, shape.parameters, parallelism.fast)
    if frozen == "4bit" and not parallelism.gpu:
        raise InputError("precision.frozen: 4bit needs a CUDA GPU; use bfloat16 or auto")
    return Held(frozen, recipe.precision.trained, has_adapter)


class Settings:
    """A stage's `trainer:` keys on top of the defaults; `section` names them in errors."""

    def __init__(self, section: str, given: dict[str, Any], defaults: dict[str, Any]) -> None:
        self.section = section
        self.values = {**defaults, **given}
        if not str(self.values["optim"]).startswith("adamw_torch"):
            raise InputError(
                f"{section}.optim: the memory of {self.values['optim']!r} cannot be estimated; "
                "supported: adamw_torch and adamw_torch_fused"
            )

    def number(self, key: str) -> int:
        """Return the value of a key that must be a positive integer."""
        value = self.values[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{self.section}.{key} is {value!r}; it must be a positive integer")
        return value

    def bf16(self, parallelism: Parallelism, default: bool, held: "Held | None" = None) -> bool:
        """Return whether matrix products are in bfloat16.

        Those with weights `held` in it are, and by default those of an adapter on such a base
        (arguments.computed_in).
        """
        given = self.values["bf16"]
        if given is not None:
            return bool(given)
        if held is not None and held.policy in ("bfloat16", "4bit"):
            return True
        return bool(parallelism.gpu and not self.values["use_cpu"] and default)

    @property
    def checkpointing(self) -> bool:
        """Whether activations are recomputed instead of kept."""
        return bool(self.values["gradient_checkpointing"])

    def batch(self, rows: int, length: int, scored: int, bf16: bool, held: "Held") -> Batch:
        """Return one forward and backward pass over `rows` of `length` tokens."""
        accumulates = self.number("gradient_accumulation_steps") > 1
        return Batch(
            rows, length, scored, bf16, self.checkpointing, accumulates, held.frozen, held.trained
        )

    @property
    def rows_per_update(self) -> int:
        """Rows of one optimizer update on one device."""
        batch = self.number("per_device_train_batch_size")
        return batch * self.number("gradient_accumulation_steps")


def base_settings(recipe: Recipe) -> Settings:
    """Return the settings of pretraining or fine-tuning."""
    given = recipe.base.trainer if recipe.base is not None else {}
    return Settings("base.trainer", given, TRAINER_DEFAULTS)


def reward_settings(recipe: Recipe) -> Settings:
    """Return the reward model's settings."""
    return Settings("reward.trainer", recipe.reward.trainer, TRAINER_DEFAULTS)


def policy_settings(recipe: Recipe) -> Settings:
    """Return the policy's settings."""
    return Settings("policy.trainer", recipe.policy.trainer, POLICY_DEFAULTS)


def adapter_of(section: str, lora: dict[str, Any] | None, shape: ModelShape) -> Adapter | None:
    """Return the adapter that a recipe's `lora:` keys describe; None for full fine-tuning.

    Raises InputError for targets that the model does not have, or that are given as a pattern.
    """
    if lora is None:
        return None
    rank = lora.get("r", LORA_RANK)
    if not isinstance(rank, int) or rank < 1:
        raise InputError(f"{section}.r is {rank!r}; it must be a positive integer")
    targets = lora.get("target_modules") or LORA_TARGETS.get(shape.model_type)
    if targets == "all-linear":
        return Adapter(rank, frozenset(shape.matrices))
    if not isinstance(targets, list):
        raise InputError(f"{section}.target_modules: give a list of names, or all-linear")
    matrices = {
        name
        for name in shape.matrices
        if any(name == target or name.endswith(f".{target}") for target in targets)
    }
    if not matrices:
        raise InputError(
            f"{section}.target_modules: a {shape.model_type} model has none of "
            f"{', '.join(map(str, targets))}; it has {', '.join(shape.matrices)}"
        )
    return Adapter(rank, frozenset(matrices))


def steps_per_generation(settings: Settings, parallelism: Parallelism) -> int:
    """Return the micro-batches that a rollout batch is divided into, as TRL computes them."""
    rows = settings.number("per_device_train_batch_size")
    if settings.values["generation_batch_size"] is not None:
        rollout = settings.number("generation_batch_size")
        if rollout % (rows * parallelism.processes):
            raise InputError(
                f"policy.trainer.generation_batch_size: {rollout} is not a multiple of "
                f"per_device_train_batch_size {rows} times {parallelism.processes} processes"
            )
        return rollout // (rows * parallelism.processes)
    if settings.values["steps_per_generation"] is not None:
        return settings.number("steps_per_generation")
    return settings.number("gradient_accumulation_steps")


def updates_per_step(settings: Settings, parallelism: Parallelism) -> int:
    """Return the optimizer updates of one step, the same for PPO, GRPO and fine-tuning."""
    accumulation = settings.number("gradient_accumulation_steps")
    minibatches = steps_per_generation(settings, parallelism) // accumulation
    return settings.number("num_iterations") * minibatches


def critic_of(recipe: Recipe, settings: Settings, adapter: Adapter | None) -> str | None:
    """Return where PPO's values come from: shared, separate or lora; None for other methods."""
    if recipe.policy.method != "ppo":
        return None
    critic: str = settings.values["critic"]
    if critic == "auto":
        critic = "separate" if adapter is None else "lora"
    if critic not in ("shared", "separate", "lora") or (critic == "lora" and adapter is None):
        raise InputError(
            f"policy.trainer.critic is {critic!r}; allowed: auto, shared, separate, and lora if "
            "policy.lora is set"
        )
    return critic


def rollout_of(
    recipe: Recipe, shape: ModelShape, lengths: Lengths, parallelism: Parallelism
) -> Rollout:
    """Return the sizes of a step of PPO or GRPO on one device."""
    settings = policy_settings(recipe)
    rows = settings.number("per_device_train_batch_size")
    completion = settings.number("max_completion_length")
    length = lengths.longest_prompt + completion
    sampled = rows * steps_per_generation(settings, parallelism)
    adapter = adapter_of("policy.lora", recipe.policy.lora, shape)
    held = held_by(recipe, shape, parallelism, adapter is not None)
    critic = critic_of(recipe, settings, adapter)
    if critic is None:
        group = settings.number("num_generations")
        if sampled % group:
            raise InputError(
                f"policy.trainer.num_generations: {group} does not divide the rollout batch of "
                f"{sampled} completions; change it, or steps_per_generation"
            )
    return Rollout(
        sampled,
        lengths.longest_prompt,
        completion,
        settings.batch(
            rows, length, rows * completion, settings.bf16(parallelism, True, held), held
        ),
        critic,
        settings.values["beta"] != 0,
        adapter,
        bool(settings.values["ds3_gather_for_generation"]),
        recipe.reward.has_model,
    )


def stage_footprints(
    recipe: Recipe, shape: ModelShape, lengths: Lengths, parallelism: Parallelism
) -> list[Footprint]:
    """Return the memory of the recipe's stages in their order, each at its worst moment."""
    footprints = []
    if recipe.base is not None:
        footprints.append(_base(recipe, shape, lengths, parallelism))
    if recipe.reward.is_fitted:
        adapter = adapter_of("reward.lora", recipe.reward.lora, shape)
        held = held_by(recipe, shape, parallelism, adapter is not None)
        batch = _text_batch(reward_settings(recipe), lengths, parallelism, 2, held)
        footprints.append(reward_footprint(shape, adapter, batch, parallelism))
    inline = recipe.evaluate.attach == "inline"
    length = 256 + recipe.evaluate.max_new_tokens
    rows = max(1, BATCH_TOKENS["gpu" if parallelism.gpu else "cpu"] // length)
    sampled = (rows, length) if inline else None
    if recipe.policy.is_offline:
        footprints.append(_offline_policy(recipe, shape, lengths, parallelism, sampled))
    else:
        rollout = rollout_of(recipe, shape, lengths, parallelism)
        footprints.append(rollout_footprint(shape, rollout, parallelism, sampled))
    if not inline:
        dtype: str = recipe.evaluate.dtype
        if dtype == "auto":  # as training held them
            dtype = held_by(recipe, shape, parallelism, recipe.policy.lora is not None).policy
        processes = max(parallelism.processes, recipe.launch.processes)
        devices = evaluation_devices(recipe.evaluate, processes)
        footprints.append(evaluation_footprint(shape, parallelism, rows, length, dtype, devices))
    return footprints


def evaluation_devices(evaluate: Evaluate, processes: int) -> int:
    """Return how many devices hold a model together while it is measured.

    vLLM's settings say so; a `device_map` divides it over the devices of the job's `processes`.
    """
    given = evaluate.engine_args
    if evaluate.engine != "vllm":
        return processes if given and evaluate.engine == "packed" else 1
    count = 1
    for key in ("tensor_parallel_size", "pipeline_parallel_size"):
        size = given.get(key, 1)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise InputError(f"evaluate.engine_args.{key} is {size!r}; give a positive integer")
        count *= size
    return count


def _base(
    recipe: Recipe, shape: ModelShape, lengths: Lengths, parallelism: Parallelism
) -> Footprint:
    assert recipe.base is not None
    settings = base_settings(recipe)
    held = held_by(recipe, shape, parallelism)
    if recipe.base.method == "sft":
        batch = _text_batch(settings, lengths, parallelism, 1, held)
        return fine_tuning_footprint("base", shape, None, batch, parallelism)
    bf16 = settings.bf16(parallelism, default=False)
    batch = settings.batch(1, recipe.base.batch_tokens, 0, bf16, held)
    return pretraining_footprint(shape, batch, parallelism)


def _offline_policy(
    recipe: Recipe,
    shape: ModelShape,
    lengths: Lengths,
    parallelism: Parallelism,
    sampled: tuple[int, int] | None,
) -> Footprint:
    """Return the footprint of SFT, or of DPO: both texts of a pair in one pass, and a reference."""
    is_dpo = recipe.policy.method == "dpo"
    adapter = adapter_of("policy.lora", recipe.policy.lora, shape)
    held = held_by(recipe, shape, parallelism, adapter is not None)
    batch = _text_batch(policy_settings(recipe), lengths, parallelism, 2 if is_dpo else 1, held)
    learning = fine_tuning_footprint("policy", shape, adapter, batch, parallelism)
    if is_dpo and adapter is None:  # else the reference is the policy's base
        learning.parts["reference"] = frozen_bytes(
            shape, shape.parameters, parallelism, batch, held.trained
        )
    if sampled is None:
        return learning
    kept = ("weights", "optimizer", "reference")
    resident = {part: learning.parts[part] for part in kept if part in learning.parts}
    measuring = measuring_footprint(shape, resident, parallelism, sampled, held.policy)
    return max(learning, measuring, key=lambda moment: moment.total)


def _text_batch(
    settings: Settings, lengths: Lengths, parallelism: Parallelism, answers: int, held: Held
) -> Batch:
    """Return a micro-batch of prompts with `answers` answers each, all of the maximum length."""
    rows = answers * settings.number("per_device_train_batch_size")
    length = min(lengths.longest_prompt + lengths.longest_answer, settings.number("max_length"))
    bf16 = settings.bf16(parallelism, False, held)
    # Without a GPU's kernel TRL computes the LM head at every position (memory.lm_head_bytes).
    scored = rows * (min(lengths.longest_answer, length) if parallelism.gpu else length)
    return settings.batch(rows, length, scored, bf16, held)
