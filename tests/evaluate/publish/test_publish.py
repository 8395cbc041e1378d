"""Exports for Every Eval Ever and `datasets`, and uploads to a local stand-in of the hub."""

import hashlib
import json
import re
import sys
import zipfile

import datasets
import numpy as np
import pandas as pd
import pytest

from selfcorrect.evaluate.measuring.cell_files import read_table
from selfcorrect.evaluate.results import load, summarise
from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from selfcorrect.scripts.commands.export import export
from selfcorrect.scripts.commands.push import push
from tests.support.hub import Hub
from tests.support.recorded_run import SMALL, record_run
from tests.support.small_runs import call

CHECKPOINT = "nano-seed-0-checkpoint-10"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record_run(tmp_path_factory.mktemp("publish") / "run", SMALL)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """Return (aggregate, rows or None) by experiment of one checkpoint, and the folder."""
    out = tmp_path_factory.mktemp("eee")
    export(run, "every-eval-ever", out, organization="A & B Lab")
    found = {}
    for path in out.glob(f"data/*/A-B-Lab/{CHECKPOINT}/*.json"):
        samples = path.with_name(f"{path.stem}_samples.jsonl")
        rows = None
        if samples.exists():
            rows = [json.loads(line) for line in samples.read_text().splitlines()]
        found[path.parents[2].name] = json.loads(path.read_text()), rows
    return found, out


def test_every_eval_ever_has_the_values_of_the_table(run, exported):
    found, _ = exported
    frame = summarise(run / "nano/seed-0/ppo/checkpoint-10/evaluation", "x")
    frame = frame[(frame["category"] == "overall") & frame["value"].notna()]
    assert set(found) == {"bbq", "winogender", "law_school"}
    for experiment, (aggregate, _) in found.items():
        table = {
            f"{experiment}/{row['condition']}/{row['metric']}": row
            for row in frame[frame["experiment"] == experiment].to_dict("records")
        }
        results = {r["evaluation_result_id"]: r for r in aggregate["evaluation_results"]}
        assert set(results) == set(table)
        for name, row in table.items():
            details = results[name]["score_details"]
            assert details["score"] == row["value"]
            assert details["uncertainty"]["num_samples"] == row["num_items"]
            assert details["details"]["num_clusters"] == str(row["num_clusters"])
            interval = details["uncertainty"].get("confidence_interval")
            assert (interval is None) == np.isnan(row["low"])
            if interval is not None:
                assert (interval["lower"], interval["upper"]) == (row["low"], row["high"])
                assert interval["confidence_level"] == 0.95 and "bootstrap" in interval["method"]
                half = (row["high"] - row["low"]) / 2
                error = details["uncertainty"]["standard_error"]["value"]
                assert error == pytest.approx(half / 1.96, rel=0.6, abs=1e-9)


def test_every_eval_ever_rows_are_the_answers(run, exported):
    found, out = exported
    assert found["winogender"][1] is None and found["law_school"][1] is None  # nothing is right
    aggregate, rows = found["bbq"]
    file = aggregate["detailed_evaluation_results"]
    identity = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    folder = rf"data/bbq/A-B-Lab/{CHECKPOINT}"
    assert re.fullmatch(rf"{folder}/{identity}_samples\.jsonl", file["file_path"])
    content = (out / file["file_path"]).read_bytes()
    assert hashlib.sha256(content).hexdigest() == file["checksum"]
    assert file["total_rows"] == len(rows)
    folder = run / "nano/seed-0/ppo/checkpoint-10/evaluation"
    answers = {
        (condition, row["item"]): row
        for condition in ("Q", "Q+IF", "Q+IF+CoT")
        for row in read_table(folder / f"bbq.{condition}.parquet", None).to_pylist()
    }
    assert len(rows) == len(answers)
    for row in rows:
        item, _, _ = row["sample_id"].rsplit("/", 2)
        answer = answers[row["evaluation_name"].removeprefix("bbq "), item]
        assert row["input"]["reference"] == [answer["options"][answer["label"]]]
        best = int(np.argmax(answer["logprobs"]))
        assert row["evaluation"]["is_correct"] == (best == answer["label"])
        assert row["output"]["reasoning_trace"] == answer["samples"]


@pytest.fixture(scope="module")
def schemas(tmp_path_factory):
    """The two JSON schemas, from the package's wheel: the package itself needs Python 3.12."""
    folder = tmp_path_factory.mktemp("wheel")
    words = ["-m", "pip", "download", "every-eval-ever==0.3.0", "--no-deps", "--quiet"]
    words += ["--python-version=3.12", "--only-binary=:all:", "--retries=0", f"--dest={folder}"]
    call([sys.executable, *words])
    wheels = list(folder.glob("*.whl"))
    if not wheels:
        pytest.skip("pip cannot fetch every-eval-ever here: its schemas are NOT tested")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return [
            json.loads(wheel.read(f"every_eval_ever/schemas/{name}.schema.json"))
            for name in ("eval", "instance_level_eval")
        ]


def test_every_eval_ever_files_pass_its_own_schemas(exported, schemas):
    jsonschema = pytest.importorskip("jsonschema", reason="pip install jsonschema")
    aggregates, answers = map(jsonschema.Draft202012Validator, schemas)
    for aggregate, rows in exported[0].values():
        aggregates.validate(aggregate)
        for row in rows or []:
            answers.validate(row)
    for schema, instance in (
        (aggregates, exported[0]["bbq"][0]),
        (answers, exported[0]["bbq"][1][0]),
    ):
        broken = {key: value for key, value in instance.items() if key != "schema_version"}
        assert not schema.is_valid(broken)  # the schema does refuse something


def test_dataset_folder_loads_with_its_configurations(run, tmp_path):
    out = tmp_path / "set"
    export(run, "dataset", out)
    cache = str(tmp_path / "cache")
    names = datasets.get_dataset_config_names(str(out), cache_dir=cache)
    assert {"results", "items-bbq", "items-winogender", "items-law_school"} == set(names)
    results = datasets.load_dataset(str(out), split="train", cache_dir=cache).to_pandas()
    expected = load(run)
    assert list(results) == list(expected) and len(results) == len(expected)
    np.testing.assert_array_equal(results["value"], expected["value"].astype(float))
    np.testing.assert_array_equal(results["low"], expected["low"].astype(float))
    items = datasets.load_dataset(str(out), "items-bbq", split="train", cache_dir=cache)
    assert len(items) == 2 * 3 * 3 * 3 * 4 * 4  # models, steps, conditions, categories, templates
    assert {"logprobs", "step", "condition", "item"} <= set(items.column_names)
    assert "95%" in (out / "README.md").read_text()


# --- the hub -------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    server = Hub()
    yield server
    server.close()


def test_results_are_pushed_as_a_private_data_set(run, hub, tmp_path, capsys):
    push(run, "me/results", endpoint=hub.url)
    (created,) = hub.created
    assert created["type"] == "dataset" and created["visibility"] == "private"
    assert {"README.md", "results.parquet", "items/bbq.parquet"} <= set(hub.files)
    (tmp_path / "results.parquet").write_bytes(hub.files["results.parquet"])
    pushed, expected = pd.read_parquet(tmp_path / "results.parquet"), load(run)
    np.testing.assert_array_equal(pushed["value"], expected["value"].astype(float))
    assert hub.url in capsys.readouterr().out


def test_a_checkpoint_is_pushed_as_a_model_with_its_card(run, hub):
    (run / "nano/seed-0/ppo/checkpoint-10/config.json").write_text("{}")
    push(run, "me/nano", checkpoint="nano/0/10", public=True, endpoint=hub.url)
    (created,) = hub.created
    assert created.get("type", "model") == "model" and created["visibility"] == "public"
    assert {"README.md", "config.json", "checkpoint.json"} == set(hub.files)
    assert b"model-index" in hub.files["README.md"]


def test_faults_of_an_upload_are_one_line(run, hub, monkeypatch):
    with pytest.raises(InputError, match="not a checkpoint of"):
        push(run, "me/x", checkpoint="nano/0/11", endpoint=hub.url)
    with pytest.raises(InputError, match="not a name of a repository"):
        push(run, "me/a b", checkpoint="nano/0/10", endpoint=hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(InputError, match=r"refuses the token \(401\)"):
        push(run, "me/x", checkpoint="nano/0/10", endpoint=hub.url)
    assert not hub.files
    hub.close()
    with pytest.raises(RunFailure, match="cannot be reached"):
        push(run, "me/x", checkpoint="nano/0/10", endpoint=hub.url)
