"""What a job says when the machine, not the recipe, is at fault."""

import multiprocessing
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from selfcorrect.recipes.foundation import machine_faults
from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from selfcorrect.recipes.foundation.machine_faults import machine_faults_are_said
from selfcorrect.recipes.load import load_recipe
from selfcorrect.train import job
from selfcorrect.train.provenance import threads_per_job

Usage = namedtuple("Usage", "total used free")


def hold(folder: Path, ready: object, done: object) -> None:
    with job.only_one(folder):
        ready.set()  # type: ignore[attr-defined]
        done.wait(60)  # type: ignore[attr-defined]


def test_a_second_process_on_the_same_job_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, ready, done))
    other.start()
    assert ready.wait(30)
    monkeypatch.setattr(job, "GOING_DOWN_SECONDS", 0.0)
    with (
        pytest.raises(InputError, match=rf"process {other.pid} on \S+, since .* is training here"),
        job.only_one(tmp_path),
    ):
        raise AssertionError("two processes hold one lock")
    done.set()
    other.join()
    with job.only_one(tmp_path):  # what is left of an ended process does not bar the way
        pass


@pytest.mark.parametrize(
    "error", [RuntimeError("unexpected pos 64 vs 0"), OSError(28, "No space left on device")]
)
def test_a_full_disk_is_said_whatever_a_library_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(machine_faults, "disk_usage", lambda path: Usage(100, 100, 0))
    with pytest.raises(RunFailure, match="no space left"), machine_faults_are_said(tmp_path):
        raise error


def test_other_errors_are_not_blamed_on_the_disk(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes"), machine_faults_are_said(tmp_path):
        raise RuntimeError("shapes do not match")


def test_threads_are_the_recipes_then_what_slurm_gives_then_a_share_of_the_cores(
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


ASKED_TWICE = """
import os, signal
from selfcorrect.recipes.foundation import signals
signals.listen()
try:
    os.kill(os.getpid(), signal.SIGTERM)
except signals.Terminated:
    os.kill(os.getpid(), signal.SIGTERM)  # while it saves
    print("saved")
"""


def test_asked_to_end_twice_a_process_still_saves() -> None:
    done = subprocess.run([sys.executable, "-c", ASKED_TWICE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "saved\n"), done.stderr
