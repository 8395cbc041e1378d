"""The catalogue is complete and pinned, and published files are told from others."""

import csv
import gzip
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from selfcorrect.evaluate.data.catalogue import (
    CATALOGUE,
    DataFile,
    catalogue,
    check_file,
    check_set,
    choose,
    count_rows,
    load_catalogue,
)
from selfcorrect.recipes.foundation.errors import InputError

BENCHMARKS = ["bbq", "winogender", "law_school", "crows_pairs", "stereoset", "winobias"]
BENCHMARKS += ["winogenerated", "mbbq"]
TEXT = b'{"a": 1}\n{"a": 2}\n'


def entry(**changes: Any) -> dict[str, Any]:
    file = {
        "path": "small/a.jsonl",
        "from": "data/a.jsonl",
        "bytes": len(TEXT),
        "sha256": hashlib.sha256(TEXT).hexdigest(),
        "rows": 2,
    }
    return {
        "title": "Small",
        "kind": "benchmark",
        "licence": "MIT",
        "citation": "Nobody (2026). Small.",
        "homepage": "https://example.org",
        "revision": "0" * 40,
        "source": "https://example.org/{revision}/",
        "rows": 2,
        "files": [{**file, **changes.pop("file", {})}],
        **changes,
    }


def write(path: Path, **entries: object) -> Path:
    path.write_text(yaml.safe_dump(entries))
    return path


# --- the catalogue of the package --------------------------------------------------------------


def test_every_data_set_has_source_and_terms() -> None:
    sets = catalogue()
    assert [name for name, data_set in sets.items() if data_set.kind == "benchmark"] == BENCHMARKS
    assert [name for name, data_set in sets.items() if data_set.kind == "feedback"] == [
        "hh_rlhf_test",
        "hh_rlhf",
        "ultrafeedback",
    ]
    for name, data_set in sets.items():
        assert data_set.licence and (
            "arXiv:" in data_set.citation or "doi:" in data_set.citation
        ), name
        assert data_set.revision in data_set.address or data_set.hub, name
        for file in data_set.files:
            assert data_set.url(file).startswith("https://") and data_set.revision in data_set.url(
                file
            )
            assert "{" not in data_set.url(file)
    assert sets["law_school"].licence == "none stated"


def test_rows_of_a_set_count_its_items() -> None:
    rows = {
        name: {file.path: file.rows for file in data_set.files}
        for name, data_set in catalogue().items()
    }
    bbq = {path: number for path, number in rows["bbq"].items() if path.endswith(".jsonl")}
    assert (len(bbq), sum(bbq.values()), catalogue()["bbq"].rows) == (11, 58_492, 58_492)
    assert catalogue()["winogender"].rows == rows["winogender"]["winogender/templates.tsv"]
    sides = [n for path, n in rows["winobias"].items() if "stereotyped" in path]
    assert (len(sides), sum(sides)) == (8, catalogue()["winobias"].rows)
    examples = rows["winogenerated"]["winogenerated/winogenerated_examples.jsonl"]
    assert catalogue()["winogenerated"].rows == examples
    for name in ("law_school", "crows_pairs", "stereoset", "mbbq", "hh_rlhf_test"):
        assert catalogue()[name].rows == sum(rows[name].values())


def test_files_go_to_the_folders_of_their_experiments() -> None:
    for name in BENCHMARKS:
        assert {file.path.split("/")[0] for file in catalogue()[name].files} == {name}


def test_repository_contains_no_data_files() -> None:
    assert CATALOGUE.stat().st_size < 30_000
    folder = CATALOGUE.parents[2]
    names = {Path(file.path).name for data_set in catalogue().values() for file in data_set.files}
    inside = ("recipes", "evaluate", "train", "scripts", "tests", "docs")
    kept = {path.name.removesuffix(".gz") for part in inside for path in (folder / part).rglob("*")}
    assert not names & kept


# --- a catalogue that is wrong -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"file": {"path": "../outside.jsonl"}}, r"small\.files\.0\.path"),
        ({"file": {"path": "small/../../outside"}}, r"small\.files\.0\.path"),
        ({"file": {"path": "/etc/passwd"}}, r"small\.files\.0\.path"),
        ({"file": {"path": "small//a"}}, r"small\.files\.0\.path"),
        ({"file": {"path": "small/.hidden"}}, r"small\.files\.0\.path"),
        ({"file": {"path": "small\\..\\a"}}, r"small\.files\.0\.path"),
        ({"file": {"path": "C:/a"}}, r"small\.files\.0\.path"),
        ({"file": {"path": "small/a\n"}}, r"small\.files\.0\.path"),
        ({"file": {"from": "../a"}}, r"small\.files\.0\.from"),
        ({"file": {"sha256": "abc"}}, r"small\.files\.0\.sha256"),
        ({"file": {"bytes": -1}}, r"small\.files\.0\.bytes"),
        ({"source": "http://example.org/{revision}/"}, r"must begin with https://"),
        ({"source": "file:///{revision}/"}, r"must begin with https://"),
        ({"source": "https://[/{revision}/"}, r"must begin with https://"),
        ({"source": "https://example.org/main/"}, r"must end with /\{revision\}/"),
        ({"files": []}, r"give either files or hub"),
        ({"hub": {"path": "a/b", "split": "train"}}, r"give either files or hub"),
        ({"revision": "main"}, r"small\.revision"),
        ({"licence": None}, r"small\.licence"),
        ({"checksum": "x"}, r"small\.checksum"),
    ],
)
def test_wrong_entry_is_refused_with_its_key(tmp_path: Path, change: dict, fragment: str) -> None:
    load_catalogue(write(tmp_path / "good.yaml", small=entry()))
    path = write(tmp_path / "bad.yaml", small=entry(**change))
    with pytest.raises(InputError, match=fragment) as caught:
        load_catalogue(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_duplicate_file_and_invalid_yaml_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "twice.yaml", one=entry(), two=entry())
    with pytest.raises(InputError, match=r"small/a\.jsonl is listed twice"):
        load_catalogue(path)
    path.write_text("a: [")
    with pytest.raises(InputError, match="not YAML"):
        load_catalogue(path)
    with pytest.raises(InputError, match="cannot be read"):
        load_catalogue(tmp_path / "none.yaml")


def test_names_are_chosen_once_and_in_order() -> None:
    assert list(choose(["winobias", "bbq", "winobias"], catalogue())) == ["winobias", "bbq"]
    with pytest.raises(InputError, match=r"unknown data set 'bqq'; choose from bbq, winog"):
        choose(["bbq", "bqq"], catalogue())


# --- checking a folder -------------------------------------------------------------------------

FILE = DataFile.model_validate(entry()["files"][0])


def test_plain_and_packed_files_are_checked_by_their_text(tmp_path: Path) -> None:
    assert check_file(FILE, tmp_path).state == "missing"
    packed = tmp_path / "small" / "a.jsonl.gz"
    packed.parent.mkdir()
    for level in (1, 9):  # other bytes, the same text
        packed.write_bytes(gzip.compress(TEXT, level))
        finding = check_file(FILE, tmp_path)
        assert (finding.state, finding.rows, finding.path) == ("right", 2, packed)
    plain = tmp_path / "small" / "a.jsonl"
    plain.write_bytes(TEXT)
    assert check_file(FILE, tmp_path).path == plain
    packed.write_bytes(gzip.compress(TEXT + TEXT))  # both are read: one wrong is wrong
    finding = check_file(FILE, tmp_path)
    assert (finding.state, finding.path) == ("different", packed)


@pytest.mark.parametrize(
    ("content", "rows", "reason"),
    [
        (TEXT[:-1] + b" ", 2, "2 rows of 2, 18 bytes of 18, checksum mismatch"),
        (TEXT[:9], 1, "1 rows of 2, 9 bytes of 18, checksum mismatch"),
        (b"", 0, "0 rows of 2, 0 bytes of 18, checksum mismatch"),
        (TEXT + b"x" * 10_000_000, None, "more than 18 bytes"),
    ],
)
def test_reason_of_a_different_file(
    tmp_path: Path, content: bytes, rows: int | None, reason: str
) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "a.jsonl").write_bytes(content)
    finding = check_file(FILE, tmp_path)
    assert (finding.state, finding.rows, finding.reason) == ("different", rows, reason)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (gzip.compress(TEXT, mtime=0)[:-9], "not a complete gzip file"),
        (TEXT, "not a complete gzip file"),
        (b"\x1f\x8b", "not a complete gzip file"),
        (b"", "0 rows of 2, 0 bytes of 18, checksum mismatch"),  # gzip reads it as an empty text
    ],
)
def test_broken_gzip_file_is_different(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "a.jsonl.gz").write_bytes(content)
    finding = check_file(FILE, tmp_path)
    assert (finding.state, finding.reason) == ("different", reason)


def test_gzip_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "a.jsonl.gz").write_bytes(gzip.compress(b"\0" * 10_000_000, 1))
    read = gzip.GzipFile.read
    sizes: list[int] = []

    def counted_read(self: gzip.GzipFile, size: int | None = -1) -> bytes:
        data = read(self, size)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(gzip.GzipFile, "read", counted_read)
    assert check_file(FILE, tmp_path).reason == "more than 18 bytes"
    assert sizes == [len(TEXT) + 1]


def test_folder_instead_of_a_file_is_different(tmp_path: Path) -> None:
    (tmp_path / "small" / "a.jsonl").mkdir(parents=True)
    assert check_file(FILE, tmp_path).reason.startswith("cannot be read (")


def test_rows_are_records_not_lines() -> None:
    assert count_rows("x.csv", b'a,b\n1,"two\nlines\nof text"\n3,4') == 2  # no last newline
    assert count_rows("x.csv", b"a,b\n1,2\n\n3,4\n") == 2
    assert count_rows("x.tsv", b"a\tb\n1\t2\n") == 1
    assert count_rows("x.csv", b"") == 0
    assert count_rows("x.jsonl", b"{}\n\n{}") == 2
    assert count_rows("x.txt.dev", b"1 one\n2 two\n") == 2
    assert count_rows("x.csv", b"caf\xe9\n") is None
    assert count_rows("x.csv", b"a\n" + b"x" * (csv.field_size_limit() + 1)) is None


def test_real_files_are_as_published() -> None:
    folder = os.environ.get("SELFCORRECT_DATA_DIR")
    if not folder:
        pytest.skip("SELFCORRECT_DATA_DIR is not set: no real file is checked")
    checked = 0
    for name, data_set in catalogue().items():
        for finding in check_set(data_set, Path(folder)):
            assert (finding.state, finding.rows) == ("right", finding.file.rows), (name, finding)
            checked += 1
            if finding.file.packed:  # what is downloaded, where the source publishes it packed
                raw = finding.path.read_bytes()
                expected = (finding.file.packed.bytes, finding.file.packed.sha256)
                assert (len(raw), hashlib.sha256(raw).hexdigest()) == expected
    assert checked == 79
    (law,) = check_set(catalogue()["law_school"], Path(folder))
    assert law.rows == 21_791 and not law.path.read_bytes().endswith(b"\n")
    metadata = check_set(catalogue()["bbq"], Path(folder))[-1]
    assert (Path(metadata.file.path).name, metadata.rows) == ("additional_metadata.csv", 58_556)
    with gzip.open(f"{folder}/bbq/additional_metadata.csv.gz") as handle:
        assert sum(1 for _ in handle) > 58_557  # more lines than records
