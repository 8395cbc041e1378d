"""Series whose checkpoints are branches on the hub, against a local server that speaks its API."""

import json
import runpy
import shutil
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from selfcorrect.evaluate.measuring import sources
from selfcorrect.evaluate.measuring.cell_files import read_cell
from selfcorrect.evaluate.measuring.run import evaluate_run
from selfcorrect.evaluate.run_folder import find_checkpoints
from selfcorrect.evaluate.scoring.load_model import ADAPTER
from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from selfcorrect.recipes.load import check_series, load_measured
from selfcorrect.scripts.commands.series import open_run, series_of
from tests.support import ROOT
from tests.support import foreign_checkpoints as foreign
from tests.support.hub import hub_as_default
from tests.support.tiny_gguf import write_gguf

REPO = {"model": "m", "path": "lab/m", "revision": "step_{step}"}


def series(*entries: dict[str, Any], **more: Any) -> Any:
    return check_series({"name": "s", "checkpoints": entries, **foreign.ASKED, **more}, "s.yaml")


def measured(given: Any, run: Path, **options: Any) -> int:
    open_run(given, run)
    return evaluate_run(load_measured(str(run / "recipe.yaml")), run, **options)


def answers(run: Path) -> list[pd.DataFrame]:
    files = run.glob("*/seed-*/series/checkpoint-*/evaluation/*.parquet")
    return [read_cell(path)[0] for path in sorted(files)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return saved models by step."""
    folder = tmp_path_factory.mktemp("saved")
    for step in (0, 20, 100):
        foreign.save(folder / f"checkpoint-{step}", step)
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path, saved):
    """Yield a hub with lab/start (main) and lab/m (main, step_20, step_100)."""
    with hub_as_default(monkeypatch, tmp_path / "cache") as server:
        server.models["lab/start"] = {"main": saved / "checkpoint-0"}
        server.models["lab/m"] = {
            "main": saved / "checkpoint-100",
            "step_20": saved / "checkpoint-20",
            "step_100": saved / "checkpoint-100",
            "step_20-reward": saved / "checkpoint-0",  # not like the pattern
        }
        yield server


def test_steps_are_the_hubs_branches_and_weights_are_dropped_once_measured(
    hub, saved, tmp_path, monkeypatch
):
    start = {"model": "m", "step": 0, "path": "lab/start"}
    given, run = series(start, REPO, keep_weights=False), tmp_path / "run"
    there: list[int] = []
    version_of = sources.version_of

    def counted(path: Path) -> str:
        there.append(len(list(run.rglob("*.safetensors"))))
        return version_of(path)

    monkeypatch.setattr(sources, "version_of", counted)
    assert measured(given, run) == 3
    assert there == [1, 1, 1]  # one checkpoint at a time
    assert not list(run.rglob("weights")) and not list((tmp_path / "cache").rglob("*.safetensors"))
    assert hub.downloads("model.safetensors") == 3
    records = [checkpoint.record for checkpoint in find_checkpoints(run)]
    assert [(r.step, r.source.path, r.source.version) for r in records] == [
        (0, "lab/start", hub.commit("lab/start", "main")),
        (20, "lab/m", hub.commit("lab/m", "step_20")),
        (100, "lab/m", hub.commit("lab/m", "step_100")),
    ]
    monkeypatch.undo()
    local = series({"model": "m", "path": f"{saved}/checkpoint-{{step}}"})
    measured(local, tmp_path / "local")
    for ours, theirs in zip(answers(run), answers(tmp_path / "local"), strict=True):
        pd.testing.assert_frame_equal(ours, theirs)


def test_branches_with_other_words_and_models_named_by_seed(hub, saved, tmp_path):
    start = saved / "checkpoint-0"
    for seed in (1, 2):
        hub.models[f"lab/m-seed{seed}"] = {
            "main": start,
            "stage1-step10-tokens3B": start,
            "stage1-step40-tokens12B": start,
            "stage2-step10-tokens1B": start,
        }
    entry = {
        "model": "m",
        "path": "lab/m-seed{seed}",
        "revision": "stage1-step{step}-tokens*",
        "seeds": [1, 2],
    }
    open_run(series(entry), tmp_path / "run")
    found = {str(c.key): c.record.source for c in find_checkpoints(tmp_path / "run")}
    assert list(found) == ["m/1/10", "m/1/40", "m/2/10", "m/2/40"]
    assert (found["m/2/40"].path, found["m/2/40"].revision) == (
        "lab/m-seed2",
        "stage1-step40-tokens12B",
    )
    open_run(series(entry | {"steps": [40]}, name="few"), tmp_path / "few")
    planned = load_measured(str(tmp_path / "few/recipe.yaml")).listed()
    assert planned == {("m", 1, 40), ("m", 2, 40)}
    with pytest.raises(InputError, match=r"nothing like lab/m-seed1@stage1-step50"):
        open_run(series(entry | {"steps": [50]}, name="none"), tmp_path / "none")
    twice = entry | {"revision": "*step{step}-tokens*"}
    with pytest.raises(InputError, match=r"stage1-step10.* and .*stage2-step10.* both step 10"):
        open_run(series(twice, name="twice"), tmp_path / "twice")


def test_kept_weights_lie_in_the_hubs_cache_and_nothing_is_fetched_twice(hub, saved, tmp_path):
    given = series_of(["lab/m@step_{step}"], "20,100", lambda: foreign.ASKED)
    assert given.name == "m" and measured(given, tmp_path / "run") == 2
    assert not list((tmp_path / "run").rglob("*.safetensors"))
    fetched = hub.downloads("model.safetensors")
    assert fetched == 2
    assert measured(given, tmp_path / "run") == 0 and measured(given, tmp_path / "new") == 2
    assert measured(given.model_copy(update={"keep_weights": False}), tmp_path / "more") == 2
    assert hub.downloads("model.safetensors") == fetched
    assert len(list((tmp_path / "cache").rglob("snapshots/*/model.safetensors"))) == 2  # a user's
    hub.close()  # without network: as recorded, and from the cache
    assert measured(given, tmp_path / "run") == 0
    with pytest.raises(RunFailure, match="cannot be reached"):
        open_run(given, tmp_path / "unknown")


def test_a_branch_that_has_moved_is_measured_anew(hub, saved, tmp_path):
    given, run = series(REPO | {"steps": [20, 100]}), tmp_path / "run"
    assert measured(given, run) == 2
    before = answers(run)
    hub.models["lab/m"]["step_20"] = saved / "checkpoint-0"
    assert measured(given, run) == 1
    after = answers(run)
    # Files are sorted by name: checkpoint-100, then checkpoint-20.
    assert all(a.equals(b) for a, b in zip(after[:2], before[:2], strict=True))
    assert not any(a.equals(b) for a, b in zip(after[2:], before[2:], strict=True))


def test_a_download_that_breaks_off_is_resumed(hub, saved, tmp_path, monkeypatch):
    size = (saved / "checkpoint-20/model.safetensors").stat().st_size
    broken: list[int] = []

    def break_off(hub: Any, handler: Any) -> bool:
        if handler.command == "HEAD" or "model.safetensors" not in handler.path or broken:
            return False
        broken.append(1)
        commit = hub.commit("lab/m", "step_20")
        handler.send_response(200)
        handler.send_header("X-Repo-Commit", commit)
        handler.send_header("Content-Length", str(size))
        handler.end_headers()
        data = (saved / "checkpoint-20/model.safetensors").read_bytes()
        handler.wfile.write(data[: size // 2])
        handler.wfile.flush()
        handler.connection.close()
        return True

    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 256)
    hub.fault = break_off
    given = series(REPO | {"steps": [20]}, keep_weights=False)
    assert measured(given, tmp_path / "run") == 1
    assert broken and hub.ranges and hub.ranges[0].startswith("model.safetensors bytes=")


def reply(code: int, content: object, **headers: object) -> Any:
    def fault(hub: Any, handler: Any) -> bool:
        handler.reply(code, content, **headers)
        return True

    return fault


def hang(hub: Any, handler: Any) -> bool:
    time.sleep(0.6)
    return False


PAGE = b"<html><body>Welcome to the hotel's network</body></html>"


@pytest.mark.parametrize(
    ("fault", "kind", "match"),
    [
        (reply(429, {"error": "slow down"}), RunFailure, r"limits .*429.*run it again later"),
        (reply(503, {"error": "down"}), RunFailure, "refuses the download"),
        (reply(200, PAGE, Content_Type="text/html"), RunFailure, "not the hub's"),
        (reply(401, {"error": "?"}, X_Error_Code="RepoNotFound"), InputError, "no such model"),
        (reply(403, {"error": "?"}, X_Error_Code="GatedRepo"), InputError, "accept the terms"),
        (hang, RunFailure, "cannot be reached"),
    ],
    ids=["429", "503", "html", "401", "gated", "slow"],
)
def test_a_hub_that_does_not_answer_is_one_line(hub, tmp_path, monkeypatch, fault, kind, match):
    from huggingface_hub.utils import _http

    if fault is hang:
        monkeypatch.setattr(_http.get_session(), "timeout", 0.2)
    hub.fault = fault
    for given in (series(REPO), series(REPO | {"steps": [20]})):
        with pytest.raises(kind, match=match) as caught:
            open_run(given, tmp_path / "run")
        assert "lab/m" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_faults_that_pass_are_waited_for(hub, tmp_path, caplog):
    answers_left = [429, 503]

    def busy(hub: Any, handler: Any) -> bool:
        if answers_left and handler.path.endswith("/refs"):
            handler.reply(answers_left.pop(), {"error": "busy"})
            return True
        return False

    hub.fault = busy
    open_run(series(REPO | {"steps": [20]}), tmp_path / "run")
    assert not answers_left and "trying again" in caplog.text


def test_a_revision_that_does_not_exist_is_named(hub, tmp_path):
    with pytest.raises(InputError, match=r"m/0/60: lab/m has no revision step_60 .*step_100"):
        open_run(series(REPO | {"steps": [20, 60]}), tmp_path / "run")
    with pytest.raises(InputError, match=r"nothing like lab/m@stage_\{step\}; .*step_20"):
        open_run(series(REPO | {"revision": "stage_{step}"}), tmp_path / "run")
    with pytest.raises(InputError, match="lab/none: no such model"):
        open_run(series(REPO | {"path": "lab/none"}), tmp_path / "run")
    commit = hub.commit("lab/m", "step_20")
    once = series({"model": "m", "step": 20, "path": "lab/m", "revision": commit})
    assert measured(once, tmp_path / "run") == 1


def test_what_cannot_be_fetched_is_named_and_the_rest_is_measured(
    hub, saved, tmp_path, monkeypatch
):
    pickled = shutil.copytree(saved / "checkpoint-20", tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    hub.models["lab/m"]["step_20"] = pickled
    given, run = series(REPO, keep_weights=False), tmp_path / "run"
    with pytest.raises(RunFailure, match=r"lab/m@step_20: no \*.safetensors .*pytorch_model.bin"):
        measured(given, run)
    assert [len(answers(run)), hub.downloads("pytorch_model.bin")] == [2, 0]
    hub.models["lab/m"]["step_20"] = saved / "checkpoint-20"
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 0))
    with pytest.raises(RunFailure, match=r"step_20: its weights take 0.0 GB, but .* make room"):
        measured(given, run)
    assert len(answers(run)) == 2  # what was measured stays
    monkeypatch.undo()


def test_a_larger_model_among_the_steps_is_found_out_once_it_is_here(hub, saved, tmp_path):
    hub.models["lab/m"]["step_100"] = foreign.save(tmp_path / "large", 100, hidden=48)
    with pytest.raises(RunFailure, match=r"step_100 has .* parameters, .* have"):
        measured(series(REPO), tmp_path / "run")
    assert len(answers(tmp_path / "run")) == 2


def test_numbers_with_leading_zeros_and_pull_requests(hub, saved, tmp_path):
    """Olmo 3 names its branches step_0025; safetensors of others exist in pull requests alone."""
    hub.models["lab/think"] = {
        "main": saved / "checkpoint-0",
        "refs/pr/1": saved / "checkpoint-0",
        "step_0020": saved / "checkpoint-20",
        "step_0100": saved / "checkpoint-100",
    }
    start = {"model": "m", "step": 0, "path": "lab/think", "revision": "refs/pr/1"}
    later = {"model": "m", "path": "lab/think", "revision": "step_{step}", "steps": [20, 100]}
    given, run = series(start, later, keep_weights=False), tmp_path / "run"
    assert measured(given, run) == 3
    found = [checkpoint.record.source for checkpoint in find_checkpoints(run)]
    assert [source.revision for source in found] == ["refs/pr/1", "step_0020", "step_0100"]
    assert all(hub.commit("lab/think", s.revision) == s.version for s in found)
    assert len({frame.to_json() for frame in answers(run)[::2]}) == 3
    for none in (later | {"steps": [2]}, start | {"revision": "refs/pr/2"}):
        with pytest.raises(InputError, match=r"lab/think(@refs/pr/2: no such| has no) revision"):
            open_run(series(none), tmp_path / "none")
    hub.close()
    assert measured(given, run) == 0


def test_a_gguf_file_on_the_hub(hub, tmp_path):
    """It is measured as the same file on this disk, and removed again."""
    for step in (5, 10):
        folder = tmp_path / f"q/step_{step}"
        folder.mkdir(parents=True)
        write_gguf(folder / f"m-{step}.gguf", seed=step)
        hub.models.setdefault("lab/q", {})[f"step_{step}"] = folder
    entry = {"model": "q", "revision": "step_{step}", "gguf_file": "m-{step}.gguf"}
    with pytest.raises(InputError, match=r"size: give it, such as 1.4B: the file m-5.gguf"):
        open_run(series(entry | {"path": "lab/q"}), tmp_path / "run")
    given = series(entry | {"path": "lab/q", "size": "11k"}, keep_weights=False)
    assert measured(given, tmp_path / "run") == 2
    assert not list((tmp_path / "run").rglob("*.gguf"))
    del entry["revision"]
    measured(series(entry | {"path": f"{tmp_path}/q/step_{{step}}"}), tmp_path / "local")
    for ours, theirs in zip(answers(tmp_path / "run"), answers(tmp_path / "local"), strict=True):
        pd.testing.assert_frame_equal(ours, theirs)


def test_adapters_on_the_hub_with_a_base_on_the_hub(hub, saved, tmp_path):
    for step in (10, 20):
        foreign.trl_lora(tmp_path / "out", step)
        folder = tmp_path / f"out/checkpoint-{step}"
        settings = json.loads((folder / ADAPTER).read_text())
        settings["base_model_name_or_path"] = "lab/start"
        (folder / ADAPTER).write_text(json.dumps(settings))
        hub.models.setdefault("lab/lora", {})[f"step_{step}"] = folder
    entry = {"model": "m", "path": "lab/lora", "revision": "step_{step}"}
    assert measured(series(entry, keep_weights=False), tmp_path / "run") == 2
    assert not list((tmp_path / "run").rglob("*.safetensors"))  # the base stays in the hub's cache
    base = str(shutil.copytree(saved / "checkpoint-0", tmp_path / "start"))
    here = {"model": "m", "path": f"{tmp_path}/out/checkpoint-{{step}}", "base": base}
    measured(series(here), tmp_path / "local")
    first, *others = answers(tmp_path / "run")
    assert not any(first["logprobs"].equals(other["logprobs"]) for other in others)
    for ours, theirs in zip([first, *others], answers(tmp_path / "local"), strict=True):
        pd.testing.assert_frame_equal(ours, theirs)


def test_published_pickles_are_converted_by_the_guides_example(hub, saved, tmp_path, monkeypatch):
    pickled = shutil.copytree(saved / "checkpoint-20", tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    hub.models["lab/m"]["step_20"] = pickled
    script = str(ROOT / "docs/examples/convert_pickles.py")
    words = [script, "lab/m", "step_{step}", "20", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(script, run_name="__main__")
    assert measured(series({"model": "m", "path": f"{tmp_path}/out/step_{{step}}"}), tmp_path / "a")
    original = {"model": "m", "step": 20, "path": str(saved / "checkpoint-20")}
    measured(series(original), tmp_path / "b")
    for ours, theirs in zip(answers(tmp_path / "a"), answers(tmp_path / "b"), strict=True):
        pd.testing.assert_frame_equal(ours, theirs)
