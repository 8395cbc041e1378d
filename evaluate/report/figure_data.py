"""The data of the page's figures: points of all metrics on show, and every logged training step."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from selfcorrect.evaluate.experiments import get_experiment
from selfcorrect.evaluate.experiments.tally import OVERALL
from selfcorrect.evaluate.figures.select import conditions_in, experiments_in
from selfcorrect.evaluate.figures.training_log import smoothed
from selfcorrect.evaluate.report.verdict import MEANINGS
from selfcorrect.evaluate.statistics.cells import ALL_ORDERS
from selfcorrect.evaluate.statistics.formatting import size_name
from selfcorrect.evaluate.statistics.series import EXPECTED
from selfcorrect.recipes.foundation.printable import escape_controls

EFFECT = "effect"  # Q minus the condition, of the headline metric
MOST_RAW_POINTS = 3000  # logged steps drawn as points behind the smoothed lines
# Vega's symbol and matplotlib's marker, with the character that stands for it in a legend.
SYMBOLS = {
    "o": ("circle", "●"),
    "s": ("square", "■"),
    "^": ("triangle-up", "▲"),
    "D": ("diamond", "◆"),
    "v": ("triangle-down", "▼"),
    "P": ("cross", "✚"),
    "X": ("M-.5,-.5L.5,.5M.5,-.5L-.5,.5", "✖"),
    "<": ("triangle-left", "◀"),
    ">": ("triangle-right", "▶"),
}


def figure_data(frame: pd.DataFrame, effects: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return an entry per experiment: its names, and its points in columns.

    `frame` is the tidy table and `effects` the list of statistics.json. Points are those of the
    headline metric (overall and by category), of the metrics beside it, and of the effects.
    """
    if "order" in frame:
        frame = frame[frame["order"] == ALL_ORDERS]
    return [
        _entry(frame[frame["experiment"] == name], effects, name) for name in experiments_in(frame)
    ]


def _entry(frame: pd.DataFrame, effects: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    definition = get_experiment(name)
    shown = [definition.headline, *definition.beside, definition.accuracy or "", "option_mass",
             EXPECTED + definition.headline]  # fmt: skip
    defined = set(frame[frame["value"].notna()]["metric"])
    shown = [m for m in dict.fromkeys(shown) if m in defined or m == definition.headline]
    overall, headline = frame["category"] == OVERALL, frame["metric"] == definition.headline
    frame = frame[(overall & frame["metric"].isin(shown)) | headline]
    categories = [OVERALL, *sorted(set(frame["category"]) - {OVERALL})]
    conditions = conditions_in(frame)
    jobs = frame[["run", "model", "parameters", "seed"]].drop_duplicates()
    jobs = jobs.sort_values("parameters", kind="stable")
    training_runs = list(
        jobs[["run", "model", "seed"]].astype(object).itertuples(index=False, name=None)
    )
    place = {
        tuple(None if pd.isna(x) else x for x in key): i for i, key in enumerate(training_runs)
    }
    metrics = [*shown, *([EFFECT] if effects else [])]
    parts = [_columns(frame, place, conditions, categories, metrics)]
    rows = [
        row for row in effects
        if row["experiment"] == name and row["metric"] == definition.headline
    ]  # fmt: skip
    if rows:
        keys = ["run", "model", "seed", "step", "condition"]
        of_cells = frame[(frame["category"] == OVERALL) & (frame["metric"] == definition.headline)]
        facts = ["kl", "reward", "num_items", "num_clusters"]
        table = pd.DataFrame(rows).assign(category=OVERALL, metric=EFFECT)
        table = table.astype({"seed": "Int64", "step": "Int64"})  # null: a stand-alone model
        table = table.merge(of_cells[keys + facts], on=keys, how="left")
        parts.append(_columns(table, place, conditions, categories, metrics))
    return {
        "name": name,
        "title": definition.title,
        "conditions": [escape_controls(condition) for condition in conditions],
        "categories": [escape_controls(category) for category in categories],
        "metrics": [_metric(definition, metric) for metric in metrics],
        "jobs": [
            {
                "run": escape_controls(run),
                "model": escape_controls(model),
                "size": "" if pd.isna(size) else size_name(float(size)),
                "seed": None if pd.isna(seed) else int(seed),
            }
            for run, model, size, seed in jobs.itertuples(index=False, name=None)
        ],
        "points": {key: [x for part in parts for x in part[key]] for key in parts[0]},
    }


def _metric(definition: Any, metric: str) -> dict[str, Any]:
    if metric == EFFECT:
        label = f"Effect: Q minus the condition ({definition.headline_metric.label.lower()})"
        return {"name": EFFECT, "label": label, "meaning": "", "unbiased": 0, "chance": None}
    described = definition.metrics[metric]
    return {
        "name": metric,
        "label": described.label,
        "meaning": described.meaning,
        "unbiased": described.unbiased,
        "chance": described.chance,
    }


def _columns(
    table: pd.DataFrame,
    jobs: Mapping[tuple[Any, ...], int],
    conditions: Sequence[str],
    categories: Sequence[str],
    metrics: Sequence[str],
) -> dict[str, list[Any]]:
    """Return equally long lists: indices of the names, then numbers; null where undefined."""
    keys = table[["run", "model", "seed"]].astype(object).itertuples(index=False, name=None)
    kl = table["kl"].astype(float)
    kl = kl.where(table["step"].astype(float) != 0, 0.0)  # the policy is the initial one
    root = kl.where(kl >= 0) ** 0.5
    return {
        "job": [jobs[tuple(None if pd.isna(x) else x for x in key)] for key in keys],
        "step": _numbers(table["step"]),
        "condition": [conditions.index(name) for name in table["condition"]],
        "category": [categories.index(name) for name in table["category"]],
        "metric": [metrics.index(name) for name in table["metric"]],
        "root_kl": _numbers(root),
        **{name: _numbers(table[name]) for name in
           ("reward", "value", "low", "high", "num_items", "num_clusters")},
    }  # fmt: skip


def _numbers(column: pd.Series) -> list[float | int | None]:
    return [
        None if not math.isfinite(x) else int(x) if x == int(x) else round(x, 5)
        for x in column.astype(float).fillna(math.nan)
    ]


def looks(conditions: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return colour, dash and symbol of each condition, as in the drawn figures."""
    from selfcorrect.evaluate.figures.panels import condition_looks

    return {
        escape_controls(name): {
            "meaning": MEANINGS.get(name, ""),
            "color": look["color"],
            "dash": [] if look["linestyle"] == "-" else [3 * x for x in look["linestyle"][1]],
            "shape": SYMBOLS.get(look["marker"], SYMBOLS["o"])[0],
            "sign": SYMBOLS.get(look["marker"], SYMBOLS["o"])[1],
        }
        for name, look in condition_looks(conditions).items()
    }


# --- training ------------------------------------------------------------------------------------


def training_data(logs: Mapping[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """Return a line per training run: steps, reward and KL, each raw and smoothed.

    `logs` maps a run's label to its `training_log`. With more than MOST_RAW_POINTS logged steps,
    every nth is a raw point; the smoothed values rest on all.
    """
    every = max(1, math.ceil(sum(map(len, logs.values())) / MOST_RAW_POINTS))
    lines = []
    for run, table in logs.items():
        for (model, seed), rows in table.groupby(["model", "seed"], sort=False):
            rows = rows.sort_values("step")
            shown = rows.iloc[::every]
            line: dict[str, Any] = {
                "run": escape_controls(run),
                "model": escape_controls(model),
                "seed": escape_controls(seed),
                "every": every,
                "step": _numbers(shown["step"]),
            }
            for name in ("reward", "kl"):
                line[name] = _numbers(shown[name])
                line[f"smooth_{name}"] = _numbers(smoothed(rows[name]).loc[shown.index])
            lines.append(line)
    return lines
