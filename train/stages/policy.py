"""The policy stage: from base and reward model to checkpoints at exactly the recipe's steps."""

# ruff: noqa: TID253  (all of this file is torch, transformers and trl)

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    set_seed,
)

from selfcorrect.evaluate.prompts.tokenized import turn_end
from selfcorrect.evaluate.scoring.load_model import refuse_pickles
from selfcorrect.evaluate.scoring.precision import loading_options
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.foundation.ranks import best_device, current_ranks
from selfcorrect.recipes.schema import Policy
from selfcorrect.train.feedback.feedback import Feedback, Messages
from selfcorrect.train.feedback.kept_rows import keep_rows
from selfcorrect.train.ppo.config import PPOConfig
from selfcorrect.train.ppo.prompts import policy_prompt_ids
from selfcorrect.train.ppo.reward_models import has_linear_score, load_reward_model
from selfcorrect.train.ppo.rewards import RatersRule, Reward, RewardModelScorer, WeightedSum
from selfcorrect.train.ppo.trainer import PPOTrainer
from selfcorrect.train.stages import JobFacts
from selfcorrect.train.stages.answers import AnswerSampler
from selfcorrect.train.stages.arguments import (
    NO_CODE,
    QUIET,
    build,
    computed_in,
    lora_config,
)
from selfcorrect.train.stages.base import RowCounter
from selfcorrect.train.stages.baselines import (
    BaselineTrainer,
    baseline_trainer,
    offline_keys,
)
from selfcorrect.train.stages.checkpoints import KeepCheckpoints, Measure
from selfcorrect.train.trainers.callbacks import StageCallback
from selfcorrect.train.trainers.guarded import train_or_resume
from selfcorrect.train.trainers.state import stage_record, work_folder, write_stage_record

DEFAULTS = {**QUIET, "lr_scheduler_type": "constant", "save_only_model": False}
# GRPO's advantages are relative to a group of completions of the same prompt.
GRPO_DEFAULTS = {"num_generations": 8, "scale_rewards": "group"}

DOES_NOT_FIT = "prompt and completion would exceed the context"
NOT_READ = "prompt and completion would exceed the reward model's context"


def policy_arguments(
    policy: Policy, output: Path, seed: int, trust_remote_code: bool = False, **given: Any
) -> PPOConfig:
    """Build a PPOConfig from the recipe's `policy.trainer`; raises InputError for a wrong key.

    GRPO reads the same settings. For SFT and DPO it holds the size of a step; keys that only their
    own classes have are left to `baselines.offline_arguments`.
    """
    fixed = {"output_dir": str(output), "seed": seed, "save_strategy": "no", "save_total_limit": 2}
    fixed |= {**NO_CODE, "trust_remote_code": trust_remote_code}
    keys, defaults = policy.trainer, {**DEFAULTS, **given}
    if policy.method == "grpo":
        defaults |= GRPO_DEFAULTS
    if policy.is_offline:
        left = offline_keys(policy)
        keys = {key: value for key, value in keys.items() if key not in left}
    probe = build(PPOConfig, "policy.trainer", keys, defaults, fixed)
    fixed["max_steps"] = policy.steps * probe.updates_per_rollout
    defaults["logging_steps"] = probe.updates_per_rollout  # one entry a step
    arguments: PPOConfig = build(PPOConfig, "policy.trainer", keys, defaults, fixed)
    return arguments


def load_policy(base: str, dtype: str = "float32", **origin: Any) -> Any:
    """Load the base model, ready to be trained, with weights of this type (see `Precision`)."""
    held = loading_options(dtype, best_device())
    with refuse_pickles(base):
        return AutoModelForCausalLM.from_pretrained(base, use_safetensors=True, **held, **origin)


def train_policy(
    job: JobFacts,
    policy: Policy,
    feedback: Feedback,
    tokenizer: PreTrainedTokenizerBase,
    record: dict[str, Any],
    measure: Measure | None,
    functions: Mapping[str, float] = MappingProxyType({"model": 1.0}),
) -> None:
    """Train the policy from the base model, resuming from the newest training state.

    Return at once if the stage is finished. `record` holds the fields of `CheckpointRecord` that
    all checkpoints share; `measure` is called at every kept checkpoint. `functions` are the weights
    of the rewards (`schema.Reward`).
    """
    base, folder = str(job.base), job.folder / policy.method
    work = work_folder(folder)
    if work is None:
        return
    started = time.time()
    trust = {"trust_remote_code": job.trust_remote_code}
    has_adapter = policy.lora is not None
    arguments = policy_arguments(
        policy,
        work,
        job.seed,
        **trust,
        **computed_in(job.frozen, has_adapter, policy.trainer),
        critic_path=str(job.reward) if _starts_critic(job, policy, functions, tokenizer) else None,
        **_scales(job, functions),
    )
    held = job.frozen if has_adapter else job.trained
    computed = "bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else held
    # A KL compares two models: the reference computes as the policy does.
    reference = job.frozen if computed == job.frozen else job.trained
    if not (policy.is_offline or has_adapter) and reference != "float32":
        arguments.model_init_kwargs = {"dtype": reference}
    set_seed(job.seed)
    scorer = None
    if "model" in functions:
        scorer = RewardModelScorer(
            load_reward_model(job.reward, job.frozen, **trust),
            AutoTokenizer.from_pretrained(job.reward, **trust),
            tokenizer,
            style=job.style,
            batch_size=arguments.per_device_train_batch_size * 2,
        )
    rewards: list[Reward] = [] if scorer is None else [scorer]
    if "raters" in functions:
        assert feedback.raters is not None
        rewards.append(RatersRule(feedback.rated, feedback.raters, tokenizer, job.style))
    prompts, left_out = feedback.prompts, dict[str, int]()
    if not policy.is_offline:  # the others read no prompts
        config = AutoConfig.from_pretrained(base, **trust).get_text_config()
        prompts, left_out = fitting_prompts(
            feedback.prompts,
            [len(policy_prompt_ids(tokenizer, prompt, job.style)) for prompt in feedback.prompts],
            getattr(config, "max_position_embeddings", None),
            arguments.max_completion_length,
        )
        if scorer is not None:
            completion = arguments.max_completion_length
            prompts, unreadable = scorable_prompts(prompts, scorer, completion)
            left_out |= unreadable
    updates = arguments.updates_per_rollout
    model = load_policy(base, held, **trust)
    judge_answers = None
    if feedback.world is not None and scorer is not None:
        judge_answers = AnswerSampler(
            feedback.world,
            load_policy(base, held, **trust).eval(),
            scorer,
            tokenizer,
            job.style,
            arguments.max_completion_length,
        )
    keep = KeepCheckpoints(folder, policy, updates, record, measure, judge_answers)
    lora = lora_config("policy.lora", policy.lora, "CAUSAL_LM") if policy.lora else None
    common: dict[str, Any] = {
        "peft_config": lora,
        "style": job.style,
        "callbacks": [StageCallback(policy.method, job.progress, updates), keep],
    }
    trainer: PPOTrainer | BaselineTrainer
    if policy.method != "ppo":
        reward = rewards[0]
        if arguments.reward_weights is not None:
            reward = WeightedSum(rewards, arguments.reward_weights)
            arguments.reward_weights = None
        trainer = baseline_trainer(
            policy, arguments, model, reward, prompts, feedback.preferences, tokenizer, **common
        )
    else:
        trainer = PPOTrainer(
            model=model,
            reward_funcs=rewards,
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
            **common,
        )
    keep.trainer = trainer
    if not trainer.is_deepspeed_enabled:
        mixed = {"bf16": "bfloat16", "fp16": "float16"}
        computed = mixed.get(trainer.accelerator.mixed_precision, held)
        types = {"frozen": job.frozen, "trained": job.trained, "computed": computed}
        keep.record = {**record, "precision": types}
    train_or_resume(trainer, work)
    if current_ranks().rank == 0:
        rows = {"prompts": len(prompts), "left_out": left_out}
        if isinstance(trainer, RowCounter):
            rows = trainer.row_facts()
        write_stage_record(
            folder,
            started,
            folder,
            steps=policy.steps,
            evaluation_seconds=round(keep.measure_seconds, 1),
            **rows,
            log=rollout_log(trainer.state.log_history),
        )
        shutil.rmtree(work, ignore_errors=True)


def _starts_critic(
    job: JobFacts, policy: Policy, functions: Mapping[str, float], tokenizer: Any
) -> bool:
    """Return whether the critic starts from the reward model's weights."""
    if "model" not in functions or policy.method != "ppo" or policy.lora is not None:
        return False
    trust = {"trust_remote_code": job.trust_remote_code}
    reward_tokenizer = AutoTokenizer.from_pretrained(job.reward, **trust)
    return (
        policy.trainer.get("critic") != "shared"
        and reward_tokenizer.get_vocab() == tokenizer.get_vocab()
        and has_linear_score(job.reward)
    )


def _scales(job: JobFacts, functions: Mapping[str, float]) -> dict[str, Any]:
    """Return the weights of the rewards, and what centres and scales their sum.

    The reward model's score is centred and in units of its standard deviation.
    """
    facts = stage_record(job.reward) or {}
    mean, deviation = facts.get("score_mean", 0.0), facts.get("score_standard_deviation", 1.0)
    if functions == {"model": 1.0}:
        return {"score_shift": mean, "score_scale": deviation}
    units = {"model": deviation, "raters": 1.0}
    weights = [functions[name] / units[name] for name in units if name in functions]
    return {
        "reward_weights": weights,
        "score_shift": functions.get("model", 0.0) * mean / deviation,
    }


def fitting_prompts(
    prompts: list[Messages], lengths: list[int], context: int | None, completion: int
) -> tuple[list[Messages], dict[str, int]]:
    """Return the prompts that leave room for a completion, and the number left out, by reason.

    `lengths`, `context` and `completion` are in tokens; a context of None is unlimited. Raises
    InputError if no prompt is left.
    """
    room = None if context is None else context - completion

    def reason_against(row: tuple[Messages, int]) -> str | None:
        return DOES_NOT_FIT if room is not None and row[1] > room else None

    kept, left_out = keep_rows(
        "policy", "prompts", list(zip(prompts, lengths, strict=True)), reason_against
    )
    if not kept:
        raise InputError(
            f"policy: no prompt leaves room for max_completion_length {completion} in the model's "
            f"context of {context}: the shortest has {min(lengths)} tokens"
        )
    return [prompt for prompt, _ in kept], left_out


def scorable_prompts(
    prompts: list[Messages], scorer: RewardModelScorer, completion: int
) -> tuple[list[Messages], dict[str, int]]:
    """Return the prompts that the reward model can read with a completion, and a count of others.

    It reads the whole end of a turn where the policy writes one token. `completion` is in the
    policy's tokens, and taken for as many of the reward model's. Raises InputError if no prompt is
    left.
    """
    tokenizer, context = scorer.tokenizer, scorer.longest_row()
    end = turn_end(tokenizer, scorer.style)
    room = None if context is None else context - completion - len([*end.ids, *end.rest][1:])

    def reason_against(prompt: Messages) -> str | None:
        if room is None:
            return None
        length = len(policy_prompt_ids(tokenizer, prompt, scorer.style))
        return NOT_READ if length > room else None

    kept, left_out = keep_rows("policy", "prompts", prompts, reason_against)
    if not kept:
        raise InputError(
            f"policy: no prompt leaves room for max_completion_length {completion} in the reward "
            f"model's context of {context}; shorten max_completion_length"
        )
    return kept, left_out


def rollout_log(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Return the trainer's log with one entry for each step, numbers only."""
    steps: dict[int, dict[str, float]] = {}
    for entry in history:
        if "ppo_step" in entry:
            numbers = {k: v for k, v in entry.items() if isinstance(v, int | float) and v == v}
            steps.setdefault(int(entry["ppo_step"]), {}).update(numbers)
    return [steps[step] for step in sorted(steps)]
