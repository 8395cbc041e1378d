"""Errors of many origins: each is classed by where it comes from, and keeps its reason."""

import errno
import http.client
import os
import re
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pydantic
import pytest
from huggingface_hub.utils import get_session
from transformers import AutoConfig

from selfcorrect.recipes.foundation.errors import outside_cause, reason_of
from selfcorrect.scripts.commands import __main__ as command
from tests.support.file_server import Server

NOBODY = "http://127.0.0.1:9/"  # the discard port, on which nothing listens


def raised_by(action: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as caught:
        action()
    return caught.value


def failing(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


class ModelConfig(pydantic.BaseModel):
    length: int

    @pydantic.model_validator(mode="after")
    def check(self) -> "ModelConfig":
        raise ValueError(f"length {self.length} is greater than the derived 64")


ORIGINS = {
    "missing file": (lambda: Path("/nowhere/at/all").read_text(), "/nowhere/at/all: No such file"),
    "folder as file": (lambda: Path("/tmp").read_text(), "/tmp: Is a directory"),
    "broken disk": (
        failing(OSError(errno.EIO, os.strerror(errno.EIO))),
        "the machine: Input/output error",
    ),
    "full disk": (
        failing(OSError(errno.ENOSPC, "No space left on device", "/d/weights")),
        "/d/weights: no space left on the disk; make room",
    ),
    "slow network disk": (
        failing(TimeoutError(errno.ETIMEDOUT, "Connection timed out", "/nfs/file")),
        "/nfs/file: Connection timed out",
    ),
    "pipe": (failing(BrokenPipeError(errno.EPIPE, "Broken pipe")), "the machine: Broken pipe"),
    "no listener": (lambda: socket.create_connection(("127.0.0.1", 9)), "network: .*refused"),
    "no route": (
        failing(OSError(errno.EHOSTUNREACH, "No route to host")),
        "network: .*No route to host",
    ),
    "urllib": (lambda: urllib.request.urlopen(NOBODY), "network: .*refused"),
    "hub client": (lambda: get_session().get(NOBODY), "network: .*(refused|offline)"),
    "library's own": (
        failing(ConnectionError("The server can't be reached at http://host after 240 seconds")),
        "network: The server can't be reached at http://host after 240 seconds",
    ),
    "half an answer": (failing(http.client.IncompleteRead(b"", 9)), "network: IncompleteRead"),
    "no such model": (
        lambda: AutoConfig.from_pretrained("nobody/no-such-model", local_files_only=True),
        "transformers: We couldn't connect",
    ),
}


@pytest.mark.parametrize(("action", "line"), ORIGINS.values(), ids=list(ORIGINS))
def test_error_is_classed_by_its_origin(
    action: Callable, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(command, "app", failing(raised_by(action)))
    with pytest.raises(SystemExit) as ended:
        command.main()
    [shown] = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1
    assert re.match(f"selfcorrect: {line}", shown)


def test_memory_of_a_server_is_not_that_of_the_machine(serve: Callable[..., Server]) -> None:
    server = serve(lambda _, handler: handler.send_error(500, "CUDA out of memory"))
    error = raised_by(lambda: urllib.request.urlopen(server.url))
    assert outside_cause(error) == "network: HTTP Error 500: CUDA out of memory"


def test_error_of_a_program_is_none_of_these() -> None:
    assert outside_cause(TypeError("unexpected keyword")) is None


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        (lambda: ModelConfig(length=99), "ModelConfig: length 99 is greater than the derived 64"),
        (lambda: ModelConfig(length="x"), "ModelConfig: length: Input should be a valid integer"),
        (failing(RuntimeError("Error(s) in loading X:\n\tsize mismatch")), "X: size mismatch"),
        (failing(ValueError("no\n\nTraceback (most recent call last):\n  File")), "no"),
        (failing(ExceptionGroup("2 errors", [ValueError("the first")])), "the first"),
        (failing(KeyError("mistral9")), "KeyError: 'mistral9'"),
        (failing(RuntimeError()), "RuntimeError"),
        (failing(ValueError("word " * 200)), "..."),
    ],
)
def test_reason_is_kept_on_one_line(action: Callable, reason: str) -> None:
    line = reason_of(raised_by(action))
    assert reason in line and len(line) <= 300 and "Traceback" not in line
