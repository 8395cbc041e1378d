"""Full and read-only disks, too few file handles, too little memory: one line, nothing lost.

The disks are small file systems in memory; the tests skip if mounting is not permitted.
"""

import errno
import hashlib
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch

from selfcorrect.evaluate.measuring.cell_files import Origin, read_cell
from selfcorrect.evaluate.measuring.measure import measure
from selfcorrect.evaluate.measuring.run import evaluate_run, recipe_plan
from selfcorrect.evaluate.report.page import write_report
from selfcorrect.evaluate.scoring.load_model import load_model
from selfcorrect.evaluate.scoring.weights import files_digest
from selfcorrect.recipes.foundation.errors import RunFailure, explain_machine_faults, machine_fault
from selfcorrect.recipes.load import load_recipe
from selfcorrect.recipes.schema import Recipe
from selfcorrect.scripts.commands.__main__ import main
from selfcorrect.train.job import run_job
from selfcorrect.train.run import prepare_run, train_run
from tests.support.file_server import SHA256, TEXT, Server, get, send_rest
from tests.support.killed_child import die
from tests.support.small_runs import FEW

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_answers")]

STAGES = ("base", "reward", "ppo")
SMALLEST = [
    *FEW[:-1],
    "policy.steps=2",
    "policy.checkpoints=[0, 2]",
    "evaluate.experiments=[winogender]",
    "evaluate.conditions=[Q]",
]


class Disk:
    """A separate file system, which can be filled to the last byte or made read-only."""

    def __init__(self, path: Path, megabytes: int) -> None:
        self.path = path
        options = f"size={megabytes}m"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            pytest.skip(
                f"no full disk was tested: mounting is not permitted ({done.stderr.strip()})"
            )

    def fill(self) -> None:
        with (self.path / "ballast").open("wb", buffering=0) as handle:
            for size in (2**20, 2**12, 1):
                try:
                    while True:
                        handle.write(bytes(size))
                except OSError as error:
                    assert error.errno == errno.ENOSPC

    def make_room(self) -> None:
        (self.path / "ballast").unlink()

    def remount(self, mode: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{mode}", str(self.path)], check=True)


@pytest.fixture
def disk() -> Iterator[Disk]:
    path = Path(tempfile.mkdtemp(prefix="selfcorrect-disk-"))
    try:
        yield Disk(path, 48)
    finally:
        subprocess.run(["umount", "-l", str(path)], capture_output=True)
        path.rmdir()


def before(stage: str, whole: Path, run: Path) -> Path:
    """Copy the run as it was before a stage."""
    shutil.copytree(whole, run)
    for later in STAGES[STAGES.index(stage) :]:
        shutil.rmtree(run / "tiny" / "seed-0" / later)
    return run


def train(recipe: Recipe, run: Path, notify: Callable[[str, int, int], None]) -> None:
    run_job(recipe, run, "tiny", 0, notify)


def contents(run: Path) -> dict[str, str]:
    """Return the checksums of weights and evaluation files."""
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for suffix in ("safetensors", "parquet")
        for path in (run / "tiny").rglob(f"*.{suffix}")
    }


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("quickstart", SMALLEST)


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run on a disk with room."""
    run = tmp_path_factory.mktemp("limits") / "small"
    prepare_run(recipe, run)
    train(recipe, run, lambda *_: None)
    return run


def exit_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Return the command's exit code and its one line on stderr, below its progress."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["selfcorrect", *arguments])
        main()
    shown = capsys.readouterr().err
    *progress, line = shown.splitlines()
    assert line.startswith("selfcorrect: "), shown
    assert all(re.fullmatch(r"small: \w+ \d+/\d+", one) for one in progress), shown
    return int(ended.value.code or 0), line


@pytest.mark.parametrize(
    ("stage", "step"),
    [("base", 2), ("reward", 999), ("ppo", 0), ("ppo", 1), ("ppo", 999)],
)
def test_full_disk_is_one_line_and_the_run_resumes_bitwise(
    recipe: Recipe, whole: Path, disk: Disk, stage: str, step: int
) -> None:
    """Step 999 means a stage's last step, after which the stage's folder is written."""
    run = before(stage, whole, disk.path / "small")

    def fill_at(now: str, done: int, total: int) -> None:
        if now == stage and done >= min(step, total) and not (disk.path / "ballast").exists():
            disk.fill()

    with pytest.raises(RunFailure, match="no space left on the disk; make room") as caught:
        train(recipe, run, fill_at)
    assert "\n" not in str(caught.value)
    kept = contents(run)
    finished = {name: digest for name, digest in kept.items() if ".work/" not in name}
    assert finished.items() <= contents(whole).items()
    disk.make_room()
    train(recipe, run, lambda *_: None)
    assert contents(run) == contents(whole)


def test_full_disk_while_measuring_or_reporting_keeps_existing_files(
    recipe: Recipe, whole: Path, disk: Disk, capsys: pytest.CaptureFixture[str]
) -> None:
    run = disk.path / "small"
    shutil.copytree(whole, run)
    cells = list(run.rglob("*.parquet"))
    for path in cells:
        path.unlink()
    disk.fill()
    code, shown = exit_of(["evaluate", str(run)], capsys)
    assert code == 1 and "no space left on the disk; make room" in shown
    assert list(run.rglob("*.parquet")) == []
    disk.make_room()
    evaluate_run(recipe, run, lambda *_: None)
    assert contents(run) == contents(whole)

    report = write_report(run, num_resamples=20)
    before = report.read_bytes()
    disk.fill()
    code, shown = exit_of(["report", str(run)], capsys)
    assert code == 1 and "no space left on the disk; make room" in shown
    assert report.read_bytes() == before
    assert not list(run.rglob("*.part"))


def test_full_disk_within_a_cell_keeps_the_intact_parts(
    recipe: Recipe, whole: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfcorrect.evaluate.scoring.packed.MOST_ITEMS", 4)
    monkeypatch.setattr("selfcorrect.evaluate.measuring.measure._PART_ITEMS", 4)
    run = shutil.copytree(whole, disk.path / "small")
    folder = run / "tiny" / "seed-0" / "ppo" / "checkpoint-2"
    (cell,) = (folder / "evaluation").glob("*.parquet")
    expected, _ = read_cell(cell)
    cell.unlink()
    seen: list[int] = []

    def score(progress: Callable[[str, int, int], None]) -> None:
        origin = Origin(files_digest(folder))
        model, tokenizer = load_model(folder, device="cpu")
        plan = recipe_plan(recipe, run)
        measure(plan, model, tokenizer, cell.parent, progress, origin=origin)

    def fill_at_eight(name: str, done: int, total: int) -> None:
        if done == 8:
            disk.fill()

    with pytest.raises(OSError, match="No space left") as caught:
        score(fill_at_eight)
    assert "make room" in (machine_fault(caught.value) or "")
    assert not cell.exists()
    disk.make_room()
    score(lambda name, done, total: seen.append(done))
    assert seen[0] == 8  # resumed where the disk was full
    pd.testing.assert_frame_equal(read_cell(cell)[0], expected)


def test_full_disk_while_fetching_leaves_no_file_and_resumes(
    disk: Disk,
    serve: Callable[..., Server],
) -> None:
    server = serve(lambda _, handler: send_rest(handler, TEXT))
    path = disk.path / "data" / "file.txt"
    path.parent.mkdir()
    disk.fill()
    with pytest.raises(OSError, match="No space left") as caught:
        get(server.url, path)
    assert "make room" in (machine_fault(caught.value) or "")
    assert not path.exists()
    disk.make_room()
    get(server.url, path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256


def test_read_only_run_is_shown_if_finished_else_refused(
    recipe: Recipe, whole: Path, disk: Disk, capsys: pytest.CaptureFixture[str]
) -> None:
    run = disk.path / "small"
    shutil.copytree(whole, run)
    write_report(run, num_resamples=20)
    (run / "tiny" / "seed-0" / "ppo" / "stage.json").rename(disk.path / "aside")
    before = contents(run)
    disk.remount("ro")
    asked = ["run", "quickstart", *SMALLEST, "--runs-dir", str(disk.path)]
    code, shown = exit_of(asked, capsys)
    assert code == 1 and "the file system is read-only; mount it for writing" in shown
    code, shown = exit_of(["report", str(run)], capsys)
    assert code == 1 and "the file system is read-only" in shown
    disk.remount("rw")
    (disk.path / "aside").rename(run / "tiny" / "seed-0" / "ppo" / "stage.json")
    disk.remount("ro")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["selfcorrect", *asked])
        with pytest.raises(SystemExit) as ended:
            main()
    assert not ended.value.code and "Report:" in capsys.readouterr().out
    disk.remount("rw")
    assert contents(run) == before


def test_too_few_file_handles_are_one_line_and_the_run_resumes(
    recipe: Recipe, whole: Path, tmp_path: Path
) -> None:
    run = before("reward", whole, tmp_path / "small")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def use_up(now: str, done: int, total: int) -> None:
        if (now, done) == ("reward", 2):
            handle = os.open("/dev/null", os.O_RDONLY)
            os.close(handle)
            resource.setrlimit(resource.RLIMIT_NOFILE, (handle, hard))

    try:
        with pytest.raises(RunFailure, match=r"too many open files; raise the limit \(ulimit -n\)"):
            train(recipe, run, use_up)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    train(recipe, run, lambda *_: None)
    assert contents(run) == contents(whole)


def test_memory_limit_is_one_line(tmp_path: Path) -> None:
    """Train a model of 3 GB in a process that may allocate half a GB more."""
    large = "{model_type: llama, hidden_size: 8192, intermediate_size: 32768, " \
        "num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2}"  # fmt: skip
    model = f"models=[{{name: tiny, scratch: {large}}}]"
    child = os.fork()
    if not child:
        code = 99
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + 2**29
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            with (tmp_path / "stderr").open("w") as sys.stderr:
                arguments = ["run", "quickstart", *SMALLEST, model, "--runs-dir", str(tmp_path)]
                sys.argv = ["selfcorrect", *arguments]
                main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    *progress, line = (tmp_path / "stderr").read_text().splitlines()
    assert os.waitstatus_to_exitcode(status) == 1, line
    assert "not enough memory; lower launch.jobs" in line
    assert all(one.startswith("tiny seed 0: ") for one in progress)


def test_killed_child_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfcorrect.train.run._train_in_child", die)
    recipe = load_recipe("quickstart", [*SMALLEST, "seeds=[0, 1]", "launch.jobs=2"])
    with pytest.raises(RunFailure, match=r"was killed \(out of memory\?\); .* lower launch"):
        train_run(recipe, tmp_path, lambda *_: None)


@pytest.mark.parametrize(
    "fails",
    [lambda: torch.empty(2**50, dtype=torch.uint8), lambda: bytearray(2**60)],
    ids=["torch", "python"],
)
def test_failed_allocation_is_one_line(tmp_path: Path, fails: Callable) -> None:
    with (
        pytest.raises(RunFailure, match="not enough memory; lower launch"),
        explain_machine_faults(tmp_path),
    ):
        fails()
