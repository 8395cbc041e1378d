"""Checksums in files and of files, so that damage is noticed before a file is used.

A file that this package writes (JSON, YAML, parquet) holds `selfcorrect-checksum:` and the SHA-256
of its own bytes, computed with these 64 digits as zeros. File and checksum appear in one rename,
and a copy keeps both. Files without a checksum (older versions, written by hand) are accepted.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from selfcorrect.recipes.foundation.atomic_files import write_text
from selfcorrect.recipes.foundation.errors import InputError

MARK = "selfcorrect-checksum:"
_MARKS = (MARK.encode(), b"selfcorrect-seal:")  # the second one in files of earlier versions
CHECKSUM_PLACEHOLDER = MARK + "0" * 64  # written first, then overwritten by the checksum
_HEAD = 400  # bytes of a text file that may hold its checksum


def insert_checksum(data: bytes) -> bytes:
    """Return the bytes with their checksum in place of `CHECKSUM_PLACEHOLDER`."""
    start = _digits_start(data)
    if start is None:
        raise ValueError("CHECKSUM_PLACEHOLDER is missing")
    return data[:start] + _digest_around(data, start) + data[start + 64 :]


def insert_file_checksum(path: Path) -> None:
    """Replace `CHECKSUM_PLACEHOLDER` in a file, without loading the file into memory."""
    with path.open("r+b") as handle, mmap(handle.fileno(), 0) as data:
        start = _digits_start(data)
        if start is None:
            raise ValueError(f"{path}: CHECKSUM_PLACEHOLDER is missing")
        data[start : start + 64] = _digest_around(data, start)


def has_valid_checksum(data: bytes | mmap) -> bool:
    """Return whether the bytes match the checksum that they hold; True if they hold none."""
    start = _digits_start(data)
    return start is None or data[start : start + 64] == _digest_around(data, start)


def file_has_valid_checksum(path: Path) -> bool:
    """Return `has_valid_checksum` of a file, without loading it into memory; may raise OSError."""
    with path.open("rb") as handle:
        if not os.fstat(handle.fileno()).st_size:
            return True
        with mmap(handle.fileno(), 0, access=ACCESS_READ) as data:
            return has_valid_checksum(data)


def _digits_start(data: bytes | mmap) -> int | None:
    """Return where the 64 digits begin: in the footer of a parquet file, in the head of others."""
    starts = [0]
    if is_parquet := data[:4] == b"PAR1":
        # To search backwards through all is slow, but a damaged length must not hide the checksum.
        length = int.from_bytes(data[-8:-4], "little")
        starts = [max(0, len(data) - 8 - length), 0]
    for start in starts:
        for mark in _MARKS:
            at = data.rfind(mark, start) if is_parquet else data.find(mark, 0, _HEAD)
            if at >= 0:
                return at + len(mark)
    return None


def _digest_around(data: bytes | mmap, start: int) -> bytes:
    with memoryview(data) as view:
        digest = hashlib.sha256(view[:start])
        digest.update(b"0" * 64)
        digest.update(view[start + 64 :])
    return digest.hexdigest().encode()


# --- records ------------------------------------------------------------------------------------


def write_record(path: Path, facts: Mapping[str, Any]) -> None:
    """Write `facts` as indented JSON with a checksum; ValueError for NaN and infinity."""
    record = {"checksum": CHECKSUM_PLACEHOLDER, **facts}
    text = json.dumps(record, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_text(path, insert_checksum(text.encode()).decode())


def read_record(path: Path, remedy: str) -> dict[str, Any]:
    """Return the facts of a JSON record, without its checksum.

    Raises InputError, with `remedy`, if it cannot be read or its checksum does not match, and
    FileNotFoundError if it does not exist.
    """
    try:
        data = path.read_bytes()
        record = from_json(data) if has_valid_checksum(data) else None
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except ValueError:
        raise InputError(f"{path}: not readable as JSON (damaged?); {remedy}") from None
    if not isinstance(record, dict):
        raise InputError(f"{path}: damaged (checksum mismatch); {remedy}")
    return without_checksum(record)


def without_checksum(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a record's facts without its checksum."""
    return {key: value for key, value in facts.items() if key not in ("checksum", "seal")}


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, text) of every value in a nested record: {"a": {"b": 1}} -> ("a.b", "1").

    A list of plain values is one text, a list of records has an index a key, null is "–".
    """
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from flatten(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(inner, dict | list) for inner in value):
        for index, inner in enumerate(value):
            yield from flatten(inner, f"{path}[{index}]")
    elif path:
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        yield path, "–" if shown is None else str(shown)


# --- files beside a record ----------------------------------------------------------------------

_digests: dict[tuple[str, int, int, int], str] = {}  # one base serves all adapters of a run


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file; cached while its time, size and inode stay the same."""
    stat = path.stat()
    key = (str(path.resolve()), stat.st_mtime_ns, stat.st_size, stat.st_ino)
    if key not in _digests:
        with path.open("rb") as handle:
            _digests[key] = hashlib.file_digest(handle, "sha256").hexdigest()
    return _digests[key]


def digests(folder: Path, but: Iterable[str] = ()) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder by relative path, except those in `but`."""
    return {
        name: file_digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (name := path.relative_to(folder).as_posix()) not in but
    }


def check_files(folder: Path, files: Any, remedy: str) -> None:
    """Raise InputError, with `remedy`, for the first file whose SHA-256 is not that in `files`."""
    if not isinstance(files, dict):
        raise InputError(f"{folder}: its record lists no files; {remedy}")
    for name, digest in files.items():
        path = folder / name
        try:
            is_same = file_digest(path) == digest
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
        if not is_same:
            raise InputError(f"{path}: damaged or replaced since it was saved; {remedy}")
