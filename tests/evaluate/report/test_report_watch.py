"""`selfcorrect report --watch` and the progress of a run."""

import shutil
import signal
import subprocess
import sys

import pytest

from selfcorrect.evaluate.figures import gallery
from selfcorrect.evaluate.measuring.measure import measure
from selfcorrect.evaluate.measuring.progress import (
    RunProgress,
    WatchedRun,
    estimate_progress,
    report_inputs,
)
from selfcorrect.evaluate.measuring.run import recipe_plan
from selfcorrect.evaluate.run_folder import RECORD, CheckpointRecord
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.load import load_recipe, save_recipe
from selfcorrect.recipes.society.benchmarks import write_benchmarks
from selfcorrect.recipes.society.tokenizer import make_tokenizer
from selfcorrect.recipes.society.world import make_world
from selfcorrect.scripts.commands import report as command
from tests.support.tiny_models import tiny_model

SETTINGS = [
    "evaluate.limit=8",
    "evaluate.experiments=[bbq, law_school]",
    "evaluate.conditions=[Q, Q+IF]",
    "policy.steps=3",
    "policy.checkpoints=[0, 3]",
    "models.0.name=m",
]
RECIPE_MODELS = 1


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run of which step 0 is measured and step 3 still to come."""
    run = tmp_path_factory.mktemp("watch") / "run"
    run.mkdir()
    recipe = load_recipe("quickstart", SETTINGS)
    recipe.models = recipe.models[:RECIPE_MODELS]
    save_recipe(recipe, run / "recipe.yaml")
    world = make_world(recipe.data.society)
    write_benchmarks(world, run / "benchmarks")
    keep(run, 0)
    tokenizer = make_tokenizer(world)
    model = tiny_model(vocabulary=len(tokenizer))
    measure(recipe_plan(recipe, run), model, tokenizer, checkpoint(run, 0) / "evaluation")
    return run


@pytest.fixture
def run(first, tmp_path):
    return shutil.copytree(first, tmp_path / "run")


def checkpoint(run, step):
    return run / f"m/seed-0/ppo/checkpoint-{step}"


def keep(run, step):
    checkpoint(run, step).mkdir(parents=True, exist_ok=True)
    counts = dict.fromkeys(("seed", "episodes", "tokens", "optimizer_updates"), 0)
    CheckpointRecord(
        model="m",
        parameters=1000,
        step=step,
        kl=None,
        reward=None,
        recipe_digest="0",
        versions={},
        **counts,
    ).write(checkpoint(run, step))


def finish(run, step):
    keep(run, step)
    shutil.copytree(checkpoint(run, 0) / "evaluation", checkpoint(run, step) / "evaluation",
                    dirs_exist_ok=True)  # fmt: skip


@pytest.fixture(autouse=True)
def _log_level(caplog):
    caplog.set_level("INFO")


def watch(run, events, monkeypatch):
    """What the command says while one event happens between every two looks."""
    waiting = iter(events)

    def sleep(seconds):
        assert seconds == 7.0
        try:
            event = next(waiting)
        except StopIteration:
            pytest.fail("the run is complete, and still watched")
        event()

    monkeypatch.setattr(command.time, "sleep", sleep)
    monkeypatch.setattr(gallery, "draw_run", lambda *_: ([], []))  # figures have their own tests
    command.report([run], watch=True, every=7.0, paper=False, out=None)
    assert list(waiting) == []


def logged(caplog):
    """Return the command's log lines without their time of day."""
    return [
        record.getMessage().split(" ", 1)[1]
        for record in caplog.records
        if record.name == command.__name__
    ]


def test_watch_follows_a_growing_run(run, monkeypatch, capsys, caplog):
    said = []

    def partly():
        said.append((run / "report.html").read_text(encoding="utf-8"))
        keep(run, 3)
        (checkpoint(run, 3) / "evaluation").mkdir()
        for path in sorted((checkpoint(run, 0) / "evaluation").iterdir())[:2]:
            shutil.copy(path, checkpoint(run, 3) / "evaluation")

    def wholly():
        said.append((run / "report.html").read_text(encoding="utf-8"))
        finish(run, 3)

    watch(run, [lambda: None, partly, wholly], monkeypatch)
    out, lines = capsys.readouterr().out, logged(caplog)
    drawn = f"run: 1 of 2 checkpoints measured; {run / 'report.html'}"
    assert lines == [drawn, "run: 1 of 2 checkpoints measured", drawn]
    assert "run is not finished: 1 of 2 checkpoints" in said[0]
    assert ">3</td>" not in said[0] and ">3</td>" in said[1]
    final = (run / "report.html").read_text(encoding="utf-8")
    assert "not finished" not in final and final != said[1]
    assert "First and last step" in out and "report.html" in out


def test_watch_waits_for_half_written_files(run, monkeypatch, caplog):
    whole = {}

    def half(path):
        def event():
            whole[path] = path.read_bytes()
            path.write_bytes(whole[path][: len(whole[path]) // 2])

        return event

    def mend(path):
        return lambda: path.write_bytes(whole[path])

    table = checkpoint(run, 0) / "evaluation" / "bbq.Q.parquet"
    record = checkpoint(run, 3) / RECORD
    recipe = run / "recipe.yaml"
    watch(
        run,
        [
            half(table), mend(table),
            lambda: finish(run, 4),  # a checkpoint that the recipe does not keep
            lambda: shutil.rmtree(checkpoint(run, 4)),
            half(recipe), mend(recipe),
            lambda: keep(run, 3), half(record), mend(record),
            lambda: finish(run, 3),
        ],
        monkeypatch,
    )  # fmt: skip
    lines = logged(caplog)
    waits = [line for line in lines if line.startswith("waiting: ")]
    assert len(waits) == 3
    assert "bbq.Q.parquet: damaged" in waits[0]
    assert "recipe.yaml" in waits[1] and RECORD in waits[2]
    assert ">4</td>" not in (run / "report.html").read_text(encoding="utf-8")


def test_watch_refuses_a_bad_run(run, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="not a run folder"):
        watch(tmp_path / "nothing", [], monkeypatch)
    (run / "recipe.yaml").write_text("name: [")
    with pytest.raises(InputError, match=r"recipe\.yaml: line 1"):
        watch(run, [], monkeypatch)


def test_watch_ends_if_the_run_is_deleted(run, monkeypatch):
    with pytest.raises(InputError, match="run folder no longer exists"):
        watch(run, [lambda: shutil.rmtree(run)], monkeypatch)


def test_watch_ends_on_a_full_disk(run, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "_write", full)
    with pytest.raises(OSError, match="No space"):
        watch(run, [], monkeypatch)


def test_progress_counts_cells_of_present_settings(run):
    watched = WatchedRun(run)
    assert watched.progress() == RunProgress(1, 2) and not watched.progress().complete
    recipe = load_recipe(str(run / "recipe.yaml"), ["evaluate.permutations=3"])
    save_recipe(recipe, run / "recipe.yaml")
    assert watched.progress() == RunProgress(0, 2)  # BBQ is asked in other orders now
    assert estimate_progress(run) == RunProgress(1, 2)
    recipe.seeds = [0, 1]
    save_recipe(recipe, run / "recipe.yaml")
    assert estimate_progress(run) == RunProgress(1, 4)


def test_report_inputs(run):
    before = report_inputs(run)
    (checkpoint(run, 0) / "evaluation" / "new.parquet").write_bytes(b"")
    assert set(report_inputs(run)) - set(before) == {
        checkpoint(run, 0) / "evaluation" / "new.parquet"
    }


def test_watch_of_several_runs(run, tmp_path, monkeypatch, caplog):
    other = shutil.copytree(run, tmp_path / "other")
    events = iter([lambda: finish(run, 3), lambda: finish(other, 3)])
    monkeypatch.setattr(command.time, "sleep", lambda seconds: next(events)())
    monkeypatch.setattr(gallery, "draw_runs", lambda *_: ([], []))
    command.report([run, other], watch=True, every=7.0, paper=False, out=None)
    lines = logged(caplog)
    page = tmp_path / "comparison" / "report.html"
    assert lines == [
        f"run: 1 of 2 checkpoints measured; other: 1 of 2 checkpoints measured; {page}",
        f"run: 2 of 2 checkpoints measured; other: 1 of 2 checkpoints measured; {page}",
    ]
    assert "not finished" not in page.read_text(encoding="utf-8")
    assert not (run / "report.html").exists()


def test_conflicting_options(run):
    with pytest.raises(InputError, match="--out needs several runs"):
        command.report([run], out=run / "x")
    with pytest.raises(InputError, match="--paper needs a single run"):
        command.report([run, run], paper=True)


def test_ctrl_c_exits_130(run):
    command_line = [
        sys.executable,
        "-m",
        "selfcorrect.scripts.commands",
        "report",
        str(run),
        "--watch",
    ]
    with subprocess.Popen(
        command_line,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A test run in the background hands on that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as watching:
        line = watching.stderr.readline()
        assert "1 of 2 checkpoints measured" in line
        watching.send_signal(signal.SIGINT)
        _, err = watching.communicate(timeout=900)
    assert watching.returncode == 130
    assert err == "selfcorrect: stopped; run the same command to resume\n"
    assert "1 of 2" in (run / "report.html").read_text(encoding="utf-8")
