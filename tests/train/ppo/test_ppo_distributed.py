"""Sums over two processes that a run's settings start (gloo); trainings: test_ppo_engines.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from selfcorrect.recipes.schema import Launch
from selfcorrect.train.distributed.settings import process_environment, write_settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]

WHITEN = """
import json, sys, torch, torch.distributed as dist
from selfcorrect.train.ppo.losses import explained_variance, whiten
dist.init_process_group("gloo")
rank = dist.get_rank()
x = torch.arange(24.0).reshape(6, 4).square()
mask = torch.tensor([[1, 1, 0, 0]] * 2 + [[1, 1, 1, 1]] * 3 + [[0, 0, 0, 0]]).float()
def reduce(sums):
    dist.all_reduce(sums)
    return sums
half = slice(3 * rank, 3 * rank + 3)
whitened = whiten(x[half], mask[half], reduce)
gap = (whitened - whiten(x, mask)[half]).abs().max().item()
single = explained_variance(x * 0.9, x, mask)
reduced = explained_variance(x[half] * 0.9, x[half], mask[half], reduce)
facts = {"gap": gap, "single": single, "reduced": reduced}
json.dump(facts, open(f"{sys.argv[1]}/{rank}.json", "w"))
dist.barrier()
dist.destroy_process_group()  # gloo's threads may abort a process that ends without
"""


def run_in_two_processes(folder: Path, code: str) -> list[dict]:
    script = folder / "worker.py"
    script.write_text(code)
    launch = Launch(processes=2)
    settings = write_settings(launch, folder / "launch", on_gpu=False)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(settings)]
    environment = process_environment(launch, 1, on_gpu=False, slot=0)
    done = subprocess.run(
        [*command, str(script), str(folder)],
        capture_output=True, text=True, timeout=900, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_whitening_in_two_processes_equals_whitening_the_complete_batch(tmp_path: Path) -> None:
    for facts in run_in_two_processes(tmp_path, WHITEN):
        assert facts["gap"] < 1e-5
        assert facts["reduced"] == pytest.approx(facts["single"], abs=1e-6)
