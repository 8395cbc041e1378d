"""Two processes on one folder: one works, the other waits or says who does; the dead hold none."""

import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from selfcorrect.evaluate.report.page import page
from selfcorrect.recipes.foundation import locks, signals
from selfcorrect.recipes.foundation.errors import RunFailure
from selfcorrect.recipes.foundation.locks import LOCK, claimed, holder

ELSEWHERE = {"host": "node7", "process": 41, "since": "2026-01-02 03:04:05 UTC", "boot": "other"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PATIENCE_SECONDS", 0.4)
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(locks, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(locks, "QUIET_SECONDS", 0.0)


def left_by_another_machine(folder: Path, count: int = 3) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOCK).write_text(json.dumps({**ELSEWHERE, "count": count}))


def test_one_has_the_folder_and_the_other_learns_who(tmp_path: Path) -> None:
    with claimed(tmp_path) as free, claimed(tmp_path) as second:
        assert free and not second
        assert holder(tmp_path).startswith(f"process {os.getpid()} on ")
    assert (tmp_path / LOCK).read_text() == ""
    assert holder(tmp_path) == "another process"
    with claimed(tmp_path) as free:
        assert free


def test_who_waits_says_for_whom_and_goes_on_when_it_is_free(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held, order = threading.Event(), []

    def first() -> None:
        with claimed(tmp_path):
            held.set()
            time.sleep(0.2)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    assert held.wait(10)
    with claimed(tmp_path, math.inf) as free:
        assert free
        order.append("second")
    thread.join()
    assert order == ["first", "second"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"selfcorrect: waiting for process {os.getpid()} on ")
    assert line.endswith(f"which is at work in {tmp_path}")


def test_what_a_killed_process_held_is_free_and_its_half_written_files_go(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path\n"
        "from selfcorrect.recipes.foundation.locks import claimed\n"
        "from selfcorrect.recipes.foundation.atomic_files import atomic_file, atomic_folder\n"
        "here = Path(sys.argv[1])\n"
        "with claimed(here), atomic_file(here / 'a.json') as a, atomic_folder(here / 'b') as b:\n"
        "    a.write_text('half'); (b / 'c').write_text('half'); print('in', flush=True)\n"
        "    time.sleep(60)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "in\n"
    with claimed(tmp_path) as free:
        assert not free
        assert holder(tmp_path).startswith(f"process {other.pid} on ")
    other.kill()
    other.wait()
    assert len(list(tmp_path.glob(".*.part"))) == 2
    with claimed(tmp_path) as free:
        assert free
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_live_process_of_another_machine_is_seen_where_locks_do_not_reach(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left_by_another_machine(tmp_path)
    ended = threading.Event()

    def alive() -> None:
        count = 3
        while not ended.wait(0.02):
            count += 1
            left_by_another_machine(tmp_path, count)

    thread = threading.Thread(target=alive)
    thread.start()
    with claimed(tmp_path) as free:
        assert not free
        assert "process 41 on node7" in holder(tmp_path)
    ended.set()
    thread.join()
    assert "process 41 on node7" in capsys.readouterr().err


def test_a_dead_process_of_another_machine_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    left_by_another_machine(tmp_path)
    started = time.monotonic()
    with claimed(tmp_path) as free:
        assert free
        assert time.monotonic() - started >= 0.4  # its counting was waited for
        assert holder(tmp_path).startswith(f"process {os.getpid()} on ")


def test_what_stands_in_a_lock_never_stops_anyone(tmp_path: Path) -> None:
    for text in ("", "{", "[1]", '{"host": 1}', "\x00\xff"):
        (tmp_path / LOCK).write_text(text)
        assert holder(tmp_path) == "another process"
        with claimed(tmp_path) as free:
            assert free


def test_a_lock_of_strangers_cannot_write_on_the_terminal(tmp_path: Path) -> None:
    said = {**ELSEWHERE, "host": "\x1b[2Jnode\n" + "7" * 999, "count": 0}
    (tmp_path / LOCK).write_text(json.dumps(said))
    assert holder(tmp_path).startswith("process 41 on [2Jnode7") and len(holder(tmp_path)) < 250
    assert holder(tmp_path).isprintable()


def test_a_folder_made_anew_is_claimed_by_its_new_lock(tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    with claimed(folder):
        (folder / LOCK).unlink()
        with claimed(folder) as free:
            assert free  # the old lock bars nobody
            with claimed(folder) as third:
                assert not third


def test_a_lock_that_is_removed_while_it_is_taken_is_none(
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
    with claimed(tmp_path, 10) as free, claimed(tmp_path) as second:
        assert free and not second


def test_who_waits_ends_when_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with claimed(tmp_path):
        monkeypatch.setattr(signals, "_asked", True)
        with pytest.raises(signals.Terminated), claimed(tmp_path, math.inf):
            raise AssertionError("two processes hold one lock")


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(RunFailure, match="cannot lock files"), claimed(tmp_path):
        pass


def test_a_second_request_to_end_does_not_break_off_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(signals, "_asked", False)
    with pytest.raises(signals.Terminated):
        signals._heard()
    signals._heard()  # while what was reached is being saved
    assert signals.is_asked()


def test_a_report_waits_for_the_one_before_it(
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
