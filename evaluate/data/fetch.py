"""Downloads of published files: resumed where they broke off, and whole and right or not at all.

What arrives goes into a hidden .part file beside its place and is renamed once its digest is the
catalogue's. The digest is what decides, so no header of a server is ever trusted: the worst a wrong
one does is that the download starts over.
"""

import hashlib
import http.client
import os
import re
import ssl
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from selfcorrect.evaluate.data.catalogue import LOCAL_HOSTS, DataSet, check_file, is_allowed
from selfcorrect.recipes.foundation.errors import InputError, RunFailure

Progress = Callable[[int, int], None]  # bytes that are here, bytes there will be
CHUNK_BYTES = 64 * 1024
SLOWEST_BYTES_PER_SECOND = 1024
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})  # worth another attempt


class Unreachable(RunFailure):
    """Every attempt failed on the way: there is little point in asking for more at once."""


class _Passing(Exception):
    """A fault of the connection or of the server that the next attempt may not meet."""


def fetch_set(
    data_set: DataSet,
    data_dir: Path,
    *,
    timeout_seconds: float = 30.0,
    attempts: int = 5,
    pause_seconds: float = 1.0,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Path]:
    """Download the files of a data set that `data_dir` lacks; returns the new ones.

    `progress` is told the file's path in the catalogue, the bytes that are here, and all of them. A
    file that is there and right, plain or with .gz behind its name, is left as it is. Raises
    InputError where another file stands in the place of one; Unreachable where the source cannot be
    reached; and RunFailure, after the other files were tried, where a file cannot be had.
    """
    findings = [check_file(file, data_dir) for file in data_set.files]
    for finding in findings:
        if finding.state == "different":
            raise InputError(
                f"{finding.path}: not the published file ({finding.reason}); move it away, then "
                "fetch again"
            )
    new: list[Path] = []
    failures: list[RunFailure] = []
    for finding in findings:
        if finding.state == "right":
            continue
        file = finding.file
        path = data_dir / file.download_path
        try:
            fetch_file(
                data_set.url(file),
                path,
                num_bytes=file.packed.bytes if file.packed else file.bytes,
                sha256=file.packed.sha256 if file.packed else file.sha256,
                timeout_seconds=timeout_seconds,
                attempts=attempts,
                pause_seconds=pause_seconds,
                progress=partial(progress, file.path) if progress else None,
            )
            new.append(path)
        except Unreachable:
            raise
        except RunFailure as failure:
            failures.append(failure)
    if failures:
        more = f" (and {len(failures) - 1} more of this set)" if len(failures) > 1 else ""
        raise RunFailure(f"{failures[0]}{more}")
    return new


def fetch_file(
    url: str,
    path: Path,
    *,
    num_bytes: int,
    sha256: str,
    timeout_seconds: float = 30.0,
    attempts: int = 5,
    pause_seconds: float = 1.0,
    progress: Progress | None = None,
) -> None:
    """Download one file of known length and digest to `path`.

    `timeout_seconds` is the longest silence, and the window in which at least 1 KiB a second must
    come; the pause before another attempt doubles each time. A second process that wants the same
    file waits for the first and then finds it there. Raises RunFailure in one line; what arrived is
    kept for the next time, unless it is wrong.
    """
    if not is_allowed(url):
        raise RunFailure(f"{url}: refused; only addresses that begin with https:// are fetched")
    part = path.with_name(f".{path.name}.part")
    if part.is_dir():
        raise RunFailure(f"{part}: a folder, where a download is kept meanwhile; move it away")
    with _one_at_a_time(path):
        if path.exists():  # another process was faster
            return
        fault = "no attempt was made"
        for attempt in range(attempts):
            if attempt:
                time.sleep(pause_seconds * 2 ** (attempt - 1))
            resumed = part.exists()
            try:
                _download(url, part, num_bytes, timeout_seconds, progress)
            except _Passing as error:
                fault = str(error)
                continue
            if _digest(part) == sha256:
                part.replace(path)
                return
            part.unlink()
            fault = "what arrived is not the published file (another checksum); it was removed"
            if not resumed:  # otherwise the old beginning may be what was wrong
                raise RunFailure(f"{url}: {fault}")
        kept = part.stat().st_size if part.exists() else 0
        state = f"{kept:,} of {num_bytes:,} bytes are here; run the same command again to go on"
        raise Unreachable(f"{url}: {fault}; {state}")


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Wait until no other process is at work on `path`, and keep others out meanwhile."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    with lock.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
        # Only after success: whoever waits on this lock, or makes a new one, then finds the file.
        lock.unlink(missing_ok=True)


def _download(
    url: str, part: Path, num_bytes: int, timeout_seconds: float, progress: Progress | None
) -> None:
    """Bring `part` from what it holds to `num_bytes` with one request."""
    here = part.stat().st_size if part.exists() else 0
    if here == num_bytes:
        return
    if here > num_bytes:
        part.unlink()
        here = 0
    with _request(url, here, num_bytes, part, timeout_seconds) as response:
        if response.status != 206:  # the server begins at the beginning, whatever it was asked
            here = 0
        decoder = _decoder(response, url, part)
        if decoder is None:
            _refuse_other_length(response, here, num_bytes, url)
        with part.open("ab" if here else "wb") as handle:
            for chunk in _chunks(response, timeout_seconds):
                data = _unpacked(decoder, chunk, num_bytes + 1) if decoder else chunk
                here += len(data)
                if here > num_bytes:
                    break
                handle.write(data)
                if progress is not None:
                    progress(here, num_bytes)
            handle.flush()
            os.fsync(handle.fileno())
    if here > num_bytes:
        part.unlink()
        raise RunFailure(f"{url}: sends more than the {num_bytes:,} bytes of the published file")
    if here < num_bytes:
        raise _Passing(f"broke off after {here:,} bytes")


def _request(
    url: str, here: int, num_bytes: int, part: Path, timeout_seconds: float
) -> http.client.HTTPResponse:
    """The server's answer, from byte `here` on where it grants that."""
    headers = {"Accept-Encoding": "identity", "User-Agent": "selfcorrect"}
    if here:
        headers["Range"] = f"bytes={here}-"
    opener = urllib.request.build_opener(_SafeRedirects(url))
    try:
        response: http.client.HTTPResponse = opener.open(
            urllib.request.Request(url, headers=headers), timeout=timeout_seconds
        )
    except urllib.error.HTTPError as error:
        error.close()
        raise _http_fault(error, url, part) from None
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        raise _connection_fault(error, url, timeout_seconds) from None
    granted = rf"bytes {here}-{num_bytes - 1}/({num_bytes}|\*)"
    if response.status == 206 and not re.fullmatch(
        granted, response.headers.get("Content-Range", "")
    ):
        response.close()
        part.unlink(missing_ok=True)
        raise _Passing("the server sends another part than it was asked for")
    if response.status not in (200, 206):
        response.close()
        raise RunFailure(f"{url}: the server answers {response.status} {response.reason}")
    return response


def _http_fault(error: urllib.error.HTTPError, url: str, part: Path) -> Exception:
    if error.code == 416:  # what is here is no beginning of what is there
        part.unlink(missing_ok=True)
        return _Passing("the server refuses to go on from what is here")
    if 300 <= error.code < 400:
        return RunFailure(f"{url}: redirects to a place that is refused ({error.reason})")
    if error.code in PASSING:
        return _Passing(f"the server answers {error.code} {error.reason}")
    return RunFailure(
        f"{url}: the server answers {error.code} {error.reason}; put the file into the data folder "
        "by hand where you have it"
    )


def _connection_fault(error: Exception, url: str, timeout_seconds: float) -> Exception:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, ssl.SSLCertVerificationError):
        return RunFailure(
            f"{url}: its certificate cannot be verified ({reason.verify_message}); SSL_CERT_FILE "
            "names the certificates that are trusted"
        )
    if isinstance(reason, TimeoutError):
        return _Passing(f"no answer within {timeout_seconds:g} seconds")
    return _Passing(f"no connection ({getattr(reason, 'strerror', None) or reason})")


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https alone; from this very machine, also to this very machine."""

    def __init__(self, url: str) -> None:
        self.local = urlsplit(url).hostname in LOCAL_HOSTS

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str,
        headers: http.client.HTTPMessage, newurl: str,
    ) -> urllib.request.Request | None:  # fmt: skip
        parts = urlsplit(newurl)
        if not is_allowed(newurl) or (parts.scheme == "http" and not self.local):
            raise urllib.error.HTTPError(newurl, code, f"{newurl}: not https", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _decoder(response: http.client.HTTPResponse, url: str, part: Path) -> Any:
    """What unpacks the answer of a server that packs though it was asked not to; None otherwise.

    A .gz file is taken as it comes: that its bytes are gzip is no packing by the server.
    """
    encoding = response.headers.get("Content-Encoding", "identity").lower()
    if encoding == "identity" or part.name.endswith(".gz.part"):
        return None
    if encoding not in ("gzip", "x-gzip"):
        raise RunFailure(f"{url}: the server sends the file packed as {encoding}")
    if response.status == 206:  # a part of the packed bytes is of no use
        part.unlink(missing_ok=True)
        raise _Passing("the server packs what it sends")
    return zlib.decompressobj(wbits=31)


def _unpacked(decoder: Any, chunk: bytes, at_most: int) -> bytes:
    try:
        data: bytes = decoder.decompress(chunk, at_most)
    except zlib.error:
        raise _Passing("what arrives is said to be gzip and is not") from None
    return data


def _refuse_other_length(
    response: http.client.HTTPResponse, here: int, num_bytes: int, url: str
) -> None:
    stated = response.headers.get("Content-Length", "")
    if stated.isdecimal() and here + int(stated) != num_bytes:
        raise RunFailure(
            f"{url}: the server states {here + int(stated):,} bytes, the published file has "
            f"{num_bytes:,}"
        )


def _chunks(response: http.client.HTTPResponse, timeout_seconds: float) -> Iterator[bytes]:
    """The body as it arrives; _Passing where it stalls, drips, or breaks."""
    since, arrived = time.monotonic(), 0
    while True:
        try:
            chunk = response.read1(CHUNK_BYTES)
        except TimeoutError:
            raise _Passing(f"nothing came for {timeout_seconds:g} seconds") from None
        except (OSError, http.client.HTTPException) as error:
            raise _Passing(f"broke off ({str(error) or type(error).__name__})") from None
        if not chunk:
            return
        yield chunk
        arrived += len(chunk)
        elapsed = time.monotonic() - since
        if elapsed > timeout_seconds:
            if arrived < SLOWEST_BYTES_PER_SECOND * elapsed:
                raise _Passing(f"{arrived:,} bytes in {elapsed:.0f} seconds are too few")
            since, arrived = time.monotonic(), 0


def _digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
