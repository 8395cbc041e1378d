"""The public data sets by name, and whether a folder holds them as they were published.

What is known of each stands in catalogue.yaml. A file is right when its text has the digest given
there, be it plain or packed with gzip; nothing of the data itself comes with this package.
"""

import csv
import gzip
import hashlib
import io
import logging
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from selfcorrect.recipes.foundation.atomic_files import read_text
from selfcorrect.recipes.foundation.errors import InputError

CATALOGUE = Path(__file__).parent / "catalogue.yaml"
_log = logging.getLogger(__name__)
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})

# Plain names with single slashes: no "..", no drive, no leading slash, nothing hidden.
_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
RelativePath = Annotated[str, Field(pattern=rf"^{_NAME}(/{_NAME})*$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Packed(_Entry):
    """The gzip file that a source publishes in place of the text."""

    bytes: Count
    sha256: Sha256


class DataFile(_Entry):
    """One published file; `bytes`, `sha256` and `rows` are those of its text, unpacked."""

    path: RelativePath
    place: RelativePath = Field(alias="from")
    bytes: Count
    sha256: Sha256
    rows: Count
    packed: Packed | None = None

    @property
    def download_path(self) -> str:
        """Where a download goes, relative to the data folder."""
        return f"{self.path}.gz" if self.packed else self.path


class Hub(_Entry):
    """What `datasets.load_dataset` is called with."""

    path: str
    data_dir: str | None = None
    split: str


class DataSet(_Entry):
    """A benchmark or a feedback set: its terms, and either its files or its name on the hub."""

    title: str
    kind: Literal["benchmark", "feedback"]
    licence: str
    citation: str
    homepage: str
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    source: str | None = None
    note: str = ""
    rows: Count | None
    files: tuple[DataFile, ...] = ()
    hub: Hub | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> "DataSet":
        if (self.hub is None) == (not self.files):
            raise ValueError("give either files or hub")
        if self.files:
            if self.source is None or not is_allowed(self.source):
                raise ValueError("source: an address that begins with https://")
            if not self.source.endswith("/{revision}/"):
                raise ValueError("source ends with /{revision}/, so that files never change")
        return self

    @property
    def address(self) -> str:
        """Where it comes from: the folder of its files, or its page on the hub."""
        return (self.source or self.homepage).replace("{revision}", self.revision)

    def url(self, file: DataFile) -> str:
        """The public address of one of the files."""
        return self.address + file.place


def is_allowed(url: str) -> bool:
    """Whether a download may come from there: https, or this very machine."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return bool(parts.hostname) and (
        parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOCAL_HOSTS)
    )


def load_catalogue(path: Path = CATALOGUE) -> dict[str, DataSet]:
    """The data sets of a catalogue by name; raises InputError naming file and key."""
    try:
        given = yaml.safe_load(read_text(path))
        found = TypeAdapter(dict[RelativePath, DataSet]).validate_python(given)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: {key}: {first['msg'].removeprefix('Value error, ')}") from None
    paths = [file.path for data_set in found.values() for file in data_set.files]
    for name in paths:
        if paths.count(name) > 1:
            raise InputError(f"{path}: {name} stands twice")
    return found


@cache
def catalogue() -> dict[str, DataSet]:
    """The catalogue of this package."""
    return load_catalogue()


def choose(names: Iterable[str], known: dict[str, DataSet]) -> dict[str, DataSet]:
    """The named data sets, each once; raises InputError for a name that is none."""
    for name in names:
        if name not in known:
            raise InputError(f"data set {name!r}: there is none; there are {', '.join(known)}")
    return {name: known[name] for name in names}


@dataclass(frozen=True)
class Finding:
    """What stands in the place of one file; `rows` is None where they cannot be counted."""

    file: DataFile
    state: Literal["right", "missing", "different"]
    path: Path
    rows: int | None = None
    reason: str = ""


def check_set(data_set: DataSet, data_dir: Path) -> list[Finding]:
    """What `data_dir` holds of each file of a data set."""
    return [check_file(file, data_dir) for file in data_set.files]


_said: set[Path] = set()  # once a process


def say_unpublished(data_dir: Path, experiments: Iterable[str]) -> None:
    """One warning where files that are read are not as they are published; they are used."""
    found = [
        finding
        for data_set in catalogue().values()
        for file in data_set.files
        if file.path.partition("/")[0] in experiments
        for finding in [check_file(file, data_dir)]
        if finding.state == "different"
    ]
    if found and found[0].path not in _said:
        _said.add(found[0].path)
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        _log.warning(
            "%s%s: not as it is published (%s), used as it is; `selfcorrect data check` says more",
            found[0].path, more, found[0].reason,
        )  # fmt: skip


def check_file(file: DataFile, data_dir: Path) -> Finding:
    """Compare one file, plain or with .gz behind its name, with the published one.

    Where both stand, both are read by the benchmarks: then one that differs is what is reported.
    """
    plain = data_dir / file.path
    found = [_compare(file, path) for path in (plain, Path(f"{plain}.gz")) if path.exists()]
    if not found:
        return Finding(file, "missing", plain, reason="missing")
    return next((finding for finding in found if finding.state == "different"), found[0])


def _compare(file: DataFile, path: Path) -> Finding:
    try:
        with path.open("rb") as handle:
            stream = gzip.GzipFile(fileobj=handle) if path.suffix == ".gz" else handle
            text = stream.read(file.bytes + 1)  # one byte too many says enough
    except (EOFError, gzip.BadGzipFile, zlib.error):
        return Finding(file, "different", path, reason="not a whole gzip file")
    except OSError as error:
        return Finding(file, "different", path, reason=f"cannot be read ({error.strerror})")
    if len(text) > file.bytes:
        return Finding(file, "different", path, reason=f"more than {file.bytes:,} bytes")
    rows = count_rows(file.path, text)
    if hashlib.sha256(text).hexdigest() == file.sha256:
        return Finding(file, "right", path, rows)
    counted = "rows cannot be counted" if rows is None else f"{rows:,} rows of {file.rows:,}"
    reason = f"{counted}, {len(text):,} bytes of {file.bytes:,}, another checksum"
    return Finding(file, "different", path, rows, reason)


def count_rows(name: str, text: bytes) -> int | None:
    """Rows of a file by the kind its name tells: records of .csv and .tsv below their header (a
    quoted field may hold line breaks), otherwise lines that are not blank; None where that fails.
    """
    if not re.search(r"\.[ct]sv$", name):
        return sum(1 for line in text.split(b"\n") if line.strip())
    delimiter = "\t" if name.endswith(".tsv") else ","
    try:
        lines = io.StringIO(text.decode("utf-8"), newline="")
        return max(0, sum(1 for record in csv.reader(lines, delimiter=delimiter) if record) - 1)
    except (UnicodeDecodeError, csv.Error):
        return None
