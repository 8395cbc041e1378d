"""Whole runs as jobs: on this machine, and through a real SLURM where one answers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from selfcorrect.evaluate.run_folder import find_checkpoints
from selfcorrect.recipes.load import load_recipe
from selfcorrect.scripts.cluster.jobs import jobs_left
from selfcorrect.scripts.commands.__main__ import main
from tests.support.fork_server import ForkServer
from tests.support.small_runs import SECONDS, call, command, digests, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * SECONDS)]

LITTLE = [
    "policy.checkpoints=[0, 4]",
    "policy.resume_every=100",
    "evaluate.attach=off",
    "evaluate.experiments=[bbq]",
    "evaluate.conditions=[Q]",
    "evaluate.limit=32",
]


def main_exit(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["selfcorrect", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder that `selfcorrect run` leaves."""
    runs = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        assert main_exit(patch, *command(runs, *LITTLE)[3:]) == 0
    return runs / "small"


def task_of(folder: Path) -> int | None:
    """The process in which submitit runs a job of this folder."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"submitit.core._submit" in words and str(folder).encode() in words:
            return int(path.parent.name)
    return None


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory, forks: ForkServer) -> tuple[Path, str]:
    """The same run as jobs of this machine, its training warned once; and what was shown."""
    runs = tmp_path_factory.mktemp("launched")
    run = runs / "small"
    process = forks.start(command(runs, *LITTLE, "--cluster", "local", name="launch"), runs)
    reached = run / "tiny" / "seed-0" / "ppo" / "checkpoint-0"
    wait_until(reached.is_dir, process)
    task = task_of(run / "launch")
    assert task is not None
    os.kill(task, signal.SIGUSR2)  # as SLURM does before a job's time ends
    _, shown = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, shown
    return run, shown


def test_jobs_with_a_time_limit_equal_a_plain_run_bitwise(
    finished: Path, launched: tuple[Path, str]
) -> None:
    run, _ = launched
    assert digests(run) == digests(finished)
    assert (run / "statistics.json").read_bytes() == (finished / "statistics.json").read_bytes()
    log = "".join(path.read_text() for path in (run / "launch").glob("*_log.err"))
    assert "SIGTERM" in log  # it did save and begin again
    assert [c.record.step for c in find_checkpoints(run)] == [0, 4]


def test_jobs_run_in_order(launched: tuple[Path, str]) -> None:
    _, shown = launched
    lines = [line.split()[1:3] for line in shown.splitlines() if "begins" in line or "done" in line]
    assert [(name, what.rstrip(",")) for name, what in lines] == [
        ("small.tiny.0.train", "begins"), ("small.tiny.0.train", "done"),
        ("small.tiny.0.evaluate", "begins"), ("small.tiny.0.evaluate", "done"),
        ("small.tiny.0.evaluate", "begins"), ("small.tiny.0.evaluate", "done"),
        ("small.report", "begins"), ("small.report", "done"),
    ]  # fmt: skip


def test_finished_work_is_not_launched_again(launched: tuple[Path, str], tmp_path: Path) -> None:
    run = tmp_path / "small"
    shutil.copytree(launched[0], run)
    recipe = load_recipe(str(run / "recipe.yaml"))
    assert jobs_left(recipe, run) == []
    shutil.rmtree(run / "tiny" / "seed-0" / "ppo" / "checkpoint-4" / "evaluation")
    measuring, report = jobs_left(recipe, run)
    assert (measuring.kind, measuring.after) == ("evaluate", [])
    assert [words[-1] for words in measuring.commands] == ["tiny/0/4"]
    assert report.after == [measuring.name]
    shutil.rmtree(run / "tiny" / "seed-0" / "ppo")
    assert [job.kind for job in jobs_left(recipe, run)] == ["train", "evaluate", "report"]


def test_train_measures_what_a_sigterm_left_unmeasured(
    launched: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "small"
    shutil.copytree(launched[0], run)
    cells = [
        run / "tiny" / "seed-0" / "ppo" / f"checkpoint-{step}" / "evaluation" for step in (0, 4)
    ]
    for cell in cells:
        shutil.rmtree(cell)
    assert (
        main_exit(
            monkeypatch,
            *command(tmp_path, *LITTLE, "--model", "tiny", "--seed", "0", name="train")[3:],
        )
        == 0
    )
    assert not any(cell.exists() for cell in cells)  # evaluation is off: it is an array's affair
    inline = ["evaluate.attach=inline", "--model", "tiny", "--seed", "0"]
    assert main_exit(monkeypatch, *command(tmp_path, *LITTLE, *inline, name="train")[3:]) == 0
    assert digests(run) == digests(launched[0])


@pytest.mark.parametrize(
    ("named", "code", "message"),
    [
        ("tiny/0/3", 2, "not a checkpoint of"),
        ("tiny/1/4", 2, "not a checkpoint of"),
        ("tiny/0/4", 1, "checkpoint-4: this checkpoint is not there yet"),
    ],
)
def test_missing_checkpoint_is_one_line(
    launched: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    named: str,
    code: int,
    message: str,
) -> None:
    run = tmp_path / "small"
    shutil.copytree(launched[0], run, ignore=shutil.ignore_patterns("checkpoint-4"))
    assert main_exit(monkeypatch, "evaluate", str(run), "--checkpoint", named) == code
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1


def test_failed_job_is_reported_and_later_jobs_run(
    launched: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "small"
    shutil.copytree(launched[0], run)
    last = run / "tiny" / "seed-0" / "ppo" / "checkpoint-4"
    shutil.rmtree(last / "evaluation")
    weights = last / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    words = command(tmp_path, *LITTLE, "--cluster", "local", name="launch")[3:]
    assert main_exit(monkeypatch, *words) == 1
    shown = capsys.readouterr().err
    assert "small.tiny.0.evaluate failed" in shown
    assert "small.report done" in shown
    line = shown.splitlines()[-1]
    assert "small.tiny.0.evaluate: " in line and "model.safetensors: damaged or replaced" in line


def test_real_slurm_equals_a_plain_run_bitwise(finished: Path, tmp_path: Path) -> None:
    """See scripts/dev/slurm_single_node.sh."""
    if not shutil.which("sbatch") or subprocess.run(["sinfo"], capture_output=True).returncode:
        pytest.skip(
            "no SLURM answers here (sbatch, sinfo): the jobs are not run through a real one"
        )
    turn = ["launch.slurm.time=10", "launch.slurm.gpus=0", "launch.slurm.save_seconds=60"]
    done = call(command(tmp_path, *LITTLE, *turn, name="launch"))
    assert done.returncode == 0, done.stderr
    run = tmp_path / "small"
    ids = [job["id"] for job in json.loads((run / "launch.json").read_text())["jobs"]]
    again = call(command(tmp_path, *LITTLE, *turn, name="launch"))
    assert again.returncode == 2 and f"scancel {' '.join(ids)}" in again.stderr, again.stderr
    deadline = time.monotonic() + SECONDS
    ask = ["squeue", "--noheader", "--format=%F", f"--user={os.getuid()}"]
    while time.monotonic() < deadline:
        queued = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()
        if not set(ids) & set(queued):
            break
        time.sleep(1)
    assert (run / "report.html").is_file(), list((run / "launch").iterdir())
    assert digests(run) == digests(finished)
