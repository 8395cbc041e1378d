"""The public data sets, and checks that a folder holds their files as published.

catalogue.yaml describes each set. A file is right if its text has the digest given there, whether
the file is plain or packed with gzip. The data themselves are not part of this package.
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
from pydantic import BaseModel, Field, TypeAdapter, ValidationError, model_validator

from selfcorrect.recipes.foundation.atomic_files import read_text
from selfcorrect.recipes.foundation.errors import InputError

CATALOGUE = Path(__file__).parent / "catalogue.yaml"
logger = logging.getLogger(__name__)
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})

# Plain names with single slashes: no "..", no drive, no leading slash, no hidden file.
_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
RelativePath = Annotated[str, Field(pattern=rf"^{_NAME}(/{_NAME})*$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


class _Entry(BaseModel, extra="forbid", frozen=True):
    """A part of the catalogue; a key it does not know is an error."""


class Packed(_Entry):
    """The gzip file that a source publishes instead of the text."""

    bytes: Count
    sha256: Sha256


class DataFile(_Entry):
    """One published file; `bytes`, `sha256` and `rows` are those of its unpacked text."""

    path: RelativePath
    source_path: RelativePath = Field(alias="from")
    bytes: Count
    sha256: Sha256
    rows: Count
    packed: Packed | None = None

    @property
    def download_path(self) -> str:
        """The path of the download, relative to the data folder."""
        return f"{self.path}.gz" if self.packed else self.path


class Hub(_Entry):
    """The arguments of `datasets.load_dataset`."""

    path: str
    data_dir: str | None = None
    split: str


class DataSet(_Entry):
    """A benchmark or feedback set: its terms, and either its files or its name on the hub."""

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
    def _check_source(self) -> "DataSet":
        if (self.hub is None) == (not self.files):
            raise ValueError("give either files or hub")
        if self.files:
            if self.source is None or not is_allowed(self.source):
                raise ValueError("source: must begin with https://")
            if not self.source.endswith("/{revision}/"):
                raise ValueError("source: must end with /{revision}/, so that files never change")
        return self

    @property
    def address(self) -> str:
        """The URL of the folder with its files, or of its page on the hub."""
        return (self.source or self.homepage).replace("{revision}", self.revision)

    def url(self, file: DataFile) -> str:
        """Return the public URL of one of the files."""
        return self.address + file.source_path


def is_allowed(url: str) -> bool:
    """Return whether downloads from `url` are allowed: https, or this machine."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return bool(parts.hostname) and (
        parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOCAL_HOSTS)
    )


def load_catalogue(path: Path = CATALOGUE) -> dict[str, DataSet]:
    """Return the data sets of a catalogue by name; InputError names file and key."""
    try:
        entries = yaml.safe_load(read_text(path))
        data_sets = TypeAdapter(dict[RelativePath, DataSet]).validate_python(entries)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: {key}: {first['msg'].removeprefix('Value error, ')}") from None
    paths = [file.path for data_set in data_sets.values() for file in data_set.files]
    for name in paths:
        if paths.count(name) > 1:
            raise InputError(f"{path}: {name} is listed twice; remove one entry")
    return data_sets


@cache
def catalogue() -> dict[str, DataSet]:
    """Return the catalogue of this package."""
    return load_catalogue()


def choose(names: Iterable[str], known: dict[str, DataSet]) -> dict[str, DataSet]:
    """Return the named data sets, each once; InputError for an unknown name."""
    for name in names:
        if name not in known:
            raise InputError(f"unknown data set {name!r}; choose from {', '.join(known)}")
    return {name: known[name] for name in names}


@dataclass(frozen=True)
class Finding:
    """The result of checking one file; `rows` is None if they cannot be counted."""

    file: DataFile
    state: Literal["right", "missing", "different"]
    path: Path
    rows: int | None = None
    reason: str = ""


def check_set(data_set: DataSet, data_dir: Path) -> list[Finding]:
    """Check each file of a data set in `data_dir`."""
    return [check_file(file, data_dir) for file in data_set.files]


_warned: set[Path] = set()  # so that each process warns once


def warn_if_unpublished(data_dir: Path, experiments: Iterable[str]) -> None:
    """Log one warning if files of the experiments differ from the published ones."""
    different = [
        finding
        for data_set in catalogue().values()
        for file in data_set.files
        if file.path.partition("/")[0] in experiments
        for finding in [check_file(file, data_dir)]
        if finding.state == "different"
    ]
    if different and different[0].path not in _warned:
        _warned.add(different[0].path)
        more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
        logger.warning(
            "%s%s: differs from the published file (%s), used as it is; `selfcorrect data check` "
            "gives details",
            different[0].path, more, different[0].reason,
        )  # fmt: skip


def check_file(file: DataFile, data_dir: Path) -> Finding:
    """Compare one file, plain or with .gz appended to its name, with the published one.

    If both exist, the benchmarks read both, so one that differs is reported.
    """
    plain = data_dir / file.path
    findings = [_compare(file, path) for path in (plain, Path(f"{plain}.gz")) if path.exists()]
    if not findings:
        return Finding(file, "missing", plain, reason="missing")
    return next((finding for finding in findings if finding.state == "different"), findings[0])


def _compare(file: DataFile, path: Path) -> Finding:
    try:
        with path.open("rb") as handle:
            stream = gzip.GzipFile(fileobj=handle) if path.suffix == ".gz" else handle
            text = stream.read(file.bytes + 1)  # one byte too many is enough to differ
    except (EOFError, gzip.BadGzipFile, zlib.error):
        return Finding(file, "different", path, reason="not a complete gzip file")
    except OSError as error:
        return Finding(file, "different", path, reason=f"cannot be read ({error.strerror})")
    if len(text) > file.bytes:
        return Finding(file, "different", path, reason=f"more than {file.bytes:,} bytes")
    rows = count_rows(file.path, text)
    if hashlib.sha256(text).hexdigest() == file.sha256:
        return Finding(file, "right", path, rows)
    counted = "rows cannot be counted" if rows is None else f"{rows:,} rows of {file.rows:,}"
    reason = f"{counted}, {len(text):,} bytes of {file.bytes:,}, checksum mismatch"
    return Finding(file, "different", path, rows, reason)


def count_rows(name: str, text: bytes) -> int | None:
    """Return the number of rows, None if they cannot be counted.

    Rows of .csv and .tsv are records below the header (a quoted field may hold line breaks); rows
    of other files are lines that are not blank.
    """
    if not re.search(r"\.[ct]sv$", name):
        return sum(1 for line in text.split(b"\n") if line.strip())
    delimiter = "\t" if name.endswith(".tsv") else ","
    try:
        lines = io.StringIO(text.decode("utf-8"), newline="")
        return max(0, sum(1 for record in csv.reader(lines, delimiter=delimiter) if record) - 1)
    except (UnicodeDecodeError, csv.Error):
        return None
