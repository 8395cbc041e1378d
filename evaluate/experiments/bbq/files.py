"""BBQ's files as they are published: the categories' rows and additional_metadata.csv.

Every row is checked; what is wrong with one is one line with file and line number.
"""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfcorrect.recipes.foundation.errors import InputError

METADATA = "additional_metadata.csv"
LONGEST_ROW = 1_000_000  # bytes of one row; the longest that is published has 1,316
LONGEST_TABLE = 100_000_000  # bytes of the authors' table; the published one has 5,827,321
_COLUMNS = ("category", "example_id", "target_loc", "label_type")

Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a category's file; `names`, `tags` and `answers` have one entry per option.

    `file` is the name of the file without its endings: "Age" for Age.jsonl.gz.
    """

    category: str
    example_id: int
    question_index: str
    negative: bool
    ambiguous: bool
    context: str
    question: str
    answers: tuple[str, str, str]
    names: tuple[str, str, str]
    tags: tuple[str, str, str]
    groups: tuple[str, ...]
    label: int
    unknown: int
    file: str

    @property
    def key(self) -> Key:
        """What identifies the row: `example_id` is unique only within its category."""
        return self.category, self.example_id

    @property
    def template(self) -> tuple[str, str]:
        """The template it was made from."""
        return self.category, self.question_index

    @property
    def people(self) -> tuple[int, int]:
        """The indices of the two options that are not "unknown"."""
        first, second = (i for i in range(3) if i != self.unknown)
        return first, second


@dataclass(frozen=True, slots=True)
class Decision:
    """The option that agrees with the stereotype (None: nobody can say), and name or label."""

    stereotyped: int | None
    proxy_name: bool


# --- the categories' rows ----------------------------------------------------------------------


def read_rows(folder: Path) -> list[Row]:
    """Every row of every *.jsonl and *.jsonl.gz, sorted by file name.

    Raises InputError naming file and line, also for a row of more than `LONGEST_ROW` bytes.
    """
    paths = sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")])
    if not paths:
        raise InputError(f"{folder}: no *.jsonl or *.jsonl.gz here; put BBQ's category files in")
    rows: list[Row] = []
    seen: dict[Key, str] = {}
    for path in paths:
        file = path.name.removesuffix(".gz").removesuffix(".jsonl")
        for number, line in _lines(path):
            where = f"{path}, line {number}"
            row = _row(line, file, where)
            before = seen.setdefault(row.key, where)
            if before is not where:
                raise InputError(
                    f"{where}: example_id {row.example_id} of {row.category} stands again; "
                    f"it was in {before}"
                )
            rows.append(row)
    if not rows:
        raise InputError(f"{folder}: the *.jsonl files here are empty")
    return rows


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers; at most one is in memory."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as handle:
            number = 0
            while line := handle.readline(LONGEST_ROW + 1):
                number += 1
                if len(line) > LONGEST_ROW:
                    raise InputError(
                        f"{path}, line {number}: more than {LONGEST_ROW:,} bytes, "
                        "the limit for one row; shorten its texts"
                    )
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield number, _text(line, f"{path}, line {number}")
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}); fetch the file again") from None


def _text(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{where}: not UTF-8 text") from None


def _row(line: str, file: str, where: str) -> Row:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        said = getattr(error, "msg", "its numbers or its nesting are too large")
        raise InputError(f"{where}: not JSON ({said}); is the file cut short?") from None
    try:
        return _checked_row(record, file)
    except KeyError as error:
        raise InputError(f"{where}: key {error} is missing") from None
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None


def _checked_row(record: Any, file: str) -> Row:
    """A row from one JSON value; raises KeyError or ValueError saying what is wrong."""
    if not isinstance(record, dict):
        raise ValueError("a row is one JSON object")
    answer_info, metadata = _object(record, "answer_info"), _object(record, "additional_metadata")
    info = [answer_info["ans0"], answer_info["ans1"], answer_info["ans2"]]
    answers = [record["ans0"], record["ans1"], record["ans2"]]
    groups = metadata["stereotyped_groups"]
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in info):
        raise ValueError("answer_info: each option needs its text and its group tag")
    template = record["question_index"]
    texts = [record["category"], record["context"], record["question"], *answers]
    if not _are_texts(texts) or not all(map(str.strip, texts)):
        raise ValueError("category, context, question and the three options are texts, not empty")
    names, tags = [str(pair[0]) for pair in info], [str(pair[1]) for pair in info]
    if tags.count("unknown") != 1:
        raise ValueError("answer_info: exactly one option needs the tag 'unknown'")
    if type(record["label"]) is not int or type(record["example_id"]) is not int:
        raise ValueError("label and example_id are whole numbers")
    if record["label"] not in (0, 1, 2):
        raise ValueError(f"label is 0, 1 or 2, not {record['label']}")
    if type(template) not in (str, int):
        raise ValueError("question_index is a text or a whole number")
    if not isinstance(groups, list) or not _are_texts(groups):
        raise ValueError("additional_metadata: stereotyped_groups is a list of texts")
    _encodable([*texts, *names, *tags, *groups, str(template)])
    return Row(
        category=record["category"],
        example_id=record["example_id"],
        question_index=str(template),
        negative=_either(record, "question_polarity", "neg", "nonneg"),
        ambiguous=_either(record, "context_condition", "ambig", "disambig"),
        context=record["context"],
        question=record["question"],
        answers=(answers[0], answers[1], answers[2]),
        names=(names[0], names[1], names[2]),
        tags=(tags[0], tags[1], tags[2]),
        groups=tuple(groups),
        label=record["label"],
        unknown=tags.index("unknown"),
        file=file,
    )


def _object(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = record[key]
    if not isinstance(value, dict):
        raise ValueError(f"{key} is a JSON object")
    return value


def _are_texts(values: list[Any]) -> bool:
    return set(map(type, values)) <= {str}  # what JSON gives has no subclasses


def _encodable(texts: list[str]) -> None:
    """Refuse half a surrogate pair, which JSON can spell and no file can hold."""
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair (\\ud800 to \\udfff) stands alone") from None


def _either(record: Mapping[str, Any], key: str, yes: str, no: str) -> bool:
    if record[key] not in (yes, no):
        raise ValueError(f"{key} is {yes!r} or {no!r}, not {str(record[key])[:40]!r}")
    return bool(record[key] == yes)


# --- the authors' table ------------------------------------------------------------------------


def read_metadata(folder: Path) -> dict[Key, Decision]:
    """The authors' additional_metadata.csv(.gz) by (category, example_id); empty when absent.

    Their `target_loc` is already turned round for non-negative questions. 64 of their rows stand
    twice, with the same content.
    """
    path = next((p for p in (folder / METADATA, folder / f"{METADATA}.gz") if p.is_file()), None)
    if path is None:
        return {}
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as handle:
            data = handle.read(LONGEST_TABLE + 1)
        if len(data) > LONGEST_TABLE:
            raise InputError(f"{path}: more than {LONGEST_TABLE:,} bytes; fetch the file again")
        text = data.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}); fetch the file again") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; fetch the file again") from None
    # Not a DictReader, which takes three times as long over 58,556 rows.
    reader = csv.reader(io.StringIO(text, newline=""))
    found: dict[Key, Decision] = {}
    try:
        places = {name: place for place, name in enumerate(next(reader, []))}
        missing = [name for name in _COLUMNS if name not in places]
        if missing:
            raise InputError(f"{path}: column {missing[0]!r} is missing")
        columns = [places[name] for name in _COLUMNS]
        for fields in reader:
            if not fields:
                continue
            where = f"{path}, line {reader.line_num}"
            wanted = [fields[at] if at < len(fields) else None for at in columns]
            key, decision = _read_record(wanted, where)
            if found.setdefault(key, decision) != decision:
                raise InputError(f"{where}: {key[0]} {key[1]} stands twice with different content")
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not CSV ({error})") from None
    return found


def _read_record(record: Sequence[str | None], where: str) -> tuple[Key, Decision]:
    category, example, target, kind = record
    if target not in ("0", "1", "2", "NA", "") or kind not in ("name", "label"):
        raise InputError(
            f"{where}: target_loc is 0, 1, 2 or NA and label_type is name or label, "
            f"not {target!r} and {kind!r}"
        )
    try:
        key = str(category), int(str(example))
    except ValueError:
        raise InputError(f"{where}: example_id {example!r} is no number") from None
    return key, Decision(int(target) if target in ("0", "1", "2") else None, kind == "name")
