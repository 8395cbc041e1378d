"""Download published files: interrupted downloads resume, and only verified files appear.

Data go into a hidden .part file beside the target, which is renamed once its digest is that of the
catalogue. Since the digest decides, no server header is trusted: the worst that a wrong header can
do is make the download start over.
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

from selfcorrect.evaluate.data.catalogue import LOCAL_HOSTS, DataSet, check_set, is_allowed
from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from selfcorrect.recipes.foundation.progress import Progress, no_progress

CHUNK_BYTES = 64 * 1024
SLOWEST_BYTES_PER_SECOND = 1024
TRANSIENT_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})  # worth another attempt


class Unreachable(RunFailure):
    """The source cannot be reached after all attempts, so other files will fail as well."""


class _TransientFault(Exception):
    """A fault of the connection or the server that another attempt may not meet."""


def fetch_set(
    data_set: DataSet,
    data_dir: Path,
    *,
    timeout_seconds: float = 30.0,
    progress: Progress = no_progress,
) -> list[Path]:
    """Download the files of a data set that `data_dir` lacks; return the new ones.

    `progress` is called with (path in the catalogue, bytes done, bytes in total). A file that is
    right, plain or with .gz appended to its name, is kept. Raises InputError if a different file
    has the name of a published one, Unreachable if the source cannot be reached, and RunFailure,
    after the other files have been tried, if a file cannot be downloaded.
    """
    findings = check_set(data_set, data_dir)
    for finding in findings:
        if finding.state == "different":
            raise InputError(
                f"{finding.path}: not the published file ({finding.reason}); move it away and "
                "fetch again"
            )
    downloaded: list[Path] = []
    failures: list[RunFailure] = []
    for finding in findings:
        if finding.state == "right":
            continue
        file = finding.file
        path = data_dir / file.download_path
        published = file.packed or file
        try:
            fetch_file(
                data_set.url(file),
                path,
                num_bytes=published.bytes,
                sha256=published.sha256,
                timeout_seconds=timeout_seconds,
                progress=progress,
                stage=file.path,
            )
            downloaded.append(path)
        except Unreachable:
            raise
        except RunFailure as failure:
            failures.append(failure)
    if failures:
        more = f" (and {len(failures) - 1} more of this set)" if len(failures) > 1 else ""
        raise RunFailure(f"{failures[0]}{more}")
    return downloaded


def fetch_file(
    url: str,
    path: Path,
    *,
    num_bytes: int,
    sha256: str,
    timeout_seconds: float = 30.0,
    attempts: int = 5,
    pause_seconds: float = 1.0,
    progress: Progress = no_progress,
    stage: str = "",
) -> None:
    """Download one file of known length and digest to `path`.

    `timeout_seconds` bounds the silence of the server, and is the window over which at least 1 KiB
    a second must arrive. The pause before another attempt doubles each time. A second process that
    downloads the same file waits for the first one. `progress` is called with (stage, bytes done,
    bytes in total). Raises RunFailure in one line; received data are kept for the next call, unless
    they are wrong.
    """
    if not is_allowed(url):
        raise RunFailure(f"{url}: refused; only https:// URLs are downloaded")
    part = path.with_name(f".{path.name}.part")
    if part.is_dir():
        raise RunFailure(f"{part}: a folder blocks this download's temporary file; move it away")
    with _exclusive(path):
        if path.exists():  # downloaded by another process
            return
        fault = "no attempt was made"
        for attempt in range(attempts):
            if attempt:
                time.sleep(pause_seconds * 2 ** (attempt - 1))
            resumed = part.exists()
            try:
                _download(
                    url, part, num_bytes, timeout_seconds, partial(progress, stage or path.name)
                )
            except _TransientFault as error:
                fault = str(error)
                continue
            if _digest(part) == sha256:
                part.replace(path)
                return
            part.unlink()
            fault = "the data are not the published file (checksum mismatch) and were removed"
            if not resumed:  # otherwise the older data may be at fault: try once more
                raise RunFailure(f"{url}: {fault}")
        kept = part.stat().st_size if part.exists() else 0
        state = f"{kept:,} of {num_bytes:,} bytes are kept; run the same command again to resume"
        raise Unreachable(f"{url}: {fault}; {state}")


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold a lock on `path`, waiting for other processes that hold it."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    with lock.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
        # Only after success: processes that wait on this lock or make a new one find the file.
        lock.unlink(missing_ok=True)


def _download(
    url: str,
    part: Path,
    num_bytes: int,
    timeout_seconds: float,
    progress: Callable[[int, int], None],
) -> None:
    """Complete `part` to `num_bytes` with one request."""
    here = part.stat().st_size if part.exists() else 0
    if here == num_bytes:
        return
    if here > num_bytes:
        part.unlink()
        here = 0
    with _request(url, here, num_bytes, part, timeout_seconds) as response:
        if response.status != 206:  # the server ignores the range and sends all
            here = 0
        decoder = _decoder(response, url, part)
        if decoder is None:
            _check_length(response, here, num_bytes, url)
        with part.open("ab" if here else "wb") as handle:
            for chunk in _chunks(response, timeout_seconds):
                data = _unpacked(decoder, chunk, num_bytes + 1) if decoder else chunk
                here += len(data)
                if here > num_bytes:
                    break
                handle.write(data)
                progress(here, num_bytes)
            handle.flush()
            os.fsync(handle.fileno())
    if here > num_bytes:
        part.unlink()
        raise RunFailure(f"{url}: sends more than the {num_bytes:,} bytes of the published file")
    if here < num_bytes:
        raise _TransientFault(f"connection closed after {here:,} bytes")


def _request(
    url: str, here: int, num_bytes: int, part: Path, timeout_seconds: float
) -> http.client.HTTPResponse:
    """Return the server's response, from byte `here` on if the server supports ranges."""
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
    content_range = rf"bytes {here}-{num_bytes - 1}/({num_bytes}|\*)"
    if response.status == 206 and not re.fullmatch(
        content_range, response.headers.get("Content-Range", "")
    ):
        response.close()
        part.unlink(missing_ok=True)
        raise _TransientFault("the server sent a different range than requested")
    if response.status not in (200, 206):
        response.close()
        raise RunFailure(f"{url}: the server answers {response.status} {response.reason}")
    return response


def _http_fault(error: urllib.error.HTTPError, url: str, part: Path) -> Exception:
    if error.code == 416:  # the kept data are not a prefix of the server's file
        part.unlink(missing_ok=True)
        return _TransientFault("the server refuses to resume from the kept data")
    if 300 <= error.code < 400:
        return RunFailure(f"{url}: redirects to a refused URL ({error.reason})")
    if error.code in TRANSIENT_STATUSES:
        return _TransientFault(f"the server answers {error.code} {error.reason}")
    return RunFailure(
        f"{url}: the server answers {error.code} {error.reason}; if you have the "
        "file, copy it into the data folder"
    )


def _connection_fault(error: Exception, url: str, timeout_seconds: float) -> Exception:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, ssl.SSLCertVerificationError):
        return RunFailure(
            f"{url}: cannot verify its certificate ({reason.verify_message}); set SSL_CERT_FILE to "
            "the file of trusted certificates"
        )
    if isinstance(reason, TimeoutError):
        return _TransientFault(f"no answer within {timeout_seconds:g} seconds")
    return _TransientFault(f"no connection ({getattr(reason, 'strerror', None) or reason})")


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects to https only; from this machine, also to this machine."""

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
    """Return a decoder if the server compresses the response although asked not to, else None.

    A published .gz file is not decoded: its bytes are gzip to begin with.
    """
    encoding = response.headers.get("Content-Encoding", "identity").lower()
    if encoding == "identity" or part.name.endswith(".gz.part"):
        return None
    if encoding not in ("gzip", "x-gzip"):
        raise RunFailure(
            f"{url}: the server sends unsupported encoding {encoding}; copy the file by hand"
        )
    if response.status == 206:  # a range of compressed bytes cannot be decoded
        part.unlink(missing_ok=True)
        raise _TransientFault("the server compresses its response")
    return zlib.decompressobj(wbits=31)


def _unpacked(decoder: Any, chunk: bytes, at_most: int) -> bytes:
    try:
        data: bytes = decoder.decompress(chunk, at_most)
    except zlib.error:
        raise _TransientFault("the response claims to be gzip but is not") from None
    return data


def _check_length(response: http.client.HTTPResponse, here: int, num_bytes: int, url: str) -> None:
    stated = response.headers.get("Content-Length", "")
    if stated.isdecimal() and here + int(stated) != num_bytes:
        raise RunFailure(
            f"{url}: the server announces {here + int(stated):,} bytes, but the published file has "
            f"{num_bytes:,}"
        )


def _chunks(response: http.client.HTTPResponse, timeout_seconds: float) -> Iterator[bytes]:
    """Yield the body in chunks; _TransientFault if it stalls, drips or breaks off."""
    since, arrived = time.monotonic(), 0
    while True:
        try:
            chunk = response.read1(CHUNK_BYTES)
        except TimeoutError:
            raise _TransientFault(f"no data for {timeout_seconds:g} seconds") from None
        except (OSError, http.client.HTTPException) as error:
            raise _TransientFault(
                f"connection broke off ({str(error) or type(error).__name__})"
            ) from None
        if not chunk:
            return
        yield chunk
        arrived += len(chunk)
        elapsed = time.monotonic() - since
        if elapsed > timeout_seconds:
            if arrived < SLOWEST_BYTES_PER_SECOND * elapsed:
                raise _TransientFault(f"too slow: {arrived:,} bytes in {elapsed:.0f} seconds")
            since, arrived = time.monotonic(), 0


def _digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
