"""The file whose existence shows that a payload ran."""

from pathlib import Path

import pytest


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "the payload ran"
