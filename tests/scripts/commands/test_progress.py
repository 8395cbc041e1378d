"""Bars on a terminal, and lines without one."""

import pytest

from selfcorrect.scripts.commands import progress


def test_lines_show_fractions_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was done before this process does not count as its speed."""
    seconds = iter([100.0, 104.0, 400.0, 1000.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    bars = progress.Bars()
    for done in (50, 50.2, 52.5, 100):
        bars("model: evaluate", done, 100)
    assert capsys.readouterr().err.splitlines() == [
        "model: evaluate 50/100",
        "model: evaluate 52.5/100, about 95 min left",  # after 5 minutes; the second is too early
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
