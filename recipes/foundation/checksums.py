"""Is a file as it was written? Records hold a digest of themselves, and of files beside them.

A sealed file (JSON, YAML, parquet) holds `selfcorrect-seal:` and the SHA-256 of its own bytes, in
which these 64 digits are zeros. So file and digest appear in one rename, and a copy keeps both.
Files without a seal, of older versions or written by hand, are taken as they are.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from selfcorrect.recipes.foundation.atomic_files import write_text
from selfcorrect.recipes.foundation.errors import InputError

MARK = "selfcorrect-seal:"
UNSEALED = MARK + "0" * 64  # what stands in a file until it is sealed
_HEAD = 400  # bytes of a text file in which its seal stands


def sealed(data: bytes) -> bytes:
    """The bytes with the digest put into the place that `UNSEALED` keeps."""
    place = _place(data)
    if place is None:
        raise ValueError("nothing to seal: UNSEALED is not in there")
    return data[:place] + _digest_around(data, place) + data[place + 64 :]


def seal(path: Path) -> None:
    """Seal a file that holds `UNSEALED`, before it takes its name; it is not held in memory."""
    with path.open("r+b") as handle, mmap(handle.fileno(), 0) as data:
        place = _place(data)
        if place is None:
            raise ValueError(f"{path}: nothing to seal: UNSEALED is not in there")
        data[place : place + 64] = _digest_around(data, place)


def is_whole(data: bytes | mmap) -> bool:
    """Whether the bytes are those that were sealed; True where there is no seal."""
    place = _place(data)
    return place is None or data[place : place + 64] == _digest_around(data, place)


def is_whole_file(path: Path) -> bool:
    """`is_whole` of a file, which is not held in memory; raises OSError where it cannot be read."""
    with path.open("rb") as handle:
        if not os.fstat(handle.fileno()).st_size:
            return True
        with mmap(handle.fileno(), 0, access=ACCESS_READ) as data:
            return is_whole(data)


def _place(data: bytes | mmap) -> int | None:
    """Where the digest begins: the seal of a parquet file is in its footer, others' at the head."""
    mark = MARK.encode()
    at = data.rfind(mark) if data[:4] == b"PAR1" else data.find(mark, 0, _HEAD)
    return None if at < 0 else at + len(mark)


def _digest_around(data: bytes | mmap, place: int) -> bytes:
    with memoryview(data) as view:
        digest = hashlib.sha256(view[:place])
        digest.update(b"0" * 64)
        digest.update(view[place + 64 :])
    return digest.hexdigest().encode()


# --- records ------------------------------------------------------------------------------------


def write_record(path: Path, facts: Mapping[str, Any]) -> None:
    """Write `facts` as sealed, indented JSON; NaN and infinity are refused."""
    text = json.dumps({"seal": UNSEALED, **facts}, indent=2, allow_nan=False, ensure_ascii=False)
    write_text(path, sealed(f"{text}\n".encode()).decode())


def read_record(path: Path, remedy: str) -> dict[str, Any]:
    """The facts of a JSON record, without its seal.

    Raises InputError, with `remedy`, where it cannot be read or is not as it was written, and
    FileNotFoundError where there is none.
    """
    try:
        data = path.read_bytes()
        found = json.loads(data.decode("utf-8")) if is_whole(data) else None
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not readable as JSON (damaged?); {remedy}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: damaged, not as it was written; {remedy}")
    found.pop("seal", None)
    return found


# --- files beside a record ----------------------------------------------------------------------

_known: dict[tuple[str, int, int, int], str] = {}  # one base serves all adapters of a run


def file_digest(path: Path) -> str:
    """SHA-256 of a file; known ones are not read again while time, size and inode stay."""
    facts = path.stat()
    key = (str(path.resolve()), facts.st_mtime_ns, facts.st_size, facts.st_ino)
    if key not in _known:
        with path.open("rb") as handle:
            _known[key] = hashlib.file_digest(handle, "sha256").hexdigest()
    return _known[key]


def digests(folder: Path, but: Iterable[str] = ()) -> dict[str, str]:
    """SHA-256 of every file below a folder, by relative path, without those named in `but`."""
    return {
        name: file_digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (name := path.relative_to(folder).as_posix()) not in but
    }


def check_files(folder: Path, files: Any, remedy: str) -> None:
    """Raises InputError, with `remedy`, for the first file that is not as `files` says."""
    if not isinstance(files, dict):
        raise InputError(f"{folder}: its record names no files; {remedy}")
    for name, digest in files.items():
        path = folder / name
        try:
            same = file_digest(path) == digest
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
        if not same:
            raise InputError(f"{path}: damaged or replaced, not as it was written; {remedy}")
