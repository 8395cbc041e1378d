"""Read a table of answers from CSV, JSONL or parquet: `category`, `example_id`, `answer`.

An error names file and row. Whether a value makes sense is checked in score.py.
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from selfcorrect.recipes.foundation.errors import InputError

COLUMNS = ("category", "example_id", "answer")

_Records = Iterator[tuple[int, tuple[Any, ...]]]


def read_answers(path: Path) -> pd.DataFrame:
    """Return the columns `category`, `example_id` and `answer` of a .csv, .jsonl or .parquet file.

    The index locates each row: `line` of a text file, `row` of a parquet file, from 1. Values are
    unchanged ("NA" is a string); an empty field is no answer. Raises InputError.
    """
    reader = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}.get(path.suffix.lower())
    if path.is_dir():
        raise InputError(f"{path}: a folder; give a file of answers")
    if reader is None:
        raise InputError(f"{path}: unknown file type; give a .csv, .jsonl or .parquet file")
    try:
        numbered = list(reader(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    numbering = "row" if path.suffix.lower() == ".parquet" else "line"
    index = pd.Index([number for number, _ in numbered], name=numbering)
    records = [record for _, record in numbered]
    return pd.DataFrame(records, index, columns=list(COLUMNS), dtype=object)


def _csv(path: Path) -> _Records:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8 text; save it as UTF-8") from None
    limit = csv.field_size_limit(len(text) + 1)  # an answer may have any length
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        columns = [_column(header, name, path) for name in COLUMNS] if header else []
        for fields in reader:
            if len(fields) not in (0, len(header)):
                raise InputError(
                    f"{path}, line {reader.line_num}: {len(fields)} fields, but {len(header)} "
                    "columns; is the file cut short, or a comma not in quotes?"
                )
            if fields:
                yield reader.line_num, tuple(fields[column] or None for column in columns)
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not CSV ({error})") from None
    finally:
        csv.field_size_limit(limit)


def _column(header: Sequence[str], name: str, source: object) -> int:
    if header.count(name) > 1:
        raise InputError(f"{source}: column {name!r} appears twice; keep one")
    if name not in header:
        raise InputError(missing_column(source, name, header))
    return header.index(name)


def missing_column(source: object, name: str, header: Sequence[str]) -> str:
    """Return the error message for a table without the column `name`."""
    present = ", ".join(short(column) for column in header[:10])
    return f"{source}: column {name!r} is missing; needed: {', '.join(COLUMNS)}; present: {present}"


def _jsonl(path: Path) -> _Records:
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        where = f"{path}, line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{where}: not UTF-8 text") from None
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", "too deeply nested, or a number is too long")
            raise InputError(f"{where}: not JSON ({reason}); is the file cut short?") from None
        if not isinstance(record, dict):
            raise InputError(f"{where}: each row must be one JSON object")
        missing = [name for name in COLUMNS if name not in record]
        if missing:
            raise InputError(f"{where}: key {missing[0]!r} is missing")
        yield number, tuple(record[name] for name in COLUMNS)


def _parquet(path: Path) -> _Records:
    try:
        with pq.ParquetFile(path) as file:
            header = file.schema_arrow.names
            for name in COLUMNS:
                _column(header, name, path)
            table = file.read(columns=list(COLUMNS))
        columns = [table.column(name).to_pylist() for name in COLUMNS]
    except (pa.ArrowException, UnicodeDecodeError, KeyError) as error:
        reason = " ".join(str(error).split())[:100]
        raise InputError(f"{path}: not a valid parquet file ({reason})") from None
    yield from enumerate(zip(*columns, strict=True), 1)


def short(value: object) -> str:
    """Return a value as error messages show it: on one line, at most 60 characters."""
    text = value if isinstance(value, str) else str(value)
    return ascii(text if len(text) <= 60 else f"{text[:57]}...")
