"""Trainer callbacks of every stage: progress, checksums of training states, saving on SIGTERM."""

# ruff: noqa: TID253  (all of this file is transformers)

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from selfcorrect.recipes.foundation import signals
from selfcorrect.recipes.foundation.progress import Progress
from selfcorrect.recipes.foundation.ranks import current_ranks
from selfcorrect.train.trainers.state import complete_state


class SaveOnSigterm(TrainerCallback):
    """Save the training state and stop, once SIGTERM has arrived.

    It waits for a multiple of `updates` optimizer updates: in between, a trainer may hold a rollout
    batch that no state contains.
    """

    def __init__(self, updates: int = 1) -> None:
        self.updates = updates

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Stop after this optimizer update if asked to; the last one ends training anyway."""
        if any(current_ranks().gather(signals.is_requested)):  # one rank alone may have got it
            signals.request()
        is_between = state.global_step % self.updates
        if signals.is_requested() and not is_between and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
        return control


class CompleteStates(TrainerCallback):
    """Mark each training state as complete, with the checksums of its files.

    Keep two states (`save_total_limit=2`): transformers deletes the older one before the newer one
    is marked.
    """

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark the state that was just saved."""
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        ranks = current_ranks()
        ranks.barrier()  # every rank writes files of its own
        ranks.from_rank0(lambda: complete_state(folder))


class StageCallback(CompleteStates):
    """Report progress, and mark training states as complete."""

    def __init__(self, stage: str, progress: Progress, updates_per_step: int = 1) -> None:
        self.stage = stage
        self.progress = progress
        self.updates_per_step = updates_per_step

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Report the step after an optimizer update, and where training starts or resumes."""
        done = state.global_step // self.updates_per_step
        self.progress(self.stage, done, state.max_steps // self.updates_per_step)

    on_train_begin = on_step_end
