"""Fixtures that tests of several rooms share."""

import gc
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.file_server import Server
from tests.support.fork_server import ForkServer


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--matrix", action="store_true", help="also run the tests marked matrix: every member"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the matrix unless it is asked for, and what needs vLLM where it is missing.

    `-m` stays free for other choices.

    Of several processes (pytest-xdist), each begins with files of slow tests, so that all end at
    about the same time.
    """
    left_out = [item for item in items if item.get_closest_marker("matrix")]
    if left_out and not config.getoption("--matrix"):
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("matrix")]
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Spare each garbage collection, with which every training begins, all that was imported."""
    gc.freeze()


@pytest.fixture(scope="session")
def forks() -> Iterator[ForkServer]:
    """Start commands in processes that have imported everything."""
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def few_answers() -> Iterator[None]:
    """Judge few answers of each checkpoint, where they are not the subject."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("selfcorrect.train.stages.answers.NUM_ANSWERS", 16)
        yield


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
