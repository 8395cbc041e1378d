"""Imports go one way: between the four folders, between their rooms, and between files.

A room is a subfolder (`evaluate/scoring`) or a file beside the rooms (`evaluate/results.py`).
"""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.support import ROOT

# Folders and, in each, the floors of its rooms, lowest first. A room imports only lower floors of
# its folder, and any room of the folders above it in this table.
FLOORS = {
    "recipes": ["foundation slurm", "society", "feedback", "schema", "series", "load"],
    "evaluate": [
        "prompts data run_folder",
        "experiments scoring",
        "measuring",
        "statistics",
        "headlines",
        "answers callback export results",
        "figures publish",
        "report probe",
    ],
    "train": [
        "feedback trainers provenance",
        "ppo",
        "stages",
        "check job",
        "distributed",
        "run planning",
    ],
    "scripts": ["dev cluster", "commands", "benchmarks study"],
}
HEIGHTS = {
    (folder, room): (place, height)
    for place, (folder, floors) in enumerate(FLOORS.items())
    for height, floor in enumerate(floors)
    for room in floor.split()
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for folder in FLOORS for path in (ROOT / folder).rglob("*.py")}


def imported_names(path: Path) -> Iterator[str]:
    """Yield every dotted name that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_modules(path: Path) -> set[str]:
    """Return the modules of this package that a file imports."""
    names = (name.removeprefix("selfcorrect.") for name in imported_names(path))
    results = (name if name in MODULES else name.rpartition(".")[0] for name in names)
    return {name for name in results if name in MODULES}


def room_of(module: str) -> tuple[str, str]:
    folder, room, *_ = module.split(".")
    return folder, room


def test_every_room_has_a_floor() -> None:
    assert {room_of(module) for module in MODULES} == set(HEIGHTS)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_rooms_import_only_lower_floors(module: str) -> None:
    room = room_of(module)
    for imported in imported_modules(MODULES[module]):
        other = room_of(imported)
        assert other == room or HEIGHTS[other] < HEIGHTS[room], f"{module} imports {imported}"


def test_no_circle_of_files() -> None:
    graph = {module: imported_modules(path) - {module} for module, path in MODULES.items()}
    assert sum(map(len, graph.values())) > len(MODULES)  # the imports are seen
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("folder", ["recipes", "evaluate"])
def test_only_training_needs_trl_and_deepspeed(folder: str) -> None:
    paths = [path for module, path in MODULES.items() if room_of(module)[0] == folder]
    imported = {name.split(".")[0] for path in paths for name in imported_names(path)}
    assert "pathlib" in imported
    assert not imported & {"trl", "deepspeed"}
