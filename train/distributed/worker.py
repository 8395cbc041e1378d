"""One of the processes that train a job.

    python -m selfcorrect.train.distributed.worker RUN MODEL SEED

Started by parent.py through `accelerate launch`. On stdout it tells, a JSON object a line, that
it has begun, how far the job is (rank 0), and how it ended; all else goes to stderr. With
--end-with-stdin behind, it ends at once when stdin does: whoever started it is gone or gives up.
"""

import json
import os
import signal
import sys
import threading
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

from selfcorrect.recipes.foundation import signals
from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from selfcorrect.recipes.foundation.messages import log_to_stderr
from selfcorrect.recipes.load import load_recipe

# Rank 0 alone may read and write a large model for so long, while the others wait.
PATIENCE = timedelta(hours=3)


def main() -> None:
    """Train the job that the arguments name, together with the other processes."""
    run, model, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print

    def tell(**event: Any) -> None:
        told.write(json.dumps(event) + "\n")
        told.flush()

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent ends its children
    log_to_stderr()
    signals.listen()
    if sys.argv[4:] == ["--end-with-stdin"]:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    tell(pid=os.getpid())
    try:
        _work(run, model, seed, tell)
    except signals.Terminated:
        tell(pid=os.getpid(), ended="asked")
    except (InputError, RunFailure) as error:
        tell(pid=os.getpid(), ended=type(error).__name__, message=str(error))
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        tell(pid=os.getpid(), ended="Exception", message=f"{type(error).__name__}: {lines[0]}")
    else:
        tell(pid=os.getpid(), ended="done")
        return
    sys.stderr.flush()
    os._exit(1)  # a process group that others have left may not be ended in order


def _end_with_stdin() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)


def _work(run: Path, model: str, seed: int, tell: Any) -> None:
    from accelerate import PartialState
    from torch import cuda

    from selfcorrect.train.check import check_training
    from selfcorrect.train.job import quiet_libraries, run_job

    quiet_libraries()
    recipe = load_recipe(str(run / "recipe.yaml"))
    if recipe.launch.deepspeed is not None:
        spare_the_compiler()
    state = PartialState(cpu=not cuda.is_available(), timeout=PATIENCE)
    rank = state.process_index
    check_training(recipe)  # again: now batches are known to be shared

    def notify(stage: str, done: int, total: int) -> None:
        if rank == 0:
            tell(stage=stage, done=done, total=total)

    run_job(recipe, run, model, seed, notify)
    state.destroy_process_group()  # gloo's threads may abort a process that ends without


def spare_the_compiler() -> None:
    """On CPUs DeepSpeed would compile a helper, for a minute, that only inference calls."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


if __name__ == "__main__":
    main()
