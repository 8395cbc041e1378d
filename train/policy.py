"""The policy under PPO: from base and reward model to checkpoints at exactly the recipe's steps."""

# ruff: noqa: TID253  (all of this file is torch, transformers and trl)

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)

from selfcorrect.evaluate.models import no_pickles
from selfcorrect.evaluate.processes import joined
from selfcorrect.evaluate.run_folder import (
    RECORD,
    CheckpointRecord,
    check_saved,
    read_checkpoint,
)
from selfcorrect.evaluate.weights import files_digest
from selfcorrect.recipes.errors import InputError
from selfcorrect.recipes.schema import Ppo
from selfcorrect.recipes.seals import digests
from selfcorrect.recipes.whole_files import whole_folder
from selfcorrect.train.arguments import NO_CODE, QUIET, build, lora_config
from selfcorrect.train.feedback import Messages, render_prompt
from selfcorrect.train.ppo.config import PPOConfig
from selfcorrect.train.ppo.rewards import RewardModelScorer
from selfcorrect.train.ppo.trainer import PPOTrainer
from selfcorrect.train.stage import (
    Notify,
    StageCallback,
    finished,
    is_finished,
    train_on,
    write_record,
)

DEFAULTS = {**QUIET, "lr_scheduler_type": "constant", "save_only_model": False}

_log = logging.getLogger(__name__)

Measure = Callable[[Any, Path], None]  # the live policy, and its checkpoint's folder


class KeepCheckpoints(TrainerCallback):
    """Keeps the policy at the recipe's steps, has each measured, and saves states to resume from.

    A checkpoint that a stopped run has kept already is left as it is: training is deterministic, so
    the same step has the same weights.
    """

    def __init__(
        self, folder: Path, ppo: Ppo, record: dict[str, Any], measure: Measure | None
    ) -> None:
        self.folder = folder
        self.ppo = ppo
        self.record = record
        self.measure = measure
        self.measure_seconds = 0.0
        self.saved = time.time()
        self.trainer: PPOTrainer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep step 0, the policy before any feedback."""
        if state.global_step == 0:
            self._reached(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """After the last optimizer update of a PPO step: keep, measure, and save the state."""
        if state.global_step % args.updates_per_rollout:
            return control
        step = state.global_step // args.updates_per_rollout
        self._reached(step)
        waited = joined().agree(lambda: time.time() - self.saved > 60 * self.ppo.resume_minutes)
        due = waited or step % self.ppo.resume_every == 0
        control.should_save = due and step < self.ppo.steps
        if control.should_save:
            self.saved = time.time()
        return control

    def _reached(self, step: int) -> None:
        if step not in self.ppo.checkpoints or self.trainer is None:
            return
        folder = self.folder / f"checkpoint-{step}"
        processes = joined()
        if not processes.agree(lambda: self._is_kept(folder)):
            self.trainer.check_model()
            if processes.rank == 0:
                with whole_folder(folder) as new:
                    self.trainer.save_policy(new)
                    self._record(step, files_digest(new), digests(new)).write(new)
            else:
                self.trainer.save_policy(folder)  # hands over its parts
            processes.wait()
        if self.measure is not None:
            started = time.time()
            self.measure(self.trainer, folder)
            self.measure_seconds += time.time() - started

    def _is_kept(self, folder: Path) -> bool:
        """Whether the checkpoint stands there whole; what is damaged is said, and kept anew."""
        if not (folder / RECORD).is_file():
            return False
        try:
            read_checkpoint(folder)
            check_saved(folder)
        except InputError as error:
            _log.warning("%s; it is saved anew", str(error).partition(";")[0])
            return False
        return True

    def _record(self, step: int, weights_digest: str, files: dict[str, str]) -> CheckpointRecord:
        trainer = self.trainer
        assert trainer is not None
        return CheckpointRecord(
            step=step,
            episodes=trainer.episodes if step else 0,
            tokens=trainer.tokens if step else 0,
            optimizer_updates=trainer.state.global_step,
            kl=trainer.last_kl if step else None,
            reward=trainer.last_score if step else None,
            weights_digest=weights_digest,
            files=files,
            **self.record,
        )


def ppo_arguments(
    ppo: Ppo, output: Path, seed: int, trust_remote_code: bool = False, **given: Any
) -> PPOConfig:
    """The recipe's `ppo.trainer` keys as a PPOConfig; InputError for a wrong one."""
    fixed = {"output_dir": str(output), "seed": seed, "save_strategy": "no", "save_total_limit": 2}
    fixed |= {**NO_CODE, "trust_remote_code": trust_remote_code}
    probe = build(PPOConfig, "ppo.trainer", ppo.trainer, {**DEFAULTS, **given}, fixed)
    fixed["max_steps"] = ppo.steps * probe.updates_per_rollout
    given["logging_steps"] = probe.updates_per_rollout  # one entry a PPO step
    arguments: PPOConfig = build(
        PPOConfig, "ppo.trainer", ppo.trainer, {**DEFAULTS, **given}, fixed
    )
    return arguments


def load_policy(base: str, ppo: Ppo, **origin: Any) -> Any:
    """The base model in float32 or its own precision, ready to be trained."""
    with no_pickles(base):
        return AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, use_safetensors=True, **origin
        )


def _load_reward(folder: Path, **trust: bool) -> Any:
    with no_pickles(folder):
        return AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, **trust
        )


def train_policy(
    ppo: Ppo,
    base: str,
    reward: Path,
    prompts: list[Messages],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    seed: int,
    record: dict[str, Any],
    notify: Notify,
    measure: Measure | None,
    trust_remote_code: bool = False,
) -> None:
    """Run PPO into `folder` from the newest state on; nothing to do where it is finished."""
    work = folder.with_name(f"{folder.name}.work")
    if is_finished(folder):
        shutil.rmtree(work, ignore_errors=True)  # killed before it came to that
        return
    started = time.time()
    facts = finished(reward) or {}
    full = ppo.lora is None
    trust = {"trust_remote_code": trust_remote_code}
    raters = AutoTokenizer.from_pretrained(reward, **trust)
    reads_our_ids = raters.get_vocab() == tokenizer.get_vocab()
    starts_critic = full and reads_our_ids and ppo.trainer.get("critic") != "shared"
    arguments = ppo_arguments(
        ppo,
        work,
        seed,
        **trust,
        critic_path=str(reward) if starts_critic else None,
        score_shift=facts.get("score_mean", 0.0),
        score_scale=facts.get("score_standard_deviation", 1.0),
    )
    texts, left_out = fitting_prompts(
        [render_prompt(tokenizer, messages) for messages in prompts],
        tokenizer,
        getattr(AutoConfig.from_pretrained(base, **trust), "max_position_embeddings", None),
        arguments.max_completion_length,
    )
    set_seed(seed)
    scorer = RewardModelScorer(
        _load_reward(reward, **trust),
        raters,
        tokenizer,
        batch_size=arguments.per_device_train_batch_size * 2,
    )
    keep = KeepCheckpoints(folder, ppo, record, measure)
    trainer = PPOTrainer(
        model=load_policy(base, ppo, **trust),
        reward_funcs=[scorer],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer,
        peft_config=lora_config("ppo.lora", ppo.lora, "CAUSAL_LM") if ppo.lora else None,
        callbacks=[StageCallback("ppo", notify, arguments.updates_per_rollout), keep],
    )
    keep.trainer = trainer
    train_on(trainer, work)
    if joined().rank == 0:
        write_record(
            folder,
            started,
            folder,
            steps=ppo.steps,
            evaluation_seconds=round(keep.measure_seconds, 1),
            left_out=left_out,
            log=rollout_log(trainer.state.log_history),
        )
        shutil.rmtree(work, ignore_errors=True)


def fitting_prompts(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, context: int | None, completion: int
) -> tuple[list[str], dict[str, int]]:
    """The prompts that leave room for a completion, and how many do not, by reason.

    `context` and `completion` are in tokens; a context of None has no bound. Raises InputError
    where no prompt is left.
    """
    if context is None:
        return texts, {}
    room = context - completion
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    fitting = [text for text, length in zip(texts, lengths, strict=True) if length <= room]
    if not fitting:
        raise InputError(
            f"ppo: no prompt leaves room for max_completion_length {completion} in the model's "
            f"context of {context}: the shortest has {min(lengths)} tokens"
        )
    if len(fitting) == len(texts):
        return texts, {}
    reason = "prompt and completion would exceed the context"
    _log.warning("ppo: %d of %d prompts are left out: %s", len(texts) - len(fitting),
                 len(texts), reason)  # fmt: skip
    return fitting, {reason: len(texts) - len(fitting)}


def rollout_log(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """One entry a PPO step from the trainer's log, numbers only."""
    steps: dict[int, dict[str, float]] = {}
    for entry in history:
        if "ppo_step" in entry:
            numbers = {k: v for k, v in entry.items() if isinstance(v, int | float) and v == v}
            steps.setdefault(int(entry["ppo_step"]), {}).update(numbers)
    return [steps[step] for step in sorted(steps)]
