"""`selfcorrect launch`: what is submitted, what is refused, and what a job does when warned."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.foundation.yaml_text import parse_yaml
from selfcorrect.recipes.load import load_recipe
from selfcorrect.recipes.slurm import Resources, Slurm, minutes
from selfcorrect.scripts.cluster.jobs import Command, jobs_left
from selfcorrect.scripts.commands.__main__ import main
from tests.support import foreign_checkpoints
from tests.support.small_runs import SECONDS, TINY

SMALL = [
    "name=small",
    f"models=[{{name: tiny, scratch: {TINY}}}, {{name: other, scratch: {TINY}}}]",
    "seeds=[0, 1]",
    "policy.steps=4",
    "policy.checkpoints=[0, 2, 4]",
    "evaluate.attach=off",
]
SLURM = ["launch.slurm.time=4:00:00", "launch.slurm.gpus=0"]

# Stand-ins for a cluster's commands: they write down what they are given.
CLUSTER = {
    "sbatch": """
        n=$(($(cat "$D/count" 2>/dev/null || echo 40) + 1))
        if [ "$n" = "$(cat "$D/refuse" 2>/dev/null)" ]; then
            echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2
            echo "sbatch: error: Batch job submission failed" >&2
            exit 1
        fi
        echo $n >"$D/count"; cp "$1" "$D/$n.sh"; echo "Submitted batch job $n" """,
    "srun": "exit 1",
    "sinfo": "echo main; echo big",
    "squeue": 'cat "$D/queued" 2>/dev/null || true',
    "scancel": 'echo "$@" >>"$D/cancelled"',
}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder first in PATH with a cluster's commands, and what they were given."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    for name, body in CLUSTER.items():
        path = folder / name
        path.write_text(f'#!/bin/bash\nD="{folder}"\n{body}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["selfcorrect", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def launch(runs: Path, *more: str) -> list[str]:
    return ["launch", "quickstart", *SMALL, *more, "--runs-dir", str(runs)]


@pytest.mark.parametrize(
    ("time", "expected"),
    [("90", 90), ("30:00", 30), ("0:20", 1), ("4:00:00", 240), ("04:00:01", 241), ("1-12", 2160),
     ("1-0:30", 1470), ("2-01:00:00", 2940)],
)  # fmt: skip
def test_slurm_times_in_minutes(time: str, expected: int) -> None:
    assert minutes(time) == expected
    assert Resources(time=time).time == time  # type: ignore[arg-type]


@pytest.mark.parametrize("time", ["4:00:00", "12:30:00", "1-0", "90"])
def test_slurm_time_needs_no_quotes_in_yaml(time: str) -> None:
    given = parse_yaml(f"time: {time}", "recipe.yaml")
    assert Slurm(**given).time == time


def test_yaml_numbers_stay_numbers() -> None:
    assert parse_yaml("[0, 12, -3, 1_000, 0x1F, 1e-5, 0.5]", "x") == [
        0,
        12,
        -3,
        1000,
        31,
        1e-5,
        0.5,
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("launch.slurm.time=tomorrow", "launch.slurm.time: a SLURM time is"),
        ("launch.slurm.time=4h", "launch.slurm.time: a SLURM time is"),
        ("launch.slurm.time=0", "launch.slurm.time: a SLURM time is"),
        ("launch.slurm.partitions=x", "launch.slurm.partitions: unknown key; did you mean partit"),
        ("launch.slurm.models.tiny.gpu=1", "models.tiny.gpu: unknown key; did you mean gpus?"),
        ("launch.slurm.models.huge.gpus=1", "launch.slurm.models: the recipe has no model 'huge'"),
        ("launch.slurm.mem=lots", "launch.slurm.mem: String should match pattern"),
        ("launch.slurm.gpus=-1", "launch.slurm.gpus: Input should be greater than or equal to 0"),
    ],
)
def test_wrong_slurm_key_is_one_line(given: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        load_recipe("quickstart", [*SMALL, given])


def test_resources_by_model_and_kind_of_job() -> None:
    asked = Slurm.model_validate(
        {"partition": "a100", "time": "4:00:00", "gpus": 8, "mem": "64G",
         "options": {"constraint": "x"}, "evaluation": {"partition": "small"},
         "models": {"big": {"time": "1-0", "options": {"exclusive": True}}}, "report": {"cpus": 2}}
    )  # fmt: skip
    big, tiny = asked.of("train", "big"), asked.of("train", "tiny")
    assert (big.time, big.gpus, big.mem) == ("1-0", 8, "64G")
    assert big.options == {"constraint": "x", "exclusive": True}
    assert (tiny.time, tiny.options) == ("4:00:00", {"constraint": "x"})
    measuring = asked.of("evaluate", "big")
    assert (measuring.partition, measuring.gpus, measuring.time) == ("small", 1, "1-0")
    report = asked.of("report", None)
    assert (report.partition, report.gpus, report.cpus, report.mem) == ("a100", 0, 2, None)
    saved = Slurm.model_validate(asked.model_dump())
    assert [saved.of(kind, "big") for kind in ("train", "evaluate", "report")] == [
        asked.of(kind, "big") for kind in ("train", "evaluate", "report")
    ]


def test_dry_run_prints_every_script_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    more = ["launch.slurm.models.other={time: 8:00:00, options: {constraint: big}}", "--dry-run"]
    assert call(monkeypatch, *launch(runs, *SLURM, *more)) == 0
    scripts = capsys.readouterr().out.split("# ---- ")[1:]
    assert [script.split(None, 1)[0].rstrip(",") for script in scripts] == [
        f"small.{model}.{seed}.{kind}"
        for model in ("other", "tiny") for seed in (0, 1) for kind in ("train", "evaluate")
    ] + ["small.report"]  # fmt: skip
    first, array, tiny, report = scripts[0], scripts[1], scripts[4], scripts[-1]
    assert "#SBATCH --time=480\n" in first and "#SBATCH --constraint=big\n" in first
    assert "#SBATCH --time=240\n" in tiny and "--constraint" not in tiny
    for line in ("--requeue", "--signal=USR2@300", "--job-name=small.other.0.train"):
        assert f"#SBATCH {line}\n" in first
    assert "--dependency" not in first and "--gpus" not in first
    assert re.search(r"# planned: 0\.\d GB at most\n", first) and "#SBATCH --mem=2G\n" in first
    assert "# runs: -m selfcorrect.scripts.commands train" in first
    assert "--model other --seed 0" in first
    assert "#SBATCH --array=0-2%3\n" in array
    assert "#SBATCH --dependency='afterany:{small.other.0.train}'\n" in array
    assert array.count("--checkpoint other/0/") == 3
    for model in ("other", "tiny"):
        for seed in (0, 1):
            assert f"{{small.{model}.{seed}.evaluate}}" in report
    assert not runs.exists()


def test_what_is_submitted_is_what_the_dry_run_printed(
    tmp_path: Path,
    cluster: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = tmp_path / "runs"
    more = [*SLURM, "launch.slurm.partition=main", "launch.slurm.cpus=3"]
    assert call(monkeypatch, *launch(runs, *more, "--dry-run")) == 0
    dry = ["#!/bin/bash" + text.partition("#!/bin/bash")[2]
           for text in capsys.readouterr().out.split("# ---- ")[1:]]  # fmt: skip
    assert call(monkeypatch, *launch(runs, *more)) == 0
    record = json.loads((runs / "small" / "launch.json").read_text())
    ids = {job["name"]: job["id"] for job in record["jobs"]}
    assert list(ids.values()) == [str(number) for number in range(41, 50)]
    submitted = [(cluster / f"{number}.sh").read_text().strip() for number in ids.values()]
    for name, number in ids.items():
        dry = [text.replace(f"{{{name}}}", number) for text in dry]
    assert submitted == [re.sub(r"'(afterany:\S+)'", r"\1", text).strip() for text in dry]
    for text in submitted[:-1]:  # a step has to be told again
        assert "#SBATCH --cpus-per-task=3\n" in text
        assert re.search(r"^srun .* --cpus-per-task 3 .* -m submitit", text, re.MULTILINE)
    shown = capsys.readouterr().out
    assert "42  small.other.0.evaluate, 3 tasks, after 41" in shown
    assert f"scancel {' '.join(ids.values())}" in shown


def test_a_series_is_submitted_as_its_dry_run_says(
    tmp_path: Path,
    cluster: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its jobs read the recipe that was saved in the run folder."""
    for step in (0, 20):
        foreign_checkpoints.trl(tmp_path / "out", step)
    path = tmp_path / "s.yaml"
    entry = {"model": "nano", "path": f"{tmp_path}/out/checkpoint-{{step}}"}
    slurm = {"time": 20, "gpus": 0, "setup": ["module load x"]}
    content = {"name": "s", "checkpoints": [entry], "launch": {"slurm": slurm}}
    path.write_text(json.dumps({**content, **foreign_checkpoints.ASKED}))
    words = ["launch", str(path), "--runs-dir", str(tmp_path / "runs")]
    assert call(monkeypatch, *words, "--dry-run") == 0
    dry = capsys.readouterr().out
    assert call(monkeypatch, *words) == 0
    array, report = [(cluster / f"{number}.sh").read_text() for number in (41, 42)]
    assert "--array=0-1%2" in array and "afterany:41" in report
    for text in (array, report):
        assert "#SBATCH --time=20\n" in text and "\nmodule load x\n" in text
        (job,) = re.findall(r"--job-name=(\S+)", text)
        assert f"--job-name={job}" in dry
    (commands,) = [job["commands"] for job in recorded_jobs(tmp_path) if job["kind"] == "evaluate"]
    assert [words[-1] for words in commands] == ["nano/0/0", "nano/0/20"]


def recorded_jobs(folder: Path) -> list[dict]:
    return json.loads((folder / "runs/s/launch.json").read_text())["jobs"]


def test_inline_evaluation_needs_one_job_per_model_and_seed(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart", [*SMALL, "evaluate.attach=inline"])
    jobs = jobs_left(recipe, tmp_path / "small")
    assert [job.kind for job in jobs] == ["train"] * 4 + ["report"]
    assert jobs[-1].after == [job.name for job in jobs[:-1]]


def test_job_requests_a_gpu_per_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = launch(tmp_path, "launch.slurm.time=60", "--dry-run")
    assert call(monkeypatch, *arguments) == 0
    scripts = capsys.readouterr().out.split("# ---- ")[1:]
    assert all("#SBATCH --gpus-per-node=1\n" in text for text in scripts[:-1])
    assert "--gpus" not in scripts[-1]
    assert "h at 30% of an H100's peak" in scripts[0]


def wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str]:
    code = call(monkeypatch, *arguments)
    shown = capsys.readouterr().err
    assert re.fullmatch(r"selfcorrect: [^\n]*\n", shown), shown
    return code, shown


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["launch.slurm.gpus=0"], "launch.slurm.time: give the time limit"),
        (
            ["launch.slurm.time=5"],
            "launch.slurm.time: 5 is not longer than launch.slurm.save_seconds",
        ),
        (
            [*SLURM, "launch.slurm.partition=gold"],
            "launch.slurm.partition: this cluster has no partition gold; it has big, main",
        ),
        (
            [*SLURM, "launch.slurm.evaluation.partition=gold"],
            "launch.slurm.partition: this cluster has no partition gold",
        ),
        (
            [*SLURM, "launch.slurm.models.other.gpus=2"],
            "launch.slurm.gpus: 2 for other, but launch.processes: 1",
        ),
        ([*SLURM, "policy.trainer.learning_ratio=1"], "policy.trainer.learning_ratio: unknown key"),
        ([*SLURM, "evaluate.conditions=[R]"], "condition 'R'"),
    ],
)
def test_wrong_recipe_submits_and_writes_nothing(
    tmp_path: Path,
    cluster: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    code, shown = wrong(monkeypatch, capsys, *launch(tmp_path / "runs", *more))
    assert code == 2 and message in shown
    assert not (cluster / "count").exists()
    assert not (tmp_path / "runs" / "small").exists()


def test_missing_sbatch_or_submitit_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        code, shown = wrong(patch, capsys, *launch(tmp_path / "runs", *SLURM))
    assert code == 2 and "--cluster slurm: sbatch is not on PATH" in shown
    monkeypatch.setitem(sys.modules, "submitit", None)
    code, shown = wrong(monkeypatch, capsys, *launch(tmp_path / "runs", *SLURM, "--dry-run"))
    assert code == 2 and "pip install 'selfcorrect[slurm]'" in shown


def test_unwritable_runs_dir_is_refused(
    tmp_path: Path,
    cluster: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    code, shown = wrong(monkeypatch, capsys, *launch(tmp_path / "file" / "runs", *SLURM))
    assert code == 2 and "not writable; give --runs-dir" in shown
    assert not (cluster / "count").exists()


def test_launch_is_refused_while_jobs_are_queued(
    tmp_path: Path,
    cluster: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = tmp_path / "runs"
    assert call(monkeypatch, *launch(runs, *SLURM)) == 0
    capsys.readouterr()
    (cluster / "queued").write_text("7\n43\n44\n44\n")
    recipe = (runs / "small" / "recipe.yaml").read_bytes()
    code, shown = wrong(monkeypatch, capsys, *launch(runs, *SLURM, "launch.slurm.qos=high"))
    assert code == 2 and "2 of its jobs still wait or run" in shown and "scancel 43 44" in shown
    assert (cluster / "count").read_text() == "49\n"
    assert (runs / "small" / "recipe.yaml").read_bytes() == recipe
    record = (runs / "small" / "launch.json").read_text()
    (runs / "small" / "launch.json").write_text(record[:100])
    code, shown = wrong(monkeypatch, capsys, *launch(runs, *SLURM))
    assert code == 2 and "launch.json: not a record of a launch" in shown
    (runs / "small" / "launch.json").write_text(record)
    (cluster / "queued").write_text("7\n")
    assert call(monkeypatch, *launch(runs, *SLURM)) == 0
    assert (cluster / "count").read_text() == "58\n"


def test_refused_job_cancels_all_jobs(
    tmp_path: Path,
    cluster: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (cluster / "refuse").write_text("44")
    arguments = launch(tmp_path, *SLURM)
    monkeypatch.setattr(sys, "argv", ["selfcorrect", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "small.other.1.evaluate: " in line and "QOSMaxSubmitJobPerUserLimit" in line
    assert "3 jobs before it were cancelled" in line
    assert (cluster / "cancelled").read_text() == "41 42 43\n"
    assert not (tmp_path / "small" / "launch.json").exists()


# ---- a job at work -------------------------------------------------------------------------------

# A training in small: it counts up, saves on SIGTERM, and would end unsaved on SLURM's warning.
CHILD = """
import pathlib, signal, sys, time
place = pathlib.Path(sys.argv[1])
def save(*_):
    time.sleep(0.5)
    (place / "saved").write_text("")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
(place / "began").write_text("")
while not (place / "go").exists():
    time.sleep(0.02)
(place / "done").write_text("")
sys.exit(int((place / "go").read_text() or 0))
"""
JOB = """
import signal, sys, pathlib
from selfcorrect.scripts.cluster.jobs import Command
place = pathlib.Path(sys.argv[1])
command = Command([sys.executable, str(place / "child.py"), str(place)], place / "done", None)
def warned(*_):
    again = command.checkpoint()
    assert again.function is not command and again.function.arguments == command.arguments
    assert (place / "saved").exists()  # not before the state is there
    sys.exit(99)
signal.signal(signal.SIGUSR2, warned)
command()
"""


def job(place: Path) -> subprocess.Popen[bytes]:
    (place / "child.py").write_text(CHILD)
    process = subprocess.Popen([sys.executable, "-c", JOB, str(place)], start_new_session=True)
    deadline = time.monotonic() + SECONDS
    while not (place / "began").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return process


def test_time_signal_saves_and_resubmits(
    tmp_path: Path,
) -> None:
    process = job(tmp_path)
    os.killpg(process.pid, signal.SIGUSR2)  # every process of the job, as SLURM does
    assert process.wait(SECONDS) == 99
    assert (tmp_path / "saved").exists() and not (tmp_path / "done").exists()


def test_sigterm_saves_and_fails_the_job(tmp_path: Path) -> None:
    process = job(tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS) == 143
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("code", [0, 3])
def test_job_exits_with_the_code_of_its_command(tmp_path: Path, code: int) -> None:
    process = job(tmp_path)
    (tmp_path / "going").write_text(str(code))
    (tmp_path / "going").rename(tmp_path / "go")
    assert process.wait(SECONDS) == code


def test_local_jobs_see_the_launchers_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import os, sys; open(sys.argv[1], 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])"
    seen = tmp_path / "seen"
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # what submitit sets
    before = signal.getsignal(signal.SIGTERM)
    Command([sys.executable, "-c", code, str(seen)], None, "2,3")()
    signal.signal(signal.SIGTERM, before)
    assert seen.read_text() == "2,3"
