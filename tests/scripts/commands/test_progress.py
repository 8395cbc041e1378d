"""Bars on a terminal, and lines without one."""

import pytest

from selfcorrect.scripts.commands import progress


def test_lines_show_fractions_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither what an earlier process did, nor the time it stood still, counts as speed."""
    bars, now = progress.Bars(), [0.0]
    monkeypatch.setattr(bars.progress, "get_time", lambda: now[0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    reports = [
        (100.0, 0), (102.0, 50), (104.0, 50.2), (402.0, 52), (702.0, 54), (9000.0, 54.5),
        (9300.0, 56.5), (20_000.0, 100),
    ]  # fmt: skip
    for now[0], done in reports:  # at first, 50 units of an earlier process are found
        bars("model: evaluate", done, 100)
    assert capsys.readouterr().err.splitlines() == [
        "model: evaluate 0/100",
        "model: evaluate 52/100, about 120 min left",  # after 5 minutes; the two before are early
        "model: evaluate 54/100, about 115 min left",
        "model: evaluate 54.5/100",
        "model: evaluate 56.5/100, about 109 min left",
        "model: evaluate 100/100",
    ]


def test_a_bar_starts_where_an_earlier_process_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    bars = progress.Bars()
    monkeypatch.setattr(bars.console, "_force_terminal", True)
    now = [0.0]
    monkeypatch.setattr(bars.progress, "get_time", lambda: now[0])
    for now[0], done in ((0.0, 50), (40.0, 50.4), (80.0, 50.8)):
        bars("evaluate", done, 100)
    (task,) = bars.progress.tasks
    assert task.completed == 50.8 and task.time_remaining == pytest.approx(4920, rel=0.01)
