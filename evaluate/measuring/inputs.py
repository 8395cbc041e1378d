"""Detect changes of the files that a recipe names, by their SHA-256 in <run>/inputs.json.

Checkpoints of one run must not come from two data sets, so changed feedback is an error. Changed
benchmarks, stimuli or templates are logged, and the cells that depend on them are measured again.
"""

import logging
from pathlib import Path

from selfcorrect.recipes.foundation.checksums import digests, file_digest, read_record, write_record
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.series import Measured, Series

FILE = "inputs.json"
FEEDBACK = ("data.preferences.path", "data.prompts.path", "data.feedback.bbq")

logger = logging.getLogger(__name__)


def check_inputs(recipe: Measured, run: Path, *, training: bool) -> None:
    """Compare the recipe's files with inputs.json, and record new ones there.

    Feedback is compared only with `training`: an evaluation does not need it. Raises InputError if
    it has changed.
    """
    record = run / FILE
    try:
        known = read_record(record, "delete it to accept the files as they are now")
    except FileNotFoundError:
        known = {}
    present = {}
    for key, paths in _named(recipe, training).items():
        present[key] = {name: digest for path in paths for name, digest in _digests(path).items()}
        before = known.get(key)
        if before is None or before == present[key]:
            continue
        names = sorted({*before, *present[key]})
        changed = [name for name in names if before.get(name) != present[key].get(name)]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        change = f"{key}: {changed[0]}{more} has changed since {run} was started"
        if key in FEEDBACK:
            raise InputError(f"{change}; restore the old file, or give the run another name")
        logger.warning("%s; the cells that depend on it are measured again", change)
    if {**known, **present} != known:
        write_record(record, {**known, **present})


def _named(recipe: Measured, training: bool) -> dict[str, list[Path]]:
    """Return the existing local files and folders that the recipe names, by recipe key."""
    data, style = recipe.data, Path(recipe.evaluate.style)
    named: dict[str, list[Path]] = {}
    if data.benchmarks is not None and data.society is None:
        named["data.benchmarks"] = [data.benchmarks / name for name in recipe.evaluate.experiments]
    if data.stimuli is not None:
        named["data.stimuli"] = [data.stimuli]
    if style.suffix in (".jinja", ".jinja2"):
        named["evaluate.style"] = [style]
    if training and not isinstance(recipe, Series):
        feedback = (recipe.data.preferences, recipe.data.prompts)
        for key, source in zip(FEEDBACK, feedback, strict=False):
            if source is not None:
                named[key] = [Path(source.path).expanduser()]
        if recipe.data.feedback is not None and data.benchmarks is not None:
            named[FEEDBACK[2]] = [data.benchmarks / "bbq"]
    return {key: [p for p in paths if p.exists()] for key, paths in named.items()}


def _digests(path: Path) -> dict[str, str]:
    try:
        if path.is_file():
            return {path.name: file_digest(path)}
        return {f"{path.name}/{name}": digest for name, digest in digests(path).items()}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
