"""Several runs in one report: their labels, which are seeds of one recipe, where they differ."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from selfcorrect.evaluate.results import tidy
from selfcorrect.evaluate.run_folder import find_checkpoints
from selfcorrect.evaluate.statistics.bootstrap import Draws
from selfcorrect.evaluate.statistics.cells import evaluated_cells
from selfcorrect.evaluate.statistics.summary import compare_cells, statistics_of
from selfcorrect.recipes.foundation.checksums import flatten, read_record
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.foundation.printable import escape_controls
from selfcorrect.recipes.foundation.yaml_text import parse_yaml
from selfcorrect.recipes.load import read_recipe_text
from selfcorrect.recipes.schema import rename_old_sections

# Keys that may differ between seeds of one recipe: none changes a checkpoint's answers, apart
# from the seeds.
IGNORED_KEYS = (
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
    """Runs of one recipe that differ in their seeds alone."""

    label: str
    runs: dict[str, Path]  # label -> folder


def name_runs(runs: Sequence[Path]) -> dict[str, Path]:
    """Label each run by its folder's name, with as many parents as make the labels unique.

    Raises InputError for a folder that is not a run, and for a run that is given twice.
    """
    paths = [run.resolve() for run in runs]
    for run, path in zip(runs, paths, strict=True):
        if not (path / "recipe.yaml").is_file():
            raise InputError(f"{run}: not a run folder (no recipe.yaml)")
        if paths.count(path) > 1:
            raise InputError(f"{run}: given twice")
    names = [path.name for path in paths]
    depth = 1
    while len(set(names)) < len(names):
        depth += 1
        names = [
            "/".join(path.parts[-depth:]) if names.count(name) > 1 else name
            for name, path in zip(names, paths, strict=True)
        ]
    return dict(zip(map(escape_controls, names), paths, strict=True))


def group_runs(named: Mapping[str, Path]) -> list[Group]:
    """Group runs whose recipes agree in all but IGNORED_KEYS, as seeds of one recipe.

    A run with a model and seed that its group already has stays alone: it would count twice.
    """
    groups: list[tuple[str, set[tuple[str, int]], dict[str, Path]]] = []
    for label, run in named.items():
        recipe = _recipe_without_seeds(run) or label  # unreadable: a group of its own
        jobs = {(c.record.model, c.record.seed) for c in find_checkpoints(run)}
        for group_recipe, group_jobs, runs in groups:
            if group_recipe == recipe and not jobs & group_jobs:
                group_jobs |= jobs
                runs[label] = run
                break
        else:
            groups.append((recipe, jobs, {label: run}))
    return [Group(" + ".join(runs), runs) for _, _, runs in groups]


def grouping_notes(groups: Sequence[Group]) -> list[str]:
    """Return sentences on which runs are seeds of one recipe, and which repeat a training."""
    notes = [
        f"{group.label} count as seeds of one recipe: their recipes agree in all but the seeds "
        f"(and {', '.join(key for key in IGNORED_KEYS if key != 'seeds')})."
        for group in groups
        if len(group.runs) > 1
    ]
    labels_by_recipe: dict[str, list[str]] = {}
    for group in groups:
        for run in list(group.runs.values())[:1]:
            recipe = _recipe_without_seeds(run)
            if recipe is not None:
                labels_by_recipe.setdefault(recipe, []).append(group.label)
    return notes + [
        f"{', '.join(labels)} have the same recipe and share a seed: they repeat one training and "
        "are shown separately."
        for labels in labels_by_recipe.values()
        if len(labels) > 1
    ]


def measure_groups(
    groups: Sequence[Group], num_resamples: int, seed: int
) -> list[tuple[pd.DataFrame, dict[str, Any]]]:
    """Return each group's tidy table and statistics, with the group's label as `run`.

    All groups are resampled with the same draws. Raises InputError for a run without evaluations,
    and for a damaged file.
    """
    draws = Draws(num_resamples, seed)
    results = []
    for group in groups:
        cells, comparisons = compare_cells(
            [replace(cell, run=group.label) for cell in of_seed]
            for run in group.runs.values()
            for of_seed in evaluated_cells(run, draws)
        )
        checkpoints = [c for run in group.runs.values() for c in find_checkpoints(run)]
        statistics = statistics_of(cells, comparisons, checkpoints, num_resamples, seed)
        results.append((tidy(cells), statistics))
    return results


def merge_statistics(groups: Sequence[Group], parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the lists of several groups' statistics; `missing` names the group's label."""
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


# --- differences between recipes ----------------------------------------------------------------


def differences(named: Mapping[str, Path], file: str) -> list[tuple[str, list[str]]]:
    """Return the keys in which the runs' recipe.yaml or run.json differ, with each run's value.

    A key that a run's file lacks is "not there".
    """
    contents = [dict(flatten(_content(run / file))) for run in named.values()]
    keys = dict.fromkeys(key for content in contents for key in content)
    rows = [(key, [content.get(key, "not there") for content in contents]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _content(path: Path) -> Any:
    """Return the content of a JSON or YAML file; {} if it is missing, or YAML that cannot be read.

    Raises InputError for a damaged JSON record.
    """
    if path.suffix == ".json":
        return read_json(path)
    try:
        content = parse_yaml(read_recipe_text(path), path.name)
        return rename_old_sections(content) if isinstance(content, dict) else content
    except (InputError, ValueError):
        return {}


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON record, {} if it is missing; raises InputError if damaged."""
    try:
        return read_record(path, "restore it or move it away")
    except FileNotFoundError:
        return {}


def _recipe_without_seeds(run: Path) -> str | None:
    """Return the recipe without IGNORED_KEYS, as text to compare; None if it cannot be read."""
    content = _content(run / "recipe.yaml")
    if not isinstance(content, dict) or not content:
        return None
    kept = json.loads(json.dumps(content, default=str))
    for key in IGNORED_KEYS:
        *parents, last = key.split(".")
        section = kept
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.pop(last, None)
    return json.dumps(kept, sort_keys=True)
