"""Checkpoints of a policy in training, saved at exactly the recipe's steps and measured."""

# ruff: noqa: TID253  (all of this file is transformers)

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from selfcorrect.evaluate.callback import gathered_weights
from selfcorrect.evaluate.run_folder import (
    RECORD,
    AnswerWorth,
    CheckpointRecord,
    check_saved,
    read_checkpoint,
)
from selfcorrect.evaluate.scoring.weights import files_digest
from selfcorrect.recipes.foundation.atomic_files import atomic_folder
from selfcorrect.recipes.foundation.checksums import digests
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.foundation.ranks import current_ranks
from selfcorrect.recipes.schema import Policy
from selfcorrect.train.ppo.trainer import PPOTrainer
from selfcorrect.train.stages.baselines import BaselineTrainer

logger = logging.getLogger(__name__)

Measure = Callable[[Any, Path], None]  # of the trainer and its checkpoint's folder


@dataclass(eq=False)
class KeepCheckpoints(TrainerCallback):
    """Save and measure the policy at the recipe's steps, and save training states.

    A checkpoint that an interrupted run has saved already is left alone: training is deterministic,
    so the same step has the same weights.
    """

    folder: Path
    policy: Policy
    updates_per_step: int
    record: dict[str, Any]
    measure: Measure | None
    judge_answers: Callable[[Any], AnswerWorth] | None = None  # of the policy
    measure_seconds: float = 0.0
    saved_at: float = field(default_factory=time.time)
    trainer: PPOTrainer | BaselineTrainer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save step 0, the policy before any feedback."""
        if state.global_step == 0:
            self._keep(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """After the last optimizer update of a step: save and measure, and request a state."""
        if state.global_step % self.updates_per_step:
            return control
        step = state.global_step // self.updates_per_step
        self._keep(step)
        is_late = current_ranks().from_rank0(
            lambda: time.time() - self.saved_at > 60 * self.policy.resume_minutes
        )
        is_due = is_late or step % self.policy.resume_every == 0
        control.should_save = is_due and step < self.policy.steps
        if control.should_save:
            self.saved_at = time.time()
        return control

    def _keep(self, step: int) -> None:
        if step not in self.policy.checkpoints or self.trainer is None:
            return
        folder = self.folder / f"checkpoint-{step}"
        ranks = current_ranks()
        if not ranks.from_rank0(lambda: self._is_kept(folder)):
            self.trainer.check_model()
            answers = self._judge_answers()
            if ranks.rank == 0:
                with atomic_folder(folder) as new:
                    self.trainer.save_policy(new)
                    self._record(step, answers, files_digest(new), digests(new)).write(new)
            else:
                self.trainer.save_policy(folder)  # under ZeRO-3 every rank gathers
            ranks.barrier()
        if self.measure is not None:
            started = time.time()
            self.measure(self.trainer, folder)
            self.measure_seconds += time.time() - started

    def _is_kept(self, folder: Path) -> bool:
        """Return whether an intact checkpoint exists; a damaged one is reported and saved again."""
        if not (folder / RECORD).is_file():
            return False
        try:
            read_checkpoint(folder)
            check_saved(folder)
        except InputError as error:
            logger.warning("%s; it is saved again", str(error).partition(";")[0])
            return False
        return True

    def _judge_answers(self) -> AnswerWorth | None:
        if self.judge_answers is None or self.trainer is None:
            return None
        policy = self.trainer.accelerator.unwrap_model(self.trainer.model)
        with gathered_weights(policy) as model:
            return self.judge_answers(model)

    def _record(
        self, step: int, answers: AnswerWorth | None, weights_digest: str, files: dict[str, str]
    ) -> CheckpointRecord:
        trainer = self.trainer
        assert trainer is not None
        return CheckpointRecord(
            step=step,
            episodes=trainer.episodes if step else 0,
            tokens=trainer.tokens if step else 0,
            optimizer_updates=trainer.state.global_step,
            kl=trainer.last_kl if step else None,
            reward=trainer.last_score if step else None,
            answers=answers,
            weights_digest=weights_digest,
            files=files,
            **self.record,
        )
