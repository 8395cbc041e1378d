"""A table of answers from a CSV, JSONL or parquet file: `category`, `example_id`, `answer`.

Every mistake is one line with file and row; whether a value makes sense, answers.py decides.
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
    """The columns `category`, `example_id` and `answer` of a .csv, .jsonl or .parquet file.

    The index says where a row stands: `line` of a text file, `row` of a parquet file, from 1.
    Values stay as they are ("NA" is a text); an empty field is no answer. Raises InputError.
    """
    read = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}.get(path.suffix.lower())
    if path.is_dir():
        raise InputError(f"{path}: a folder; give one file of answers")
    if read is None:
        raise InputError(f"{path}: answers come as .csv, .jsonl or .parquet")
    try:
        found = list(read(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    numbering = "row" if path.suffix.lower() == ".parquet" else "line"
    index = pd.Index([number for number, _ in found], name=numbering)
    records = [record for _, record in found]
    return pd.DataFrame(records, index, columns=list(COLUMNS), dtype=object)


def _csv(path: Path) -> _Records:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8 text; save it as UTF-8") from None
    limit = csv.field_size_limit(len(text) + 1)  # an answer may be as long as it likes
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        places = [_column(header, name, path) for name in COLUMNS] if header else []
        for fields in reader:
            if len(fields) not in (0, len(header)):
                raise InputError(
                    f"{path}, line {reader.line_num}: {len(fields)} fields, and {len(header)} "
                    "columns; is the file cut short, or a comma not in quotes?"
                )
            if fields:
                yield reader.line_num, tuple(fields[place] or None for place in places)
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not CSV ({error})") from None
    finally:
        csv.field_size_limit(limit)


def _column(header: Sequence[str], name: str, source: object) -> int:
    if header.count(name) > 1:
        raise InputError(f"{source}: column {name!r} stands twice")
    if name not in header:
        raise InputError(missing_column(source, name, header))
    return header.index(name)


def missing_column(source: object, name: str, header: Sequence[str]) -> str:
    """What to say of a table that lacks a column."""
    there = ", ".join(short(one) for one in header[:10])
    return f"{source}: column {name!r} is missing; it needs {', '.join(COLUMNS)}, it has {there}"


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
            said = getattr(error, "msg", "its numbers or its nesting are too large")
            raise InputError(f"{where}: not JSON ({said}); is the file cut short?") from None
        if not isinstance(record, dict):
            raise InputError(f"{where}: a row is one JSON object")
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
        said = " ".join(str(error).split())[:100]
        raise InputError(f"{path}: not a whole parquet file ({said})") from None
    yield from enumerate(zip(*columns, strict=True), 1)


def short(value: object) -> str:
    """A value as an error names it: on one line, and not too long."""
    text = value if isinstance(value, str) else str(value)
    return ascii(text if len(text) <= 60 else f"{text[:57]}...")
