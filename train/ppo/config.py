"""Settings of PPO: the fields of TRL's GRPOConfig, and PPO's own."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args

import torch
from trl import GRPOConfig

from selfcorrect.recipes.foundation.errors import InputError, reason_of

CriticKind = Literal["auto", "shared", "separate", "lora"]
KLEstimator = Literal["k1", "k2", "k3"]
C = TypeVar("C", bound=GRPOConfig)

OPTIONAL = (
    "critic_learning_rate", "cliprange_value", "kl_target", "max_kl", "score_clip",
    "missing_eos_penalty",
)  # fmt: skip
BOUNDS: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (("num_iterations", "kl_horizon", "score_scale"), "above 0", lambda value: value > 0),
    (("beta", "vf_coef", "critic_warmup_steps"), "0 or more", lambda value: value >= 0),
    (("gamma", "lam"), "between 0 and 1", lambda value: 0 <= value <= 1),
    (OPTIONAL, "above 0, or null for off", lambda value: value is None or value > 0),
    (("score_shift",), "a finite number", math.isfinite),
)


def _help_from_docstring(cls: type[C]) -> type[C]:
    """Use the docstring's description of each attribute as its help text on a command line."""
    entries = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", cls.__doc__ or "", re.MULTILINE)
    descriptions = {name: " ".join(text.split()) for name, text in entries}
    for field in fields(cls):
        if field.name in descriptions:
            help_text = descriptions[field.name].replace("%", "%%")  # for argparse
            field.metadata = MappingProxyType({"help": help_text})
    return cls


@_help_from_docstring
@dataclass
class PPOConfig(GRPOConfig):
    """Settings of `PPOTrainer`: those of GRPOConfig, some with other defaults, and PPO's own.

    One PPO step samples one rollout batch of `generation_batch_size` completions and then makes
    `updates_per_rollout` optimizer updates on it: `num_iterations` PPO epochs of
    `steps_per_generation / gradient_accumulation_steps` minibatches each. `max_steps`,
    `logging_steps` and `save_steps` count optimizer updates, as everywhere in transformers.

    Attributes:
        epsilon: PPO's clip range (0.2 in Schulman et al. 2017). The policy loss gives no gradient
            to a token whose probability ratio has left 1 - epsilon to 1 + epsilon in the direction
            of its advantage.
        epsilon_high: upper clip range, if it is to differ from the lower one. None: epsilon.
        num_generations: completions per prompt. 1, since a critic needs no group to compare with.
        num_generations_eval: completions per prompt in evaluation.
        num_iterations: PPO epochs over a rollout batch.
        beta: initial coefficient of the KL penalty in the reward. 0 loads no reference model, and
            no KL is measured either.
        disable_dropout: turn off dropout and all other random numbers of training (layer drop,
            router jitter), so that probability ratios start at exactly 1.
        gradient_checkpointing: save memory at about 30 % of the time.
        adam_epsilon: Adam's epsilon; 1e-5 as in Huang et al. 2022 (37 implementation details).
        bf16: bfloat16 autocast. None: on if a GPU supports it, off on a CPU.
        loss_type: "dapo", the mean over the tokens of a minibatch; no other is allowed.
        scale_rewards: "none"; PPO uses no group statistics.
        critic: the network that estimates values. "shared": a head on the policy's trunk.
            "separate": its own network. "lora": a second adapter on the policy's frozen base.
            "auto": "lora" if the policy trains an adapter, otherwise "separate".
        critic_path: folder of the reward model that initialises the critic: a sequence classifier
            for "separate", an adapter of the policy's shape for "lora". None: the policy's weights
            and a head that starts at zero.
        critic_learning_rate: the critic's learning rate, under the same schedule. None: the
            policy's.
        critic_warmup_steps: PPO steps at the start in which only the critic learns.
        vf_coef: weight of the value loss.
        cliprange_value: clip range of the values: the value loss takes the larger error of the new
            value and of the new value kept within this distance of the old one. None: off.
        gamma: discount per token.
        lam: lambda of generalised advantage estimation (Schulman et al. 2016).
        kl_estimator: estimate of the KL per token in the reward, with r = log policy - log
            reference: "k1" r, "k2" r^2/2, "k3" exp(-r) - 1 + r (Schulman 2020).
        kl_target: sequence KL in nats to which the controller of Ziegler et al. 2019 steers `beta`.
            None: `beta` is fixed.
        kl_horizon: episodes over which that controller acts.
        max_kl: stop with an error if the sequence KL of a rollout batch exceeds this. None: off.
        whiten_rewards: divide rewards by their standard deviation over the rollout batch.
        whiten_advantages: scale advantages to mean 0 and variance 1 over the rollout batch.
        score_shift: subtracted from the score.
        score_scale: divides the score after that.
        score_clip: then bounds the size of the score. None: off.
        missing_eos_penalty: then subtracted from the score of a completion that did not end. None:
            off.
    """

    epsilon: float = 0.2
    epsilon_high: float | None = None
    num_generations: int | None = 1
    num_generations_eval: int | None = 1
    num_iterations: int = 4
    beta: float = 0.05
    disable_dropout: bool = True
    gradient_checkpointing: bool = False
    adam_epsilon: float = 1e-5
    bf16: bool | None = None
    loss_type: str = "dapo"
    scale_rewards: str | bool = "none"

    critic: CriticKind = "auto"
    critic_path: str | None = None
    critic_learning_rate: float | None = None
    critic_warmup_steps: int = 0
    vf_coef: float = 0.5
    cliprange_value: float | None = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    kl_estimator: KLEstimator = "k1"
    kl_target: float | None = None
    kl_horizon: int = 10_000
    max_kl: float | None = None
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    score_shift: float = 0.0
    score_scale: float = 1.0
    score_clip: float | None = None
    missing_eos_penalty: float | None = None

    def __post_init__(self) -> None:
        """Check the settings; raise InputError with one line that names the key."""
        if self.bf16 is None:
            on_gpu = torch.cuda.is_available() and not self.use_cpu
            self.bf16 = on_gpu and torch.cuda.is_bf16_supported() and not self.fp16
        num_generations = self.num_generations
        if num_generations == 1:
            # GRPO refuses groups of one. A group as large as the rollout batch passes its checks.
            steps = self.steps_per_generation or self.gradient_accumulation_steps
            rollout = self.generation_batch_size or self.per_device_train_batch_size * steps
            if rollout < 2:
                raise InputError(
                    "ppo: a rollout batch needs at least 2 completions; raise "
                    "per_device_train_batch_size or steps_per_generation"
                )
            self.num_generations = rollout
        try:
            super().__post_init__()
        except ValueError as error:
            raise InputError(f"ppo: {reason_of(error)}") from None
        self.num_generations = num_generations
        self._check()

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer updates per PPO step: PPO epochs times minibatches."""
        return self.num_iterations * (self.steps_per_generation // self.gradient_accumulation_steps)

    @property
    def micro_steps_per_rollout(self) -> int:
        """Forward and backward passes per PPO step and process."""
        return self.num_iterations * self.steps_per_generation

    def _check(self) -> None:
        if self.steps_per_generation % self.gradient_accumulation_steps:
            raise InputError(
                f"ppo: steps_per_generation ({self.steps_per_generation}) must be a multiple of "
                f"gradient_accumulation_steps ({self.gradient_accumulation_steps}), so that a PPO "
                "epoch is a whole number of minibatches"
            )
        choices = (
            ("critic", get_args(CriticKind)),
            ("kl_estimator", get_args(KLEstimator)),
            ("loss_type", ("dapo",)),
            ("importance_sampling_level", ("token",)),
        )
        for key, allowed in choices:
            if getattr(self, key) not in allowed:
                raise InputError(
                    f"ppo: {key} is {getattr(self, key)!r}; allowed: {', '.join(allowed)}"
                )
        for keys, bound, holds in BOUNDS:
            for key in keys:
                if not holds(getattr(self, key)):
                    raise InputError(f"ppo: {key} is {getattr(self, key)}; it must be {bound}")
        for key in ("kl_target", "max_kl"):
            if getattr(self, key) is not None and self.beta == 0:
                raise InputError(
                    f"ppo: {key} needs a reference model, but beta is 0; "
                    f"set beta above 0 or remove {key}"
                )
        if self.critic == "shared" and self.critic_path is not None:
            raise InputError(
                "ppo: critic_path cannot be used with critic: shared, whose trunk is the "
                "policy's; remove critic_path or set critic: separate"
            )
