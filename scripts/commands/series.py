"""Series of checkpoints that were trained elsewhere, as several commands take them."""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.foundation.locks import hold_lock
from selfcorrect.recipes.load import check_series, load_measured, recipe_path
from selfcorrect.recipes.series import PLACEHOLDERS, Series


def series_of(
    targets: Sequence[str], steps: str | None, settings: Callable[[], dict[str, Any]]
) -> Series | None:
    """Return the series that the targets of `evaluate` name; None if they are models.

    They are one YAML file (or shipped name) with overrides, patterns with {step}, or output folders
    of trainers; only the last two take `steps` and `settings`. Raises InputError for a mixture.
    """
    first, *rest = targets
    if _is_recipe(first):
        recipe = load_measured(first, rest)
        if not isinstance(recipe, Series):
            raise InputError(f"{first}: a recipe; carry it out with selfcorrect run {first}")
        if steps is not None:
            raise InputError(f"--steps: {first} lists its own")
        return recipe
    from selfcorrect.evaluate.measuring.series import adopt

    patterns = [target if _is_pattern(target) else adopt(Path(target)) for target in targets]
    if not any(patterns):
        return None
    if not all(patterns):
        model = targets[patterns.index(None)]
        raise InputError(f"{model}: a model beside a series; write {{step}}, or measure it apart")
    entries = [_entry(str(pattern), steps) for pattern in patterns]
    names = [entry["model"] for entry in entries]
    content = {"name": names[0] if len(names) == 1 else f"{names[0]}-and-{len(names) - 1}-more"}
    return check_series({**content, "checkpoints": entries, **settings()}, ", ".join(targets))


def _is_recipe(target: str) -> bool:
    if target.endswith((".yaml", ".yml")):
        return True
    try:
        return not Path(target).exists() and "/" not in target and recipe_path(target).is_file()
    except InputError:
        return False


def _is_pattern(target: str) -> bool:
    return PLACEHOLDERS[0] in target


def _entry(pattern: str, steps: str | None) -> dict[str, Any]:
    """Return the entry of a series for a path, or for a hub name with @ and its revision."""
    path, _, revision = pattern.partition("@")
    entry: dict[str, Any] = {"path": path, "model": _label(path)}
    if revision:
        entry["revision"] = revision
    if steps is not None:
        parts = [part.strip() for part in steps.split(",")]
        if not all(part.isdecimal() for part in parts):
            raise InputError(f"--steps {steps}: give numbers, such as 0,100,200")
        entry["steps"] = [int(part) for part in parts]
    return entry


def _label(path: str) -> str:
    """Return the name of the last part of a path, before its numbers, that is a name."""
    parts = Path(path).expanduser().absolute().parts if "{" in path else (path,)
    named = [part for part in Path(*parts).parts if "{" not in part and part != "weights"]
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", named[-1] if named else "model").strip("._-")
    return name[:64] or "model"


def open_run(series: Series, run: Path, *, wait: bool = False) -> None:
    """Open a series in the folder `run`, as `open_series`, and record the machine in run.json."""
    from selfcorrect.evaluate.measuring.run import run_date
    from selfcorrect.evaluate.measuring.series import open_series
    from selfcorrect.train.provenance import record_start

    with hold_lock(run, math.inf):
        resolved, changed = open_series(series, run, wait=wait)
        if changed or not (run / "run.json").is_file():
            record_start(resolved, run, run_date(resolved, run))
