"""Benchmark tables as delimited text: every row is read whole, or refused by its line."""

import csv
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from selfcorrect.evaluate.experiments.reading import lines
from selfcorrect.recipes.foundation.errors import InputError


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
