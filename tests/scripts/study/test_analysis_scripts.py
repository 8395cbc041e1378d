"""The scripts a researcher copies: each runs on a small recorded run and draws what it says."""

import runpy
import subprocess
import sys

import pytest

from selfcorrect.evaluate.results import write_results
from tests.support import ROOT
from tests.support.recorded_run import Size, record_run

SCRIPTS = ROOT / "scripts"
SMALL = Size(steps=(0, 2, 10), templates=3, blocks=1, occupations=8, students=8)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    return [record_run(folder / name, SMALL) for name in ("one", "two")]


@pytest.fixture
def start(monkeypatch, capsys):
    """Runs a script as `python scripts/NAME.py ...` would, without a second interpreter."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
        said = capsys.readouterr()
        return subprocess.CompletedProcess(name, ended.value.code or 0, said.out, said.err)

    return run


def drawn(ended, out):
    """The names of the figures; each is there as PNG and SVG, and was printed."""
    assert ended.returncode == 0, ended.stderr
    names = sorted(path.name for path in out.iterdir())
    figures = [name.removesuffix(".png") for name in names if name.endswith(".png")]
    assert names == sorted(f"{name}.{kind}" for name in figures for kind in ("png", "svg"))
    assert ended.stdout.split() == [str(out / f"{name}.png") for name in figures]
    return figures


@pytest.mark.parametrize(
    ("name", "arguments", "figures"),
    [
        ("figure_steps", ["--model", "nano"], ["steps"]),
        ("figure_size", ["--step", "2", "--step", "10"], ["size"]),
        ("figure_categories", [], ["categories-bbq"]),
        ("figure_map", ["--experiment", "law_school"], ["map-law_school"]),
    ],
)
def test_one_run_gives_the_figure(name, arguments, figures, runs, tmp_path, start):
    ended = start(name, runs[0], *arguments, "--out", tmp_path / "out")
    assert drawn(ended, tmp_path / "out") == figures


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("figure_steps", ["steps-bbq", "steps-law_school", "steps-winogender"]),
        ("figure_categories", ["categories-bbq-1", "categories-bbq-2"]),
    ],
)
def test_several_runs_are_told_apart(name, figures, runs, tmp_path, start):
    ended = start(name, *runs, "--out", tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == figures


def test_the_map_of_effects_needs_the_statistics_and_says_so(runs, tmp_path, start):
    ended = start("figure_map", runs[0], "--effect", "--out", tmp_path)
    assert ended.returncode == 2
    assert ended.stderr.endswith(f"run `selfcorrect report {runs[0]}` first\n")
    assert ended.stderr.startswith("figure_map: ") and ended.stderr.count("\n") == 1
    write_results(runs[0], 20)
    assert drawn(start("figure_map", runs[0], "--effect", "--out", tmp_path), tmp_path) == [
        "map-bbq"
    ]


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("figure_steps", ["--model", "huge"], "model 'huge': not in the table"),
        ("figure_size", ["--step", "7"], "step 7: nothing was measured there; there are 0, 2, 10"),
        ("figure_categories", ["--experiment", "stereoset"], "stereoset: not measured"),
        ("figure_map", ["--experiment", "nonsense"], "experiment 'nonsense': there is none"),
    ],
)
def test_a_users_error_is_one_line(name, arguments, said, runs, tmp_path, start):
    ended = start(name, runs[0], *arguments, "--out", tmp_path / "out")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"{name}: {said}")
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_they_start_from_a_shell(runs, tmp_path):
    command = [sys.executable, str(SCRIPTS / "figure_map.py"), str(runs[0]), "--out", "maps"]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path, timeout=200)
    assert (tmp_path / "maps" / "map-bbq.svg").is_file()


def test_a_folder_that_is_no_run_is_one_line(tmp_path, start):
    ended = start("figure_steps", tmp_path)
    assert ended.returncode == 2
    assert ended.stderr == (
        f"figure_steps: {tmp_path}: no recipe.yaml here, so this is not a run folder\n"
    )


def test_scripts_are_short_enough_to_copy():
    for path in SCRIPTS.glob("figure_*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 60, path.name
