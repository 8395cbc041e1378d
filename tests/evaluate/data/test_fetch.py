"""Downloads from servers that break off, lie, stall and redirect: verified files or none."""

import gzip
import hashlib
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from selfcorrect.evaluate.data.catalogue import DataFile, DataSet
from selfcorrect.evaluate.data.fetch import fetch_set
from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from tests.support.file_server import SHA256, TEXT, Server, get, head, send_rest, start_of


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def failure(url: str, path: Path, **settings: Any) -> str:
    """Return the one-line error of a download that must fail and leave no file."""
    with pytest.raises(RunFailure) as caught:
        get(url, path, **settings)
    assert not path.exists()
    assert "\n" not in str(caught.value) and str(caught.value).startswith(url)
    return str(caught.value)


def test_download_with_progress_leaves_the_file_only(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve(lambda _, handler: send_rest(handler, TEXT))
    steps: list[tuple[str, int, int]] = []
    path = tmp_path / "deep" / "file.txt"
    get(server.url, path, progress=lambda *step: steps.append(step))
    assert path.read_bytes() == TEXT and left(path.parent) == ["file.txt"]
    assert steps[-1] == ("file.txt", len(TEXT), len(TEXT))
    assert [done for _, done, _ in steps] == sorted({done for _, done, _ in steps})
    get(server.url, path)  # what is there is not fetched again
    assert server.ranges == [None]
    assert server.headers[0]["Accept-Encoding"] == "identity"


def test_interrupted_download_resumes(serve: Callable[..., Server], tmp_path: Path) -> None:
    half = len(TEXT) // 2

    def answer(server: Server, handler: Any) -> None:
        send_rest(handler, TEXT, None if len(server.ranges) > 1 else half)

    server = serve(answer)
    path = tmp_path / "file.txt"
    get(server.url, path)
    assert path.read_bytes() == TEXT
    assert server.ranges == [None, f"bytes={half}-"]
    assert server.sent == [half, len(TEXT) - half]  # only the rest came the second time


def test_next_call_resumes_from_kept_data(serve: Callable[..., Server], tmp_path: Path) -> None:
    third = len(TEXT) // 3
    breaking = serve(lambda _, handler: send_rest(handler, TEXT, start_of(handler) + third))
    path = tmp_path / "file.txt"
    line = failure(breaking.url, path, attempts=1)
    assert "run the same command again" in line and f"{third:,} of {len(TEXT):,} bytes" in line
    failure(breaking.url, path, attempts=1)
    get(breaking.url, path, attempts=2)
    expected = [None, f"bytes={third}-", f"bytes={2 * third}-"]
    assert breaking.ranges == [*expected, f"bytes={3 * third}-"][: len(breaking.ranges)]
    assert path.read_bytes() == TEXT and left(tmp_path) == ["file.txt"]


def test_server_that_ignores_the_range_starts_over(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    def answer(server: Server, handler: Any) -> None:
        head(handler, 200, Content_Length=len(TEXT))
        handler.send(TEXT if len(server.ranges) > 1 else TEXT[:1000])

    server = serve(answer)
    get(server.url, tmp_path / "file.txt")
    assert (tmp_path / "file.txt").read_bytes() == TEXT
    assert server.ranges == [None, "bytes=1000-"]


@pytest.mark.parametrize("content_range", ["bytes 0-9/10", "bytes 5-479999/480000", "nonsense", ""])
def test_wrong_content_range_is_discarded(
    serve: Callable[..., Server], tmp_path: Path, content_range: str
) -> None:
    def answer(server: Server, handler: Any) -> None:
        if start_of(handler):
            head(handler, 206, Content_Range=content_range)
            handler.send(TEXT[5:])
        else:
            send_rest(handler, TEXT)

    (tmp_path / ".file.txt.part").write_bytes(TEXT[:1000])
    server = serve(answer)
    get(server.url, tmp_path / "file.txt")
    assert (tmp_path / "file.txt").read_bytes() == TEXT
    assert server.ranges == ["bytes=1000-", None]


def test_damaged_partial_file_is_discarded(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(lambda _, handler: send_rest(handler, TEXT))
    (tmp_path / ".file.txt.part").write_bytes(b"x" * 1000)
    get(server.url, tmp_path / "file.txt")
    assert (tmp_path / "file.txt").read_bytes() == TEXT
    assert server.ranges == ["bytes=1000-", None]


@pytest.mark.parametrize("too_much", [0, 7])
def test_complete_partial_file_needs_no_request_unless_wrong(
    serve: Callable[..., Server], tmp_path: Path, too_much: int
) -> None:
    server = serve(lambda _, handler: send_rest(handler, TEXT))
    (tmp_path / ".file.txt.part").write_bytes(TEXT + b"x" * too_much)
    get(server.url, tmp_path / "file.txt")
    assert (tmp_path / "file.txt").read_bytes() == TEXT
    assert server.ranges == ([None] if too_much else [])


def test_wrong_content_of_the_right_length_is_removed(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve(lambda _, handler: send_rest(handler, TEXT[:-1] + b"!"))
    line = failure(server.url, tmp_path / "file.txt")
    assert "checksum mismatch" in line
    assert not list(tmp_path.glob(".*.part")) and server.ranges == [None]


@pytest.mark.parametrize("stated", [10, len(TEXT) - 1, len(TEXT) + 1, 10**15])
def test_wrong_content_length_is_refused_before_writing(
    serve: Callable[..., Server], tmp_path: Path, stated: int
) -> None:
    def answer(_: Server, handler: Any) -> None:
        head(handler, 200, Content_Length=stated)
        handler.send(TEXT)

    line = failure(serve(answer).url, tmp_path / "file.txt")
    assert f"announces {stated:,} bytes, but the published file has {len(TEXT):,}" in line
    assert not list(tmp_path.glob(".*.part"))


def test_download_larger_than_published_is_stopped(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    def answer(_: Server, handler: Any) -> None:
        head(handler, 200)
        for _ in range(2000):  # a gigabyte, were nobody to hang up
            handler.send(TEXT)

    server = serve(answer)
    line = failure(server.url, tmp_path / "file.txt")
    assert f"sends more than the {len(TEXT):,} bytes" in line
    assert not list(tmp_path.glob(".*.part")) and len(server.ranges) == 1
    time.sleep(0.2)
    assert server.sent[0] < 40 * len(TEXT)  # what the sockets hold, not a gigabyte


def test_stalled_download_times_out_and_keeps_its_data(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    done = threading.Event()

    def answer(_: Server, handler: Any) -> None:
        head(handler, 200, Content_Length=len(TEXT))
        handler.send(TEXT[:1000])
        handler.wfile.flush()
        done.wait()

    server = serve(answer)
    line = failure(server.url, tmp_path / "file.txt", timeout_seconds=0.5, attempts=1)
    assert "no data for 0.5 seconds" in line and "1,000 of" in line
    assert (tmp_path / ".file.txt.part").read_bytes() == TEXT[:1000]
    line = failure(server.url, tmp_path / "file.txt", timeout_seconds=0.5, attempts=2)
    assert len(server.ranges) == 3  # as many attempts as were allowed
    done.set()


def test_silent_server_times_out(serve: Callable[..., Server], tmp_path: Path) -> None:
    done = threading.Event()
    server = serve(lambda _, handler: done.wait())
    line = failure(server.url, tmp_path / "file.txt", timeout_seconds=0.5, attempts=1)
    assert "no answer within 0.5 seconds" in line
    done.set()


def test_slow_drip_times_out(serve: Callable[..., Server], tmp_path: Path) -> None:
    def answer(_: Server, handler: Any) -> None:
        head(handler, 200, Content_Length=len(TEXT))
        for byte in itertools.cycle(TEXT[:200]):
            handler.send(bytes([byte]))
            time.sleep(0.05)

    server = serve(answer)
    line = failure(server.url, tmp_path / "file.txt", timeout_seconds=0.5, attempts=1)
    assert "too slow" in line


@pytest.mark.parametrize(
    ("status", "requests", "fragment"),
    [(404, 1, "answers 404"), (403, 1, "answers 403"), (503, 3, "answers 503"), (204, 1, "204")],
)
def test_http_errors_are_one_line(
    serve: Callable[..., Server], tmp_path: Path, status: int, requests: int, fragment: str
) -> None:
    server = serve(lambda _, handler: head(handler, status, Content_Length=0))
    line = failure(server.url, tmp_path / "file.txt")
    assert fragment in line and len(server.ranges) == requests


def test_recovering_server_is_asked_again(serve: Callable[..., Server], tmp_path: Path) -> None:
    def answer(server: Server, handler: Any) -> None:
        if len(server.ranges) < 3:
            head(handler, 503 if len(server.ranges) == 1 else 416)
        else:
            send_rest(handler, TEXT)

    server = serve(answer)
    (tmp_path / ".file.txt.part").write_bytes(TEXT[:10])
    get(server.url, tmp_path / "file.txt")
    assert (tmp_path / "file.txt").read_bytes() == TEXT
    assert server.ranges == ["bytes=10-", "bytes=10-", None]  # 416: what is here was no beginning


def test_refused_connection_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/file.txt"
    assert "no connection (Connection refused)" in failure(url, tmp_path / "file.txt")


@pytest.mark.parametrize(
    "goal", ["file:///etc/passwd", "http://example.org/file.txt", "ftp://example.org/file.txt"]
)
def test_redirects_other_than_https_are_refused(
    serve: Callable[..., Server], tmp_path: Path, goal: str
) -> None:
    server = serve(lambda _, handler: head(handler, 302, Location=goal))
    line = failure(server.url, tmp_path / "file.txt")
    assert "redirects to a refused URL" in line and len(server.ranges) == 1


def test_https_never_redirects_to_this_machine() -> None:
    import email.message
    import urllib.error
    import urllib.request

    from selfcorrect.evaluate.data.fetch import _SafeRedirects

    def redirect(origin: str, goal: str) -> object:
        request = urllib.request.Request(origin)
        handler = _SafeRedirects(origin)
        return handler.redirect_request(request, None, 302, "", email.message.Message(), goal)  # type: ignore[arg-type]

    assert redirect("https://example.org/a", "https://elsewhere.org/a")
    assert redirect("http://localhost/a", "http://127.0.0.1/a")
    with pytest.raises(urllib.error.HTTPError):
        redirect("https://example.org/a", "http://localhost/a")


def test_redirect_keeps_the_range(serve: Callable[..., Server], tmp_path: Path) -> None:
    goal = serve(lambda _, handler: send_rest(handler, TEXT))
    first = serve(lambda _, handler: head(handler, 302, Location=goal.url))
    (tmp_path / ".file.txt.part").write_bytes(TEXT[:100])
    get(first.url, tmp_path / "file.txt")
    assert goal.ranges == ["bytes=100-"] and goal.sent == [len(TEXT) - 100]


@pytest.mark.parametrize("url", ["http://example.org/a", "file:///etc/passwd", "/etc/passwd", "a"])
def test_only_https_and_this_machine_are_allowed(tmp_path: Path, url: str) -> None:
    assert "only https:// URLs are downloaded" in failure(url, tmp_path / "file.txt")


@pytest.mark.parametrize("breaks", [False, True])
def test_unrequested_gzip_encoding_is_decoded(
    serve: Callable[..., Server], tmp_path: Path, breaks: bool
) -> None:
    packed = gzip.compress(TEXT)

    def answer(server: Server, handler: Any) -> None:
        if start_of(handler):
            head(handler, 206, Content_Encoding="gzip", Content_Range="bytes 1-2/3")
            return
        head(handler, 200, Content_Encoding="gzip", Content_Length=len(packed))
        handler.send(packed[: 5000 if breaks and len(server.ranges) == 1 else None])

    server = serve(answer)
    get(server.url, tmp_path / "file.txt")
    assert (tmp_path / "file.txt").read_bytes() == TEXT
    assert len(server.ranges) == (3 if breaks else 1)


def test_gzip_bomb_stops_at_the_published_size(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    bomb = gzip.compress(b"\0" * 200_000_000, 9)

    def answer(_: Server, handler: Any) -> None:
        head(handler, 200, Content_Encoding="gzip", Content_Length=len(bomb))
        handler.send(bomb)

    line = failure(serve(answer).url, tmp_path / "file.txt")
    assert "sends more than" in line and not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize("encoding", ["br", "gzip"])
def test_unsupported_encoding_is_one_line(
    serve: Callable[..., Server], tmp_path: Path, encoding: str
) -> None:
    def answer(_: Server, handler: Any) -> None:
        head(handler, 200, Content_Encoding=encoding, Content_Length=len(TEXT))
        handler.send(TEXT)

    line = failure(serve(answer).url, tmp_path / "file.txt")
    assert ("unsupported encoding br" if encoding == "br" else "claims to be gzip") in line


def test_published_gzip_file_is_not_decoded(serve: Callable[..., Server], tmp_path: Path) -> None:
    packed = gzip.compress(TEXT)

    def answer(_: Server, handler: Any) -> None:
        head(handler, 200, Content_Encoding="gzip", Content_Length=len(packed))
        handler.send(packed)

    sha256 = hashlib.sha256(packed).hexdigest()
    path = tmp_path / "file.txt.gz"
    get(serve(answer).url, path, num_bytes=len(packed), sha256=sha256)
    assert path.read_bytes() == packed


def test_concurrent_processes_download_a_file_once(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    def answer(_: Server, handler: Any) -> None:
        head(handler, 200, Content_Length=len(TEXT))
        for start in range(0, len(TEXT), len(TEXT) // 10):
            handler.send(TEXT[start : start + len(TEXT) // 10])
            time.sleep(0.05)

    server = serve(answer)
    path = tmp_path / "file.txt"
    code = (
        "from pathlib import Path; from selfcorrect.evaluate.data.fetch import fetch_file; "
        f"fetch_file({server.url!r}, Path({str(path)!r}), num_bytes={len(TEXT)}, "
        f"sha256={SHA256!r}, attempts=1)"
    )
    environment = {**os.environ, "no_proxy": "*"}
    runs = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [run.wait(900) for run in runs] == [0, 0, 0]
    assert path.read_bytes() == TEXT and len(server.ranges) == 1
    assert left(tmp_path) == ["file.txt"]


def test_killed_download_does_not_block_the_next(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    def answer(server: Server, handler: Any) -> None:
        if len(server.ranges) > 1:
            send_rest(handler, TEXT)
            return
        head(handler, 200, Content_Length=len(TEXT))
        handler.send(TEXT[:100_000])
        handler.wfile.flush()
        time.sleep(20)

    server = serve(answer)
    path = tmp_path / "file.txt"
    code = (
        "from pathlib import Path; from selfcorrect.evaluate.data.fetch import fetch_file; "
        f"fetch_file({server.url!r}, Path({str(path)!r}), num_bytes={len(TEXT)}, sha256={SHA256!r})"
    )
    run = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "no_proxy": "*"})
    part = tmp_path / ".file.txt.part"
    deadline = time.monotonic() + 900
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    run.kill()
    run.wait()
    here = part.stat().st_size
    get(server.url, path)
    assert path.read_bytes() == TEXT and server.ranges[1] == f"bytes={here}-" and here > 0


# --- whole data sets ---------------------------------------------------------------------------


def data_set(server: Server, *texts: bytes, packed: bool = False) -> DataSet:
    files = []
    for number, text in enumerate(texts):
        entry: dict[str, Any] = {
            "path": f"small/{number}.jsonl",
            "from": f"data/{number}.jsonl",
            "bytes": len(text),
            "sha256": hashlib.sha256(text).hexdigest(),
            "rows": text.count(b"\n"),
        }
        if packed:
            body = gzip.compress(text, mtime=0)
            digest = hashlib.sha256(body).hexdigest()
            entry["packed"] = {"bytes": len(body), "sha256": digest}
        files.append(DataFile.model_validate(entry))
    return DataSet(
        title="Small",
        kind="benchmark",
        licence="MIT",
        citation="Nobody (2026). Small.",
        homepage="https://example.org",
        revision="0" * 40,
        source=server.url.removesuffix("file.txt") + "{revision}/",
        rows=sum(text.count(b"\n") for text in texts),
        files=tuple(files),
    )


TEXTS = (b'{"a": 1}\n', b'{"a": 2}\n{"a": 3}\n')


def by_path(_: Server, handler: Any) -> None:
    revision, folder, name = handler.path.strip("/").split("/")
    assert (revision, folder) == ("0" * 40, "data")
    send_rest(handler, TEXTS[int(name.split(".")[0])])


def test_data_set_is_fetched_once_and_packed_copies_count(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve(by_path)
    small = data_set(server, *TEXTS)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "0.jsonl.gz").write_bytes(gzip.compress(TEXTS[0]))
    steps: list[tuple[str, int, int]] = []
    new = fetch_set(small, tmp_path, progress=lambda *step: steps.append(step))
    assert new == [tmp_path / "small" / "1.jsonl"]
    assert steps[-1] == ("small/1.jsonl", len(TEXTS[1]), len(TEXTS[1]))
    assert fetch_set(small, tmp_path) == [] and len(server.ranges) == 1
    assert left(tmp_path / "small") == ["0.jsonl.gz", "1.jsonl"]


def test_file_published_packed_is_kept_packed(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(lambda _, handler: send_rest(handler, gzip.compress(TEXTS[1], mtime=0)))
    small = data_set(server, TEXTS[1], packed=True)
    assert fetch_set(small, tmp_path) == [tmp_path / "small" / "0.jsonl.gz"]
    assert fetch_set(small, tmp_path) == []


def test_different_file_is_never_overwritten(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(by_path)
    different = tmp_path / "small" / "1.jsonl"
    different.parent.mkdir()
    different.write_text("my own\n")
    with pytest.raises(InputError, match=r"1\.jsonl: not the published file .*move it away"):
        fetch_set(data_set(server, *TEXTS), tmp_path)
    assert different.read_text() == "my own\n" and server.ranges == []


def test_missing_file_does_not_prevent_the_others(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    def answer(server: Server, handler: Any) -> None:
        if handler.path.endswith("0.jsonl"):
            head(handler, 404)
        else:
            by_path(server, handler)

    small = data_set(serve(answer), *TEXTS)
    with pytest.raises(RunFailure, match=r"0\.jsonl: the server answers 404"):
        fetch_set(small, tmp_path)
    assert (tmp_path / "small" / "1.jsonl").read_bytes() == TEXTS[1]
