"""Scoring answers: matching with options, tables of every kind, and `selfcorrect score`."""

import json
import math
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from selfcorrect.evaluate.answers.read import read_answers
from selfcorrect.evaluate.answers.score import COUNTS, METRICS, match_options, score_bbq
from selfcorrect.evaluate.statistics.formatting import compact_with_interval
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.scripts.commands import score
from tests.support import ROOT
from tests.support.bbq_rows import block, write

OPTIONS = ("The grandfather", "Can't be determined", "The grandson of the grandfather")


# --- matching an answer with options --------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "option"),
    [
        (0, 0),
        (2, 2),
        (1.0, 1),
        (Decimal("1"), 1),
        ("0", 0),
        ("1.0", 1),
        (" 2 ", 2),
        ("(1)", 1),
        ("2.", 2),
        ("b", 1),
        (" (b)", 1),
        ("B.", 1),
        ("(C)", 2),
        ("**a**", 0),
        ("（b）", 1),
        ("(b) Can't be determined", 1),
        ("a. The grandfather", 0),
        ("c) the grandson of the grandfather.", 2),
        ("**(a)** The grandfather", 0),
        ("(2) The grandson of the grandfather", 2),
        ("The grandfather", 0),
        ("the grandfather.", 0),
        ("'THE  GRANDFATHER'", 0),
        ("“The grandfather”\n", 0),
        ("Cant be determined", 1),
        ("can’t be determined!", 1),
        ("The grandson of the grandfather", 2),
    ],
)
def test_match_by_index_letter_or_text(answer: Any, option: int) -> None:
    assert match_options(answer, OPTIONS) == {option}


@pytest.mark.parametrize(
    "answer",
    [
        None,
        "",
        "  ",
        "...",
        "3",
        3,
        -1,
        "-1",
        "+1",
        0.5,
        "1.5",
        "1e0",
        math.inf,
        10**400,
        True,
        "d",
        "(d)",
        "ab",
        "grandfather",
        "The grand",
        "The grandson",
        "I think it is the grandfather",
        "The grandfather, because he is old",
        "(b) because nobody knows",
        "The grandfather or the grandson",
        "determined",
        "\ud800",
        "x" * 10_000_000,
        "(b) " + "Can't be determined " * 500_000,
        "(" * 100_000,
    ],
    ids=lambda value: str(value)[:20].encode("ascii", "replace").decode(),
)
def test_no_match_for_other_text_or_a_part_of_an_option(answer: Any) -> None:
    assert match_options(answer, OPTIONS) == set()


@pytest.mark.parametrize(
    ("answer", "options", "matches"),
    [
        ("us", ("US", "us", "Unknown"), {1}),  # exactly one of them
        ("Us", ("US", "us", "Unknown"), {0, 1}),
        ("u.s.", ("US", "us", "Unknown"), {0, 1}),
        ("C", ("C++", "C", "Unknown"), {1, 2}),  # the text of one, the letter of another
        ("C++", ("C++", "C", "Unknown"), {0}),
        ("C+", ("C++", "C", "Unknown"), {0, 1}),
        ("1", ("1", "2", "3"), {0, 1}),  # the text of one, the index of another
        ("2", ("0", "1", "2"), {2}),
        (1, ("1", "2", "3"), {1}),  # a number is an index
        ("3", ("1", "2", "3"), {2}),
        ("The boy", ("The boy", "The boy", "Unknown"), {0, 1}),
        ("(a) The girl", ("The boy", "The girl", "Unknown"), {0, 1}),
        ("1. The boy", ("The boy", "The girl", "Unknown"), {0, 1}),
        ("B. Smith", ("B. Smith", "C. Jones", "Unknown"), {0}),
        ("!!!", ("???", "!!!", "Unknown"), {1}),
        ("...", ("???", "!!!", "Unknown"), set()),  # nothing is left of them to compare
        ("लड़की।", ("लड़का", "लड़की", "Unknown"), {1}),  # marks tell words apart
    ],
)
def test_ambiguous_answers_match_several_options(
    answer: Any, options: tuple[str, str, str], matches: set[int]
) -> None:
    assert match_options(answer, options) == matches


words = st.text(st.characters(codec="utf-8", categories=("L", "Zs", "Nd", "P")), max_size=12)


@settings(max_examples=300, deadline=None)
@given(st.tuples(words, words, words), st.integers(0, 2), words)
def test_text_of_an_option_always_matches_it(
    options: tuple[str, str, str], place: int, other: str
) -> None:
    if options[place].strip():
        assert place in match_options(options[place], options)
    for answer in (other, options[place].upper(), f"{other}.", f"({other})"):
        assert match_options(answer, options) <= {0, 1, 2}


# --- tables ------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Eight questions on age; the options are "The elder", "The Not known", "The youth"."""
    return write(tmp_path, [*block(0), *block(4, template=2)])


RECORDS: list[dict[str, Any]] = [
    {"category": "Age", "example_id": 0, "answer": "The elder"},
    {"category": "Age", "example_id": 1, "answer": 0},
    {"category": "Age", "example_id": 2, "answer": None},
    {"category": "Age", "example_id": 3, "answer": "NA"},
    {"category": "Age", "example_id": 4, "answer": "null"},
    {"category": "Age", "example_id": 6, "answer": "the youth,\nI think"},
    {"category": "Age", "example_id": 7, "answer": "(c)"},
]


def written(folder: Path, suffix: str, records: list[dict[str, Any]] = RECORDS) -> Path:
    path = folder / f"answers{suffix}"
    if suffix == ".csv":
        pd.DataFrame(records).to_csv(path, index=False)
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        texts = [
            r | {"answer": r["answer"] if r["answer"] is None else str(r["answer"])}
            for r in records
        ]
        pd.DataFrame(texts).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_scores_by_hand_from_every_file_type(data: Path, suffix: str) -> None:
    result = score_bbq(read_answers(written(data, suffix)), data)
    age = result["categories"]["Age"]
    assert (age["n_rows"], age["n_unanswered"], age["n_unparsed"]) == (8, 1, 4)
    assert (age["n_ambiguous"], age["n_disambiguated"]) == (1, 2)
    assert age["bias_ambiguous"] == 1 and age["accuracy_ambiguous"] == 0
    assert age["bias_disambiguated"] == 1 and age["accuracy_disambiguated"] == 1
    assert age["share_unparsed"] == pytest.approx(4 / 7)
    assert result == score_bbq(pd.DataFrame(RECORDS), data)


def test_missing_values_differ_from_the_strings_na_and_null(data: Path) -> None:
    for suffix in (".csv", ".jsonl", ".parquet"):
        answers = list(read_answers(written(data, suffix))["answer"])
        assert answers[2] is None and answers[3:5] == ["NA", "null"], suffix


@pytest.mark.parametrize("kind", ["float64", "Int64", "int64[pyarrow]", "category", "object"])
def test_indices_of_every_dtype_with_gaps(data: Path, kind: str) -> None:
    answers = [0, 1, 2, None, 0, 1, 2, 1]
    series = pd.Series(answers, dtype="float64").astype("Int64" if kind == "Int64" else "float64")
    table = pd.DataFrame({"category": "Age", "example_id": range(8), "answer": series.astype(kind)})
    result = score_bbq(table, data)
    table.to_parquet(data / "answers.parquet")
    table.to_csv(data / "answers.csv", index=False)  # 0.0, 1.0 and so on
    assert result["categories"]["Age"]["n_unparsed"] == 1
    assert result["categories"]["Age"]["share_option_1"] == pytest.approx(3 / 7)
    for name in ("answers.parquet", "answers.csv"):
        assert score_bbq(read_answers(data / name), data) == result


def test_numpy_scalars_are_indices(data: Path) -> None:
    answers = np.array([np.int64(0), np.float32(2.0), np.int8(1)], dtype=object)
    numbers = np.array([np.int64(0), np.int64(1), np.int64(2)], dtype=object)
    table = pd.DataFrame({"category": "Age", "example_id": numbers, "answer": answers})
    assert score_bbq(table, data)["categories"]["Age"]["n_unparsed"] == 0


def test_byte_order_mark_windows_line_ends_and_extra_columns(data: Path) -> None:
    path = data / "answers.csv"
    lines = ["note, example_id ,category,answer", '"a ""b"", c",3,Age,"the youth."']
    text = "\r\n".join([*lines, "", ",4.0, Age ,1", ""])
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    table = read_answers(path)
    assert list(table.index) == [2, 4] and table.index.name == "line"
    age = score_bbq(table, data)["categories"]["Age"]
    assert (age["n_ambiguous"], age["n_disambiguated"], age["n_unparsed"]) == (1, 1, 0)


def test_answer_of_ten_megabytes_is_unparsed(data: Path) -> None:
    records = [{"category": "Age", "example_id": i, "answer": 0} for i in range(8)]
    records[3]["answer"] = "well, " * 1_700_000
    for suffix in (".csv", ".jsonl", ".parquet"):
        result = score_bbq(read_answers(written(data, suffix, records)), data)
        assert result["categories"]["Age"]["n_unparsed"] == 1


def test_category_by_its_name_or_its_file(tmp_path: Path) -> None:
    write(tmp_path, block(0), "ages_2.jsonl")
    write(tmp_path, block(0, category="SES"), "Race.jsonl")
    write(tmp_path, block(0, category="Race"), "other.jsonl.gz")
    names = ["Age", "ages_2", "SES", "Race", "other"]
    table = pd.DataFrame({"category": names, "example_id": [0, 1, 2, 3, 2], "answer": 0})
    result = score_bbq(table, tmp_path)["categories"]
    assert {name: one["n_unanswered"] for name, one in result.items()} == {
        "Age": 2,
        "SES": 3,
        "Race": 2,  # a category of the data goes before a file of that name
    }
    write(tmp_path, [*block(0, category="A"), *block(0, category="B")], "both.jsonl")
    with pytest.raises(InputError, match="'both' has no example_id 0"):  # of which category?
        score_bbq(pd.DataFrame([{"category": "both", "example_id": 0, "answer": 0}]), tmp_path)
    twice = pd.DataFrame({"category": ["Age", "ages_2"], "example_id": 1, "answer": 0})
    with pytest.raises(InputError, match="rows 0 and 1: 'Age' 1 is answered twice"):
        score_bbq(twice, tmp_path)


@pytest.mark.parametrize(
    "spell",
    [
        int,
        float,
        str,
        np.int64,
        np.float32,
        Decimal,
        lambda i: f"{i}.0",
        lambda i: f"{i}.",
        lambda i: f" {i} ",
        lambda i: f"({i})",
        lambda i: f"[{i}]",
        lambda i: f"{i})",
        lambda i: f"**{i}**",
        lambda i: f'"{i}"',
        lambda i: chr(ord("０") + i),  # full width
        lambda i: f"（{i}）",
        lambda i: f"{i}. {['The elder', 'The Not known', 'The youth'][i - 1]}",
    ],
)
def test_answers_counted_from_one_are_refused_in_every_spelling(data: Path, spell: Any) -> None:
    """They would be answers to other options, with an accuracy near 0."""
    answers = [spell(1 + i % 3) for i in range(8)]
    table = pd.DataFrame({"category": "Age", "example_id": range(8)}).assign(
        answer=pd.Series(answers, dtype=object)
    )
    with pytest.raises(InputError, match="answers: 2 answers are 3 and none is 0"):
        score_bbq(table, data)
    for suffix in (".csv", ".parquet") if not isinstance(answers[0], Decimal) else ():
        path = data / f"answers{suffix}"
        frame = table.assign(answer=pd.Series(answers))
        frame.to_csv(path, index=False) if suffix == ".csv" else frame.to_parquet(path)
        with pytest.raises(InputError, match=r"2 answers are 3 and none is 0"):
            score_bbq(read_answers(path), data, str(path))
    table["answer"] = [spell(i % 3) if i % 3 or i > 3 else 0 for i in range(8)]  # one 0: from 0
    assert score_bbq(table, data)["categories"]["Age"]["n_unanswered"] == 0


@pytest.mark.parametrize("answers", [["1", "2"], ["b", "c"], ["3", 0], ["The youth", "3 people"]])
def test_answers_that_may_count_from_zero_are_scored(data: Path, answers: list[Any]) -> None:
    table = pd.DataFrame({"category": "Age", "example_id": [0, 1], "answer": answers})
    assert score_bbq(table, data)["categories"]["Age"]["n_unanswered"] == 6


def test_text_of_an_option_that_is_a_number_is_no_index(tmp_path: Path) -> None:
    records = block(0)
    for record in records:
        record |= {"ans0": "3", "ans2": "4"}
    table = pd.DataFrame({"category": "Age", "example_id": range(4), "answer": "3"})
    age = score_bbq(table, write(tmp_path, records))["categories"]["Age"]
    assert age["share_option_0"] == 1 and age["n_unparsed"] == 0


@pytest.mark.parametrize("name", ["race_x_ses", "Race x SES", "RACE-X-SES", " Race_x_SES "])
def test_category_in_another_case_or_with_blanks(tmp_path: Path, name: str) -> None:
    write(tmp_path, [*block(0), *block(0, category="Race_x_SES")])
    table = pd.DataFrame({"category": [name], "example_id": [" 2.0 "], "answer": [0]})
    result = score_bbq(table, tmp_path)["categories"]
    assert (result["Race_x_SES"]["n_unanswered"], result["Age"]["n_unanswered"]) == (3, 4)


def test_data_dir_may_be_the_bbq_folder(data: Path) -> None:
    table = pd.DataFrame(RECORDS)
    assert score_bbq(table, data / "bbq") == score_bbq(table, data)


def test_options_with_equal_spelling_are_unclear(tmp_path: Path) -> None:
    records = block(0)
    for record in records:
        record |= {"ans0": "The man", "ans2": "the man."}
    data = write(tmp_path, records)
    answers = ["The man!", "THE MAN", "(c)", "no idea"]  # the second: but for case, the first
    table = pd.DataFrame({"category": "Age", "example_id": range(4), "answer": answers})
    age = score_bbq(table, data)["categories"]["Age"]
    assert (age["n_unparsed"], age["n_unclear"]) == (2, 1)
    assert age["share_option_0"] == age["share_option_2"] == 0.5


def test_intersections_and_names_are_in_no_overall_score(tmp_path: Path) -> None:
    people = (("Ann Lee", "F"), ("Bo Ray", "M"))
    names = block(0, people, ("F",), category="G", template=30)
    for record in names:
        record |= {"ans0": "Ann Lee", "ans2": "Bo Ray"}
    races = (("Black man", "M-Black"), ("Arab man", "M-Arab"))
    write(tmp_path, names + block(4, (("woman", "woman"), ("man", "man")), ("F",), category="G"))
    write(tmp_path, block(0, races, ("Black",), category="Race_x_gender"), "cross.jsonl")
    table = pd.DataFrame(
        [("G", i, [0, 0, 2, 2][i % 4] if i < 4 else 1) for i in range(8)]
        + [("Race_x_gender", i, 0) for i in range(4)],
        columns=["category", "example_id", "answer"],
    )
    result = score_bbq(table, tmp_path)
    assert list(result["categories"]) == ["G", "G (names)", "Race_x_gender"]
    assert result["categories"]["G (names)"]["bias_ambiguous"] == 1
    for one in result["overall"].values():
        assert one["n_rows"] == 4 and one["accuracy_ambiguous"] == 1 and one["bias_ambiguous"] == 0
    only = score_bbq(table[table["category"] == "Race_x_gender"], tmp_path)
    for one in only["overall"].values():
        assert one["n_unanswered"] == one["n_rows"] == 4
        assert all(one[name] is None for name in METRICS)


def test_undecided_rows_count_in_accuracy_only(tmp_path: Path) -> None:
    data = write(tmp_path, [*block(0, (("man", "man"), ("boy", "boy")), ("F",)), *block(4)])
    table = pd.DataFrame({"category": "Age", "example_id": range(8), "answer": 0})
    age = score_bbq(table, data)["categories"]["Age"]
    assert age["n_undecided"] == 4 and age["n_ambiguous"] == 4
    assert age["accuracy_disambiguated"] == 0.5 and age["bias_disambiguated"] == 0
    age = score_bbq(table[2:].replace({"answer": {0: 1}}), data)["categories"]["Age"]
    assert (age["n_undecided"], age["n_unanswered"]) == (2, 2)


# --- what cannot be scored ---------------------------------------------------------------------

HEAD = "category,example_id,answer\n"


@pytest.mark.parametrize(
    ("name", "content", "fragment"),
    [
        ("a.csv", b"", "has no answers"),
        ("a.csv", HEAD.encode(), "has no answers"),
        ("a.jsonl", b"\n\n", "has no answers"),
        ("a.csv", b"category,example_id\nAge,1\n", "column 'answer' is missing; needed: category"),
        ("a.csv", b"category;example_id;answer\nAge;1;0\n", "column 'category' is missing"),
        ("a.csv", f"answer,{HEAD}1,Age,1,2\n".encode(), "column 'answer' appears twice"),
        ("a.csv", f"{HEAD}Age,1,0\nAge,2".encode(), "line 3: 2 fields, but 3 columns"),
        ("a.csv", f"{HEAD}Age,1,The boy, he\n".encode(), "line 2: 4 fields, but 3 columns"),
        ("a.csv", f'{HEAD}Age,1,"The boy\nAge,2,0\n'.encode(), "line 3: not CSV"),
        ("a.csv", f"{HEAD}Age,1,0\n".encode() + b"Age,2,\xff\xfe\n", "line 3: not UTF-8"),
        ("a.csv", HEAD.encode("utf-16"), "line 1: not UTF-8"),
        (
            "a.csv",
            f"{HEAD}Age,one,0\n".encode(),
            "line 2: example_id must be .* not 'one'",
        ),
        (
            "a.csv",
            f"{HEAD}Age,,0\n".encode(),
            "line 2: example_id must be .* not 'None'",
        ),
        ("a.csv", f"{HEAD}Age,1.5,0\n".encode(), "line 2: example_id must be a whole"),
        ("a.csv", f"{HEAD},1,0\n".encode(), "line 2: category must be the name of a BBQ category"),
        (
            "a.csv",
            f"{HEAD}Age,1,0\nAge,99,0\nages,1,0\n".encode(),
            "line 3: 'Age' has no example_id 99 in .*bbq, and 1 more .*categories: Age",
        ),
        (
            "a.csv",
            f"{HEAD}Age,1,0\nAge,2,0\n\nAge,1,0\n".encode(),
            "lines 2 and 5: 'Age' 1 is answ",
        ),
        ("a.jsonl", b'{"category": "Age", "example_id": 1, "ans', "line 1: not JSON .*cut short"),
        ("a.jsonl", b'\n{"category": "Age", "example_id": 1}', "line 2: key 'answer' is missing"),
        ("a.jsonl", b"[1, 2]", "line 1: each row must be one JSON object"),
        ("a.jsonl", b"\n\xff", "line 2: not UTF-8"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.jsonl", b'{"example_id": ' + b"9" * 5_000 + b"}", "line 1: not JSON"),
        (
            "a.jsonl",
            b'{"category": "Age", "example_id": true, "answer": 1}',
            "line 1: example_id must be a whole",
        ),
        (
            "a.jsonl",
            b'{"category": 5, "example_id": 1, "answer": 1}',
            "line 1: category must be the name of a BBQ category",
        ),
        (
            "a.jsonl",
            b'{"category": "Age", "example_id": 1, "answer": [0.1, 0.9, 0]}',
            "line 1: answer must be a string or a number, not a list",
        ),
        ("a.parquet", b"PAR1 and no more", "not a valid parquet file"),
        ("a.parquet", b"", "not a valid parquet file"),
        ("a.xlsx", b"x", "unknown file type; give a .csv"),
        ("answers", b"x", "unknown file type; give a .csv"),
    ],
)
def test_bad_table_is_refused_in_one_line(
    data: Path, name: str, content: bytes, fragment: str
) -> None:
    path = data / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=fragment) as caught:
        score_bbq(read_answers(path), data, str(path))
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 400


def test_folders_missing_files_and_bad_parquet_are_refused(data: Path) -> None:
    (data / "answers.parquet").mkdir()
    with pytest.raises(InputError, match="a folder; give a file"):
        read_answers(data / "answers.parquet")
    with pytest.raises(InputError, match=r"absent\.csv: cannot be read \(No such file"):
        read_answers(data / "absent.csv")
    path = data / "a.parquet"
    pq.write_table(pa.table({"category": ["Age"], "example_id": [1]}), path)
    with pytest.raises(InputError, match="column 'answer' is missing"):
        read_answers(path)
    pq.write_table(pa.table({"category": ["Age"], "example_id": [1], "answer": [[0.1, 0.9]]}), path)
    with pytest.raises(InputError, match="row 1: answer must be a string or a number"):
        score_bbq(read_answers(path), data, str(path))
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(InputError, match="not a valid parquet file"):
        read_answers(path)


def test_hostile_names_are_escaped_in_errors(data: Path) -> None:
    names = ["\x1b[2J\u202e\nAge", "x" * 1_000_000]
    for name in names:
        with pytest.raises(InputError) as caught:
            score_bbq(pd.DataFrame([{"category": name, "example_id": 1, "answer": 0}]), data)
        message = str(caught.value)
        assert message.isprintable() and len(message) < 400


# --- the command -------------------------------------------------------------------------------


def command(*arguments: str) -> Any:
    return CliRunner().invoke(score.app, ["bbq", *arguments], catch_exceptions=False)


def test_json_is_strict_and_complete(data: Path) -> None:
    path = written(data, ".csv")
    result = command(str(path), "--data-dir", str(data), "--json")
    assert result.exit_code == 0 and result.stderr == ""

    def refuse(word: str) -> None:
        raise AssertionError(word)

    record = json.loads(result.stdout, parse_constant=refuse)
    assert list(record) == ["categories", "overall"] and list(record["overall"]) == [
        "pooled",
        "mean",
    ]
    promised = [
        "accuracy_ambiguous",
        "accuracy_disambiguated",
        "bias_ambiguous",
        "bias_disambiguated",
        "share_unknown_ambiguous",
        "share_unknown_disambiguated",
        "n_ambiguous",
        "n_disambiguated",
    ]
    for one in (record["categories"]["Age"], *record["overall"].values()):
        assert set(promised) <= set(one) and set(COUNTS) <= set(one)
    assert record == score_bbq(read_answers(path), data)


def test_table_of_the_command(data: Path) -> None:
    write(data, block(0, category="Race_x_SES"), "other.jsonl")
    result = command(str(written(data, ".csv")), "--data-dir", str(data))
    shown = result.stdout
    assert result.exit_code == 0 and all(len(line) <= 112 for line in shown.splitlines()[:12])
    (age,) = [line for line in shown.splitlines() if line.strip().startswith("Age")]
    # one ambiguous answer in one of two templates: no interval; two decided ones, one in each
    assert age.split() == ["Age", *"1.00 1.00 [1.00, 1.00] .00 1.00 .00 .67 .00 .33 7".split()]
    assert "Unparsed: 4 of 7 answers" in shown
    assert "Unanswered: 5 of 12 rows of the data: Age 1, Race_x_SES 4 (all)" in shown
    assert "Race_x_SES" not in shown.split("Unanswered")[0]


def test_table_and_json_have_the_same_intervals(tmp_path: Path) -> None:
    rows = [row for k in range(6) for row in block(4 * k, template=k)]
    data = write(tmp_path, rows)
    generator = np.random.default_rng(3)
    records = [
        {"category": "Age", "example_id": i, "answer": int(generator.integers(3))}
        for i in range(24)
    ]
    path = written(tmp_path, ".jsonl", records)
    age = score_bbq(read_answers(path), data)["categories"]["Age"]
    low, value, high = (age[f"bias_ambiguous{end}"] for end in ("_low", "", "_high"))
    assert low < value < high and age["n_templates"] == 6
    row = {"value": value, "low": low, "high": high}
    shown = command(str(path), "--data-dir", str(data)).stdout
    assert compact_with_interval(row) in shown


def test_command_refuses_answers_counted_from_one(data: Path) -> None:
    records = [{"category": "Age", "example_id": i, "answer": 1 + i % 3} for i in range(8)]
    path = str(written(data, ".csv", records))
    with pytest.raises(InputError, match="2 answers are 3 and none is 0, but indices start at 0"):
        command(path, "--data-dir", str(data), "--json")
    records[0]["answer"] = 0
    assert command(str(written(data, ".csv", records)), "--data-dir", str(data)).stderr == ""


def test_missing_and_empty_data_folders_are_named(data: Path) -> None:
    path = str(written(data, ".csv"))
    with pytest.raises(InputError, match="no such data folder; give --data-dir"):
        command(path, "--data-dir", str(data / "absent"))
    (data / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: no \*\.jsonl"):
        command(path, "--data-dir", str(data / "empty"))


def test_scoring_loads_no_torch(data: Path) -> None:
    code = (
        "import sys; from selfcorrect.scripts.commands.score import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'trl', 'matplotlib', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    arguments = ["bbq", str(written(data, ".csv")), "--data-dir", str(data)]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, cwd=ROOT / "tests")
