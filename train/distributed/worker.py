"""One of the processes that train a job.

    python -m selfcorrect.train.distributed.worker RUN MODEL SEED [--end-with-stdin]

parent.py starts it through `accelerate launch`. It sends events to stdout, one JSON object a line:
its start, the job's progress (rank 0), and its end; all other output goes to stderr. With
--end-with-stdin it ends as soon as stdin is closed, when its parent has ended or given up.
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
from selfcorrect.recipes.foundation.errors import (
    InputError,
    RunFailure,
    outside_cause,
    reason_of,
)
from selfcorrect.recipes.foundation.messages import log_to_stderr
from selfcorrect.recipes.load import load_recipe

# The other ranks wait this long while rank 0 reads or writes a large model.
TIMEOUT = timedelta(hours=3)


def main() -> None:
    """Train the job named on the command line, together with the other processes."""
    run, model, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the output of libraries

    def send(**event: Any) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent ends its children
    log_to_stderr()
    signals.listen()
    if sys.argv[4:] == ["--end-with-stdin"]:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    send(pid=os.getpid())
    try:
        _work(run, model, seed, send)
    except signals.Terminated:
        send(pid=os.getpid(), ended="terminated")
    except (InputError, RunFailure) as error:
        send(pid=os.getpid(), ended=type(error).__name__, message=str(error))
    except Exception as error:
        traceback.print_exc()
        message = outside_cause(error) or f"{type(error).__name__}: {reason_of(error)}"
        send(pid=os.getpid(), ended="Exception", message=message)
    else:
        send(pid=os.getpid(), ended="done")
        return
    sys.stderr.flush()
    os._exit(1)  # ending a process group that others have left may hang


def _end_with_stdin() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)


def _work(run: Path, model: str, seed: int, send: Any) -> None:
    from accelerate import PartialState
    from torch import cuda

    from selfcorrect.train.check import check_training
    from selfcorrect.train.job import quiet_libraries, run_job

    quiet_libraries()
    recipe = load_recipe(str(run / "recipe.yaml"))
    if recipe.launch.deepspeed is not None:
        skip_inference_kernel()
    state = PartialState(cpu=not cuda.is_available(), timeout=TIMEOUT)
    rank = state.process_index
    check_training(recipe)  # again: batch sizes are checked against the number of processes

    def progress(stage: str, done: float, total: int) -> None:
        if rank == 0:
            send(stage=stage, done=done, total=total)

    run_job(recipe, run, model, seed, progress)
    state.destroy_process_group()  # or gloo's threads may abort the process at its end


def skip_inference_kernel() -> None:
    """Keep DeepSpeed from compiling a kernel for CPU inference, which takes a minute."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


if __name__ == "__main__":
    main()
