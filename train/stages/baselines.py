"""The baselines of PPO: TRL's GRPO, and supervised fine-tuning on the preferred answers.

They keep checkpoints at the same steps as PPO. A step has the same number of optimizer updates and
rows: GRPO takes them from one rollout batch, SFT takes new rows for every update.
"""

# ruff: noqa: TID253  (all of this file is torch, transformers and trl)

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import GRPOTrainer, SFTConfig, SFTTrainer

from selfcorrect.recipes.foundation.errors import InputError, first_line
from selfcorrect.recipes.schema import Policy
from selfcorrect.train.feedback.feedback import Preference
from selfcorrect.train.ppo import losses
from selfcorrect.train.ppo.config import PPOConfig
from selfcorrect.train.ppo.rewards import RewardModelScorer, guarded
from selfcorrect.train.stages.arguments import NO_CODE, build
from selfcorrect.train.stages.base import SFT_DEFAULTS, preferred_rows
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


class GRPOBaseline(GRPOTrainer, BaselineTrainer):
    """TRL's GRPO with PPO's reward shaping; the KL penalty is in the loss, as in TRL."""

    stage = "grpo"

    def __init__(self, model: Any, scorer: RewardModelScorer, args: PPOConfig, **kwargs: Any):
        self._scorer = scorer
        super().__init__(model, [guarded(self._reward)], args, **kwargs)
        self.updates_per_step = args.updates_per_rollout
        scorer.model.to(self.accelerator.device)

    @property
    def episodes(self) -> int:
        """Number of completions sampled so far."""
        return self.state.global_step // self.updates_per_step * self.args.generation_batch_size

    def _reward(
        self, prompts: Any, completions: Any, completion_ids: Sequence[list[int]], **_: Any
    ) -> list[float]:
        raw = torch.tensor(self._scorer(prompts, completions, completion_ids))
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

    def _get_train_sampler(self, dataset: Any = None) -> EpochSampler:
        return EpochSampler(super()._get_train_sampler(dataset))


class SFTBaseline(SFTTrainer, BaselineTrainer):
    """TRL's SFT, with a loss on the preferred answers only."""

    stage = "sft"


def baseline_trainer(
    policy: Policy,
    arguments: PPOConfig,
    model: Any,
    scorer: RewardModelScorer,
    prompts: list[str],
    preferences: list[Preference],
    tokenizer: PreTrainedTokenizerBase,
    **given: Any,
) -> BaselineTrainer:
    """Return the trainer of `policy.method`, grpo or sft; `prompts` are rendered.

    Raises InputError for settings that the trainer refuses.
    """
    if policy.method == "grpo":
        try:
            return GRPOBaseline(
                model,
                scorer,
                arguments,
                train_dataset=Dataset.from_dict({"prompt": prompts}),
                processing_class=tokenizer,
                **given,
            )
        except ValueError as error:
            raise InputError(f"policy.trainer: {first_line(error)}") from error
    trainer = SFTBaseline(
        model=model,
        args=sft_arguments(policy, arguments),
        train_dataset=Dataset.from_list(preferred_rows(tokenizer, preferences)),
        processing_class=tokenizer,
        **given,
    )
    trainer.updates_per_step = arguments.updates_per_rollout
    trainer.rows_per_update = arguments.per_device_train_batch_size
    trainer.rows_per_update *= arguments.gradient_accumulation_steps
    return trainer


def sft_only_keys(policy: Policy) -> set[str]:
    """Return the keys of `policy.trainer` that SFTConfig has and PPOConfig has not."""
    return {key for key in policy.trainer if key in _fields(SFTConfig) - _fields(PPOConfig)}


def sft_arguments(policy: Policy, arguments: PPOConfig) -> SFTConfig:
    """Build an SFTConfig from `policy.trainer`, without the keys that only PPOConfig has.

    `arguments` hold the settings that the run itself decides. Raises InputError for a wrong value.
    """
    sft_keys = sft_only_keys(policy)
    shared = {
        key: policy.trainer[key] for key in policy.trainer.keys() & _fields(SFTConfig) - sft_keys
    }
    run = ("output_dir", "seed", "save_strategy", "save_total_limit", "max_steps", "logging_steps")
    fixed = {key: getattr(arguments, key) for key in run}
    defaults = {**SFT_DEFAULTS, "lr_scheduler_type": "constant", "adam_epsilon": 1e-5, **shared}
    defaults |= {"logging_strategy": "steps", "include_num_input_tokens_seen": "non_padding"}
    return build(  # type: ignore[no-any-return]
        SFTConfig,
        "policy.trainer",
        {key: policy.trainer[key] for key in sft_keys},
        defaults,
        {**fixed, **NO_CODE},
    )


def _fields(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}
