"""The policy stage: from base and reward model to checkpoints at exactly the recipe's steps."""

# ruff: noqa: TID253  (all of this file is torch, transformers and trl)

import logging
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    set_seed,
)

from selfcorrect.evaluate.scoring.load_model import refuse_pickles
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.foundation.ranks import current_ranks
from selfcorrect.recipes.schema import Policy
from selfcorrect.train.feedback.feedback import Feedback, render_prompt
from selfcorrect.train.ppo.config import PPOConfig
from selfcorrect.train.ppo.rewards import RewardModelScorer, load_reward_model
from selfcorrect.train.ppo.trainer import PPOTrainer
from selfcorrect.train.stages import JobFacts
from selfcorrect.train.stages.arguments import NO_CODE, QUIET, build, lora_config
from selfcorrect.train.stages.baselines import BaselineTrainer, baseline_trainer, sft_only_keys
from selfcorrect.train.stages.checkpoints import KeepCheckpoints, Measure
from selfcorrect.train.trainers.callbacks import StageCallback
from selfcorrect.train.trainers.guarded import train_or_resume
from selfcorrect.train.trainers.state import stage_record, work_folder, write_stage_record

DEFAULTS = {**QUIET, "lr_scheduler_type": "constant", "save_only_model": False}
# GRPO's advantages are relative to a group of completions of the same prompt.
GRPO_DEFAULTS = {"num_generations": 8, "scale_rewards": "group"}

logger = logging.getLogger(__name__)


def policy_arguments(
    policy: Policy, output: Path, seed: int, trust_remote_code: bool = False, **given: Any
) -> PPOConfig:
    """Build a PPOConfig from the recipe's `policy.trainer`; raises InputError for a wrong key.

    GRPO reads the same settings. For SFT it holds the size of a step; keys that only SFTConfig has
    are left to `baselines.sft_arguments`.
    """
    fixed = {"output_dir": str(output), "seed": seed, "save_strategy": "no", "save_total_limit": 2}
    fixed |= {**NO_CODE, "trust_remote_code": trust_remote_code}
    keys, defaults = policy.trainer, {**DEFAULTS, **given}
    if policy.method == "grpo":
        defaults |= GRPO_DEFAULTS
    if policy.method == "sft":
        sft_keys = sft_only_keys(policy)
        keys = {key: value for key, value in keys.items() if key not in sft_keys}
    probe = build(PPOConfig, "policy.trainer", keys, defaults, fixed)
    fixed["max_steps"] = policy.steps * probe.updates_per_rollout
    defaults["logging_steps"] = probe.updates_per_rollout  # one entry a step
    arguments: PPOConfig = build(PPOConfig, "policy.trainer", keys, defaults, fixed)
    return arguments


def load_policy(base: str, **origin: Any) -> Any:
    """Load the base model in float32, ready to be trained."""
    with refuse_pickles(base):
        return AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, use_safetensors=True, **origin
        )


def train_policy(
    job: JobFacts,
    policy: Policy,
    feedback: Feedback,
    tokenizer: PreTrainedTokenizerBase,
    record: dict[str, Any],
    measure: Measure | None,
) -> None:
    """Train the policy from base and reward model, resuming from the newest training state.

    Return at once if the stage is finished. `record` holds the fields of `CheckpointRecord` that
    all checkpoints share; `measure` is called at every kept checkpoint.
    """
    base, reward, folder = str(job.base), job.reward, job.folder / policy.method
    work = work_folder(folder)
    if work is None:
        return
    started = time.time()
    facts = stage_record(reward) or {}
    trust = {"trust_remote_code": job.trust_remote_code}
    reward_tokenizer = AutoTokenizer.from_pretrained(reward, **trust)
    starts_critic = (  # from the reward model's weights
        policy.method == "ppo"
        and policy.lora is None
        and policy.trainer.get("critic") != "shared"
        and reward_tokenizer.get_vocab() == tokenizer.get_vocab()
    )
    arguments = policy_arguments(
        policy,
        work,
        job.seed,
        **trust,
        critic_path=str(reward) if starts_critic else None,
        score_shift=facts.get("score_mean", 0.0),
        score_scale=facts.get("score_standard_deviation", 1.0),
    )
    texts, left_out = fitting_prompts(
        [render_prompt(tokenizer, messages) for messages in feedback.prompts],
        tokenizer,
        getattr(AutoConfig.from_pretrained(base, **trust), "max_position_embeddings", None),
        arguments.max_completion_length,
    )
    set_seed(job.seed)
    scorer = RewardModelScorer(
        load_reward_model(reward, **trust),
        reward_tokenizer,
        tokenizer,
        batch_size=arguments.per_device_train_batch_size * 2,
    )
    updates = arguments.updates_per_rollout
    keep = KeepCheckpoints(folder, policy, updates, record, measure)
    model = load_policy(base, **trust)
    lora = lora_config("policy.lora", policy.lora, "CAUSAL_LM") if policy.lora else None
    common: dict[str, Any] = {
        "peft_config": lora,
        "callbacks": [StageCallback(policy.method, job.progress, updates), keep],
    }
    trainer: PPOTrainer | BaselineTrainer
    if policy.method != "ppo":
        trainer = baseline_trainer(
            policy, arguments, model, scorer, texts, feedback.preferences, tokenizer, **common
        )
    else:
        trainer = PPOTrainer(
            model=model,
            reward_funcs=[scorer],
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=tokenizer,
            **common,
        )
    keep.trainer = trainer
    train_or_resume(trainer, work)
    if current_ranks().rank == 0:
        write_stage_record(
            folder,
            started,
            folder,
            steps=policy.steps,
            evaluation_seconds=round(keep.measure_seconds, 1),
            left_out=left_out,
            log=rollout_log(trainer.state.log_history),
        )
        shutil.rmtree(work, ignore_errors=True)


def fitting_prompts(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, context: int | None, completion: int
) -> tuple[list[str], dict[str, int]]:
    """Return the prompts that leave room for a completion, and the number left out, by reason.

    `context` and `completion` are in tokens; a context of None is unlimited. Raises InputError if
    no prompt is left.
    """
    if context is None:
        return texts, {}
    room = context - completion
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    fitting = [text for text, length in zip(texts, lengths, strict=True) if length <= room]
    if not fitting:
        raise InputError(
            f"policy: no prompt leaves room for max_completion_length {completion} in the model's "
            f"context of {context}: the shortest has {min(lengths)} tokens"
        )
    if len(fitting) == len(texts):
        return texts, {}
    reason = "prompt and completion would exceed the context"
    num_left_out = len(texts) - len(fitting)
    logger.warning("policy: %d of %d prompts are left out: %s", num_left_out, len(texts), reason)
    return fitting, {reason: num_left_out}


def rollout_log(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Return the trainer's log with one entry for each step, numbers only."""
    steps: dict[int, dict[str, float]] = {}
    for entry in history:
        if "ppo_step" in entry:
            numbers = {k: v for k, v in entry.items() if isinstance(v, int | float) and v == v}
            steps.setdefault(int(entry["ppo_step"]), {}).update(numbers)
    return [steps[step] for step in sorted(steps)]
