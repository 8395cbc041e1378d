"""`selfcorrect data`: what is listed, fetched and checked, and the exit code of each."""

import gzip
import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from selfcorrect.evaluate.data.catalogue import DataSet, catalogue
from selfcorrect.scripts.commands import data
from tests.support.command import run_command

FILES = {"one": b'{"a": 1}\n{"a": 2}\n', "two": b"a,b\n1,2\n"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A catalogue of two sets that a local server has, and one on the hub; returns its folder."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("SELFCORRECT_DATA_DIR", str(tmp_path / "data"))
    public = tmp_path / "public" / ("0" * 40)
    public.mkdir(parents=True)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    handler = partial(Quiet, directory=str(tmp_path / "public"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    sets = {}
    for name, text in FILES.items():
        suffix = "jsonl" if name == "one" else "csv"
        (public / f"{name}.{suffix}").write_bytes(text)
        file = {"path": f"{name}/{name}.{suffix}", "from": f"{name}.{suffix}", "bytes": len(text)}
        file |= {"sha256": hashlib.sha256(text).hexdigest(), "rows": 2 if name == "one" else 1}
        about = {"title": f"Set {name}", "kind": "benchmark", "licence": "none stated"}
        about |= {"citation": "Nobody (2026).", "homepage": "https://example.org", "rows": 2}
        about |= {"revision": "0" * 40, "note": f"Beware of {name}.", "files": [file]}
        about |= {"source": f"http://127.0.0.1:{server.server_address[1]}/{{revision}}/"}
        sets[name] = DataSet.model_validate(about)
    hub = {"path": "owner/pairs", "data_dir": "part", "split": "train_prefs"}
    about |= {"files": [], "hub": hub, "source": None, "kind": "feedback", "rows": None}
    sets["pairs"] = DataSet.model_validate(about)
    monkeypatch.setattr(data, "catalogue", lambda: sets)
    yield tmp_path
    server.shutdown()
    server.server_close()


def data_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    return run_command(monkeypatch, "data", *arguments)


def test_fetch_shows_terms_first_and_verifies_checksums(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert data_command(monkeypatch, "fetch", "one") == 0
    output = capsys.readouterr().out
    assert output.index("one: licence: none stated; source: https://example.org") == 0
    assert "Beware of one." in output and "1 fetched, 0 present before" in output
    assert (folder / "data" / "one" / "one.jsonl").read_bytes() == FILES["one"]
    assert data_command(monkeypatch, "check") == 0  # only what is here counts
    assert capsys.readouterr().out == "one: 1 of 1 files match their checksum\n"
    assert data_command(monkeypatch, "check", "one", "two") == 1
    output = capsys.readouterr()
    assert "two: missing" in output.out
    assert output.err == f"selfcorrect: {folder / 'data'}: missing or different: two\n"
    assert data_command(monkeypatch, "fetch", "--all") == 0
    assert "0 fetched, 1 present before" in capsys.readouterr().out
    assert data_command(monkeypatch, "check", "one", "two") == 0


def test_data_dir_option(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = folder / "elsewhere"
    assert data_command(monkeypatch, "fetch", "one", "--data-dir", str(elsewhere)) == 0
    assert (elsewhere / "one" / "one.jsonl").is_file() and not (folder / "data").exists()
    (elsewhere / "one" / "one.jsonl").unlink()
    (elsewhere / "one" / "one.jsonl.gz").write_bytes(gzip.compress(FILES["one"]))
    assert data_command(monkeypatch, "check", "one", "--data-dir", str(elsewhere)) == 0
    assert data_command(monkeypatch, "list", "--data-dir", str(elsewhere)) == 0
    output = capsys.readouterr().out
    assert "1 of 1" in output and "0 of 1" in output and f"Data folder: {elsewhere}" in output


def test_different_file_is_reported_and_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = folder / "data" / "one" / "one.jsonl"
    changed.parent.mkdir(parents=True)
    changed.write_text('{"a": 3}\n')
    assert data_command(monkeypatch, "check") == 1
    assert f"{changed}: 1 rows of 2, 9 bytes of 18, checksum mismatch" in capsys.readouterr().out
    assert data_command(monkeypatch, "list") == 0
    assert "0 of 1, 1 different" in capsys.readouterr().out
    assert data_command(monkeypatch, "fetch", "--all") == 2
    assert "move it away and fetch again" in capsys.readouterr().err
    assert changed.read_text() == '{"a": 3}\n'
    assert (folder / "data" / "two" / "two.csv").read_bytes() == FILES["two"]


def test_each_failure_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (folder / "public").rglob("*.*"):
        path.unlink()
    assert data_command(monkeypatch, "fetch", "--all") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("the server answers 404" in line for line in lines)


def test_unreachable_source_ends_the_command_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from selfcorrect.evaluate.data.fetch import Unreachable

    asked: list[DataSet] = []

    def fetch_set(data_set: DataSet, *_: object, **__: object) -> list[Path]:
        asked.append(data_set)
        raise Unreachable("no connection")

    monkeypatch.setattr(data, "fetch_set", fetch_set)
    assert data_command(monkeypatch, "fetch", "--all") == 1 and len(asked) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["fetch"], 2, "--all; available: one, two, pairs"),
        (["fetch", "--all", "one"], 2, "name data sets or give --all"),
        (["fetch", "thre"], 2, "unknown data set 'thre'; choose from one, two, pairs"),
        (["check", "thre"], 2, "unknown data set 'thre'"),
        (["list", "thre"], 2, "unknown data set 'thre'"),
        (["check"], 1, "contains no data set"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    assert data_command(monkeypatch, *arguments) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_set_on_the_hub_goes_through_datasets(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    calls: list[tuple[tuple, dict]] = []

    def load_dataset(*given: object, **named: object) -> datasets.Dataset:
        calls.append((given, named))
        return datasets.Dataset.from_list([{"a": 1}] * 7)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert data_command(monkeypatch, "fetch", "pairs") == 0
    named = {"data_dir": "part", "split": "train_prefs", "revision": "0" * 40}
    assert calls == [(("owner/pairs", None), named)]
    output = capsys.readouterr().out
    line = f"path: owner/pairs, data_dir: part, split: train_prefs, revision: {'0' * 40}"
    assert "7 rows" in output and line in output
    assert data_command(monkeypatch, "check", "pairs") == 0
    assert "loaded through datasets by its hub name" in capsys.readouterr().out


def test_list_shows_every_fact(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert data_command(monkeypatch, "list", *catalogue()) == 0
    output = capsys.readouterr().out
    for name, data_set in catalogue().items():
        assert name in output
        for text in (
            data_set.licence,
            data_set.citation,
            data_set.homepage,
            data_set.revision,
            data_set.address,
        ):
            assert text in output
        for file in data_set.files:
            assert file.sha256 in output and f"{file.rows:,} rows" in output
    assert "{revision}" not in output
    assert "its checksum is not verified" in output
    assert data_command(monkeypatch, "list") == 0
    table = capsys.readouterr().out
    assert all(name in table for name in catalogue()) and "58,492" in table
