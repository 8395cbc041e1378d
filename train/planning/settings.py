"""From a recipe to what planning reckons with: batch sizes, lengths, precision, adapters."""

from dataclasses import dataclass
from typing import Any

from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.schema import Recipe
from selfcorrect.train.planning.memory import Adapter, Batch, Engine, Footprint
from selfcorrect.train.planning.model_shape import ModelShape
from selfcorrect.train.planning.stage_memory import (
    Rollout,
    evaluation,
    fine_tuning,
    ppo,
    pretraining,
    reward_fitting,
)

# What the libraries and the stages take where the recipe says nothing; tests compare both.
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
PPO_DEFAULTS: dict[str, Any] = {
    **TRAINER_DEFAULTS,
    "num_iterations": 4,
    "max_completion_length": 512,
    "steps_per_generation": None,
    "generation_batch_size": None,
    "beta": 0.05,
    "critic": "auto",
    "ds3_gather_for_generation": True,
}
LORA_RANK = 8  # peft's default
# peft's own choice where a recipe names no target_modules
LORA_TARGETS = {
    "llama": ["q_proj", "v_proj"],
    "mistral": ["q_proj", "v_proj"],
    "qwen2": ["q_proj", "v_proj"],
    "qwen3": ["q_proj", "v_proj"],
    "gpt_neox": ["query_key_value"],
    "gpt2": ["c_attn"],
}


@dataclass(frozen=True)
class Lengths:
    """Tokens of the feedback's prompts and answers: on average, and at most."""

    prompt: float
    longest_prompt: int
    answer: float
    longest_answer: int


class Settings:
    """A stage's `trainer:` keys over the defaults; `section` names them in errors."""

    def __init__(self, section: str, given: dict[str, Any], defaults: dict[str, Any]) -> None:
        self.section = section
        self.values = {**defaults, **given}
        if not str(self.values["optim"]).startswith("adamw_torch"):
            raise InputError(
                f"{section}.optim: plan knows the memory of adamw_torch and adamw_torch_fused "
                f"only, not of {self.values['optim']!r}"
            )

    def number(self, key: str) -> int:
        """A whole number above 0."""
        value = self.values[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{self.section}.{key}: {value!r} is no whole number above 0")
        return value

    def bf16(self, engine: Engine, otherwise: bool) -> bool:
        """Whether matrix products are in bfloat16; `otherwise` where the recipe says nothing."""
        given = self.values["bf16"]
        return bool(
            engine.gpu and not self.values["use_cpu"] and (otherwise if given is None else given)
        )

    @property
    def checkpointing(self) -> bool:
        """Whether activations are computed again instead of kept."""
        return bool(self.values["gradient_checkpointing"])

    @property
    def accumulates(self) -> bool:
        """Whether an update adds up several micro-batches."""
        return self.number("gradient_accumulation_steps") > 1


def base_settings(recipe: Recipe) -> Settings:
    """Of pretraining or fine-tuning."""
    given = recipe.base.trainer if recipe.base is not None else {}
    return Settings("base.trainer", given, TRAINER_DEFAULTS)


def reward_settings(recipe: Recipe) -> Settings:
    """Of the reward model."""
    return Settings("reward.trainer", recipe.reward.trainer, TRAINER_DEFAULTS)


def ppo_settings(recipe: Recipe) -> Settings:
    """Of PPO."""
    return Settings("ppo.trainer", recipe.ppo.trainer, PPO_DEFAULTS)


def adapter_of(section: str, lora: dict[str, Any] | None, shape: ModelShape) -> Adapter | None:
    """The adapter that a recipe's `lora:` keys describe; None for full fine-tuning.

    Raises InputError for targets that the model does not have, or that are given as a pattern.
    """
    if lora is None:
        return None
    rank = lora.get("r", LORA_RANK)
    if not isinstance(rank, int) or rank < 1:
        raise InputError(f"{section}.r: {rank!r} is no whole number above 0")
    targets = lora.get("target_modules") or LORA_TARGETS.get(shape.model_type)
    if targets == "all-linear":
        return Adapter(rank, frozenset(shape.matrices))
    if not isinstance(targets, list):
        raise InputError(f"{section}.target_modules: plan needs a list of names, or all-linear")
    found = {
        name
        for name in shape.matrices
        if any(name == target or name.endswith(f".{target}") for target in targets)
    }
    if not found:
        raise InputError(
            f"{section}.target_modules: a {shape.model_type} model has none of "
            f"{', '.join(map(str, targets))}; it has {', '.join(shape.matrices)}"
        )
    return Adapter(rank, frozenset(found))


def steps_per_generation(settings: Settings, engine: Engine) -> int:
    """Micro-batches that a rollout batch is learned from, as TRL works it out."""
    rows = settings.number("per_device_train_batch_size")
    if settings.values["generation_batch_size"] is not None:
        whole = settings.number("generation_batch_size")
        if whole % (rows * engine.processes):
            raise InputError(
                f"ppo.trainer.generation_batch_size: {whole} is no multiple of "
                f"per_device_train_batch_size {rows} times {engine.processes} processes"
            )
        return whole // (rows * engine.processes)
    if settings.values["steps_per_generation"] is not None:
        return settings.number("steps_per_generation")
    return settings.number("gradient_accumulation_steps")


def rollout_of(recipe: Recipe, shape: ModelShape, lengths: Lengths, engine: Engine) -> Rollout:
    """The sizes of a PPO step on one device."""
    settings = ppo_settings(recipe)
    rows = settings.number("per_device_train_batch_size")
    completion = settings.number("max_completion_length")
    adapter = adapter_of("ppo.lora", recipe.ppo.lora, shape)
    critic = settings.values["critic"]
    if critic == "auto":
        critic = "separate" if adapter is None else "lora"
    if critic not in ("shared", "separate", "lora") or (critic == "lora" and adapter is None):
        raise InputError(
            f"ppo.trainer.critic: {critic!r}; auto, shared, separate, or with ppo.lora lora"
        )
    batch = Batch(
        rows,
        lengths.longest_prompt + completion,
        rows * completion,
        settings.bf16(engine, otherwise=True),
        settings.checkpointing,
        settings.accumulates,
    )
    return Rollout(
        rows * steps_per_generation(settings, engine),
        lengths.longest_prompt,
        completion,
        batch,
        critic,
        settings.values["beta"] != 0,
        adapter,
        bool(settings.values["ds3_gather_for_generation"]),
    )


def stage_footprints(
    recipe: Recipe, shape: ModelShape, lengths: Lengths, engine: Engine
) -> list[Footprint]:
    """Memory of the recipe's stages, in their order, at the worst moment of each."""
    found = []
    if recipe.base is not None:
        found.append(_base(recipe, shape, lengths, engine))
    if recipe.reward.path is None:
        settings = reward_settings(recipe)
        batch = _text_batch(settings, lengths, engine, answers=2)
        adapter = adapter_of("reward.lora", recipe.reward.lora, shape)
        found.append(reward_fitting(shape, adapter, batch, engine))
    inline = recipe.evaluate.attach == "inline"
    rollout = rollout_of(recipe, shape, lengths, engine)
    found.append(ppo(shape, rollout, engine, measures=inline))
    if not inline:
        length = 256 + recipe.evaluate.max_new_tokens
        rows = max(1, (32768 if engine.gpu else 4096) // length)
        found.append(evaluation(shape, engine, rows, length))
    return found


def _base(recipe: Recipe, shape: ModelShape, lengths: Lengths, engine: Engine) -> Footprint:
    assert recipe.base is not None
    settings = base_settings(recipe)
    bf16 = settings.bf16(engine, otherwise=False)
    if recipe.base.method == "pretrain":
        whole = Batch(
            1,
            recipe.base.batch_tokens,
            bf16=bf16,
            checkpointing=settings.checkpointing,
            accumulates=settings.accumulates,
        )
        return pretraining(shape, whole, engine)
    return fine_tuning(shape, _text_batch(settings, lengths, engine, answers=1), engine)


def _text_batch(settings: Settings, lengths: Lengths, engine: Engine, answers: int) -> Batch:
    """A micro-batch of prompts with `answers` answers to each, as long as the longest may be."""
    rows = answers * settings.number("per_device_train_batch_size")
    length = min(lengths.longest_prompt + lengths.longest_answer, settings.number("max_length"))
    bf16 = settings.bf16(engine, otherwise=False)
    # Without a GPU's kernel TRL computes the LM head at every position (planning/memory.py: head).
    scored = rows * (min(lengths.longest_answer, length) if engine.gpu else length)
    return Batch(rows, length, scored, bf16, settings.checkpointing, settings.accumulates)
