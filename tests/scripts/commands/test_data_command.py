"""`selfcorrect data`: what is listed, fetched and checked, and the exit code of each."""

import gzip
import hashlib
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from selfcorrect.evaluate.data.catalogue import DataSet, catalogue
from selfcorrect.scripts.commands import data
from selfcorrect.scripts.commands.__main__ import app, main

FILES = {"one": b'{"a": 1}\n{"a": 2}\n', "two": b"a,b\n1,2\n"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
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


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command as a user does; returns its exit code."""
    if not any(group.name == "data" for group in app.registered_groups):
        app.add_typer(data.app, name="data")
    monkeypatch.setattr(sys, "argv", ["selfcorrect", "data", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_fetched_sets_are_right_and_terms_are_said_first(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "fetch", "one") == 0
    shown = capsys.readouterr().out
    assert shown.index("one: licence: none stated; source: https://example.org") == 0
    assert "Beware of one." in shown and "1 fetched, 0 already here" in shown
    assert (place / "data" / "one" / "one.jsonl").read_bytes() == FILES["one"]
    assert call(monkeypatch, "check") == 0  # only what is here counts
    assert capsys.readouterr().out == "one: 1 of 1 files as published\n"
    assert call(monkeypatch, "check", "one", "two") == 1
    shown = capsys.readouterr()
    assert "two: not here; selfcorrect data fetch two" in shown.out
    assert shown.err == f"selfcorrect: {place / 'data'}: missing or different: two\n"
    assert call(monkeypatch, "fetch", "--all") == 0
    assert "0 fetched, 1 already here" in capsys.readouterr().out
    assert call(monkeypatch, "check", "one", "two") == 0


def test_a_data_dir_of_ones_own_is_used(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = place / "own"
    assert call(monkeypatch, "fetch", "one", "--data-dir", str(own)) == 0
    assert (own / "one" / "one.jsonl").is_file() and not (place / "data").exists()
    (own / "one" / "one.jsonl").unlink()
    (own / "one" / "one.jsonl.gz").write_bytes(gzip.compress(FILES["one"]))
    assert call(monkeypatch, "check", "one", "--data-dir", str(own)) == 0
    assert call(monkeypatch, "list", "--data-dir", str(own)) == 0
    shown = capsys.readouterr().out
    assert "1 of 1" in shown and "0 of 1" in shown and f"Data folder: {own}" in shown


def test_a_different_file_is_said_and_kept_and_the_others_are_fetched(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = place / "data" / "one" / "one.jsonl"
    own.parent.mkdir(parents=True)
    own.write_text('{"a": 3}\n')
    assert call(monkeypatch, "check") == 1
    assert f"{own}: 1 rows of 2, 9 bytes of 18, another checksum" in capsys.readouterr().out
    assert call(monkeypatch, "list") == 0
    assert "0 of 1, 1 other" in capsys.readouterr().out
    assert call(monkeypatch, "fetch", "--all") == 2
    assert "move it away, then fetch again" in capsys.readouterr().err
    assert own.read_text() == '{"a": 3}\n'
    assert (place / "data" / "two" / "two.csv").read_bytes() == FILES["two"]


def test_two_failures_are_two_lines(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (place / "public").rglob("*.*"):
        path.unlink()
    assert call(monkeypatch, "fetch", "--all") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("the server answers 404" in line for line in lines)


def test_an_unreachable_source_ends_the_command_at_once(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from selfcorrect.evaluate.data.fetch import Unreachable

    asked: list[DataSet] = []

    def fetch_set(data_set: DataSet, *_: object, **__: object) -> list[Path]:
        asked.append(data_set)
        raise Unreachable("no connection")

    monkeypatch.setattr(data, "fetch_set", fetch_set)
    assert call(monkeypatch, "fetch", "--all") == 1 and len(asked) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["fetch"], 2, "name data sets or give --all; there are one, two, pairs"),
        (["fetch", "--all", "one"], 2, "name data sets or give --all"),
        (["fetch", "thre"], 2, "data set 'thre': there is none; there are one, two, pairs"),
        (["check", "thre"], 2, "data set 'thre': there is none"),
        (["list", "thre"], 2, "data set 'thre': there is none"),
        (["check"], 1, "no data set is here; selfcorrect data fetch NAME"),
    ],
)
def test_mistakes_are_one_line(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    said: str,
) -> None:
    assert call(monkeypatch, *arguments) == code
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_set_on_the_hub_goes_through_datasets(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    calls: list[tuple[tuple, dict]] = []

    def load_dataset(*given: object, **named: object) -> datasets.Dataset:
        calls.append((given, named))
        return datasets.Dataset.from_list([{"a": 1}] * 7)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert call(monkeypatch, "fetch", "pairs") == 0
    named = {"data_dir": "part", "split": "train_prefs", "revision": "0" * 40}
    assert calls == [(("owner/pairs", None), named)]
    shown = capsys.readouterr().out
    line = f"path: owner/pairs, data_dir: part, split: train_prefs, revision: {'0' * 40}"
    assert "7 rows" in shown and line in shown
    assert call(monkeypatch, "check", "pairs") == 0
    assert "loaded through datasets by its hub name" in capsys.readouterr().out


def test_all_that_is_known_of_a_set_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "list", *catalogue()) == 0
    shown = capsys.readouterr().out
    for name, one in catalogue().items():
        assert name in shown
        for text in (one.licence, one.citation, one.homepage, one.revision, one.address):
            assert text in shown
        for file in one.files:
            assert file.sha256 in shown and f"{file.rows:,} rows" in shown
    assert "{revision}" not in shown
    assert "no checksum of it is verified here" in shown
    assert call(monkeypatch, "list") == 0
    table = capsys.readouterr().out
    assert all(name in table for name in catalogue()) and "58,492" in table
