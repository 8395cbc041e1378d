"""Series of checkpoints trained elsewhere: found, measured as a run, resumed, refused."""

import json
import math
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from selfcorrect.evaluate.measuring.cell_files import read_cell
from selfcorrect.evaluate.measuring.measure import measure
from selfcorrect.evaluate.measuring.run import evaluate_run, recipe_plan
from selfcorrect.evaluate.measuring.series import adopt, find_numbers
from selfcorrect.evaluate.results import load
from selfcorrect.evaluate.run_folder import find_checkpoints
from selfcorrect.evaluate.scoring.load_model import load_model
from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from selfcorrect.recipes.load import check_series, load_measured, load_recipe
from selfcorrect.scripts.cluster.jobs import jobs_left
from selfcorrect.scripts.commands.evaluate import evaluate
from selfcorrect.scripts.commands.plan import plan
from selfcorrect.scripts.commands.series import open_run, series_of
from tests.support import ROOT
from tests.support import foreign_checkpoints as foreign


def series(*entries: dict[str, Any], **more: Any) -> Any:
    content = {"name": "s", "checkpoints": list(entries), **foreign.ASKED, **more}
    return check_series(content, "s.yaml")


def measured(given: Any, run: Path, **options: Any) -> int:
    """Open a series in `run` and measure it; return the number of checkpoints measured."""
    open_run(given, run)
    return evaluate_run(load_measured(str(run / "recipe.yaml")), run, **options)


def cells(run: Path) -> list[Path]:
    return sorted(run.glob("*/seed-*/series/checkpoint-*/evaluation/*.parquet"))


LADDER = [(size, seed, step) for size in ("nano", "small") for seed in (0, 1) for step in (0, 250)]
LADDER.append(("nano", 0, 100))


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    """Return the output folders of two sizes with two seeds: out/<size>/seed<n>/checkpoint-<n>."""
    out = tmp_path_factory.mktemp("ladder")
    for size, seed, step in LADDER:
        shape = {"hidden": 16 if size == "nano" else 32, "seed": seed}
        foreign.trl(out / size / f"seed{seed}", step, **shape)
    return out


@pytest.fixture(scope="module")
def finished(ladder, tmp_path_factory):
    """Return the run that `selfcorrect evaluate SERIES.yaml` makes of the ladder, and the YAML."""
    folder = tmp_path_factory.mktemp("finished")
    path = folder / "ladder.yaml"
    content = {
        "name": "ladder",
        "steps_are": "fine-tuning steps",
        "checkpoints": [
            {"model": size, "path": f"{ladder}/{size}/seed{{seed}}/checkpoint-{{step}}"}
            for size in ("nano", "small")
        ],
        **foreign.ASKED,
    }
    path.write_text(json.dumps(content))
    evaluate([str(path)], out=folder / "run")
    return folder / "run", path


def test_a_series_becomes_a_run_with_table_statistics_figures_and_report(finished, ladder):
    run, _ = finished
    frame = load(run)
    found = {tuple(key) for key in frame[["model", "seed", "step"]].drop_duplicates().values}
    assert found == set(LADDER)
    assert frame[["episodes", "kl", "reward"]].isna().all(axis=None)
    sizes = frame.groupby("model")["parameters"].unique()
    assert all(
        list(sizes[size]) == [foreign.model(0, hidden=hidden).num_parameters()]
        for size, hidden in (("nano", 16), ("small", 32))
    )
    statistics = json.loads((run / "statistics.json").read_text())
    steps = [row for row in statistics["trends"] if row["against"] == "step"]
    assert {row["unit"] for row in steps} == {"items", "seeds"}
    assert any(row["p_adjusted"] is not None for row in steps) and statistics["thresholds"]
    assert statistics["missing"] == []
    label = "fine-tuning steps"
    assert label in (run / "figures/steps-small.svg").read_text()
    page = (run / "report.html").read_text()
    assert label in page and "RLHF steps of" not in page
    assert not list(run.rglob("*.safetensors"))


def test_a_checkpoint_gets_the_answers_of_its_model_alone(finished, ladder, tmp_path):
    run, _ = finished
    checkpoint = next(c for c in find_checkpoints(run) if str(c.key) == "small/1/250")
    model, tokenizer = load_model(ladder / "small/seed1/checkpoint-250", dtype="float32")
    asked = recipe_plan(load_measured(str(run / "recipe.yaml")), run)
    paths = measure(asked, model, tokenizer, tmp_path / "alone")
    for path in paths:
        alone, _ = read_cell(path)
        ours, _ = read_cell(checkpoint.evaluation / path.name)
        pd.testing.assert_frame_equal(alone, ours)


def test_what_is_measured_is_not_measured_again_and_changed_weights_are(
    ladder, tmp_path, monkeypatch
):
    out = shutil.copytree(ladder / "nano/seed0", tmp_path / "out")
    given = series({"model": "m", "path": f"{out}/checkpoint-{{step}}"})
    run = tmp_path / "run"
    assert measured(given, run) == 3
    before = {path: path.read_bytes() for path in cells(run)}
    monkeypatch.setattr("selfcorrect.evaluate.scoring.weights.load_model", None)
    assert measured(given, run) == 0  # nothing is even loaded
    monkeypatch.undo()
    (out / "checkpoint-100/model.safetensors").touch()  # copied anew: the same weights
    assert measured(given, run) == 1
    assert {path: path.read_bytes() for path in cells(run)} == before
    foreign.save(out / "checkpoint-100", 120)
    assert measured(given, run) == 1
    changed = {path for path, text in before.items() if path.read_bytes() != text}
    assert {path.parents[1].name for path in changed} == {"checkpoint-100"}


@pytest.mark.parametrize("name", foreign.TRAINERS)
def test_the_output_folder_of_a_trainer_is_a_series_by_itself(name, tmp_path):
    out = tmp_path / "my run"
    for step in (20, 100):
        foreign.TRAINERS[name](out, step)
    (out / "config.json").write_text("{}")  # some save the last model beside the checkpoints
    given = series_of([str(out)], None, lambda: foreign.ASKED)
    assert given is not None and given.name == "my_run"
    run = tmp_path / "run"
    assert measured(given, run) == 2
    found = find_checkpoints(run)
    assert [checkpoint.record.step for checkpoint in found] == [20, 100]
    digests = {checkpoint.record.weights_digest for checkpoint in found}
    assert len(digests) == 2 and None not in digests
    assert len(cells(run)) == 4
    (first, _), (last, _) = read_cell(cells(run)[0]), read_cell(cells(run)[2])
    assert not first["logprobs"].equals(last["logprobs"])


@pytest.mark.matrix
def test_the_example_of_the_guide_is_measured(tmp_path, monkeypatch):
    """`docs/examples`, with few updates and items: a plain transformers Trainer, and the YAML."""
    monkeypatch.chdir(tmp_path)
    words = ["train_elsewhere.py", "--steps", "2", "--documents", "40"]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(ROOT / "docs/examples/train_elsewhere.py"), run_name="__main__")
    few = ["evaluate.limit=4", "evaluate.experiments=[winogender]", "evaluate.conditions=[Q]"]
    given = load_measured(str(ROOT / "docs/examples/elsewhere.yaml"), few)
    assert measured(given, tmp_path / "run") == 8
    keys = {str(checkpoint.key) for checkpoint in find_checkpoints(tmp_path / "run")}
    assert keys == {f"{m}/{s}/{n}" for m in ("small", "large") for s in (0, 1) for n in (1, 2)}


def test_weights_in_parts_name_the_trainers_own_command(tmp_path):
    foreign.verl_sharded(tmp_path / "out", 20)
    given = series_of([str(tmp_path / "out")], None, lambda: foreign.ASKED)
    with pytest.raises(InputError, match=r"verl.model_merger merge --backend fsdp .*actor"):
        open_run(given, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    foreign.save(tmp_path / "out/global_step_20/actor/huggingface", 20)  # as the merger does
    assert measured(given, tmp_path / "run") == 1


def test_folders_that_are_no_trainers_are_left_alone(tmp_path):
    foreign.save(tmp_path / "model", 0)
    foreign.trl(tmp_path / "model", 10)  # one checkpoint in a model's folder
    (tmp_path / "logs/step_1").mkdir(parents=True)
    for folder in ("model", "logs", "nowhere"):
        assert adopt(tmp_path / folder) is None
        assert series_of([str(tmp_path / folder)], None, dict) is None


def test_steps_and_a_pattern_on_the_command_line(ladder, tmp_path, monkeypatch):
    pattern = f"{ladder}/nano/seed{{seed}}/checkpoint-{{step}}"
    given = series_of([pattern], "0,250", lambda: foreign.ASKED)
    found, notes = find_numbers(given)
    assert (sorted(found.listed()), notes) == (
        [("nano", seed, step) for seed in (0, 1) for step in (0, 250)],
        [],
    )
    written = shutil.copytree(ladder / "nano/seed0/checkpoint-250", tmp_path / "step-00250")
    open_run(
        series({"model": "m", "path": f"{tmp_path}/step-{{step}}", "step": 250}), tmp_path / "r"
    )
    assert [c.record.source.path for c in find_checkpoints(tmp_path / "r")] == [str(written)]
    monkeypatch.chdir(ladder / "nano")
    with pytest.raises(InputError, match="m/0/7: seed0/checkpoint-7 has no model"):
        open_run(
            series({"model": "m", "path": "seed0/checkpoint-{step}", "step": 7}), tmp_path / "x"
        )
    for steps, match in (("0,300", "nothing like .*seed0/checkpoint-300"), ("0,x", "--steps 0,x")):
        with pytest.raises(InputError, match=match):
            open_run(series_of([pattern], steps, lambda: foreign.ASKED), tmp_path / "run")
    with pytest.raises(InputError, match="a model beside a series"):
        series_of([pattern, str(tmp_path)], None, dict)
    with pytest.raises(InputError, match="selfcorrect run quickstart"):
        series_of(["quickstart"], None, dict)


FAULTS = {
    "has 5 twice": {"steps": [0, 5, 5]},
    "step 0 is given twice": {"steps": [0, 100], "again": {"steps": [0]}},
    r"100, .* no model": {"steps": [0, 101]},
    "size: 1.4B, but .* parameters": {"size": "1.4B"},
    "different sizes different names": {"again": {"path": "small/seed0/checkpoint-0", "step": 7}},
    "steps: several": {"path": "nano/seed0/checkpoint-0", "steps": [0, 1]},
    "step is missing": {"path": "nano/seed0/checkpoint-0"},
    "nothing like": {"path": "nano/seed0/chekpoint-{step}"},
    "trainer_state.json says step 100": {"moved": True, "steps": [1]},
    "which has no revision": {"revision": "step_{step}", "steps": [0]},
    "size: 'big' is not": {"size": "big"},
    r"did you mean seeds\?": {"sedes": [1]},
}  # fmt: skip


@pytest.mark.parametrize("match", FAULTS)
def test_faults_of_a_series_are_one_line_and_leave_nothing(match, ladder, tmp_path):
    fault = dict(FAULTS[match])
    if fault.pop("moved", False):
        shutil.copytree(ladder / "nano/seed0/checkpoint-100", tmp_path / "seed100/x")
        fault["path"] = f"{tmp_path}/seed{{step}}00/x"
    again = fault.pop("again", None)
    entry = {"model": "m", "path": "nano/seed0/checkpoint-{step}"} | fault
    entries = [entry] + ([] if again is None else [entry | again])
    for each in entries:
        each["path"] = str(ladder / each["path"])
        if "step" in each:
            each.pop("steps", None)
    if match.startswith("100"):
        match = "m/0/101: .* no model"
    with pytest.raises(InputError, match=match) as caught:
        open_run(series(*entries), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_adapters_of_other_bases_are_refused(tmp_path):
    for step in (10, 20):
        foreign.trl_lora(tmp_path / "out", step)
    pattern = f"{tmp_path}/out/checkpoint-{{step}}"
    with pytest.raises(InputError, match=r"base: other, but .*adapter_config.json was trained on"):
        open_run(series({"model": "m", "path": pattern, "base": "other"}), tmp_path / "run")
    moved = tmp_path / "elsewhere/base"
    shutil.copytree(tmp_path / "base", moved)
    given = series({"model": "m", "path": pattern, "base": str(moved)})
    assert measured(given, tmp_path / "moved") == 2
    assert measured(series({"model": "m", "path": pattern}), tmp_path / "run") == 2
    for ours, theirs in zip(cells(tmp_path / "moved"), cells(tmp_path / "run"), strict=True):
        pd.testing.assert_frame_equal(read_cell(ours)[0], read_cell(theirs)[0])
    settings = tmp_path / "out/checkpoint-20/adapter_config.json"
    named = json.loads(settings.read_text()) | {"base_model_name_or_path": str(moved)}
    settings.write_text(json.dumps(named))
    with pytest.raises(InputError, match="different bases different model names"):
        open_run(series({"model": "m", "path": pattern}), tmp_path / "other")


def test_a_checkpoint_that_vanishes_is_named_and_the_others_stay_measured(
    ladder, tmp_path, monkeypatch
):
    from selfcorrect.evaluate.scoring import weights

    out = shutil.copytree(ladder / "nano/seed0", tmp_path / "out")
    given = series({"model": "m", "path": f"{out}/checkpoint-{{step}}"})
    load_fresh = weights.CheckpointLoader.load

    def vanishing(loader: Any, folder: Path, **options: Any) -> Any:
        if folder.name == "checkpoint-100":
            shutil.rmtree(folder)
        return load_fresh(loader, folder, **options)

    monkeypatch.setattr(weights.CheckpointLoader, "load", vanishing)
    with pytest.raises(RunFailure, match=r"checkpoint-100: vanished .*others? .*measured"):
        measured(given, tmp_path / "run")
    assert {path.parents[1].name for path in cells(tmp_path / "run")} == {
        "checkpoint-0",
        "checkpoint-250",
    }
    monkeypatch.undo()
    assert measured(given, tmp_path / "run") == 0  # its steps are looked for anew


def test_watch_measures_what_appears(ladder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    given = series({"model": "m", "path": f"{out}/checkpoint-{{step}}", "steps": [0, 250]})
    run = tmp_path / "run"
    with pytest.raises(InputError, match="no model"):
        open_run(given, run)
    open_run(given, run, wait=True)
    monkeypatch.setattr("selfcorrect.evaluate.measuring.run.POLL_SECONDS", 0.01)
    coming = [0, 250]

    def look() -> bool:
        if coming:
            step = coming.pop(0)
            shutil.copytree(ladder / f"nano/seed0/checkpoint-{step}", out / f"checkpoint-{step}")
            open_run(given, run, wait=True)
        return False

    recipe = load_measured(str(run / "recipe.yaml"))
    assert evaluate_run(recipe, run, watch=True, look_for_more=look) == 2
    assert len(cells(run)) == 4


def test_a_folder_of_another_run_is_refused(finished, ladder, tmp_path):
    run, path = finished
    before = (run / "recipe.yaml").read_bytes()
    given = series({"model": "m", "path": f"{ladder}/nano/seed0/checkpoint-{{step}}"})
    with pytest.raises(InputError, match="the run of ladder"):
        open_run(given, run)
    assert (run / "recipe.yaml").read_bytes() == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="neither empty nor"):
        open_run(given, tmp_path)
    assert (tmp_path / "notes.txt").exists()
    with pytest.raises(InputError, match="nothing to train"):
        load_recipe(str(path))


def test_jobs_of_a_cluster_divide_the_checkpoints(finished, ladder, tmp_path):
    run, path = finished
    given = load_measured(str(path))
    found, _ = find_numbers(given)
    jobs = jobs_left(found, tmp_path / "new")
    assert {job.name: len(job.commands) for job in jobs} == {
        "ladder.small.0.evaluate": 2,
        "ladder.small.1.evaluate": 2,
        "ladder.nano.0.evaluate": 3,
        "ladder.nano.1.evaluate": 2,
        "ladder.report": 1,
    }
    assert jobs[-1].after == [job.name for job in jobs[:-1]]
    assert jobs_left(load_measured(str(run / "recipe.yaml")), run) == []
    evaluate([str(run)], checkpoint="nano/0/100")  # what such a job runs: measured already


def test_a_plan_counts_checkpoints_and_one_devices_memory(finished, capsys):
    _, path = finished
    plan(str(path), None, device="h100")
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines() if line.startswith(("nano", "small"))]
    assert [row[:2] for row in rows[-2:]] == [["nano", "5"], ["small", "4"]]
    assert "policy" not in shown and math.isfinite(float(rows[0][3]))
