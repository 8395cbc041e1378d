"""The house: packages are the folders, imports go one way, start-up is light."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support import ROOT

SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
ORDER = ["recipes", "evaluate", "train", "scripts"]  # each may import itself and those before it
NOT_IN_THE_WHEEL = {"scripts/benchmarks", "scripts/study", "scripts/dev"}


def code_files() -> list[Path]:
    return sorted(path for folder in ORDER for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(str(node.module))
    return found


@pytest.mark.parametrize("path", code_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0]
    allowed = set(ORDER[: ORDER.index(own) + 1])
    for name in imported(path):
        if name.startswith("selfcorrect."):
            assert name.split(".")[1] in allowed, f"{path.name} imports {name}"
    if own not in ("train", "scripts"):
        assert not {name.split(".")[0] for name in imported(path)} & {"trl", "deepspeed"}


def test_every_folder_of_code_is_a_package_in_pyproject() -> None:
    folders = {str(path.parent.relative_to(ROOT)) for path in code_files()}
    assert folders >= NOT_IN_THE_WHEEL
    assert (folders - NOT_IN_THE_WHEEL) | {"scripts"} == set(SETTINGS["package-dir"].values())
    assert set(SETTINGS["packages"]) == set(SETTINGS["package-dir"])
    for package, folder in SETTINGS["package-dir"].items():
        assert package == "selfcorrect." + folder.replace("/", ".")


def test_top_folders_have_no_init_so_that_installed_libraries_win() -> None:
    for folder in ORDER:
        assert not (ROOT / folder / "__init__.py").exists()


def test_the_wheel_holds_code_and_yaml_and_nothing_else(tmp_path: Path) -> None:
    import zipfile

    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", str(tmp_path), "."],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {
        "selfcorrect/recipes/quickstart.yaml",
        "selfcorrect/recipes/society/stimuli.yaml",
        "selfcorrect/evaluate/prompts/paper.yaml",
        "selfcorrect/evaluate/prompts/controls.yaml",
        "selfcorrect/evaluate/data/catalogue.yaml",
        "selfcorrect/evaluate/report/page.js",
        "selfcorrect/evaluate/report/page.html.j2",
        "selfcorrect/train/ppo/trainer.py",
    } <= set(names)
    assert all(name.startswith("selfcorrect") for name in names)


def test_the_command_starts_without_torch() -> None:
    code = (
        "import sys; from selfcorrect.scripts.commands.__main__ import app; "
        "heavy = {'torch', 'transformers', 'trl', 'matplotlib', 'pandas'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "tests")
