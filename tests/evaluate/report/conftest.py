"""A recorded run and its results, for tests that do not change them."""

from pathlib import Path
from typing import Any

import pytest

from selfcorrect.evaluate.results import results_of
from tests.support.recorded_run import SMALL, record_run


@pytest.fixture(scope="session")
def recorded_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run of two models; do not change it."""
    return record_run(tmp_path_factory.mktemp("report") / "run", SMALL)


@pytest.fixture(scope="session")
def statistics(recorded_run: Path) -> dict[str, Any]:
    """The content of the recorded run's statistics.json."""
    return results_of(recorded_run, num_resamples=200)[1]
