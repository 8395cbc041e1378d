"""Read rows of feedback through `datasets`, from a file, a folder, or the hub.

Errors are one line; for text files they name the faulty line, which the libraries do not.
"""

import csv
import glob
import gzip
import json
import logging
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selfcorrect.recipes.foundation.errors import InputError, machine_fault

FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".parquet": "parquet",
}
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def read_rows(
    path: str,
    key: str,
    *,
    name: str | None = None,
    data_dir: str | None = None,
    split: str = "train",
    revision: str | None = None,
) -> Any:
    """Return a `datasets.Dataset` from a local file or folder, or from the hub.

    A file may be .jsonl, .json, .csv, .tsv, .txt (a row a line) or .parquet, text also with .gz;
    `split` applies to folders and the hub. Raises InputError, in one line that begins with `key`.
    """
    import datasets

    local = Path(path).expanduser()
    is_file = local.is_file() or (_suffix(local) in FORMATS and not local.is_dir())
    if not is_file and not local.is_dir() and not _HUB_NAME.fullmatch(path):
        raise InputError(f"{key}: {path}: no such file or folder, and not a hub name (owner/name)")
    try:
        with _libraries_silent():
            if is_file:
                arguments = _file_arguments(local, key)
                if FORMATS[_suffix(local)] == "csv" and (fault := _cut_row(local)):
                    raise InputError(f"{key}: {path}: {fault}")
                rows = datasets.load_dataset(**arguments)
                # Or text that is not UTF-8 would fail only when it is read.
                rows.data.validate(full=True)
            elif local.is_dir():
                rows = datasets.load_dataset(str(local), name, data_dir=data_dir, split=split)
            else:
                rows = datasets.load_dataset(
                    path, name, data_dir=data_dir, split=split, revision=revision
                )
    except InputError:
        raise
    except Exception as error:  # datasets raises errors of many kinds
        if machine_fault(error) is not None:
            raise
        fault = _first_fault(local) if is_file else None
        raise InputError(f"{key}: {path}: {fault or _reason(error)}") from None
    if not len(rows):
        raise InputError(f"{key}: {path}: no rows")
    return rows


@contextmanager
def _libraries_silent() -> Iterator[None]:
    """Silence the libraries' log: our own error reports the failure."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _suffix(path: Path) -> str:
    """Return the file's suffix without .gz."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


def _file_arguments(path: Path, key: str) -> dict[str, Any]:
    """Return the arguments of `load_dataset` for a file, which is one split called train."""
    suffix = _suffix(path)
    if not path.is_file():
        raise InputError(f"{key}: no file {path}")
    if suffix not in FORMATS:
        raise InputError(f"{key}: {path}: unknown format; use {', '.join(FORMATS)}")
    # datasets treats the path as a pattern: escape brackets in it.
    files = glob.escape(str(path))
    arguments: dict[str, Any] = {"path": FORMATS[suffix], "data_files": files, "split": "train"}
    if FORMATS[suffix] == "csv":  # every field is text: "4" is not a number, "NA" is not missing
        import pandas as pd
        from datasets import Features, Value

        separator = "\t" if suffix == ".tsv" else ","
        columns = pd.read_csv(path, sep=separator, nrows=0).columns
        features = Features({column: Value("string") for column in columns})
        arguments |= {"sep": separator, "features": features, "keep_default_na": False}
    return arguments


def _cut_row(path: Path) -> str | None:
    """Describe the first row with more or fewer fields than the header; pandas would pad it."""
    separator = "\t" if _suffix(path) == ".tsv" else ","
    opened = gzip.open if path.suffix == ".gz" else open
    limit = csv.field_size_limit(sys.maxsize)  # a dialogue may be of any length
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, delimiter=separator)
            header = next(reader, [])
            columns = len(header)
            if twice := [name for name in header if header.count(name) > 1]:
                return f"column {twice[0]!r} appears twice; keep one"
            for fields in reader:
                where = f"line {reader.line_num}"
                if len(fields) not in (0, columns):
                    return f"{where}: {len(fields)} fields for {columns} columns; is it cut short?"
                if any("\0" in field for field in fields):
                    return f"{where}: contains a zero byte; is the file damaged?"
    finally:
        csv.field_size_limit(limit)
    return None


def _reason(error: BaseException) -> str:
    """Return the first line of the original cause of a library's error."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).splitlines()
    return f"cannot be loaded ({lines[0] if lines else type(error).__name__})"


def _first_fault(path: Path) -> str | None:
    """Describe the first faulty line of a text file; None if all lines can be read."""
    suffix = _suffix(path)
    if suffix == ".parquet":
        return None
    number, is_empty = 0, True
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as handle:
            for line in handle:
                number += 1
                text = line.decode("utf-8")
                is_empty = is_empty and not text.strip()
                if suffix == ".jsonl" and text.strip() and not isinstance(json.loads(text), dict):
                    return f'line {number}: a row must be an object, such as {{"prompt": "..."}}'
    except UnicodeDecodeError:
        return f"line {number}: not UTF-8 text; save it as UTF-8"
    except json.JSONDecodeError as error:
        return f"line {number}: not JSON ({error.msg}); is the file cut short?"
    except (EOFError, gzip.BadGzipFile, zlib.error):
        return "not a complete gzip file; is it cut short?"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "no rows" if is_empty or (FORMATS[suffix] == "csv" and number == 1) else None
