"""Evaluation of a run on disk: broken, vanishing and shared checkpoints, and watching."""

import multiprocessing
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from selfcorrect.evaluate.headlines import log_checkpoint
from selfcorrect.evaluate.measuring import run as measuring_run
from selfcorrect.evaluate.measuring.cell_files import read_cell
from selfcorrect.evaluate.measuring.run import evaluate_run, recipe_plan, unmeasured
from selfcorrect.evaluate.results import load as load_cells
from selfcorrect.evaluate.run_folder import CheckpointRecord, read_checkpoint
from selfcorrect.evaluate.scoring.weights import files_digest
from selfcorrect.evaluate.statistics.formatting import compact
from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from selfcorrect.recipes.foundation.locks import hold_lock
from selfcorrect.recipes.load import check_recipe, load_recipe, save_recipe
from selfcorrect.recipes.society.benchmarks import write_benchmarks
from selfcorrect.recipes.society.tokenizer import make_tokenizer
from selfcorrect.recipes.society.world import make_world
from tests.support.fork_server import ForkServer
from tests.support.ranks import run_module
from tests.support.small_runs import RECIPE, SECONDS
from tests.support.tiny_models import tiny_model

torch.set_num_threads(1)

STEPS = (0, 2, 4)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of three checkpoints, as it would lie on disk; only what evaluation looks at."""
    folder = tmp_path / "run"
    folder.mkdir()
    asked = {"experiments": ["winogender"], "conditions": ["Q", "Q+IF"]}
    recipe = check_recipe({**RECIPE, "evaluate": asked}, "x")
    save_recipe(recipe, folder / "recipe.yaml")
    world = make_world(recipe.data.society)
    write_benchmarks(world, folder / "benchmarks")
    tokenizer = make_tokenizer(world)
    for step in STEPS:
        write_checkpoint(checkpoint_of(folder, step), tokenizer, step)
    return folder


def checkpoint_of(run: Path, step: int) -> Path:
    return run / "tiny" / "seed-0" / "ppo" / f"checkpoint-{step}"


def write_checkpoint(folder: Path, tokenizer, step: int, digest: bool = False) -> None:
    tiny_model(vocabulary=len(tokenizer), seed=step).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CheckpointRecord(
        **{"model": "tiny", "parameters": 1, "seed": 0, "step": step, "episodes": 0},
        **{"tokens": 0, "optimizer_updates": 0, "kl": None, "reward": None},
        **{"recipe_digest": "x", "versions": {}},
        weights_digest=files_digest(folder) if digest else None,
    ).write(folder)


def bytes_of(run: Path) -> dict[str, bytes]:
    files = run.glob("*/seed-*/ppo/*/evaluation/*.parquet")
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def recipe_of(run: Path):
    return load_recipe(str(run / "recipe.yaml"))


def test_broken_checkpoints_are_named_and_the_others_measured(run: Path) -> None:
    from safetensors.torch import load_file, save_file

    recipe = recipe_of(run)
    folders = [checkpoint_of(run, step) for step in STEPS]
    weights = [folder / "model.safetensors" for folder in folders]
    whole = weights[0].read_bytes(), weights[1].read_bytes()
    broken = load_file(weights[0])
    broken["model.norm.weight"][:] = torch.nan
    save_file(broken, weights[0], {"format": "pt"})
    weights[1].write_bytes(whole[1][:-100])  # half-written
    with pytest.raises(RunFailure) as caught:
        evaluate_run(recipe, run)
    message = str(caught.value)
    assert "\n" not in message and "checkpoint-0" in message and "NaN" in message
    assert "(and 1 more)" in message
    waiting = unmeasured(run, recipe_plan(recipe, run))
    assert [checkpoint.record.step for checkpoint in waiting] == [0, 2]
    assert not list(folders[0].glob("evaluation/*.parquet"))
    weights[0].write_bytes(whole[0])
    weights[1].write_bytes(whole[1])
    assert evaluate_run(recipe, run) == 2
    assert not unmeasured(run, recipe_plan(recipe, run))


def test_changed_weights_are_never_scored(run: Path) -> None:
    recipe, folder = recipe_of(run), checkpoint_of(run, 2)
    record = read_checkpoint(folder).record
    record.model_copy(update={"weights_digest": files_digest(folder)}).write(folder)
    whole = (folder / "model.safetensors").read_bytes()
    flipped = bytearray(whole)
    flipped[-7] ^= 1
    (folder / "model.safetensors").write_bytes(flipped)
    with pytest.raises(RunFailure, match="checkpoint-2: the weights are not those"):
        evaluate_run(recipe, run)
    assert not list(folder.glob("evaluation/*.parquet"))
    (folder / "model.safetensors").write_bytes(whole)
    calls: list[tuple[str, float, int]] = []
    assert evaluate_run(recipe, run, lambda *call: calls.append(call)) == 1
    shares = [done for _, done, _ in calls]  # of the one checkpoint
    assert {(stage, total) for stage, _, total in calls} == {("evaluate", 1)}
    assert shares == sorted(shares) and (shares[0], shares[-1]) == (0, 1)
    metadata = read_cell(folder / "evaluation" / "winogender.Q.parquet")[1]
    origin = {"weights": files_digest(folder), "engine": "packed"}
    assert origin.items() <= metadata["origin"].items()
    assert evaluate_run(recipe, run) == 0
    # Other weights in the same folder are another checkpoint.
    shutil.copy(checkpoint_of(run, 4) / "model.safetensors", folder)
    record.model_copy(update={"weights_digest": files_digest(folder)}).write(folder)
    assert evaluate_run(recipe, run) == 1


def test_locked_checkpoint_is_left_to_its_holder(run: Path, monkeypatch) -> None:
    recipe, evaluation = recipe_of(run), checkpoint_of(run, 2) / "evaluation"
    monkeypatch.setattr(measuring_run, "POLL_SECONDS", 0.01)
    seen: list[int] = []

    def hold_until_others_are_measured() -> None:
        with hold_lock(evaluation) as free:
            assert free
            held.set()
            deadline = time.monotonic() + SECONDS
            while not bytes_of(run).keys() >= {
                f"tiny/seed-0/ppo/checkpoint-4/evaluation/winogender.{name}.parquet"
                for name in ("Q", "Q+IF")
            }:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            seen.append(len(list(evaluation.glob("*.parquet"))))

    held = threading.Event()
    other = threading.Thread(target=hold_until_others_are_measured)
    other.start()
    assert held.wait(SECONDS)
    assert evaluate_run(recipe, run) == 3  # the last once the other let go
    other.join()
    assert seen == [0]  # nobody worked there while it was held


def count_measured(run: Path, numbers: Any) -> None:
    numbers.put(evaluate_run(recipe_of(run), run))


@pytest.mark.slow
def test_two_processes_and_two_ranks_give_the_same_bytes(
    run: Path, tmp_path: Path, forks: ForkServer
) -> None:
    expected = bytes_of(run)
    assert not expected
    shared, sharded = shutil.copytree(run, tmp_path / "b"), shutil.copytree(run, tmp_path / "c")
    evaluate_run(recipe_of(run), run)
    context = multiprocessing.get_context("fork")
    numbers = context.SimpleQueue()
    pair = [context.Process(target=count_measured, args=(shared, numbers)) for _ in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(SECONDS)
        assert process.exitcode == 0
    assert sum(numbers.get() for _ in pair) == 3
    assert bytes_of(shared) == bytes_of(run)
    shown = run_module(forks, "ranks", "evaluate", sharded)
    assert shown.count("report.html") == 1  # said once
    assert bytes_of(sharded) == bytes_of(run)


def test_watch_follows_a_run_to_its_last_checkpoint(run: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(measuring_run, "POLL_SECONDS", 0.01)
    recipe = recipe_of(run)
    later = tmp_path / "later"
    shutil.copytree(checkpoint_of(run, 4), later)
    shutil.rmtree(checkpoint_of(run, 4))
    half = checkpoint_of(run, 2) / "model.safetensors"
    whole = half.read_bytes()
    half.write_bytes(whole[: len(whole) // 2])  # as a slow copy leaves it
    results: list[int] = []
    watcher = threading.Thread(target=lambda: results.append(evaluate_run(recipe, run, watch=True)))
    watcher.start()
    wait_for(lambda: len(bytes_of(run)) == 2)  # step 0
    vanishing = checkpoint_of(run, 3)
    shutil.copytree(later, tmp_path / "copy")
    (tmp_path / "copy" / "checkpoint.json").unlink()
    (tmp_path / "copy").rename(vanishing)
    record = read_checkpoint(later).record
    record.model_copy(update={"step": 3}).write(vanishing)
    (vanishing / "model.safetensors").unlink()
    time.sleep(0.1)
    vanishing.rename(tmp_path / "gone")  # at once: the watcher may be writing into it
    (checkpoint_of(run, 1)).mkdir()
    (checkpoint_of(run, 1) / "checkpoint.json").write_text("{")  # a record on its way
    time.sleep(0.1)
    shutil.rmtree(checkpoint_of(run, 1))
    half.write_bytes(whole)
    wait_for(lambda: len(bytes_of(run)) == 4)
    assert watcher.is_alive()  # step 4 is to come
    checkpoint_of(run, 4).parent.joinpath(".checkpoint-4.part").mkdir()  # not there yet
    later.rename(checkpoint_of(run, 4))
    watcher.join(SECONDS)
    assert not watcher.is_alive() and results == [3]
    assert len(bytes_of(run)) == 6
    assert not vanishing.exists()


def wait_for(condition) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_missing_engine_is_one_line(run: Path) -> None:
    recipe = load_recipe(str(run / "recipe.yaml"), ["evaluate.engine=vllm", "evaluate.attach=off"])
    with pytest.raises(InputError, match="vLLM is not installed"):
        evaluate_run(recipe, run)
    with pytest.raises(InputError, match="attach: off"):
        load_recipe(str(run / "recipe.yaml"), ["evaluate.engine=vllm"])
    with pytest.raises(InputError, match=re.escape("evaluate.engine")):
        load_recipe(str(run / "recipe.yaml"), ["evaluate.engine=fast"])


def test_leftovers_of_a_killed_evaluation_are_removed(run: Path, caplog) -> None:
    recipe, evaluation = recipe_of(run), checkpoint_of(run, 2) / "evaluation"
    caplog.set_level("INFO", "selfcorrect")
    evaluate_run(recipe, run, on_measured=log_checkpoint)
    values = {}
    for name in ("Q", "Q+IF"):
        frame = load_cells(run, num_resamples=2).query(
            "condition == @name and metric == 'correlation' and category == 'overall'"
        )
        values[name] = [compact(value) for value in frame["value"]]  # by step
    (q0, *_, q4), (if0, *_, if4) = values["Q"], values["Q+IF"]
    assert caplog.messages[0] == f"tiny/0/0: winogender Q {q0}, Q+IF {if0}"
    assert caplog.messages[2] == f"tiny/0/4: winogender Q {q0}→{q4}, Q+IF {if0}→{if4}"
    parts = evaluation / ".winogender.Q.parquet.parts"
    parts.mkdir()
    (parts / "000000000-000000256.parquet").touch()
    (evaluation / ".winogender.Q.parquet.7-0a1b2c3d.part").touch()
    assert evaluate_run(recipe, run) == 0
    assert not list(evaluation.glob(".*.part*")) and len(caplog.messages) == 3
