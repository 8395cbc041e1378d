"""Fixtures that tests of several rooms share."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.file_server import Server


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
