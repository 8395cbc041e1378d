"""What a job says when the machine, not the recipe, is at fault."""

import multiprocessing
from collections import namedtuple
from pathlib import Path

import pytest

from selfcorrect.recipes import machine_faults
from selfcorrect.recipes.errors import InputError, RunFailure
from selfcorrect.recipes.machine_faults import machine_faults_are_said
from selfcorrect.train import job

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
