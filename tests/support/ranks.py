"""Two ranks, and the variables that `accelerate launch` sets for each kind of parallelism.

Imports cost seconds a process. A test starts one process that imports everything; its ranks are
forked from it, each with a launcher's variables, and try one parallelism after the other. Run as a
module, it trains a job. Arguments: the run and the parallelism.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.multiprocessing import start_processes

from selfcorrect.train.distributed import worker
from selfcorrect.train.distributed.settings import deepspeed_settings
from tests.support import ROOT

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


def run_module(name: str, *arguments: object) -> None:
    """Run a module of tests/support that calls `start_ranks`, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.support.{name}", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=3000,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CI": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def start_ranks(work: Callable[..., None], *arguments: object) -> None:
    """Run `work(*arguments)` in two ranks; if one fails, end both and raise its error."""
    torch.set_num_threads(1)
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


if __name__ == "__main__":
    start_ranks(train_job, Path(sys.argv[1]), sys.argv[2])
