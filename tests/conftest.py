"""Fixtures that tests of several rooms share."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.file_server import Server


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--matrix", action="store_true", help="also run the tests marked matrix: every member"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the matrix unless it is asked for; `-m` stays free for other choices."""
    if config.getoption("--matrix"):
        return
    left_out = [item for item in items if item.get_closest_marker("matrix")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("matrix")]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    """Start local servers from their `answer` functions."""
    monkeypatch.setenv("no_proxy", "*")
    running: list[Server] = []

    def start(answer: Callable[[Server, Any], None]) -> Server:
        running.append(Server(answer))
        return running[-1]

    yield start
    for server in running:
        server.close()
