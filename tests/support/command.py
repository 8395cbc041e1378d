"""The command `selfcorrect`, called within the test's own process."""

import sys

import pytest

from selfcorrect.scripts.commands.__main__ import main


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run `selfcorrect` with these arguments and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["selfcorrect", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        main()
    return int(exit_info.value.code or 0)
