"""One process holds a folder's lock; another waits or learns who holds it; the dead hold none."""

import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from selfcorrect.evaluate.report import page
from selfcorrect.recipes.foundation import locks, signals
from selfcorrect.recipes.foundation.errors import RunFailure
from selfcorrect.recipes.foundation.locks import LOCK, hold_lock, lock_holder

ELSEWHERE = {"host": "node7", "process": 41, "since": "2026-01-02 03:04:05 UTC", "boot": "other"}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PATIENCE_SECONDS", 0.4)
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(locks, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(locks, "QUIET_SECONDS", 0.0)


def write_lock_of_another_host(folder: Path, count: int = 3) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOCK).write_text(json.dumps({**ELSEWHERE, "count": count}))


def test_lock_is_exclusive_and_names_its_holder(tmp_path: Path) -> None:
    with hold_lock(tmp_path) as first, hold_lock(tmp_path) as second:
        assert first and not second
        assert lock_holder(tmp_path).startswith(f"process {os.getpid()} on ")
    assert (tmp_path / LOCK).read_text() == ""
    assert lock_holder(tmp_path) == "another process"
    with hold_lock(tmp_path) as again:
        assert again


def test_waiting_is_logged_once_and_ends_with_the_holder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held, order = threading.Event(), []

    def hold_first() -> None:
        with hold_lock(tmp_path):
            held.set()
            while not caplog.messages:
                time.sleep(0.01)
            order.append("first")

    thread = threading.Thread(target=hold_first)
    thread.start()
    assert held.wait(900)
    with hold_lock(tmp_path, math.inf) as is_held:
        assert is_held
        order.append("second")
    thread.join()
    assert order == ["first", "second"]
    (line,) = caplog.messages
    assert line.startswith(f"waiting for process {os.getpid()} on ")
    assert line.endswith(str(tmp_path))


def test_lock_of_a_killed_process_is_free_and_its_temporary_files_are_removed(
    tmp_path: Path,
) -> None:
    code = (
        "import os, sys, time; from pathlib import Path\n"
        "from selfcorrect.recipes.foundation.locks import hold_lock\n"
        "from selfcorrect.recipes.foundation.atomic_files import atomic_file, atomic_folder\n"
        "here = Path(sys.argv[1])\n"
        "with hold_lock(here), atomic_file(here / 'a.json') as a, atomic_folder(here / 'b') as b:\n"
        "    a.write_text('half'); (b / 'c').write_text('half'); print('in', flush=True)\n"
        "    time.sleep(900)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "in\n"
    with hold_lock(tmp_path) as is_held:
        assert not is_held
        assert lock_holder(tmp_path).startswith(f"process {process.pid} on ")
    process.kill()
    process.wait()
    assert len(list(tmp_path.glob(".*.part"))) == 2
    with hold_lock(tmp_path) as is_held:
        assert is_held
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_counting_process_of_another_host_keeps_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Some file systems do not carry flock from one host to another."""
    monkeypatch.setattr(locks, "PATIENCE_SECONDS", 900)  # ends at the first count
    write_lock_of_another_host(tmp_path)
    ended = threading.Event()

    def keep_counting() -> None:
        count = 3
        while not ended.wait(0.02):
            count += 1
            write_lock_of_another_host(tmp_path, count)

    thread = threading.Thread(target=keep_counting)
    thread.start()
    with hold_lock(tmp_path) as is_held:
        assert not is_held
    ended.set()
    thread.join()
    assert "process 41 on node7" in lock_holder(tmp_path)
    assert "held by process 41 on node7" in caplog.messages[0]


def test_lock_of_a_dead_process_of_another_host_is_taken_after_the_patience(tmp_path: Path) -> None:
    write_lock_of_another_host(tmp_path)
    started = time.monotonic()
    with hold_lock(tmp_path) as is_held:
        assert is_held
        assert time.monotonic() - started >= 0.4
        assert lock_holder(tmp_path).startswith(f"process {os.getpid()} on ")


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"host": 1}', "\x00\xff"])
def test_malformed_lock_file_stops_nobody(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK).write_text(text)
    assert lock_holder(tmp_path) == "another process"
    with hold_lock(tmp_path) as is_held:
        assert is_held


def test_hostile_lock_file_cannot_control_the_terminal(tmp_path: Path) -> None:
    record = {**ELSEWHERE, "host": "\x1b[2Jnode\n" + "7" * 999, "count": 0}
    (tmp_path / LOCK).write_text(json.dumps(record))
    holder = lock_holder(tmp_path)
    assert holder.startswith("process 41 on [2Jnode7") and holder.isprintable()
    assert len(holder) < 250


def test_recreated_folder_is_locked_by_its_new_lock_file(tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    with hold_lock(folder):
        (folder / LOCK).unlink()
        with hold_lock(folder) as second:
            assert second  # the removed lock file bars nobody
            with hold_lock(folder) as third:
                assert not third


def test_lock_file_removed_while_it_is_being_locked_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    flock, removed = fcntl.flock, []

    def remove_first(descriptor: int, how: int) -> None:
        if not removed:
            (tmp_path / LOCK).unlink()
            removed.append(True)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with hold_lock(tmp_path, 900) as first, hold_lock(tmp_path) as second:
        assert first and not second


def test_sigterm_ends_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hold_lock(tmp_path):
        monkeypatch.setattr(signals, "_requested", True)
        with pytest.raises(signals.Terminated), hold_lock(tmp_path, math.inf):
            raise AssertionError("two processes hold one lock")


def test_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(RunFailure, match="cannot lock files"), hold_lock(tmp_path):
        pass


def test_second_sigterm_does_not_interrupt_saving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_requested", False)
    with pytest.raises(signals.Terminated):
        signals._on_sigterm()
    signals._on_sigterm()  # while the state is being saved
    assert signals.is_requested()


def test_reports_of_one_run_are_written_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.yaml").write_text("name: r\n")
    order = []

    def write(run: Path, *_: object) -> Path:
        order.append("begins")
        time.sleep(0.1)
        order.append("ends")
        return run

    monkeypatch.setattr(page, "_write_report", write)
    threads = [threading.Thread(target=page.write_report, args=(tmp_path,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order == ["begins", "ends"] * 3
