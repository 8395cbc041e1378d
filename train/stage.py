"""What every stage of training shares: finished folders, states to resume from, progress.

Where a stage runs in several processes, all of them call the same functions here. Rank 0 looks at
the disk and writes, and tells the others what it saw.
"""

# ruff: noqa: TID253  (all of this file is transformers)

import json
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from selfcorrect.evaluate.processes import joined
from selfcorrect.recipes import termination
from selfcorrect.recipes.whole_files import whole_folder, write_json, write_text

Notify = Callable[[str, int, int], None]  # stage, steps done, steps in all
RECORD = "stage.json"
COMPLETE = "complete"  # written last: a state folder without it was cut short


def finished(folder: Path) -> dict[str, Any] | None:
    """The record of a finished stage; None while it is not finished. Folders appear whole."""
    path = folder / RECORD
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def is_finished(folder: Path) -> bool:
    """Whether the stage is finished, as rank 0 sees it."""
    return joined().agree(lambda: finished(folder) is not None)


@contextmanager
def finishing(folder: Path, work: Path) -> Iterator[Path | None]:
    """Hand out a new folder that takes the place of `folder`, to rank 0; None to the others.

    Then `work` goes, and all processes go on together.
    """
    if joined().rank == 0:
        with whole_folder(folder) as new:
            yield new
        shutil.rmtree(work, ignore_errors=True)
    else:
        yield None
    joined().wait()


def whole_state(trainer: Any) -> dict[str, Any] | None:
    """The trained model's tensors on rank 0 where DeepSpeed holds them; None where the model does.

    To be called in every process. `save_pretrained` takes it as `state_dict`.
    """
    if not trainer.is_deepspeed_enabled:
        return None
    return trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}


def num_parameters(model: Any) -> int:
    """How many parameters the model has, also where ZeRO-3 has split them up."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


def write_record(folder: Path, started: float, **facts: Any) -> None:
    """Write stage.json: wall seconds of this process and its peak memory so far, and `facts`."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = round(time.time() - started, 1)
    write_json(folder / RECORD, {"seconds": seconds, "peak_memory_mb": round(peak), **facts})


def resume_state(folder: Path) -> str | None:
    """The newest whole state below `folder`, if any; states that were cut short are removed."""

    def look() -> str | None:
        whole = []
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            if (path / COMPLETE).is_file():
                whole.append(path)
            else:
                shutil.rmtree(path)
        newest = max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
        return str(newest) if newest else None

    return joined().agree(look)


def train_on(trainer: Any, work: Path) -> None:
    """Train from the newest state below `work` to the end, without transformers' own printing.

    Raises Terminated on SIGTERM, after the optimizer update under way, with its state saved.
    """
    trainer.remove_callback(PrinterCallback)  # the run shows its own progress
    trainer.add_callback(SaveOnTerm())  # last: what others say of saving comes before
    with termination.deferred():
        trainer.train(resume_from_checkpoint=resume_state(work))


class SaveOnTerm(TrainerCallback):
    """Saves the state and stops, once the system has asked the process to end."""

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """After an optimizer update; at the last one, training ends by itself."""
        if any(joined().gather(termination.is_asked)):  # a signal may have reached only one
            termination.ask()
        if termination.is_asked() and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
        return control


class StageCallback(TrainerCallback):
    """Reports progress, and marks whole states.

    Two states are kept (`save_total_limit=2`): transformers deletes the older before the mark of
    the newer is written.
    """

    def __init__(self, stage: str, notify: Notify, updates_per_step: int = 1) -> None:
        self.stage = stage
        self.notify = notify
        self.updates_per_step = updates_per_step

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Say where the stage stands."""
        self._report(state)

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Say how far it is."""
        self._report(state)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark the state as whole, once every process has written its part."""
        mark = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / COMPLETE
        joined().wait()
        joined().agree(lambda: write_text(mark, ""))

    def _report(self, state: TrainerState) -> None:
        done = state.global_step // self.updates_per_step
        self.notify(self.stage, done, state.max_steps // self.updates_per_step)
