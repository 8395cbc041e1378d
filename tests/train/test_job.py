"""A job's lock, its threads, and the errors that its machine causes."""

import multiprocessing
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from selfcorrect.recipes.foundation import errors
from selfcorrect.recipes.foundation.errors import InputError, RunFailure, explain_machine_faults
from selfcorrect.recipes.load import load_recipe
from selfcorrect.train import job
from selfcorrect.train.provenance import threads_per_job

Usage = namedtuple("Usage", "total used free")


def hold(folder: Path, ready: object, done: object) -> None:
    with job.hold_job(folder):
        ready.set()  # type: ignore[attr-defined]
        done.wait(900)  # type: ignore[attr-defined]


def test_second_process_on_a_job_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, ready, done), daemon=True)
    other.start()
    assert ready.wait(900)
    monkeypatch.setattr(job, "KILLED_PROCESS_SECONDS", 0.0)
    with (
        pytest.raises(InputError, match=rf"process {other.pid} on .* is training here"),
        job.hold_job(tmp_path),
    ):
        raise AssertionError("two processes hold one lock")
    done.set()
    other.join()
    with job.hold_job(tmp_path):  # an ended process holds no lock
        pass


@pytest.mark.parametrize(
    "error", [RuntimeError("unexpected pos 64 vs 0"), OSError(28, "No space left on device")]
)
def test_full_disk_is_named_whatever_a_library_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(errors, "disk_usage", lambda path: Usage(100, 100, 0))
    with pytest.raises(RunFailure, match="no space left"), explain_machine_faults(tmp_path):
        raise error


def test_other_errors_are_not_blamed_on_the_disk(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes"), explain_machine_faults(tmp_path):
        raise RuntimeError("shapes do not match")


def test_threads_come_from_recipe_then_slurm_then_share_of_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = load_recipe("quickstart", ["launch.threads=null", "launch.jobs=2"])
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert threads_per_job(recipe) == 8
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "6")
    assert threads_per_job(recipe) == 8  # `run` inside anybody's own job: two share it
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    assert threads_per_job(recipe) == 6  # a job of `launch` is one model and seed
    assert threads_per_job(load_recipe("quickstart", ["launch.threads=3"])) == 3


TERMINATED_TWICE = """
import os, signal
from selfcorrect.recipes.foundation import signals
signals.listen()
try:
    os.kill(os.getpid(), signal.SIGTERM)
except signals.Terminated:
    os.kill(os.getpid(), signal.SIGTERM)  # while it saves
    print("saved")
"""


def test_second_sigterm_does_not_stop_the_saving() -> None:
    done = subprocess.run([sys.executable, "-c", TERMINATED_TWICE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "saved\n"), done.stderr
