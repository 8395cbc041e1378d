"""Read BBQ's published files: the rows of each category, and additional_metadata.csv.

Every row is checked; an error names file and line.
"""

import csv
import gzip
import io
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfcorrect.evaluate.experiments.reading import folder_rows
from selfcorrect.recipes.foundation.errors import InputError

METADATA = "additional_metadata.csv"
LONGEST_TABLE = 100_000_000  # bytes of the authors' table; the published one has 5,827,321
_DECIMALS = re.compile(r"(?<=\d)\.0+$")  # of whole numbers, as pandas writes them beside gaps
_COLUMNS = ("category", "example_id", "target_loc", "label_type")

Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a category's file; `names`, `tags` and `answers` have one entry per option.

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
        """The row's identity: `example_id` is unique only within its category."""
        return self.category, self.example_id

    @property
    def template(self) -> tuple[str, str]:
        """The template behind the row."""
        return self.category, self.question_index

    @property
    def people(self) -> tuple[int, int]:
        """The indices of the two options that are not "unknown"."""
        first, second = (i for i in range(3) if i != self.unknown)
        return first, second


@dataclass(frozen=True, slots=True)
class Decision:
    """The option that agrees with the stereotype, None if undecided; and whether names are used."""

    stereotyped: int | None
    proxy_name: bool


# --- the categories' rows ----------------------------------------------------------------------


def read_rows(folder: Path, *, by_file: bool = False) -> list[Row]:
    """Return every row of every *.jsonl and *.jsonl.gz, sorted by file name.

    With `by_file` the file's name is the rows' category, for files that repeat a category. Raises
    InputError naming file and line.
    """
    rows: list[Row] = []
    seen: dict[Key, str] = {}
    for file, where, record in folder_rows(folder, "put BBQ's category files in"):
        row = _row({**record, "category": file} if by_file else record, file, where)
        first = seen.setdefault(row.key, where)
        if first is not where:
            raise InputError(
                f"{where}: example_id {row.example_id} of {row.category} appears twice, first "
                f"in {first}"
            )
        rows.append(row)
    return rows


def _row(record: Mapping[str, Any], file: str, where: str) -> Row:
    try:
        return _checked_row(record, file)
    except KeyError as error:
        raise InputError(f"{where}: key {error} is missing") from None
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None


def _checked_row(record: Mapping[str, Any], file: str) -> Row:
    """Return the row of one JSON object; raises KeyError or ValueError if it is malformed."""
    answer_info, metadata = _object(record, "answer_info"), _object(record, "additional_metadata")
    info = [answer_info["ans0"], answer_info["ans1"], answer_info["ans2"]]
    answers = [record["ans0"], record["ans1"], record["ans2"]]
    groups = metadata["stereotyped_groups"]
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in info):
        raise ValueError("answer_info: each option needs a text and a group tag")
    template = record["question_index"]
    texts = [record["category"], record["context"], record["question"], *answers]
    if not _are_strings(texts) or not all(map(str.strip, texts)):
        raise ValueError("category, context, question and options must be non-empty strings")
    names, tags = [str(pair[0]) for pair in info], [str(pair[1]) for pair in info]
    if tags.count("unknown") != 1:
        raise ValueError("answer_info: exactly one option needs the tag 'unknown'")
    if type(record["label"]) is not int or type(record["example_id"]) is not int:
        raise ValueError("label and example_id must be whole numbers")
    if record["label"] not in (0, 1, 2):
        raise ValueError(f"label must be 0, 1 or 2, not {record['label']}")
    if type(template) not in (str, int):
        raise ValueError("question_index must be a string or a whole number")
    if not isinstance(groups, list) or not _are_strings(groups):
        raise ValueError("additional_metadata: stereotyped_groups must be a list of strings")
    _check_encodable([*texts, *names, *tags, *groups, str(template)])
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
        raise ValueError(f"{key} must be a JSON object")
    return value


def _are_strings(values: list[Any]) -> bool:
    return set(map(type, values)) <= {str}  # JSON values have no subclasses


def _check_encodable(texts: list[str]) -> None:
    """Raise ValueError for half a surrogate pair, which JSON can spell and UTF-8 cannot."""
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("contains half of a surrogate pair (\\ud800 to \\udfff)") from None


def _either(record: Mapping[str, Any], key: str, yes: str, no: str) -> bool:
    if record[key] not in (yes, no):
        raise ValueError(f"{key} must be {yes!r} or {no!r}, not {str(record[key])[:40]!r}")
    return bool(record[key] == yes)


# --- the authors' table ------------------------------------------------------------------------


def read_metadata(folder: Path) -> dict[Key, Decision]:
    """Return the authors' additional_metadata.csv(.gz) by (category, example_id), {} if absent.

    Its `target_loc` is already flipped for non-negative questions. 64 rows appear twice, with the
    same content.
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
    # A DictReader would take three times as long over 58,556 rows.
    reader = csv.reader(io.StringIO(text, newline=""))
    decisions: dict[Key, Decision] = {}
    try:
        positions = {name: index for index, name in enumerate(next(reader, []))}
        missing = [name for name in _COLUMNS if name not in positions]
        if missing:
            raise InputError(f"{path}: column {missing[0]!r} is missing")
        columns = [positions[name] for name in _COLUMNS]
        for fields in reader:
            if not fields:
                continue
            where = f"{path}, line {reader.line_num}"
            record = [fields[i] if i < len(fields) else None for i in columns]
            key, decision = _read_record(record, where)
            if decisions.setdefault(key, decision) != decision:
                raise InputError(
                    f"{where}: {key[0]} {key[1]} appears twice with different content; "
                    "fetch the file again"
                )
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not CSV ({error})") from None
    return decisions


def _read_record(record: Sequence[str | None], where: str) -> tuple[Key, Decision]:
    category, example, target, kind = record
    target, example = (_DECIMALS.sub("", text or "") for text in (target, example))
    if target not in ("0", "1", "2", "NA", "nan", "") or kind not in ("name", "label"):
        raise InputError(
            f"{where}: target_loc must be 0, 1, 2 or NA, and label_type name or label, "
            f"not {target!r} and {kind!r}"
        )
    try:
        key = str(category), int(str(example))
    except ValueError:
        raise InputError(f"{where}: example_id {example!r} is not a number") from None
    return key, Decision(int(target) if target in ("0", "1", "2") else None, kind == "name")
