"""The baselines of PPO: TRL's GRPO, fine-tuning on the preferred answers, and DPO on the pairs.

They keep checkpoints at the same steps as PPO. A step has the same number of optimizer updates and
rows: GRPO takes them from one rollout batch, SFT and DPO take new rows for every update. A row of
DPO is a pair.
"""

# ruff: noqa: TID253  (all of this file is torch, transformers and trl)

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, SFTConfig

from selfcorrect.evaluate.prompts.dialogue import Style
from selfcorrect.evaluate.scoring.precision import held_in
from selfcorrect.recipes.foundation.errors import InputError, reason_of
from selfcorrect.recipes.schema import Policy
from selfcorrect.train.feedback.feedback import Messages, Preference
from selfcorrect.train.ppo import losses
from selfcorrect.train.ppo.config import PPOConfig
from selfcorrect.train.ppo.on_policy import OnPolicyTrainer
from selfcorrect.train.ppo.rewards import (
    RatersRule,
    Reward,
    RewardModelScorer,
    WeightedSum,
    guarded,
)
from selfcorrect.train.stages.arguments import NO_CODE, build, computed_in
from selfcorrect.train.stages.base import (
    SFT_DEFAULTS,
    FineTuningTrainer,
    preferred_rows,
    usable_rows,
)
from selfcorrect.train.stages.dpo import LOSSES, PairTrainer, pair_rows, usable_pairs
from selfcorrect.train.trainers.epoch_sampler import EpochSampler
from selfcorrect.train.trainers.guarded import GuardedTrainer


class BaselineTrainer(GuardedTrainer):
    """The part of PPOTrainer's interface that KeepCheckpoints uses."""

    last_kl: float | None = None
    last_score: float | None = None
    updates_per_step = 1
    rows_per_update = 1

    @property
    def episodes(self) -> int:
        """Number of completions sampled so far; for SFT, of answers trained on."""
        return int(self.state.global_step) * self.rows_per_update

    @property
    def tokens(self) -> int:
        """Number of tokens in those episodes."""
        return int(self.state.num_input_tokens_seen)

    def save_policy(self, folder: str | Path) -> None:
        """Save policy and tokenizer for `from_pretrained`."""
        self.accelerator.unwrap_model(self.model).save_pretrained(str(folder))
        self.processing_class.save_pretrained(str(folder))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the step and the last score and KL to TRL's metrics."""
        if "loss" in logs:
            logs = {**logs, "ppo_step": self.state.global_step // self.updates_per_step}
            figures = {"objective/score": self.last_score, "objective/kl": self.last_kl}
            logs |= {name: figure for name, figure in figures.items() if figure is not None}
        super().log(logs, start_time)


class GRPOBaseline(OnPolicyTrainer, BaselineTrainer):
    """TRL's GRPO with PPO's reward shaping; the KL penalty is in the loss, as in TRL."""

    stage = "grpo"

    def __init__(
        self, model: Any, reward: Reward, args: PPOConfig, style: Style, **kwargs: Any
    ) -> None:
        self._rewarded, self.style = reward, style
        super().__init__(model, [guarded(self._reward)], args, **kwargs)
        self._patch_models(critic=None)
        self.updates_per_step = args.updates_per_rollout
        for part in reward.rewards if isinstance(reward, WeightedSum) else [reward]:
            if isinstance(part, RewardModelScorer | RatersRule):
                part.end_ids.update(self.eos_token_ids)
            if isinstance(part, RewardModelScorer):
                part.model.to(self.accelerator.device)

    @property
    def episodes(self) -> int:
        """Number of completions sampled so far."""
        return self.state.global_step // self.updates_per_step * self.args.generation_batch_size

    def _reward(
        self, prompts: Any, completions: Any, completion_ids: Sequence[list[int]], **_: Any
    ) -> list[float]:
        raw = torch.tensor(
            self._rewarded(prompts=prompts, completions=completions, completion_ids=completion_ids)
        )
        self.last_score = float(raw.mean())
        args, ends = self.args, self.eos_token_ids
        ended = torch.tensor([bool(ids) and ids[-1] in ends for ids in completion_ids])
        shaped: list[float] = losses.shaped_score(
            raw, ended, args.score_shift, args.score_scale, args.score_clip,
            args.missing_eos_penalty,
        ).tolist()  # fmt: skip
        return shaped

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        policy, reference = batch.get("old_per_token_logps"), batch.get("ref_per_token_logps")
        if policy is not None and reference is not None:
            kl = ((policy - reference) * batch["completion_mask"]).sum(dim=1)
            self.last_kl = float(kl.mean())
        return batch

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        loss: torch.Tensor = super()._compute_loss(model, inputs)
        new, mask = self._newest_log_probs, inputs["completion_mask"]
        if "ref_per_token_logps" in inputs:
            self._check_reference(new, inputs["ref_per_token_logps"], mask)
        if inputs.get("old_per_token_logps") is not None:
            self._check_ratio(new, inputs["old_per_token_logps"], mask)
        return loss

    def save_policy(self, folder: str | Path) -> None:
        """Save policy and tokenizer for `from_pretrained`."""
        with self.given_settings():
            super().save_policy(folder)

    def _get_train_sampler(self, dataset: Any = None) -> EpochSampler:
        return EpochSampler(super()._get_train_sampler(dataset))


class SFTBaseline(FineTuningTrainer, BaselineTrainer):
    """TRL's SFT, with a loss on the preferred answers only."""

    stage = "sft"


class DPOBaseline(PairTrainer, BaselineTrainer):
    """TRL's DPO on the pairs that the reward model learns from."""

    stage = "dpo"


OFFLINE_CONFIGS: dict[str, type[SFTConfig] | type[DPOConfig]] = {"sft": SFTConfig, "dpo": DPOConfig}


def baseline_trainer(
    policy: Policy,
    arguments: PPOConfig,
    model: Any,
    reward: Reward,
    prompts: list[Messages],
    preferences: list[Preference],
    tokenizer: PreTrainedTokenizerBase,
    style: Style,
    **given: Any,
) -> BaselineTrainer:
    """Return the trainer of `policy.method`, not of ppo; `style` is of its dialogues.

    Raises InputError for settings that the trainer refuses.
    """
    if policy.method == "grpo":
        try:
            return GRPOBaseline(
                model,
                reward,
                arguments,
                train_dataset=Dataset.from_dict({"prompt": prompts}),
                processing_class=tokenizer,
                style=style,
                **given,
            )
        except ValueError as error:
            raise InputError(f"policy.trainer: {reason_of(error)}") from error
    has_adapter = policy.lora is not None
    computed = computed_in(held_in(model), has_adapter, policy.trainer)
    settings = offline_arguments(policy, arguments, computed)
    kind: type[SFTBaseline] | type[DPOBaseline]
    if policy.method == "sft":
        kind = SFTBaseline
        rows = preferred_rows(tokenizer, preferences, style)
        rows, left_out = usable_rows(rows, settings.max_length, model, "policy")
    else:
        kind = DPOBaseline
        rows = pair_rows(tokenizer, preferences, style)
        rows, left_out = usable_pairs(rows, settings.max_length, model)
    try:
        trainer = kind(
            model=model,
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            **given,
        )
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"policy.trainer: {reason_of(error)}") from error
    trainer.left_out = left_out
    trainer.updates_per_step = arguments.updates_per_rollout
    trainer.rows_per_update = arguments.per_device_train_batch_size
    trainer.rows_per_update *= arguments.gradient_accumulation_steps
    return trainer


def offline_keys(policy: Policy) -> set[str]:
    """Return the keys of `policy.trainer` that PPOConfig has not, or means something else by."""
    others = _fields(OFFLINE_CONFIGS[policy.method]) - (_fields(PPOConfig) - {"loss_type"})
    return policy.trainer.keys() & others


def offline_arguments(
    policy: Policy, arguments: PPOConfig, computed: Mapping[str, bool] = MappingProxyType({})
) -> SFTConfig | DPOConfig:
    """Build the method's own settings from `policy.trainer`, without keys that only PPOConfig has.

    `arguments` hold the settings that the run itself decides, `computed` is `computed_in`. Raises
    InputError for a wrong value.
    """
    kind = OFFLINE_CONFIGS[policy.method]
    left = offline_keys(policy)
    shared = {key: policy.trainer[key] for key in policy.trainer.keys() & _fields(kind) - left}
    run = ("output_dir", "seed", "save_strategy", "save_total_limit", "max_steps", "logging_steps")
    fixed = {key: getattr(arguments, key) for key in run} | NO_CODE
    if kind is DPOConfig:  # a resumed run has the reference of the uninterrupted one
        fixed |= {"precompute_ref_log_probs": False, "sync_ref_model": False}
    defaults = {**SFT_DEFAULTS, "lr_scheduler_type": "constant", "adam_epsilon": 1e-5}
    defaults |= {**computed, **shared}
    defaults |= {"logging_strategy": "steps", "include_num_input_tokens_seen": "non_padding"}
    defaults = {key: value for key, value in defaults.items() if key in _fields(kind)}
    given = {key: policy.trainer[key] for key in left}
    settings: SFTConfig | DPOConfig = build(kind, "policy.trainer", given, defaults, fixed)
    if isinstance(settings, DPOConfig):
        for loss in settings.loss_type:
            if loss not in LOSSES:
                raise InputError(
                    f"policy.trainer.loss_type: {loss!r} is no loss of DPO; "
                    f"choose from {', '.join(LOSSES)}"
                )
    return settings


def _fields(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}
