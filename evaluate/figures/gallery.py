"""Draw and save all figures of a report, each with its title and its content in words."""
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
from selfcorrect.evaluate.figures.curves import in_words, name_steps, save
from selfcorrect.evaluate.figures.details import (
    beside_the_bias,
    by_category,
    clusters_against_fact,
    scatter_columns,
)
from selfcorrect.evaluate.figures.maps import effects_by_size_and_step, size_by_steps
from selfcorrect.evaluate.figures.overoptimisation import overoptimisation
from selfcorrect.evaluate.figures.select import (
    NothingToDraw,
    common_steps,
    experiments_in,
    models_in,
    overall,
)
from selfcorrect.evaluate.figures.training_log import training_log
from selfcorrect.evaluate.results import load_items
from selfcorrect.evaluate.run_folder import RLHF_STEPS, find_checkpoints, step_words

MAIN = "sizes-"  # the main figure of an experiment is called sizes-<experiment>
Plan = tuple[str, str, Callable[[], Figure]]  # name, title, and the call that draws it


@dataclass(frozen=True)
class Drawing:
    """A figure on disk: <folder>/<name>.png and .svg, its title, and its content in words.

    Main figures are <name>.pdf too, as wide as a column.
    """

    name: str
    title: str
    alt: str


def draw_run(
    frame: pd.DataFrame, statistics: Mapping[str, Any], run: Path, folder: Path, paper: bool = False
) -> tuple[list[Drawing], list[str]]:
    """Draw every figure of one run that the data allows, into `folder`.

    `frame` and `statistics` are the run's results. With `paper`, the figures against steps and
    size show the paper's values as open markers. Returns the drawings, and a sentence for each
    reason why figures are missing.
    """
    data, steps = overall(frame), step_words([run])
    models, experiments = models_in(data), experiments_in(data)
    ends = sorted({*common_steps(data)[:1], *common_steps(data)[-1:]})
    effects = statistics["effects"]
    plans: list[Plan] = []
    for name in experiments:  # the main figures come first
        title = f"{EXPERIMENTS[name].title} against {steps}, by size"
        plans.append((f"{MAIN}{name}", title, partial(curves.steps_by_size, frame, name)))
    for model in models[-1:]:  # the largest; figures by size show the others
        draw = partial(curves.against_steps, frame, model, paper)
        plans.append((f"steps-{model}", f"Metric against {steps}, {model}", draw))
    size = partial(curves.against_size, frame, *ends, paper=paper)
    plans.append(("size", "Metric against model size", size))
    draw = partial(curves.instruction_effects, effects)
    plans.append(("effects", "Effect of the instruction", draw))
    for name in experiments:
        title = f"{EXPERIMENTS[name].title} over size and steps"
        plans.append((f"map-{name}", title, partial(size_by_steps, frame, name)))
        title = f"{EXPERIMENTS[name].title}: effect of the instruction over size and steps"
        draw = partial(effects_by_size_and_step, effects, name)
        plans.append((f"map-effects-{name}", title, draw))
    for name in experiments:
        if EXPERIMENTS[name].beside:
            title = f"{EXPERIMENTS[name].title}: metrics beside the headline"
            plans.append((f"beside-{name}", title, partial(beside_the_bias, frame, name)))
        if _num_categories(frame, name) > 1:
            title = f"{EXPERIMENTS[name].title} by category, {models[-1]}"
            plans.append((f"categories-{name}", title, partial(by_category, frame, name)))
    for name, (file_name, cluster) in scatter_names(experiments).items():
        title = f"{EXPERIMENTS[name].title} by {cluster}, {models[-1]}"
        plans.append((file_name, title, partial(_draw_clusters, frame, run, name)))
    draw = partial(curves.training_curves, frame, training_log(run))
    plans.append(("training", "Reward and KL during training", draw))
    if any(checkpoint.record.answers for checkpoint in find_checkpoints(run)):
        title = "What raters want beside what the reward model says"
        plans.append(("overoptimisation", title, partial(overoptimisation, run)))
    drawings, missing = _draw(plans, folder, steps)
    for name in experiments:
        if any(drawing.name == f"{MAIN}{name}" for drawing in drawings):
            figure = curves.steps_by_size(frame, name, in_column=True)
            name_steps(figure, steps)
            save(figure, folder, f"{MAIN}{name}", ["pdf"])
    return drawings, missing


def scatter_names(experiments: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return the file name and the cluster of each figure of single clusters, by experiment."""
    scatters = {n: s for n in experiments if (s := EXPERIMENTS[n].scatter) is not None}
    named: dict[str, str] = {}  # two experiments may have the same kind of cluster
    for name, scatter in scatters.items():
        plain = f"{scatter.cluster}s"
        named[name] = f"{plain}-{name}" if plain in named.values() else plain
    return {name: (named[name], scatter.cluster) for name, scatter in scatters.items()}


def draw_models(frame: pd.DataFrame, folder: Path) -> tuple[list[Drawing], list[str]]:
    """Draw the figure of stand-alone models; returns as `draw_run`."""
    draw = partial(curves.without_training, frame)
    return _draw([("models", "Headline metrics by condition", draw)], folder)


def draw_runs(
    frame: pd.DataFrame, statistics: Mapping[str, Any], folder: Path
) -> tuple[list[Drawing], list[str]]:
    """Draw every figure that compares runs, by the column `run`; returns as `draw_run`."""
    experiments = experiments_in(frame[frame["step"].notna()])
    plans: list[Plan] = []
    for name in experiments:
        title = f"{EXPERIMENTS[name].title} against RLHF steps, a line per run"
        plans.append((f"steps-{name}", title, partial(runs.steps_by_run, frame, name)))
    size = partial(runs.size_by_run, frame)
    plans.append(("size", "Metric against model size, a line per run", size))
    for name in experiments:
        title = f"{EXPERIMENTS[name].title}: effect of the instruction, a line per run"
        draw = partial(runs.effects_by_run, statistics["effects"], name)
        plans.append((f"effects-{name}", title, draw))
    training = partial(runs.training_by_run, frame)
    plans.append(("training", "Reward and KL during training", training))
    return _draw(plans, folder)


def _draw_clusters(frame: pd.DataFrame, run: Path, experiment: str) -> Figure:
    items = load_items(run, experiment, columns=scatter_columns(experiment))
    return clusters_against_fact(frame, items, experiment)


def _num_categories(frame: pd.DataFrame, experiment: str) -> int:
    names = set(frame[frame["experiment"] == experiment]["category"])
    return len(names - {OVERALL})


def _draw(
    plans: Sequence[Plan], folder: Path, steps: str = RLHF_STEPS
) -> tuple[list[Drawing], list[str]]:
    drawings: list[Drawing] = []
    missing: dict[str, list[str]] = {}  # reason -> titles of the figures not drawn
    for name, title, draw in plans:
        try:
            figure = draw()
        except NothingToDraw as reason:
            missing.setdefault(str(reason), []).append(title)
            continue
        name_steps(figure, steps)
        name = re.sub(r"[^\w.+-]", "_", name)
        save(figure, folder, name)
        drawings.append(Drawing(name, title, in_words(figure)))
    return drawings, [f"{'; '.join(titles)}: {reason}." for reason, titles in missing.items()]
