"""Whole runs of the smallest recipe: inline equals offline, killed equals uninterrupted."""

import json
import os
import re
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from selfcorrect.evaluate.measuring.cell_files import read_cell
from selfcorrect.evaluate.run_folder import find_checkpoints
from selfcorrect.recipes import load
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.load import check_recipe, load_recipe
from selfcorrect.train.check import check_training
from selfcorrect.train.job import hold_job
from selfcorrect.train.run import prepare_run, run_recipe, train_run
from selfcorrect.train.stages import JobFacts
from selfcorrect.train.stages.base import train_base
from tests.drills import kill
from tests.drills.kill import Moment, differences, drill
from tests.support.fork_server import ForkServer
from tests.support.small_runs import FEW, SECONDS, SMALL, call, command, digests, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * SECONDS)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run, in a new interpreter."""
    runs = tmp_path_factory.mktemp("finished") / "runs"
    runs.mkdir()
    done = call(command(runs), cwd=runs.parent)
    assert done.returncode == 0, done.stderr
    assert "Report:" in done.stdout
    return runs / "small"


def test_run_writes_checkpoints_results_figures_and_report(finished: Path) -> None:
    checkpoints = find_checkpoints(finished)
    assert [c.record.step for c in checkpoints] == [0, 2, 4]
    for checkpoint in checkpoints:
        # Two conditions on three experiments, and Match stats on Winogender.
        assert len(list(checkpoint.evaluation.glob("*.parquet"))) == 7
        assert (checkpoint.folder / "model.safetensors").is_file()
    first, _, last = (c.record for c in checkpoints)
    assert (first.episodes, first.kl, first.reward) == (0, None, None)
    assert (last.episodes, last.optimizer_updates) == (4 * 16, 4 * 4)
    assert last.kl is not None and last.reward is not None
    for name in ("results.parquet", "statistics.json", "report.html", "run.json"):
        assert (finished / name).stat().st_size > 0
    assert list((finished / "figures").glob("*.png")) and list((finished / "figures").glob("*.svg"))
    assert load_recipe(str(finished / "recipe.yaml")).name == "small"
    leftovers = [p for p in finished.rglob("*") if p.name.endswith((".part", ".work"))]
    assert not leftovers


def test_weights_differ_between_steps(finished: Path) -> None:
    results = digests(finished)
    weights = {v for k, v in results.items() if k.startswith("tiny/seed-0/ppo") and "model" in k}
    assert len(weights) == 3


def test_offline_evaluation_equals_inline_bitwise(
    finished: Path, tmp_path: Path, forks: ForkServer
) -> None:
    copy = tmp_path / "runs" / "small"
    shutil.copytree(finished, copy)
    before = digests(copy)
    for checkpoint in find_checkpoints(copy):
        shutil.rmtree(checkpoint.evaluation)
    words = [sys.executable, "-m", "selfcorrect.scripts.commands", "evaluate", str(copy)]
    done = forks.call(words, tmp_path)
    assert done.returncode == 0, done.stderr
    assert digests(copy) == before


def test_rerun_repeats_no_finished_work(finished: Path, forks: ForkServer) -> None:
    weights = {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")}
    cells = {p: p.stat().st_mtime_ns for p in finished.rglob("evaluation/*.parquet")}
    report = (finished / "report.html").stat().st_mtime_ns
    done = forks.call(command(finished.parent), finished.parent.parent)
    assert done.returncode == 0, done.stderr
    assert (finished / "report.html").stat().st_mtime_ns == report
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")} == weights
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("evaluation/*.parquet")} == cells


def test_sigkill_at_any_stage_resumes_bitwise_in_any_environment(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes depend on no checkout, locale, umask, hash seed or time zone either."""
    checkout = tmp_path / "check out" / "selfcorrect"
    for package in ("recipes", "evaluate", "train", "scripts"):
        shutil.copytree(Path(load.__file__).parent.parent / package, checkout / package)
    program = checkout / "scripts" / "commands" / "__main__.py"
    program.write_text(f"print('from the other checkout')\n{program.read_text()}")
    for name in [name for name in os.environ if name.startswith("LC_")]:
        monkeypatch.delenv(name)
    other = {
        "PYTHONPATH": str(checkout.parent), "PYTHONHASHSEED": "4321", "LC_ALL": "POSIX",
        "TZ": "Pacific/Chatham", "COLUMNS": "40",
    }  # fmt: skip
    for name, value in other.items():
        monkeypatch.setenv(name, value)
    job = "tiny/seed-0"
    plan = [
        Moment(f"{job}/base.work/checkpoint-10"),
        Moment(f"{job}/reward.work/checkpoint-6"),
        Moment(f"{job}/ppo/checkpoint-0/evaluation/bbq.Q.parquet"),
        Moment(f"{job}/ppo.work/checkpoint-8"),
        Moment("figures/effects.png"),
    ]
    runs = tmp_path / "rüns"
    umask = os.umask(0o077)
    try:
        server = ForkServer()
        kills, differing = drill(runs, finished, plan, signal.SIGKILL, server=server)
    finally:
        os.umask(umask)
        server.close()
    assert differing == []
    assert [row[2] for row in kills] == [
        *("base", "reward", "evaluation, checkpoint-0", "ppo", "report")
    ]
    shown = (tmp_path / "rüns.txt").read_text()  # of the last start, which ended
    assert "from the other checkout" in shown and "bit for bit" not in shown
    assert json.loads((runs / "small" / "run.json").read_text())["changes"] == []


def test_kill_drill_reports_missing_changed_and_leftover_files(
    finished: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(finished, tmp_path / "small")
    assert differences(run, finished) == []
    weights = run / "tiny" / "seed-0" / "ppo" / "checkpoint-2" / "model.safetensors"
    flipped = bytearray(weights.read_bytes())
    flipped[-1] ^= 1
    weights.write_bytes(flipped)
    (run / "results.parquet").unlink()
    record = json.loads((run / "statistics.json").read_text())
    (run / "statistics.json").write_text(json.dumps({**record, "more": 1}))
    (run / "tiny" / "seed-0" / "base.work").mkdir()
    (run / "figures" / ".effects.png.7-0a1b2c3d.part").touch()
    assert differences(run, finished) == [
        "results.parquet",
        "statistics.json",
        "tiny/seed-0/ppo/checkpoint-2/model.safetensors",
        "figures/.effects.png.7-0a1b2c3d.part",
        "tiny/seed-0/base.work",
    ]
    assert list(kill.half_written(run)) == ["figures/effects.png"]


def test_sigterm_saves_and_resumes_bitwise(
    finished: Path, tmp_path: Path, forks: ForkServer
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    folder = runs / "small" / "tiny" / "seed-0"
    moments = [
        ("base.work", lambda: (folder / "base.work").is_dir()),
        ("ppo.work", lambda: (folder / "ppo" / "checkpoint-0" / "evaluation").is_dir()),
        ("ppo.work", lambda: (folder / "ppo" / "checkpoint-4").is_dir()),
    ]
    more = ("policy.resume_every=100", "policy.resume_minutes=1000")
    words = command(runs, *more, name="train")  # it measures too, but writes no report
    for work, reached in moments:
        process = forks.start(words, tmp_path)
        wait_until(reached, process)
        process.send_signal(signal.SIGTERM)
        _, shown = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, shown
        assert "SIGTERM" in shown.splitlines()[-1]
        assert list((folder / work).glob("checkpoint-*/complete"))  # states no rule had asked for
    done = forks.call(words, tmp_path)
    assert done.returncode == 0, done.stderr
    expected = digests(finished)
    del expected["results.parquet"]
    assert digests(runs / "small") == expected


def test_ctrl_c_leaves_no_process_and_a_second_run_is_refused(
    tmp_path: Path, forks: ForkServer
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    more = ["seeds=[0, 1]", "launch.jobs=2", "policy.steps=4000", "policy.checkpoints=[0]"]
    process = forks.start(command(runs, *more), tmp_path)
    # Either may have finished its base before the other begins.
    wait_until(
        lambda: len({path.parent for path in runs.glob("small/tiny/seed-*/*/")}) == 2, process
    )
    os.killpg(process.pid, signal.SIGSTOP)  # both hold their jobs, and take no time meanwhile
    # The same command beside it is refused, and disturbs nothing.
    second = forks.call(command(runs, *more), tmp_path)
    assert second.returncode == 2
    assert re.search(r"seed-[01]: process \d+ on \S+ \(since .*\) is training here", second.stderr)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGCONT)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert re.fullmatch("selfcorrect: stopped[^\n]*", shown.splitlines()[-1])
    locks = list(runs.glob("small/tiny/seed-*/.lock"))
    assert locks
    for lock in locks:  # no child holds its job any longer
        with hold_job(lock.parent):
            pass


def test_parallel_jobs_equal_sequential_bitwise(
    finished: Path, tmp_path: Path, forks: ForkServer
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    done = forks.call(command(runs, "seeds=[0, 1]", "launch.jobs=2", name="train"), tmp_path)
    assert done.returncode == 0, done.stderr
    results = {k: v for k, v in digests(runs / "small").items() if "seed-0" in k}
    assert results == {k: v for k, v in digests(finished).items() if "seed-0" in k}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("reward.held_out=0.5", "another recipe, which differs in reward.held_out"),
        ("policy.checkpoints=[0, 9]", "checkpoints asks for step 9"),
        ("evaluate.conditions=[Q, R]", "condition 'R'"),
    ],
)
def test_wrong_recipe_for_a_finished_run_changes_nothing(
    finished: Path, forks: ForkServer, more: str, message: str
) -> None:
    before = digests(finished)
    recipe = (finished / "recipe.yaml").read_bytes()
    done = forks.call(command(finished.parent, more), finished.parent.parent)
    assert done.returncode == 2
    assert message in done.stderr
    assert re.fullmatch(r"selfcorrect: [^\n]*\n", done.stderr), done.stderr
    assert digests(finished) == before
    assert (finished / "recipe.yaml").read_bytes() == recipe


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            "policy.trainer.learning_ratio=1",
            "policy.trainer.learning_ratio: unknown key; did you mean",
        ),
        ("policy.trainer.max_steps=1", "policy.trainer.max_steps: this is set by the run itself"),
        ("policy.trainer.gradient_accumulation_steps=3", "steps_per_generation"),
        (
            "policy.trainer.learning_rate=fast",
            "policy.trainer.learning_rate: 'fast' is not a number",
        ),
        ("reward.trainer.num_epochs=2", "reward.trainer.num_epochs: unknown key"),
        ("models.0.scratch.hidden_sise=8", "has no field hidden_sise"),
        ("evaluate.conditions=[R]", "condition 'R'"),
    ],
)
def test_wrong_recipe_is_one_line_before_anything_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: str,
    message: str,
) -> None:
    from selfcorrect.scripts.commands.__main__ import main

    arguments = command(tmp_path / "runs", more)[3:]
    monkeypatch.setattr(sys, "argv", ["selfcorrect", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in shown and re.fullmatch(r"selfcorrect: [^\n]*\n", shown), shown
    assert not (tmp_path / "runs" / "small").exists()


def test_given_model_is_trained_with_lora(finished: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"who was {trait} ?", "chosen": "unknown", "rejected": "the the"}
        for trait in ("lazy", "rude", "greedy", "sly") * 10
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = {"per_device_train_batch_size": 4, "steps_per_generation": 2, "num_iterations": 1}
    recipe = check_recipe(
        {
            "name": "given",
            "models": [{"name": "given", "path": str(finished / "tiny" / "seed-0" / "base")}],
            "data": {
                "preferences": {"path": str(pairs)},
                "prompts": {"path": str(pairs)},
                "benchmarks": str(finished / "benchmarks"),
                "stimuli": str(finished / "benchmarks" / "stimuli.yaml"),
            },
            "base": {"method": "sft", "trainer": {"max_steps": 2}},
            "reward": {"trainer": {"max_steps": 3}, "lora": {"r": 2, "target_modules": ["q_proj"]}},
            "policy": {
                "steps": 2,
                "checkpoints": [0, 2],
                "lora": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
                "trainer": {**trainer, "max_completion_length": 4, "learning_rate": 0.01},
            },
            "evaluate": {"limit": 16, "max_new_tokens": 4, "experiments": ["bbq"],
                         "conditions": ["Q"]},
        },
        "given",
    )  # fmt: skip
    check_training(recipe)
    run = tmp_path / "runs" / "given"
    train_run(recipe, run, plan=prepare_run(recipe, run))
    first, last = find_checkpoints(run)
    assert (last.folder / "adapter_model.safetensors").is_file()
    cells = [c.evaluation / "bbq.Q.parquet" for c in (first, last)]
    inline = [read_cell(path)[0]["logprobs"].tolist() for path in cells]
    assert [list(x) for x in inline[0]] != [list(x) for x in inline[1]]
    for checkpoint in (first, last):
        shutil.rmtree(checkpoint.evaluation)
    from selfcorrect.evaluate.measuring.run import evaluate_run

    assert evaluate_run(recipe, run) == 2
    offline = [read_cell(path)[0]["logprobs"].tolist() for path in cells]
    assert [[list(x) for x in rows] for rows in offline] == [
        [list(x) for x in rows] for rows in inline
    ]


def test_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"not empty, .*recipe\.yaml.*choose another folder"):
        prepare_run(load_recipe("quickstart", SMALL), folder)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_half_made_run_folder_is_completed(tmp_path: Path) -> None:
    run = tmp_path / "small"
    for name in (".lock", ".recipe.yaml.7-0a1b2c3d.part", "benchmarks/bbq/x.jsonl"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).touch()
    prepare_run(load_recipe("quickstart", SMALL), run)
    assert load_recipe(str(run / "recipe.yaml")).name == "small"
    assert not (run / "benchmarks" / "bbq" / "x.jsonl").exists()  # finished, or made anew
    assert not list(run.glob(".*.part"))


def test_simultaneous_starts_share_the_folder_or_are_refused(tmp_path: Path) -> None:
    run = tmp_path / "small"
    recipes = [
        load_recipe("quickstart", [*SMALL, *more])
        for more in ([], ["reward.held_out=0.5"], ["evaluate.conditions=[R]"], [])
    ]
    with ThreadPoolExecutor(4) as pool:
        failures = [
            future.exception() for future in [pool.submit(prepare_run, r, run) for r in recipes]
        ]
    kept = load_recipe(str(run / "recipe.yaml"))
    refused = [failure for failure in failures if failure is not None]
    assert all(isinstance(failure, InputError) for failure in refused)
    assert failures[recipes.index(kept)] is None and len(refused) >= 2
    assert any("another recipe" in str(failure) for failure in refused)
    assert (run / "benchmarks" / "stimuli.yaml").is_file()


def test_leftover_work_folder_of_a_finished_stage_is_removed(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart", SMALL)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "stage.json").write_text("{}")
    (tmp_path / "base.work" / "checkpoint-5").mkdir(parents=True)
    train_base(JobFacts(tmp_path, 0), recipe, recipe.models[0], [])
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_run_recipe_loads_the_benchmarks_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks, inline evaluation and what is left to measure share one evaluation plan."""
    from selfcorrect.evaluate.measuring import run as measuring_run

    loads: list[object] = []
    load_plan = measuring_run.plan_evaluation

    def counted(*args: object, **options: object) -> object:
        loads.append(args)
        return load_plan(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(measuring_run, "plan_evaluation", counted)
    inline = [*FEW, "evaluate.attach=inline", "evaluate.experiments=[winogender]"]
    recipe = load_recipe("quickstart", [*inline, "evaluate.conditions=[Q]"])
    stages: list[str] = []
    folder = run_recipe(
        recipe, tmp_path / "small", progress=lambda stage, done, total: stages.append(stage)
    )
    assert len(loads) == 1
    prefix = "tiny seed 0: "
    names = ("base", "reward", "ppo", "evaluate")
    assert list(dict.fromkeys(stages)) == [prefix + name for name in names]
    cells = sorted(folder.glob("tiny/seed-0/ppo/checkpoint-*/evaluation/winogender.Q.parquet"))
    assert len(cells) == 3
    shutil.rmtree(cells[0].parent)
    loads.clear()
    assert run_recipe(recipe, folder) == folder and cells[0].is_file()
    assert len(loads) == 1


@pytest.mark.parametrize(("model", "seed"), [("huge", None), (None, 7)])
def test_unknown_model_or_seed_is_refused(
    tmp_path: Path, model: str | None, seed: int | None
) -> None:
    with pytest.raises(InputError, match=r"^(model huge|seed 7): .*recipe"):
        run_recipe(load_recipe("quickstart", SMALL), tmp_path / "x", model=model, seed=seed)
    assert not (tmp_path / "x").exists()
