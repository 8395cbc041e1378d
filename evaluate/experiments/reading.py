"""Benchmark files line by line: every row is read whole, or refused by its file and line."""

import csv
import gzip
import json
import reprlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from selfcorrect.evaluate.prompts.items import systematic_sample
from selfcorrect.recipes.foundation.errors import InputError

# The longest rows of the published benchmarks have a few thousand bytes; far beyond, it is damage.
LARGEST_LINE = 1_000_000


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """Each line of a text file (or `.gz` of one) after its place, "FILE, line 7".

    Line ends are stripped, a blank line is "" and a byte-order mark is no text. Raises InputError
    where the file cannot be read, is not UTF-8, or a line is longer than `LARGEST_LINE` bytes: no
    more than that is ever held.
    """
    number = 0
    try:
        with _open(path) as handle:
            while line := handle.readline(LARGEST_LINE + 1):
                number += 1
                where = f"{path}, line {number}"
                if len(line) > LARGEST_LINE:
                    raise InputError(
                        f"{where}: more than {LARGEST_LINE:,} bytes in one row, the limit; "
                        "shorten its texts"
                    )
                decoded = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                yield where, decoded if decoded.strip() else ""
    except UnicodeDecodeError:
        raise InputError(f"{path}, line {number}: not UTF-8 text; save it as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason}); is the file whole?") from None


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON object of each line that is not blank, after its place."""
    for where, line in lines(path):
        if not line:
            continue
        try:
            record = json.loads(line)
        except RecursionError:
            raise InputError(f"{where}: lists nested too deep") from None
        except ValueError as error:
            reason = getattr(error, "msg", "a number too long")
            raise InputError(f"{where}: not JSON ({reason}); is the file cut short?") from None
        if not isinstance(record, dict):
            raise InputError(f"{where}: a row is one JSON object, in braces")
        yield where, record


def text(record: Mapping[str, Any], key: str, where: str) -> str:
    """The value of `key`, stripped; raises InputError where it is missing, no text, or empty."""
    if key not in record:
        raise InputError(f"{where}: key {key!r} is missing; is this the right file?")
    return checked_text(record[key], f"{where}: {key}")


def checked_text(value: Any, what: str) -> str:
    """`value` stripped; raises InputError that opens with `what` when it is no text, or empty."""
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{what} is a text, not empty")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half a character, which no file can hold
        raise InputError(f"{what} holds half of a surrogate pair (\\ud800 to \\udfff)") from None
    return value.strip()


def spread(keys: Sequence[tuple[str, ...]], wanted: int | None, seed: int) -> list[int]:
    """Indices, in order, of a systematic sample of `wanted` rows (at least one), spread over keys.

    Rows are laid out by their keys, and by chance where keys are equal: each category, and within
    it each cluster, gets its share to within one. None, or as many as there are, keeps all.
    """
    if wanted is None or wanted >= len(keys):
        return list(range(len(keys)))
    chance = np.random.default_rng([seed, 1]).permutation(len(keys))
    layout = sorted(range(len(keys)), key=lambda i: (keys[i], chance[i]))
    hits = systematic_sample(np.ones(len(keys)), max(1, wanted), seed)
    return sorted(layout[place] for place in np.flatnonzero(hits))


# --- delimited text -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Record:
    """A row: its place ("FILE, line 7") for messages, and its values by column, stripped."""

    where: str
    values: dict[str, str]


def read_records(path: Path, columns: Sequence[str], delimiter: str = ",") -> list[Record]:
    """The rows below the header, one a line; blank lines are skipped.

    With a tab as `delimiter`, quotation marks are ordinary characters. Raises InputError, with
    file and line, where `reading.lines` does, where there are no rows or one of `columns` is not in
    the header, and for a row that is empty in one of them, has not as many columns as the header,
    or leaves a quotation mark open.
    """
    quoting: Literal[0, 3] = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    header: list[str] | None = None
    records: list[Record] = []
    for where, line in lines(path):
        if not line:
            continue
        try:
            row = next(csv.reader([line], delimiter=delimiter, quoting=quoting, strict=True))
        except csv.Error as error:
            raise InputError(f"{where}: {error}; is a quotation mark left open?") from None
        row = [value.strip() for value in row]
        if header is None:
            header = row
            _check(header, columns, where)
            continue
        if len(row) != len(header):
            raise InputError(
                f"{where}: {len(row)} columns where the header has {len(header)}; "
                "is the file cut short?"
            )
        values = dict(zip(header, row, strict=True))
        for name in columns:
            if not values[name]:
                raise InputError(f"{where}: {name or 'the first column'} is empty; fill it in")
        records.append(Record(where, values))
    if not records:
        raise InputError(f"{path}: no rows below a header; is the file cut short?")
    return records


def _check(header: Sequence[str], columns: Sequence[str], where: str) -> None:
    for name in columns:
        if header.count(name) != 1:
            found = "stands twice" if name in header else "is missing"
            there = ", ".join(reprlib.repr(column) for column in header[:12])
            raise InputError(f"{where}: column {name!r} {found}; there are {there}")
