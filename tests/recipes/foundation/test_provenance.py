"""run.json: what a run was begun with, what has changed since, and a line where bits may differ."""

import json
from pathlib import Path
from typing import Any

import pytest

from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.load import load_recipe
from selfcorrect.train import provenance
from selfcorrect.train.provenance import record_start, run_facts

FACTS: dict[str, Any] = {
    "name": "r",
    "seeds": [0],
    "platform": "Linux-1",
    "cores": 2,
    "jobs": 1,
    "threads_per_job": 1,
    "versions": {"torch": "2.12", "trl": "1.16"},
    "environment": {},
    "commit": None,
}
RECIPE = load_recipe("quickstart")


def start(run: Path, monkeypatch: pytest.MonkeyPatch, **facts: Any) -> dict[str, Any]:
    monkeypatch.setattr(provenance, "run_facts", lambda recipe: {**FACTS, **facts})
    record_start(RECIPE, run)
    return json.loads((run / "run.json").read_text())


def test_where_nothing_differs_nothing_is_said_and_nothing_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = start(tmp_path, monkeypatch)
    assert start(tmp_path, monkeypatch) == first
    assert first["changes"] == [] and first["begun"].endswith(" UTC")
    assert capsys.readouterr().err == ""


def test_what_may_change_bits_is_kept_and_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start(tmp_path, monkeypatch)
    versions = {"torch": "2.13", "trl": "1.16"}
    found = start(
        tmp_path,
        monkeypatch,
        versions=versions,
        threads_per_job=2,
        environment={"MKL_CBWR": "AVX2"},
    )
    (change,) = found["changes"]
    assert change.pop("at").endswith(" UTC")
    assert change == {
        "threads_per_job": ["1", "2"],
        "versions.torch": ["2.12", "2.13"],
        "environment.MKL_CBWR": [None, "AVX2"],
    }
    assert found["versions"] == versions  # the newest stand above
    assert capsys.readouterr().err == (
        f"selfcorrect: {tmp_path}: since this run was begun, threads_per_job was 1, is 2, torch "
        "was 2.12, is 2.13, environment.MKL_CBWR was none, is AVX2: bits may differ\n"
    )


def test_back_at_the_beginning_nothing_is_said_but_the_history_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start(tmp_path, monkeypatch)
    start(tmp_path, monkeypatch, threads_per_job=2)
    start(tmp_path, monkeypatch, threads_per_job=2)
    assert capsys.readouterr().err.count("threads_per_job was 1, is 2") == 2
    found = start(tmp_path, monkeypatch)
    assert capsys.readouterr().err == ""
    assert [change["threads_per_job"] for change in found["changes"]] == [["1", "2"], ["2", "1"]]


def test_what_changes_no_bit_is_kept_but_not_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start(tmp_path, monkeypatch)
    found = start(tmp_path, monkeypatch, jobs=2, cores=64, seeds=[0, 1], platform="Linux-2")
    assert capsys.readouterr().err == ""
    assert set(found["changes"][0]) == {"at", "jobs", "cores", "platform"}
    assert found["seeds"] == [0, 1]


def test_a_run_of_an_older_version_goes_on_without_a_false_alarm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"name": "r", "threads_per_job": 1}))
    found = start(tmp_path, monkeypatch)
    assert found["begun"] is None and found["changes"] == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_damaged_history_is_named_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(InputError, match=r"run.json: (not readable as JSON|damaged)"):
        start(tmp_path, monkeypatch)
    assert (tmp_path / "run.json").read_text() == text


def test_the_facts_name_what_torch_computes_with(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    facts = run_facts(load_recipe("quickstart", ["launch.threads=3"]))
    assert facts["threads_per_job"] == 3
    assert facts["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["environment"]["MKL_CBWR"] == "COMPATIBLE"
    assert "OMP_NUM_THREADS" not in facts["environment"]  # the recipe's threads take its place
    json.dumps(facts)
