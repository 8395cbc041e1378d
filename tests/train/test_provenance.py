"""run.json records versions and hardware, and a start on other ones logs what changed."""

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
    record_start(RECIPE, run, "2026-11-27")
    return json.loads((run / "run.json").read_text())


def test_unchanged_facts_add_and_log_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = start(tmp_path, monkeypatch)
    assert start(tmp_path, monkeypatch) == first
    assert first["changes"] == [] and first["begun"].endswith(" UTC")
    assert not caplog.messages


def test_changed_versions_are_recorded_and_logged_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start(tmp_path, monkeypatch)
    versions = {"torch": "2.13", "trl": "1.16"}
    record = start(
        tmp_path,
        monkeypatch,
        versions=versions,
        threads_per_job=2,
        environment={"MKL_CBWR": "AVX2"},
    )
    (change,) = record["changes"]
    assert change.pop("at").endswith(" UTC")
    assert change == {
        "threads_per_job": ["1", "2"],
        "versions.torch": ["2.12", "2.13"],
        "environment.MKL_CBWR": [None, "AVX2"],
    }
    assert record["versions"] == versions
    (line,) = caplog.messages
    assert line.startswith(f"{tmp_path}: ")
    for change in ("threads_per_job from 1 to 2", "torch from 2.12 to 2.13", "MKL_CBWR from none"):
        assert change in line


def test_history_stays_once_the_facts_are_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start(tmp_path, monkeypatch)
    start(tmp_path, monkeypatch, threads_per_job=2)
    start(tmp_path, monkeypatch, threads_per_job=2)
    assert [("threads_per_job from 1 to 2" in line) for line in caplog.messages] == [True, True]
    record = start(tmp_path, monkeypatch)
    assert len(caplog.messages) == 2
    assert [change["threads_per_job"] for change in record["changes"]] == [["1", "2"], ["2", "1"]]


def test_harmless_changes_are_recorded_but_not_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start(tmp_path, monkeypatch)
    record = start(tmp_path, monkeypatch, jobs=2, cores=64, seeds=[0, 1], platform="Linux-2")
    assert not caplog.messages
    assert set(record["changes"][0]) == {"at", "jobs", "cores", "platform"}
    assert record["seeds"] == [0, 1]


def test_record_of_an_older_version_logs_no_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"name": "r", "threads_per_job": 1}))
    record = start(tmp_path, monkeypatch)
    assert record["begun"] is None and record["changes"] == []
    assert not caplog.messages


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_damaged_run_json_is_named_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(InputError, match=r"run.json: (not readable as JSON|damaged)"):
        start(tmp_path, monkeypatch)
    assert (tmp_path / "run.json").read_text() == text


def test_facts_name_what_torch_computes_with(monkeypatch: pytest.MonkeyPatch) -> None:
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
