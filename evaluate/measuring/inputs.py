"""Files that a recipe names and a run reads: are they still those that it began with?

Their digests stand in <run>/inputs.json. Weights of two data sets must never mix, so changed
feedback ends the run; changed benchmarks, stimuli or templates are said: what they decide is
measured anew.
"""

import logging
from pathlib import Path

from selfcorrect.recipes.foundation.checksums import digests, file_digest, read_record, write_record
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.schema import Recipe

FILE = "inputs.json"
FEEDBACK = ("data.preferences.path", "data.prompts.path")

_log = logging.getLogger(__name__)


def check_inputs(recipe: Recipe, run: Path, *, training: bool) -> None:
    """Compare the recipe's files with those that the run began with, and take down new ones.

    Feedback is looked at with `training` alone: an evaluation needs none. Raises InputError where
    it has changed.
    """
    record = run / FILE
    try:
        known = read_record(record, "delete it, and the files are taken as they are now")
    except FileNotFoundError:
        known = {}
    found = {}
    for key, paths in _named(recipe, training).items():
        found[key] = {name: digest for path in paths for name, digest in _digests(path).items()}
        before = known.get(key)
        if before is None or before == found[key]:
            continue
        names = sorted({*before, *found[key]})
        changed = [name for name in names if before.get(name) != found[key].get(name)]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        what = f"{key}: {changed[0]}{more} has changed since {run} began with it"
        if key in FEEDBACK:
            raise InputError(f"{what}; put the old file back, or give the run another name")
        _log.warning("%s; what it decides is measured anew", what)
    if {**known, **found} != known:
        write_record(record, {**known, **found})


def _named(recipe: Recipe, training: bool) -> dict[str, list[Path]]:
    """The local files and folders that the recipe names, by its keys."""
    data, style = recipe.data, Path(recipe.evaluate.style)
    named: dict[str, list[Path]] = {}
    if data.benchmarks is not None and data.society is None:
        named["data.benchmarks"] = [data.benchmarks / name for name in recipe.evaluate.experiments]
    if data.stimuli is not None:
        named["data.stimuli"] = [data.stimuli]
    if style.suffix in (".jinja", ".jinja2"):
        named["evaluate.style"] = [style]
    for key, source in zip(FEEDBACK, (data.preferences, data.prompts), strict=True):
        if training and source is not None:
            named[key] = [Path(source.path).expanduser()]
    return {key: [p for p in paths if p.exists()] for key, paths in named.items()}


def _digests(path: Path) -> dict[str, str]:
    try:
        if path.is_file():
            return {path.name: file_digest(path)}
        return {f"{path.name}/{name}": digest for name, digest in digests(path).items()}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
