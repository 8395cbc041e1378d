"""The wheel holds what a user runs, pyproject agrees with the folders, start-up is light."""

import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

from tests.support import ROOT

SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = ("recipes", "evaluate", "train", "scripts")
NOT_IN_THE_WHEEL = ("scripts/benchmarks", "scripts/study", "scripts/dev")
SHELL_SCRIPTS = {"scripts/quickstart", "scripts/test", "scripts/environment.sh"}


def git_files(*options: str) -> list[str]:
    listing = subprocess.check_output(["git", "ls-files", "-z", *options], cwd=ROOT, text=True)
    return [name for name in listing.split("\0") if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in a wheel, built from a copy without ignored files such as build/."""
    source, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheel"))
    for name in git_files("--cached", "--others", "--exclude-standard"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", str(target), "."],
        cwd=source,
        check=True,
        capture_output=True,
    )
    (path,) = target.glob("*.whl")
    return set(zipfile.ZipFile(path).namelist())


def test_wheel_holds_exactly_the_tracked_files_of_its_packages(wheel: set[str]) -> None:
    tracked = {
        f"selfcorrect/{name}"
        for name in git_files(*FOLDERS)
        if name not in SHELL_SCRIPTS
        and not name.startswith(tuple(f"{folder}/" for folder in NOT_IN_THE_WHEEL))
    }
    assert "selfcorrect/recipes/quickstart.yaml" in tracked
    assert {name for name in wheel if ".dist-info/" not in name} == tracked


def test_every_folder_of_code_is_a_package_in_pyproject() -> None:
    code = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    folders = {str(path.parent.relative_to(ROOT)) for path in code}
    assert folders >= set(NOT_IN_THE_WHEEL)
    assert folders - set(NOT_IN_THE_WHEEL) | {"scripts"} == set(SETTINGS["package-dir"].values())
    assert set(SETTINGS["packages"]) == set(SETTINGS["package-dir"])
    for package, folder in SETTINGS["package-dir"].items():
        assert package == "selfcorrect." + folder.replace("/", ".")


@pytest.mark.parametrize("folder", FOLDERS)
def test_top_folder_has_no_init_so_that_installed_libraries_win(folder: str) -> None:
    """With one, evaluate/ would hide the installed `evaluate` library in a checkout."""
    assert (ROOT / folder).is_dir() and not (ROOT / folder / "__init__.py").exists()


def test_command_starts_without_torch() -> None:
    code = (
        "import sys; from selfcorrect.scripts.commands.__main__ import app; "
        "heavy = {'torch', 'transformers', 'trl', 'matplotlib', 'pandas'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "tests")
