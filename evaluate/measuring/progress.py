"""How far a run is measured, and whether a file behind its report has changed."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from selfcorrect.evaluate.measuring.plan import EvaluationPlan
from selfcorrect.evaluate.measuring.run import is_measured, recipe_plan
from selfcorrect.evaluate.run_folder import (
    CHECKPOINT_FOLDERS,
    find_checkpoints,
    planned_checkpoints,
)
from selfcorrect.recipes.load import load_measured
from selfcorrect.recipes.series import Measured


@dataclass(frozen=True)
class RunProgress:
    """How many of a recipe's checkpoints are measured."""

    measured: int
    planned: int

    @property
    def complete(self) -> bool:
        """Whether nothing is left to measure."""
        return self.measured == self.planned

    def __str__(self) -> str:
        return f"{self.measured} of {self.planned} checkpoints measured"


def estimate_progress(run: Path) -> RunProgress:
    """Count the checkpoints that have any evaluation file; reads no file but the records.

    Raises InputError for a folder that is not a run, and for a recipe that cannot be read.
    """
    started = {c.key for c in find_checkpoints(run) if any(c.evaluation.glob("*.parquet"))}
    planned = planned_checkpoints(load_measured(str(run / "recipe.yaml")))
    return RunProgress(len(started & planned), len(planned))


class WatchedRun:
    """A run while it is trained and measured; its plan is loaded again only if the recipe changes.

    Raises InputError if the recipe or its benchmarks cannot be read.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._recipe: Measured | None = None
        self._plan = EvaluationPlan([])

    def progress(self) -> RunProgress:
        """Count the checkpoints that hold every cell of the present plan."""
        checkpoints = find_checkpoints(self.run)
        recipe = load_measured(str(self.run / "recipe.yaml"))
        if recipe != self._recipe:
            self._plan = recipe_plan(recipe, self.run)
            self._recipe = recipe
        planned = planned_checkpoints(recipe)
        measured = {c.key for c in checkpoints if is_measured(c, self._plan)}
        return RunProgress(len(measured & planned), len(planned))


def report_inputs(run: Path) -> dict[Path, tuple[int, int]]:
    """Return the files behind a report, with their modification time (ns) and size in bytes.

    A file that vanishes meanwhile is left out.
    """
    patterns = ["recipe.yaml", "run.json", "*/seed-*/reward/stage.json"]
    for method in CHECKPOINT_FOLDERS:
        checkpoints = f"*/seed-*/{method}/checkpoint-*"
        patterns += [f"{checkpoints}/*.json", f"{checkpoints}/evaluation/*.parquet"]
    inputs = {}
    for path in (path for pattern in patterns for path in run.glob(pattern)):
        with suppress(FileNotFoundError):
            facts = path.stat()
            inputs[path] = (facts.st_mtime_ns, facts.st_size)
    return inputs
