"""Records of finished stages, and training states to resume from.

All ranks of a distributed stage call these functions together. Rank 0 reads and writes the disk and
tells the other ranks the outcome.
"""

# ruff: noqa: TID253  (all of this file is transformers)

import logging
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from selfcorrect.evaluate.run_folder import STAGE_RECORD
from selfcorrect.recipes.foundation.atomic_files import atomic_folder, flush_folder
from selfcorrect.recipes.foundation.checksums import check_files, digests, read_record, write_record
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.foundation.ranks import current_ranks

COMPLETE = "complete"  # written last, with all checksums: a state without it is partial

logger = logging.getLogger(__name__)


def stage_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of a finished stage, or None if the stage is not finished.

    Raises InputError if the record or a file that it lists is damaged, or if the record belongs to
    another stage.
    """
    remedy = f"restore {folder}, or delete it to have the same run make it again"
    try:
        record = read_record(folder / STAGE_RECORD, remedy)
    except FileNotFoundError:
        return None
    if record.get("stage", _stage_name(folder)) != _stage_name(folder):
        raise InputError(f"{folder / STAGE_RECORD}: belongs to {record['stage']}; {remedy}")
    check_files(folder, record.get("files", {}), remedy)
    return record


def work_folder(folder: Path) -> Path | None:
    """Return the folder of a stage's training states; None if the stage is finished on rank 0."""
    work = folder.with_name(f"{folder.name}.work")
    if not current_ranks().from_rank0(lambda: stage_record(folder) is not None):
        return work
    shutil.rmtree(work, ignore_errors=True)  # left by a process that was killed in between
    return None


@contextmanager
def finish_stage(folder: Path, work: Path) -> Iterator[Path | None]:
    """Yield a new folder that replaces `folder` on leaving, on rank 0; None on other ranks.

    Then delete `work` and let all ranks continue.
    """
    if current_ranks().rank == 0:
        with atomic_folder(folder) as new:
            yield new
        shutil.rmtree(work, ignore_errors=True)
    else:
        yield None
    current_ranks().barrier()


def write_stage_record(folder: Path, started: float, final: Path, **facts: Any) -> None:
    """Write stage.json: seconds since `started`, peak memory of this process, checksums, `facts`.

    `folder` will be moved to `final`; if it is there already, the record lists no files.
    """
    record = {
        "stage": _stage_name(final),
        "seconds": round(time.time() - started, 1),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        **facts,
        "files": {} if folder == final else digests(folder),
    }
    write_record(folder / STAGE_RECORD, record)


def _stage_name(folder: Path) -> str:
    """Return model, seed and stage: tiny/seed-0/base."""
    return "/".join(folder.resolve().parts[-3:])


def complete_state(folder: Path) -> None:
    """Mark a training state as complete, with the checksums of its files."""
    flush_folder(folder)
    write_record(folder / COMPLETE, {"files": digests(folder, but=[COMPLETE])})


def check_state(folder: Path, remedy: str) -> None:
    """Raise InputError for a damaged training state, FileNotFoundError for a partial one."""
    check_files(folder, read_record(folder / COMPLETE, remedy).get("files"), remedy)


def newest_state(work: Path) -> str | None:
    """Return the newest intact training state below `work`, or None.

    Partial states are removed, and damaged ones too, with a warning: training from an older state,
    or from the beginning, leads to the same weights.
    """
    return current_ranks().from_rank0(lambda: _newest_intact(work))


def _newest_intact(work: Path) -> str | None:
    states = work.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    for state in sorted(states, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        try:
            check_state(state, "resuming from an older state instead")
        except FileNotFoundError:
            shutil.rmtree(state, ignore_errors=True)
        except InputError as error:
            logger.warning("%s", error)
            shutil.rmtree(state, ignore_errors=True)
        else:
            return str(state)
    return None


def gathered_weights(trainer: Any) -> dict[str, Any] | None:
    """Return the trained weights on rank 0 if DeepSpeed holds them; None if the model itself does.

    `save_pretrained` takes them as `state_dict`. Every rank must call this.
    """
    if not trainer.is_deepspeed_enabled:
        return None
    return trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}


def rows_drawn(trainer: Any) -> int:
    """Return how many rows of its data set a trainer has trained on at least once."""
    args = trainer.args
    num = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return min(len(trainer.train_dataset), num * trainer.state.global_step)


def num_parameters(model: Any) -> int:
    """Return the number of parameters, also of a model that ZeRO-3 has split."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
