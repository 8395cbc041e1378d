"""Every figure that a report shows, drawn and saved, with its title and its content in words."""
# ruff: noqa: TID253 - all of this file is matplotlib; it is itself imported only where needed.

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from selfcorrect.evaluate.experiments import EXPERIMENTS
from selfcorrect.evaluate.experiments.tally import OVERALL
from selfcorrect.evaluate.figures import curves, runs
from selfcorrect.evaluate.figures.curves import in_words, save
from selfcorrect.evaluate.figures.details import (
    beside_the_bias,
    by_category,
    clusters_against_fact,
    scatter_columns,
)
from selfcorrect.evaluate.figures.maps import effects_by_size_and_step, size_by_steps
from selfcorrect.evaluate.figures.select import (
    NothingToDraw,
    common_steps,
    experiments_in,
    models_in,
    overall,
)
from selfcorrect.evaluate.results import load_items

Wanted = tuple[str, str, Callable[[], Figure]]  # name, title, how it is drawn


@dataclass(frozen=True)
class Drawing:
    """One figure on disk: <folder>/<name>.png and .svg, a title, and its content in words."""

    name: str
    title: str
    alt: str


def draw_run(
    frame: pd.DataFrame,
    statistics: Mapping[str, Any],
    run: Path,
    folder: Path,
    paper: bool = False,
) -> tuple[list[Drawing], list[str]]:
    """Draw every figure of one run that the data allows, into `folder`.

    `frame` and `statistics` are the run's results. With `paper`, the figures against steps and
    size show the paper's values as open markers. Returns the drawings, and a sentence for each
    reason why figures are missing.
    """
    data = overall(frame)
    models, experiments = models_in(data), experiments_in(data)
    ends = sorted({*common_steps(data)[:1], *common_steps(data)[-1:]})
    effects = statistics["effects"]
    wanted: list[Wanted] = [
        (
            f"steps-{model}",
            f"Metric against RLHF steps, {model}",
            partial(curves.against_steps, frame, model, paper),
        )
        for model in models[-1:]  # the largest; the others stand in the panels by size
    ]
    size = partial(curves.against_size, frame, *ends, paper=paper)
    wanted.append(("size", "Metric against model size", size))
    for name in experiments if len(models) > 1 else []:
        steps = partial(curves.steps_by_size, frame, name)
        wanted.append(
            (f"sizes-{name}", f"{EXPERIMENTS[name].title} against RLHF steps, by size", steps)
        )
    wanted.append(
        ("effects", "Effect of the instruction", partial(curves.instruction_effects, effects))
    )
    for name in experiments:
        title = f"{EXPERIMENTS[name].title} over size and steps"
        wanted.append((f"map-{name}", title, partial(size_by_steps, frame, name)))
        title = f"{EXPERIMENTS[name].title}: effect of the instruction over size and steps"
        draw = partial(effects_by_size_and_step, effects, name)
        wanted.append((f"map-effects-{name}", title, draw))
    for name in experiments:
        if EXPERIMENTS[name].beside:
            title = f"{EXPERIMENTS[name].title}: what stands beside the headline metric"
            wanted.append((f"beside-{name}", title, partial(beside_the_bias, frame, name)))
        if _num_categories(frame, name) > 1:
            title = f"{EXPERIMENTS[name].title} by category, {models[-1]}"
            wanted.append((f"categories-{name}", title, partial(by_category, frame, name)))
    for name in experiments:
        if scatter := EXPERIMENTS[name].scatter:
            title = f"{EXPERIMENTS[name].title} by {scatter.cluster}, {models[-1]}"
            draw = partial(_draw_clusters, frame, run, name)
            wanted.append((f"{scatter.cluster}s", title, draw))
    wanted.append(
        ("training", "Reward and KL during training", partial(curves.training_curves, frame))
    )
    return _draw(wanted, folder)


def draw_runs(
    frame: pd.DataFrame, statistics: Mapping[str, Any], folder: Path
) -> tuple[list[Drawing], list[str]]:
    """Every figure that lays several runs side by side; the column `run` tells them apart."""
    experiments = experiments_in(frame[frame["step"].notna()])
    wanted: list[Wanted] = [
        (
            f"steps-{name}",
            f"{EXPERIMENTS[name].title} against RLHF steps, a line a run",
            partial(runs.steps_by_run, frame, name),
        )
        for name in experiments
    ]
    size = partial(runs.size_by_run, frame)
    wanted.append(("size", "Metric against model size, a line a run", size))
    for name in experiments:
        title = f"{EXPERIMENTS[name].title}: effect of the instruction, a line a run"
        draw = partial(runs.effects_by_run, statistics["effects"], name)
        wanted.append((f"effects-{name}", title, draw))
    training = partial(runs.training_by_run, frame)
    wanted.append(("training", "Reward and KL during training", training))
    return _draw(wanted, folder)


def _draw_clusters(frame: pd.DataFrame, run: Path, experiment: str) -> Figure:
    items = load_items(run, experiment, columns=scatter_columns(experiment))
    return clusters_against_fact(frame, items, experiment)


def _num_categories(frame: pd.DataFrame, experiment: str) -> int:
    names = set(frame[frame["experiment"] == experiment]["category"])
    return len(names - {OVERALL})


def _draw(wanted: Sequence[Wanted], folder: Path) -> tuple[list[Drawing], list[str]]:
    drawings: list[Drawing] = []
    lacking: dict[str, list[str]] = {}  # reason -> the figures that it keeps from being drawn
    for name, title, draw in wanted:
        try:
            figure = draw()
        except NothingToDraw as reason:
            lacking.setdefault(str(reason), []).append(title)
            continue
        name = re.sub(r"[^\w.+-]", "_", name)
        save(figure, folder, name)
        drawings.append(Drawing(name, title, in_words(figure)))
    return drawings, [f"{'; '.join(titles)}: {reason}." for reason, titles in lacking.items()]
