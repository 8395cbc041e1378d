"""Errors of many origins: each is classed by where it comes from, and keeps its reason."""

import errno
import http.client
import importlib
import json
import os
import re
import socket
import sys
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pydantic
import pytest
from huggingface_hub import errors as hub
from huggingface_hub.utils import get_session
from transformers import AutoConfig, LlamaConfig

from selfcorrect.evaluate.scoring.lm_eval import engine_loader
from selfcorrect.recipes.foundation.errors import (
    InputError,
    RunFailure,
    outside_cause,
    reason_of,
)
from selfcorrect.recipes.foundation.hub_errors import hub_errors
from selfcorrect.scripts.commands import __main__ as command
from selfcorrect.train.feedback.files import read_rows
from selfcorrect.train.ppo import reward_models
from selfcorrect.train.stages import arguments
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


def from_client(
    error: BaseException, module: str = "huggingface_hub.somewhere"
) -> Callable[[], None]:
    """Return a function of the hub's client, or another module, that raises an error."""
    scope = {"__name__": module, "error": error, "cause": error.__cause__}
    exec("def fail():\n    raise error from cause", scope)
    return scope["fail"]


def caused_by(cause: BaseException) -> hub.LocalEntryNotFoundError:
    error = hub.LocalEntryNotFoundError("cannot find the requested files in the local cache")
    error.__cause__ = cause
    return error


def answered(code: int) -> hub.HfHubHTTPError:
    response = get_session().build_request("GET", NOBODY)
    kind = type(get_session()).__module__.partition(".")[0]
    answer = importlib.import_module(kind).Response(code, request=response)
    return hub.HfHubHTTPError(f"{code} from the hub", response=answer)


HUB = {
    "offline": (caused_by(hub.OfflineModeIsEnabled("no")), InputError, "HF_HUB_OFFLINE is set"),
    "no cause": (hub.LocalEntryNotFoundError("no copy"), RunFailure, "cannot be reached"),
    "no network": (caused_by(ConnectionError("refused")), RunFailure, "be reached .refused"),
    "limit": (caused_by(answered(429)), RunFailure, "limits the number of requests"),
    "server's fault": (caused_by(answered(503)), RunFailure, "refuses the download .503"),
    "no token": (caused_by(answered(403)), InputError, "refuses the token"),
    "no metadata": (caused_by(hub.FileMetadataError("no ETag")), RunFailure, "not the hub's"),
    "page for JSON": (json.JSONDecodeError("expecting value", "<html>", 0), RunFailure, "login"),
    "other JSON": (KeyError("branches"), RunFailure, "not the hub's"),
    "broken transfer": (OSError("Consistency check failed"), RunFailure, "download failed"),
    "another library": (RuntimeError("CAS service error"), RunFailure, "failed .CAS service"),
    "memory of the server": (answered(500), RunFailure, "refuses the download .500"),
}


@pytest.mark.parametrize(("error", "kind", "fragment"), HUB.values(), ids=list(HUB))
def test_error_of_the_hubs_client_is_one_line_by_its_origin(
    error: Exception, kind: type, fragment: str
) -> None:
    with pytest.raises(kind, match=rf"^lab/m: .*{fragment}"), hub_errors("lab/m", "download"):
        from_client(error)()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        PermissionError(errno.EACCES, "Permission denied", "/cache/blobs"),
        MemoryError(),
    ],
    ids=["full disk", "cache of another user", "memory"],
)
def test_error_of_this_machine_is_not_the_hubs(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, hub_errors("lab/m", "download"):
        from_client(error)()
    assert outside_cause(caught.value) is not None


def test_errors_of_our_own_code_are_not_the_hubs() -> None:
    with pytest.raises(TypeError, match="unexpected"), hub_errors("lab/m", "download"):
        from_client(TypeError("unexpected keyword"), "selfcorrect.evaluate.publish.hub")()


def rows(raised: Callable, folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("datasets.load_dataset", raised)
    (folder / "rows.jsonl").write_text('{"prompt": "x"}\n')
    read_rows(str(folder / "rows.jsonl"), "data.prompts")


def trainer(raised: Callable, folder: Path, patch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Arguments:
        output_dir: str = ""
        __post_init__ = raised

    arguments.build(Arguments, "policy.trainer", {}, {}, {})


def classifier(raised: Callable, folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reward_models, "_scored_class", raised)
    reward_models.check_family(LlamaConfig())


def lm_of_lm_eval(raised: Callable, folder: Path, patch: pytest.MonkeyPatch) -> None:
    registry = ModuleType("lm_eval.api.registry")
    registry.get_model = lambda name: SimpleNamespace(create_from_arg_obj=raised)
    patch.setitem(sys.modules, "lm_eval.api.registry", registry)
    patch.setattr("importlib.util.find_spec", lambda name: name)
    engine_loader("lm-eval:other").load("lab/m")


@pytest.mark.parametrize("reader", [rows, trainer, classifier, lm_of_lm_eval])
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/cache/x"), OSError),
        (MemoryError(), MemoryError),
        (ValueError("no such column"), InputError),
    ],
    ids=["full disk", "memory", "input"],
)
def test_what_a_library_raises_is_the_inputs_fault_unless_the_machines(
    reader: Callable, error: Exception, kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raised(*_: object, **__: object) -> None:
        raise error

    with pytest.raises(kind) as caught:
        reader(raised, tmp_path, monkeypatch)
    assert (caught.value is error) == (kind is not InputError)
