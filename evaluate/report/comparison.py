"""Several runs in one report: their names, which are seeds of one recipe, where they differ."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from selfcorrect.evaluate.results import statistics_of, tidy
from selfcorrect.evaluate.run_folder import find_checkpoints
from selfcorrect.evaluate.statistics.bootstrap import Draws
from selfcorrect.evaluate.statistics.cells import MeasuredCell, measure_run
from selfcorrect.recipes.foundation.checksums import flatten, read_record
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.foundation.printable import escape_controls
from selfcorrect.recipes.foundation.yaml_text import parse_yaml
from selfcorrect.recipes.load import read_recipe_text

# Keys of a recipe that change no answer of any checkpoint, beside the seeds: names, what is kept,
# and how the machine is used.
NO_DIFFERENCE = (
    "name",
    "description",
    "seeds",
    "launch",
    "policy.checkpoints",
    "policy.resume_every",
    "policy.resume_minutes",
    "evaluate.attach",
)


@dataclass(frozen=True)
class Group:
    """Runs that are one experiment: one recipe but for the seeds, and no seed twice."""

    label: str
    runs: dict[str, Path]  # label -> folder


def name_runs(runs: Sequence[Path]) -> dict[str, Path]:
    """Each run under its folder's name, with as many parents as tell it from the others.

    Raises InputError for a folder that is no run, and for one that is named twice.
    """
    whole = [run.resolve() for run in runs]
    for run, path in zip(runs, whole, strict=True):
        if not (path / "recipe.yaml").is_file():
            raise InputError(f"{run}: not a run folder (no recipe.yaml)")
        if whole.count(path) > 1:
            raise InputError(f"{run}: given twice")
    names = [path.name for path in whole]
    depth = 1
    while len(set(names)) < len(names):
        depth += 1
        names = [
            "/".join(path.parts[-depth:]) if names.count(name) > 1 else name
            for name, path in zip(names, whole, strict=True)
        ]
    return dict(zip(map(escape_controls, names), whole, strict=True))


def group_runs(named: Mapping[str, Path]) -> list[Group]:
    """Runs whose recipes agree in all but NO_DIFFERENCE, as seeds of one; the others alone.

    A run that holds a model and seed of its group already stands alone: it would count twice.
    """
    groups: list[tuple[str, set[tuple[str, int]], dict[str, Path]]] = []
    for label, run in named.items():
        recipe = _same_in_all_seeds(run) or label  # unreadable: a group of its own
        held = {(c.record.model, c.record.seed) for c in find_checkpoints(run)}
        for other, there, runs in groups:
            if other == recipe and not held & there:
                there |= held
                runs[label] = run
                break
        else:
            groups.append((recipe, held, {label: run}))
    return [Group(" + ".join(runs), runs) for _, _, runs in groups]


def grouping_notes(groups: Sequence[Group]) -> list[str]:
    """Sentences on which runs are taken together, and which are not though they look alike."""
    notes = [
        f"{group.label} are taken as seeds of one model: their recipes agree in all but the seeds "
        f"(and {', '.join(key for key in NO_DIFFERENCE if key != 'seeds')})."
        for group in groups
        if len(group.runs) > 1
    ]
    alike: dict[str, list[str]] = {}
    for group in groups:
        for run in list(group.runs.values())[:1]:
            recipe = _same_in_all_seeds(run)
            if recipe is not None:
                alike.setdefault(recipe, []).append(group.label)
    return notes + [
        f"{', '.join(labels)} have the same recipe and share a seed: they are repetitions of one "
        "training, and stand apart."
        for labels in alike.values()
        if len(labels) > 1
    ]


def measure_groups(
    groups: Sequence[Group], num_resamples: int, seed: int
) -> list[tuple[pd.DataFrame, dict[str, Any]]]:
    """Each group's tidy table and statistics; `run` is the group's label.

    All are resampled with the same draws. Raises InputError for a run of which nothing has been
    evaluated, and for a damaged file.
    """
    draws = Draws(num_resamples, seed)
    found = []
    for group in groups:
        cells: list[MeasuredCell] = []
        for run in group.runs.values():
            mine = measure_run(run, draws)
            if not mine:
                raise InputError(
                    f"{run}: no checkpoint has been evaluated; run `selfcorrect evaluate {run}`"
                )
            cells += [replace(cell, run=group.label) for cell in mine]
        checkpoints = [c for run in group.runs.values() for c in find_checkpoints(run)]
        found.append((tidy(cells), statistics_of(cells, checkpoints, num_resamples, seed)))
    return found


def merge_statistics(groups: Sequence[Group], parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One statistics.json of several: lists joined, and what is missing under the group's label."""
    merged = dict(parts[0])
    for key, first in parts[0].items():
        if isinstance(first, list):
            merged[key] = [row for part in parts for row in part[key]]
    merged["missing"] = [
        f"{group.label}: {sentence}"
        for group, part in zip(groups, parts, strict=True)
        for sentence in part["missing"]
    ]
    return merged


# --- what the recipes say -----------------------------------------------------------------------


def differences(named: Mapping[str, Path], file: str) -> list[tuple[str, list[str]]]:
    """The keys in which the runs' recipe.yaml or run.json differ, with what each run says.

    A key that a run's file lacks is "not there".
    """
    said = [dict(flatten(_content(run / file))) for run in named.values()]
    keys = dict.fromkeys(key for content in said for key in content)
    rows = [(key, [content.get(key, "not there") for content in said]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _content(path: Path) -> Any:
    """Return the content of a JSON or YAML file; {} if it is missing, or YAML that cannot be read.

    Raises InputError for a damaged JSON record.
    """
    if path.suffix == ".json":
        try:
            return read_record(path, "restore it or move it away")
        except FileNotFoundError:
            return {}
    try:
        return parse_yaml(read_recipe_text(path), path.name)
    except InputError:
        return {}


def _same_in_all_seeds(run: Path) -> str | None:
    """The recipe without NO_DIFFERENCE, as text to compare; None where it cannot be read."""
    content = _content(run / "recipe.yaml")
    if not isinstance(content, dict) or not content:
        return None
    kept = json.loads(json.dumps(content, default=str))
    for key in NO_DIFFERENCE:
        *parents, last = key.split(".")
        place = kept
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place.pop(last, None)
    return json.dumps(kept, sort_keys=True)
