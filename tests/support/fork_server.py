"""Processes that begin with everything imported: each is forked from a server that imported it.

Imports cost every new interpreter about seven seconds. A fork equals `python -m MODULE` otherwise:
it has a process group, signals, output, a working directory and an exit of its own. Environment
variables, hash seed and locale are those with which its server was started.
"""

import atexit
import gc
import importlib
import importlib.util
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import IO

from tests.support import ROOT
from tests.support.small_runs import SECONDS

IMPORTED = (
    "selfcorrect.scripts.commands.run",
    "selfcorrect.train.job",
    "selfcorrect.evaluate.figures.gallery",
    "matplotlib.backends._backend_pdf_ps",
)


class ForkedProcess:
    """A forked process with the attributes and methods of Popen that tests use."""

    def __init__(self, pid: int, status: IO[str], stdout: IO[str], stderr: IO[str]) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.stdout, self.stderr = stdout, stderr  # files, to be read once it has ended
        self._status = status

    def poll(self) -> int | None:
        """Return the exit code (minus the signal's number if one ended it), or None."""
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.returncode = int(self._status.readline())
            for file in (self.stdout, self.stderr):
                file.seek(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; TimeoutExpired if it takes longer than `timeout` seconds."""
        if self.returncode is None and not select.select([self._status], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        code = self.poll()
        assert code is not None
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end and return the output and the error output."""
        self.wait(timeout)
        return self.stdout.read(), self.stderr.read()

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL, unless the process has ended."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The server, started with the environment variables of now, which ends with `close`."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.support.fork_server"], cwd=ROOT, stdin=theirs
            )

    def start(self, words: list[str], cwd: Path, output: Path | None = None) -> ForkedProcess:
        """Start a command line `python -m MODULE ...` in `cwd`, in a process group of its own.

        Its output and error output go to the file `output`, or to one temporary file each.
        """
        assert words[:2] == [sys.executable, "-m"], words
        if output is None:
            files = [tempfile.TemporaryFile("w+", encoding="utf-8") for _ in "12"]  # noqa: SIM115
        else:
            files = [output.open("w+", encoding="utf-8")] * 2
        status, theirs = os.pipe()
        request = json.dumps([words[2:], str(cwd)]).encode()
        socket.send_fds(self._control, [request], [theirs, *(file.fileno() for file in files)])
        os.close(theirs)
        lines = os.fdopen(status)
        return ForkedProcess(int(lines.readline()), lines, *files)

    def call(self, words: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run a command line to its end and return its output."""
        process = self.start(words, cwd)
        try:
            shown = process.communicate(SECONDS)
        finally:
            process.kill()
        return subprocess.CompletedProcess(words, process.wait(), *shown)

    def close(self) -> None:
        """End the server, and the processes that a failed test has left (also if pytest dies)."""
        self._control.close()
        self._server.wait()


def serve(control: socket.socket) -> list[str]:
    """Fork a process for each request until the other end closes; return its words in the fork."""
    import torch

    for name in IMPORTED:
        importlib.import_module(name)
    if torch.version.cuda is None and importlib.util.find_spec("deepspeed") is not None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as `quiet_libraries` does
        importlib.import_module("deepspeed")  # accelerate does; it looks for a GPU
    gc.freeze()  # a fork's collections would copy every page
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server ends with its test run
    supervisors: set[int] = set()
    while True:
        request, files, _, _ = socket.recv_fds(control, 2**16, 3)
        if not request:
            for supervisor in supervisors:
                os.kill(supervisor, signal.SIGTERM)
            for supervisor in supervisors:
                os.waitpid(supervisor, 0)
            sys.exit()
        if (supervisor := os.fork()) == 0:
            control.close()
            words, cwd = json.loads(request)
            _fork_and_supervise(*files)
            os.chdir(cwd)
            return words
        supervisors.add(supervisor)
        for file in files:
            os.close(file)
        supervisors -= {ended for ended in supervisors if os.waitpid(ended, os.WNOHANG)[0]}


def _fork_and_supervise(status: int, stdout: int, stderr: int) -> None:
    """Return in a new process; this one reports its process id and its exit code, and ends."""
    if pid := os.fork():
        os.setpgid(pid, pid)  # here too, so that the group exists when it is reported
        signal.signal(signal.SIGTERM, lambda *_: os.killpg(pid, signal.SIGKILL))
        with suppress(BrokenPipeError):  # nobody waits any more
            os.write(status, b"%d\n" % pid)
            _, ended = os.waitpid(pid, 0)
            os.write(status, b"%d\n" % os.waitstatus_to_exitcode(ended))
        os._exit(0)
    os.close(status)
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)
    for number, file in enumerate((stdout, stderr), start=1):
        os.dup2(file, number)
    for file in {stdout, stderr}:
        os.close(file)


def run(words: list[str]) -> None:
    """Run a module with its arguments as `python -m` does, and end.

    The end takes down no modules: that would copy every page shared with the server.
    """
    sys.argv = words
    code: object = 0
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else code is not None)


if __name__ == "__main__":
    run(serve(socket.socket(fileno=0)))
