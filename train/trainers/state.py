"""What every stage of training shares: finished folders, states to resume from, progress.

Where a stage runs in several processes, all of them call the same functions here. Rank 0 looks at
the disk and writes, and tells the others what it saw.
"""

# ruff: noqa: TID253  (all of this file is transformers)

import logging
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from selfcorrect.evaluate.run_folder import STAGE_RECORD as RECORD
from selfcorrect.recipes.foundation import signals
from selfcorrect.recipes.foundation.atomic_files import atomic_folder, flush_folder
from selfcorrect.recipes.foundation.checksums import check_files, digests, read_record
from selfcorrect.recipes.foundation.checksums import write_record as write_sealed
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.foundation.ranks import current_ranks

Notify = Callable[[str, int, int], None]  # stage, steps done, steps in all
COMPLETE = "complete"  # written last, with all files' digests: without it a state was cut short

_log = logging.getLogger(__name__)


def finished(folder: Path) -> dict[str, Any] | None:
    """The record of a finished stage; None while it is not finished. Folders appear whole.

    Raises InputError where the record or a file that it names is damaged, or another stage's.
    """
    remedy = f"copy {folder} here again, or delete it: the same run makes it anew"
    try:
        record = read_record(folder / RECORD, remedy)
    except FileNotFoundError:
        return None
    if record.get("stage", _stage(folder)) != _stage(folder):
        raise InputError(f"{folder / RECORD}: is that of {record['stage']}; {remedy}")
    check_files(folder, record.get("files", {}), remedy)
    return record


def is_finished(folder: Path) -> bool:
    """Whether the stage is finished, as rank 0 sees it."""
    return current_ranks().from_rank0(lambda: finished(folder) is not None)


@contextmanager
def finishing(folder: Path, work: Path) -> Iterator[Path | None]:
    """Hand out a new folder that takes the place of `folder`, to rank 0; None to the others.

    Then `work` goes, and all processes go on together.
    """
    if current_ranks().rank == 0:
        with atomic_folder(folder) as new:
            yield new
        shutil.rmtree(work, ignore_errors=True)
    else:
        yield None
    current_ranks().barrier()


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


def _stage(folder: Path) -> str:
    """Which stage it is: tiny/seed-0/base."""
    return "/".join(folder.resolve().parts[-3:])


def write_record(folder: Path, started: float, place: Path, **facts: Any) -> None:
    """Write stage.json: wall seconds of this process and its peak memory so far, and `facts`.

    `folder` is what will stand at `place`; the digests of the files that it holds are taken down.
    """
    record = {
        "stage": _stage(place),
        "seconds": round(time.time() - started, 1),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        **facts,
        "files": {} if folder == place else digests(folder),
    }
    write_sealed(folder / RECORD, record)


def resume_state(folder: Path) -> str | None:
    """The newest whole state below `folder`, if any.

    States that were cut short are removed; so is one that is damaged, which is said: an older one
    behind it, or the beginning, leads to the same weights.
    """
    return current_ranks().from_rank0(lambda: _newest_whole(folder))


def _newest_whole(folder: Path) -> str | None:
    found = folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    for path in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        try:
            check_state(path, "it is passed over")
        except FileNotFoundError:
            shutil.rmtree(path, ignore_errors=True)
        except InputError as error:
            _log.warning("%s", error)
            shutil.rmtree(path, ignore_errors=True)
        else:
            return str(path)
    return None


def check_state(path: Path, remedy: str) -> None:
    """Raises InputError for a damaged state, FileNotFoundError for one that was never finished."""
    check_files(path, read_record(path / COMPLETE, remedy).get("files"), remedy)


def train_on(trainer: Any, work: Path) -> None:
    """Train from the newest state below `work` to the end, without transformers' own printing.

    `trainer` is a FiniteTrainer. Raises Terminated on SIGTERM, after the optimizer update under
    way, with its state saved, and RunFailure where what was trained is not finite.
    """
    trainer.remove_callback(PrinterCallback)  # the run shows its own progress
    # Last: what others say of saving comes before.
    trainer.add_callback(SaveOnTerm(getattr(trainer, "updates_per_step", 1)))
    with signals.deferred():
        trainer.train(resume_from_checkpoint=resume_state(work))
    trainer.check_model()


class SaveOnTerm(TrainerCallback):
    """Saves the state and stops, once the system has asked the process to end.

    States are saved after every `updates` optimizer updates only: between them a trainer may hold a
    rollout batch that no state has.
    """

    def __init__(self, updates: int = 1) -> None:
        self.updates = updates

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """After an optimizer update; at the last one, training ends by itself."""
        if any(current_ranks().gather(signals.is_asked)):  # a signal may have reached only one
            signals.ask()
        between = state.global_step % self.updates
        if signals.is_asked() and not between and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
        return control


class MarkWhole(TrainerCallback):
    """Marks states as whole.

    Two states are kept (`save_total_limit=2`): transformers deletes the older before the mark of
    the newer is written.
    """

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark the state as whole, with the digests of its files."""
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        processes = current_ranks()
        processes.barrier()  # each process writes files of its own
        processes.from_rank0(lambda: _mark_whole(folder))


def _mark_whole(folder: Path) -> None:
    flush_folder(folder)
    write_sealed(folder / COMPLETE, {"files": digests(folder, but=[COMPLETE])})


class StageCallback(MarkWhole):
    """Reports progress, and marks whole states."""

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

    def _report(self, state: TrainerState) -> None:
        done = state.global_step // self.updates_per_step
        self.notify(self.stage, done, state.max_steps // self.updates_per_step)
