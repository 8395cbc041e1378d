"""Bytes that a run writes: models, checkpoints, and training states."""

from dataclasses import dataclass

from selfcorrect.recipes.schema import Recipe
from selfcorrect.train.planning.memory import Parallelism
from selfcorrect.train.planning.model_shape import ModelShape
from selfcorrect.train.planning.settings import adapter_of, critic_of, policy_settings
from selfcorrect.train.planning.stage_memory import critic_parameters


@dataclass(frozen=True)
class Disk:
    """Bytes of one model and seed; `working` exist only while a stage is trained."""

    base: float
    reward: float
    checkpoints: float
    working: float

    @property
    def kept(self) -> float:
        """Bytes that stay after training."""
        return self.base + self.reward + self.checkpoints


def disk(recipe: Recipe, shape: ModelShape, parallelism: Parallelism) -> Disk:
    """Return what is saved: weights in float32 (16 bits under DeepSpeed), and two training states.

    Evaluation adds some tens of MB per checkpoint, which are not counted.
    """
    settings = policy_settings(recipe)
    bf16 = settings.bf16(parallelism, default=not recipe.policy.is_offline)
    size = 2.0 if parallelism.zero and bf16 else 4.0
    adapter = adapter_of("policy.lora", recipe.policy.lora, shape)
    policy = shape.trainable(adapter)
    critic = critic_parameters(shape, critic_of(recipe, settings, adapter), adapter)
    states = [2 * (12.0 if parallelism.zero == 0 else 14.0) * (policy + critic)]
    if recipe.reward.is_fitted:
        fitted = adapter_of("reward.lora", recipe.reward.lora, shape)
        states.append(2 * 12.0 * shape.trainable(fitted, shape.backbone))
    if recipe.base is not None:
        states.append(2 * 12.0 * shape.parameters)
    return Disk(
        4.0 * shape.parameters,
        4.0 * shape.backbone if recipe.reward.is_fitted else 0.0,
        size * policy * len(recipe.policy.checkpoints),
        max(states),
    )
