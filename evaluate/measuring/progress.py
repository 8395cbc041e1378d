"""How far a run is measured, and whether anything in it has changed since a report was written."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from selfcorrect.evaluate.measuring.cell_files import read_settings
from selfcorrect.evaluate.measuring.run import planned, recipe_plan
from selfcorrect.evaluate.run_folder import POLICY_METHODS, Checkpoint, find_checkpoints
from selfcorrect.recipes.load import load_recipe
from selfcorrect.recipes.schema import Recipe


@dataclass(frozen=True)
class Progress:
    """How many of the checkpoints that a recipe asks for are measured."""

    measured: int
    planned: int

    @property
    def complete(self) -> bool:
        """Whether nothing is left to measure."""
        return self.measured == self.planned

    def __str__(self) -> str:
        return f"{self.measured} of {self.planned} checkpoints measured"


def begun(run: Path) -> Progress:
    """How many checkpoints have any evaluation file at all; reads no file but the records.

    Raises InputError for a folder that is no run and for a recipe that cannot be read.
    """
    found = {_place(c) for c in find_checkpoints(run) if any(c.evaluation.glob("*.parquet"))}
    places = planned(load_recipe(str(run / "recipe.yaml")))
    return Progress(len(found & places), len(places))


class Watched:
    """A run while it is trained and measured; the plan of its recipe is made only when it changes.

    Raises InputError where the recipe or its benchmarks cannot be read.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._recipe: Recipe | None = None
        self._cells: dict[str, str] = {}  # file name -> settings digest

    def progress(self) -> Progress:
        """How many checkpoints hold every cell of the plan, measured with its present settings."""
        checkpoints = find_checkpoints(self.run)  # says what is wrong with a folder that is no run
        recipe = load_recipe(str(self.run / "recipe.yaml"))
        if recipe != self._recipe:
            cells = recipe_plan(recipe, self.run).cells
            self._cells = {cell.file_name: cell.settings_digest for cell in cells}
            self._recipe = recipe
        places = planned(recipe)
        whole = {_place(c) for c in checkpoints if self._is_whole(c)}
        return Progress(len(whole & places), len(places))

    def _is_whole(self, checkpoint: Checkpoint) -> bool:
        """A file is read whole only once: every one is written whole or not at all."""
        paths = {name: checkpoint.evaluation / name for name in self._cells}
        return all(path.is_file() for path in paths.values()) and all(
            read_settings(path).get("settings_digest") == self._cells[name]
            for name, path in paths.items()
        )


def _place(checkpoint: Checkpoint) -> tuple[str, int, int]:
    record = checkpoint.record
    return record.model, record.seed, record.step


def made_from(run: Path) -> dict[Path, tuple[int, int]]:
    """The files behind a report, with their time of change (ns) and size.

    One that vanishes while it is looked at is left out.
    """
    found = {}
    for path in _behind(run):
        try:
            facts = path.stat()
        except FileNotFoundError:
            continue
        found[path] = (facts.st_mtime_ns, facts.st_size)
    return found


def _behind(run: Path) -> Iterable[Path]:
    yield run / "recipe.yaml"
    yield run / "run.json"
    yield from run.glob("*/seed-*/reward/stage.json")
    for method in POLICY_METHODS:
        yield from run.glob(f"*/seed-*/{method}/checkpoint-*/*.json")
        yield from run.glob(f"*/seed-*/{method}/checkpoint-*/evaluation/*.parquet")
