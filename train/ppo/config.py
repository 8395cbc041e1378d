"""Every setting of PPO: the fields of TRL's GRPOConfig, and below them PPO's own."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from trl import GRPOConfig

from selfcorrect.recipes.foundation.errors import InputError

CRITICS = ("auto", "shared", "separate", "lora")
KL_ESTIMATORS = ("k1", "k2", "k3")


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class PPOConfig(GRPOConfig):
    """Settings of `PPOTrainer`: GRPOConfig's, some with PPO's defaults, and PPO's own.

    One PPO step samples one rollout batch of `generation_batch_size` completions and then makes
    `updates_per_rollout` optimizer updates on it: `num_iterations` PPO epochs of
    `steps_per_generation / gradient_accumulation_steps` minibatches each. `max_steps`,
    `logging_steps` and `save_steps` count optimizer updates, as everywhere in transformers.

    Fields of GRPOConfig with another default
        num_generations: completions per prompt. 1: a critic needs no group to compare with.
        num_iterations: PPO epochs over a rollout batch.
        beta: initial coefficient of the KL penalty, which sits in the reward. 0 keeps no reference
            model, and then no KL is measured either.
        disable_dropout: dropout off, so that probability ratios start at exactly 1.
        gradient_checkpointing: off; it saves memory and costs about 30 % of the time.
        adam_epsilon: 1e-5, as in the PPO of Huang et al. 2022 (37 implementation details).
        bf16: on where a GPU computes in it; off on CPU.
        loss_type: "dapo" is the mean over the tokens of a minibatch; no other is allowed.
        scale_rewards: "none"; group statistics have no place in PPO.

    PPO's own fields
        critic: where values come from. "shared": a head on the policy's trunk. "separate": a
            network of its own. "lora": the policy's frozen base with a second adapter. "auto":
            "lora" where the policy trains an adapter, otherwise "separate".
        critic_path: folder of the reward model that the critic starts from: a sequence classifier
            for "separate", an adapter of the policy's own shape for "lora". None: the policy's
            weights. The head then starts at zero instead of as the reward model's.
        critic_learning_rate: the critic's own rate, under the same schedule. None: the policy's.
        critic_warmup_steps: PPO steps at the start in which the critic alone learns.
        vf_coef: weight of the value loss.
        cliprange_value: the value loss takes the worse of the new value and the new value kept
            within this distance of the old one. None: not clipped.
        gamma: discount per token.
        lam: lambda of generalised advantage estimation (Schulman et al. 2016).
        kl_estimator: estimate of the KL per token, with r = log policy - log reference: "k1" r,
            "k2" r^2/2, "k3" exp(-r) - 1 + r (Schulman 2020).
        kl_target: sequence KL in nats that the controller of Ziegler et al. 2019 steers `beta`
            to. None: `beta` stays.
        kl_horizon: episodes over which that controller acts.
        max_kl: stop with an error when the sequence KL of a rollout batch exceeds it. None: off.
        whiten_rewards: divide rewards by their standard deviation over the rollout batch.
        whiten_advantages: advantages to mean 0 and variance 1 over the rollout batch.
        score_shift, score_scale: the score used is (score - score_shift) / score_scale.
        score_clip: then kept within +- this value. None: off.
        missing_eos_penalty: then reduced by this where the completion did not end. None: off.
    """

    num_generations: int | None = _setting(1, "Completions per prompt.")
    num_generations_eval: int | None = _setting(1, "Completions per prompt in evaluation.")
    num_iterations: int = _setting(4, "PPO epochs over a rollout batch.")
    beta: float = _setting(0.05, "Initial coefficient of the KL penalty in the reward.")
    disable_dropout: bool = _setting(True, "Turn dropout off.")
    gradient_checkpointing: bool = _setting(False, "Save memory at about 30 %% of the time.")
    adam_epsilon: float = _setting(1e-5, "Adam's epsilon.")
    bf16: bool | None = _setting(None, "bfloat16 autocast. None: where a GPU supports it.")
    loss_type: str = _setting("dapo", "Mean over the tokens of a minibatch; no other is allowed.")
    scale_rewards: str | bool = _setting("none", "Group statistics are not used in PPO.")

    critic: Literal["auto", "shared", "separate", "lora"] = _setting("auto", "Where values live.")
    critic_path: str | None = _setting(None, "Reward model that the critic starts from.")
    critic_learning_rate: float | None = _setting(None, "None: the policy's rate.")
    critic_warmup_steps: int = _setting(0, "PPO steps in which the critic alone learns.")
    vf_coef: float = _setting(0.5, "Weight of the value loss.")
    cliprange_value: float | None = _setting(0.2, "Clip range of the values. None: off.")
    gamma: float = _setting(1.0, "Discount per token.")
    lam: float = _setting(0.95, "Lambda of generalised advantage estimation.")
    kl_estimator: Literal["k1", "k2", "k3"] = _setting("k1", "KL estimate in the reward.")
    kl_target: float | None = _setting(None, "Sequence KL to steer to, nats. None: fixed beta.")
    kl_horizon: int = _setting(10_000, "Episodes over which the KL controller acts.")
    max_kl: float | None = _setting(None, "Stop beyond this sequence KL, nats. None: off.")
    whiten_rewards: bool = _setting(False, "Rewards to unit variance over the rollout batch.")
    whiten_advantages: bool = _setting(True, "Advantages to mean 0, variance 1.")
    score_shift: float = _setting(0.0, "Subtracted from the score.")
    score_scale: float = _setting(1.0, "Divides the score.")
    score_clip: float | None = _setting(None, "Bound on the size of the score. None: off.")
    missing_eos_penalty: float | None = _setting(None, "Off the score without an end token.")

    def __post_init__(self) -> None:
        """Check the settings; raises InputError with one line that names the key."""
        if self.bf16 is None:
            on_gpu = torch.cuda.is_available() and not self.use_cpu
            self.bf16 = on_gpu and torch.cuda.is_bf16_supported() and not self.fp16
        wanted = self.num_generations
        if wanted == 1:
            # GRPO refuses groups of one. The whole rollout batch passes its checks, then 1 returns.
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
            raise InputError(f"ppo: {str(error).splitlines()[0]}") from None
        self.num_generations = wanted
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
            ("critic", CRITICS),
            ("kl_estimator", KL_ESTIMATORS),
            ("loss_type", ("dapo",)),
            ("importance_sampling_level", ("token",)),
        )
        for key, allowed in choices:
            if getattr(self, key) not in allowed:
                raise InputError(
                    f"ppo: {key} is {getattr(self, key)!r}; allowed: {', '.join(allowed)}"
                )
        for key in ("num_iterations", "kl_horizon", "score_scale"):
            self._require(key, getattr(self, key) > 0, "above 0")
        for key in ("beta", "vf_coef", "critic_warmup_steps"):
            self._require(key, getattr(self, key) >= 0, "0 or more")
        for key in ("gamma", "lam"):
            self._require(key, 0 <= getattr(self, key) <= 1, "between 0 and 1")
        for key in (
            "critic_learning_rate",
            "cliprange_value",
            "kl_target",
            "max_kl",
            "score_clip",
            "missing_eos_penalty",
        ):
            value = getattr(self, key)
            self._require(key, value is None or value > 0, "above 0, or null for off")
        self._require("score_shift", math.isfinite(self.score_shift), "a finite number")
        for key in ("kl_target", "max_kl"):
            if getattr(self, key) is not None and self.beta == 0:
                raise InputError(
                    f"ppo: {key} needs a reference model, but beta is 0; "
                    f"set beta above 0 or remove {key}"
                )
        if self.critic == "shared" and self.critic_path is not None:
            raise InputError(
                "ppo: critic_path has no use with critic: shared, whose trunk is the "
                "policy's; remove critic_path or set critic: separate"
            )

    def _require(self, key: str, holds: bool, bound: str) -> None:
        if not holds:
            raise InputError(f"ppo: {key} is {getattr(self, key)}; it must be {bound}")
