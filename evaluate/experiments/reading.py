"""Read benchmark files row by row; a bad row ends the reading with its file and line."""

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

LONGEST_ROW = 1_000_000  # bytes; the longest published rows have a few thousand


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield each line of a text file (or `.gz` of one) after its location, "FILE, line 7".

    Line ends and a byte-order mark are stripped; a blank line is "". Raises InputError if the file
    cannot be read, is not UTF-8, or has a line of more than `LONGEST_ROW` bytes, which is never
    held in memory.
    """
    number = 0
    try:
        with _open(path) as handle:
            while line := handle.readline(LONGEST_ROW + 1):
                number += 1
                where = f"{path}, line {number}"
                if len(line) > LONGEST_ROW:
                    raise InputError(
                        f"{where}: longer than {LONGEST_ROW:,} bytes, the limit for one row; "
                        "shorten its texts"
                    )
                decoded = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                yield where, decoded if decoded.strip() else ""
    except UnicodeDecodeError:
        raise InputError(f"{path}, line {number}: not UTF-8 text; save it as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason}); is the file complete?") from None


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the JSON object of each line that is not blank, after its location."""
    for where, line in lines(path):
        if not line:
            continue
        try:
            record = json.loads(line)
        except RecursionError:
            raise InputError(f"{where}: nested too deep") from None
        except ValueError as error:
            reason = getattr(error, "msg", "a number is too long")
            raise InputError(f"{where}: not JSON ({reason}); is the file cut short?") from None
        if not isinstance(record, dict):
            raise InputError(f"{where}: each row must be one JSON object")
        yield where, record


def folder_rows(folder: Path, remedy: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield each row of every *.jsonl and *.jsonl.gz: its file's name, its location, its object.

    Files come sorted by name, which is given without its endings: "Age" for Age.jsonl.gz. Raises
    InputError with `remedy` if there are no files, or no rows in them.
    """
    paths = sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")])
    if not paths:
        raise InputError(f"{folder}: no *.jsonl or *.jsonl.gz here; {remedy}")
    empty = True
    for path in paths:
        name = path.name.removesuffix(".gz").removesuffix(".jsonl")
        for where, record in json_lines(path):
            empty = False
            yield name, where, record
    if empty:
        raise InputError(f"{folder}: the *.jsonl files here are empty; {remedy}")


def text(record: Mapping[str, Any], key: str, where: str) -> str:
    """Return the value of `key`, stripped; raises InputError if missing, not a string, or empty."""
    if key not in record:
        raise InputError(f"{where}: key {key!r} is missing; is this the right file?")
    return checked_text(record[key], f"{where}: {key}")


def checked_text(value: Any, what: str) -> str:
    """Return `value` stripped; raises InputError naming `what` if not a string, or empty."""
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{what} must be a non-empty string")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half a character, which UTF-8 cannot
        raise InputError(f"{what} contains half of a surrogate pair (\\ud800 to \\udfff)") from None
    return value.strip()


def spread(keys: Sequence[tuple[str, ...]], num_rows: int | None, seed: int) -> list[int]:
    """Return the sorted indices of a systematic sample of rows, spread over their keys.

    The sample has `num_rows` rows and at least one; None keeps all. Rows are sorted by key, and at
    random among equal keys, so that each category, and within it each cluster, gets its share to
    within one row.
    """
    if num_rows is None or num_rows >= len(keys):
        return list(range(len(keys)))
    tie_breaks = np.random.default_rng([seed, 1]).permutation(len(keys))
    layout = sorted(range(len(keys)), key=lambda i: (keys[i], tie_breaks[i]))
    counts = systematic_sample(np.ones(len(keys)), max(1, num_rows), seed)
    return sorted(layout[position] for position in np.flatnonzero(counts))


# --- delimited text -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Record:
    """A row: its location ("FILE, line 7") for messages, and its stripped values by column."""

    where: str
    values: dict[str, str]


def read_records(path: Path, columns: Sequence[str], delimiter: str = ",") -> list[Record]:
    """Return the rows below the header, one per line; blank lines are skipped.

    With a tab as `delimiter`, quotation marks are ordinary characters. Raises InputError as `lines`
    does, if there are no rows or a column is missing, and for a row with an empty value in one of
    `columns`, another number of columns than the header, or an unclosed quotation mark.
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
            raise InputError(f"{where}: {error}; is a quotation mark not closed?") from None
        row = [value.strip() for value in row]
        if header is None:
            header = row
            _check(header, columns, where)
            continue
        if len(row) != len(header):
            raise InputError(
                f"{where}: {len(row)} columns, but the header has {len(header)}; "
                "is the file cut short?"
            )
        values = dict(zip(header, row, strict=True))
        for name in columns:
            if not values[name]:
                raise InputError(f"{where}: {name or 'the first column'} is empty; fill it in")
        records.append(Record(where, values))
    if not records:
        raise InputError(f"{path}: no rows below the header; is the file cut short?")
    return records


def _check(header: Sequence[str], columns: Sequence[str], where: str) -> None:
    for name in columns:
        if header.count(name) != 1:
            problem = "appears twice" if name in header else "is missing"
            present = ", ".join(reprlib.repr(column) for column in header[:12])
            raise InputError(f"{where}: column {name!r} {problem}; the columns are {present}")
