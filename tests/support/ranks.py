"""Two ranks, and the variables that `accelerate launch` sets for each kind of parallelism.

Imports cost seconds a process. A test forks a process that has imported everything; its ranks are
forked from it, each with a launcher's variables, and try one parallelism after the other. Run as a
module, it trains a job (arguments: `train`, the run and the parallelism) or measures a run
(`evaluate` and the run).
"""

import gc
import importlib.util
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.multiprocessing import start_processes

from selfcorrect.scripts.commands.__main__ import app
from selfcorrect.train.distributed import worker
from selfcorrect.train.distributed.settings import deepspeed_settings
from tests.support import ROOT
from tests.support.fork_server import ForkServer

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


def run_module(forks: ForkServer, name: str, *arguments: object) -> str:
    """Run a module of tests/support that calls `start_ranks`; return its output."""
    words = [sys.executable, "-m", f"tests.support.{name}", *map(str, arguments)]
    done = forks.call(words, ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def start_ranks(work: Callable[..., None], *arguments: object) -> None:
    """Run `work(*arguments)` in two ranks; if one fails, end both and raise its error."""
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CI": "1"}  # no telemetry
    gc.freeze()
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    start_processes(_run, (port, work, arguments), nprocs=2, start_method="fork")


def _run(rank: int, port: int, work: Callable[..., None], arguments: tuple[object, ...]) -> None:
    os.environ |= {
        **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "2"),
        **{"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)},
    }
    os.environ.pop("ACCELERATE_USE_CPU", None)  # the trainers' arguments say so
    if HAS_DEEPSPEED:
        worker.skip_inference_kernel()
    work(*arguments)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def set_parallelism(parallelism: str, folder: Path) -> None:
    """Set what the next trainer reads: "ddp", or DeepSpeed's "zero1" to "zero3"."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = str(parallelism != "ddp").lower()
    os.environ["ACCELERATE_DEEPSPEED_ZERO3_INIT"] = str(parallelism == "zero3").lower()
    if parallelism != "ddp":
        settings = deepspeed_settings(parallelism, on_gpu=False)
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # split all
        file = folder / f"{parallelism}.{os.environ['RANK']}.json"
        file.write_text(json.dumps(settings))
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(file)


def train_job(run: Path, parallelism: str) -> None:
    """Train the job of model "given" and seed 0, as the processes of a run do."""
    set_parallelism(parallelism, run)
    worker._work(run, "given", 0, lambda **_: None)


def evaluate(run: str) -> None:
    """Measure a run with the command, as `accelerate launch` starts it for several devices."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    app(["evaluate", run], standalone_mode=False)


if __name__ == "__main__":
    if sys.argv[1] == "evaluate":
        start_ranks(evaluate, sys.argv[2])
    else:
        start_ranks(train_job, Path(sys.argv[2]), sys.argv[3])
