"""The headline metrics of a checkpoint: as numbers for a tracker, and in words for the terminal."""

import logging
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np

from selfcorrect.evaluate.experiments import get_experiment
from selfcorrect.evaluate.experiments.base import condition_rank
from selfcorrect.evaluate.measuring.cell_files import read_cell, read_settings
from selfcorrect.evaluate.run_folder import RECORD, Checkpoint, read_checkpoint
from selfcorrect.evaluate.statistics.bootstrap import Draws, bootstrap
from selfcorrect.evaluate.statistics.comparisons import UNINSTRUCTED
from selfcorrect.evaluate.statistics.formatting import compact
from selfcorrect.recipes.foundation.errors import InputError

REQUEST = "Q+IF"
WIDTH = 87  # columns; with "selfcorrect: " before it, a line fits 100

logger = logging.getLogger(__name__)


def headlines(paths: Iterable[Path]) -> dict[str, float]:
    """Return each cell's headline metric and option mass over all items, if they are defined.

    The keys are <experiment>.<condition>.<metric>.
    """
    defined: dict[str, float] = {}
    for path in paths:
        facts = path.stat() if path.exists() else None  # `read_cell` reports a missing file
        state = None if facts is None else (facts.st_ino, facts.st_mtime_ns, facts.st_size)
        defined |= _headlines_of(path, state)
    return defined


@lru_cache(maxsize=256)  # those of a job's first checkpoint are shown beside every later one
def _headlines_of(path: Path, state: tuple[int, int, int] | None) -> dict[str, float]:
    """Return `headlines` of one cell; `state` changes with its file."""
    frame, metadata = read_cell(path)
    experiment = get_experiment(metadata["experiment"])
    tally = experiment.tally(frame)
    pooled = experiment.overall_categories(tally.categories)
    values = bootstrap(tally, experiment.compute, pooled, Draws(1)).replicates.metrics
    defined = {}
    for metric in (experiment.headline, "option_mass"):
        value = float(values[metric][0]) if metric in values else float("nan")
        if np.isfinite(value):
            defined[f"{experiment.name}.{metadata['condition']}.{metric}"] = value
    return defined


def log_checkpoint(checkpoint: Checkpoint) -> None:
    """Log the headlines of a checkpoint that was just measured, beside those of its job's first.

    Only the cells that the lines show are read.
    """
    first: dict[str, float] = {}
    with suppress(InputError, FileNotFoundError):  # damaged or deleted meanwhile: no line
        paths = {
            (settings["experiment"], settings["condition"]): path
            for path in sorted(checkpoint.evaluation.glob("*.parquet"))
            for settings in [read_settings(path)]
        }
        shown = [paths[cell] for cell in _shown(paths)]
        kept = [read_checkpoint(p.parent) for p in checkpoint.folder.parent.glob(f"*/{RECORD}")]
        measured = [other for other in kept if any(other.evaluation.glob("*.parquet"))]
        start = min(measured, key=lambda other: other.record.step)
        if start.key != checkpoint.key:
            files = (start.evaluation / path.name for path in shown)
            first = headlines(path for path in files if path.is_file())
        log_headlines(str(checkpoint.key), headlines(shown), first)


def log_headlines(name: str, values: Mapping[str, float], first: Mapping[str, float]) -> None:
    """Log `headline_lines`."""
    for line in headline_lines(name, values, first):
        logger.info("%s", line)


def headline_lines(name: str, values: Mapping[str, float], first: Mapping[str, float]) -> list[str]:
    """Return `headlines` under Q and Q+IF in lines of WIDTH columns, most often one.

    "small/0/60: bbq Q .46→.51, Q+IF .42→.12; winogender Q .60" gives the values of `first`, then
    those of `values`. Where an experiment was not asked under Q+IF, its first other condition is
    shown.
    """
    keys = {}
    for key in values:
        experiment, _, rest = key.partition(".")
        condition, _, metric = rest.rpartition(".")
        if metric == get_experiment(experiment).headline:
            keys[experiment, condition] = key
    parts: dict[str, list[str]] = {}
    for experiment, condition in _shown(keys):
        key = keys[experiment, condition]
        before = f"{compact(first[key])}→" if key in first else ""
        parts.setdefault(experiment, []).append(f"{condition} {before}{compact(values[key])}")
    lines: list[str] = []
    for experiment, texts in parts.items():
        part = f"{experiment} {', '.join(texts)}"
        if lines and len(lines[-1]) + 2 + len(part) <= WIDTH:
            lines[-1] += f"; {part}"
        else:
            lines.append(f"{name}: {part}")
    return lines


def _shown(cells: Collection[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return each experiment's Q and Q+IF, or what comes nearest."""
    chosen = []
    for experiment in dict.fromkeys(experiment for experiment, _ in cells):
        conditions = [condition for name, condition in cells if name == experiment]
        conditions.sort(key=lambda c: (c != UNINSTRUCTED, c != REQUEST, condition_rank(c)))
        chosen += [(experiment, condition) for condition in conditions[:2]]
    return chosen
