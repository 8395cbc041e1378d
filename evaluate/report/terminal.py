"""The table a run or an evaluation ends with in the terminal; fits 100 columns."""

from collections.abc import Sequence

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from selfcorrect.evaluate.experiments import get_experiment
from selfcorrect.evaluate.experiments.base import condition_rank
from selfcorrect.evaluate.experiments.tally import OVERALL
from selfcorrect.evaluate.results import ALL_ORDERS
from selfcorrect.evaluate.statistics.formatting import compact, compact_with_interval
from selfcorrect.recipes.foundation.printable import escape_controls

BESIDE = {
    "accuracy_ambiguous": "Accuracy\nambig.",
    "accuracy_disambiguated": "Accuracy\ndisamb.",
    "option_mass": "Option\nmass",
}


def closing_table(frame: pd.DataFrame) -> Table:
    """Headline metrics with their 95 % intervals, from the tidy table of results.py.

    Runs: per run, model and seed, its first and last step, a row per condition. Stand-alone models
    (no step): a row per experiment and condition, with BBQ's accuracies and the option mass.
    """
    if "order" in frame:  # orders of the options: only all of them together
        frame = frame[frame["order"] == ALL_ORDERS]
    overall = frame[frame["category"] == OVERALL]
    if overall["step"].notna().any():
        return _run_table(overall[overall["step"].notna()])
    # BBQ's names and intersections are in no overall figure: a small sample may hold nothing else.
    keys = ["model", "experiment", "condition"]
    held = set(overall[keys].itertuples(index=False, name=None))
    apart = frame[~frame[keys].apply(tuple, axis=1).isin(held)].drop_duplicates(keys)
    apart = apart.assign(category=OVERALL, metric="none", value=None, num_items=0)
    parts = [part for part in (overall, apart) if len(part)]
    return _model_table(pd.concat(parts) if parts else overall)


def _run_table(data: pd.DataFrame) -> Table:
    experiments = list(dict.fromkeys(data["experiment"]))
    several_runs, several_seeds = data["run"].nunique() > 1, data["seed"].nunique() > 1
    table = _empty("First and last RLHF step", experiments)
    if several_runs:
        table.add_column("Run", overflow="fold")
    table.add_column("Model", overflow="fold")
    if several_seeds:
        table.add_column("Seed", justify="right")
    table.add_column("Step", justify="right", no_wrap=True)
    table.add_column("Condition", no_wrap=True)
    for experiment in experiments:
        table.add_column(_heading(experiment), justify="right", no_wrap=True)
    for (run, model, seed), mine in data.groupby(["run", "model", "seed"], sort=False):
        for step in sorted({mine["step"].min(), mine["step"].max()}):
            here = mine[mine["step"] == step]
            conditions = sorted(set(here["condition"]), key=condition_rank)
            for index, condition in enumerate(conditions):
                place = [_shown(run)] if several_runs else []
                place += [_shown(model), *([str(seed)] if several_seeds else []), str(step)]
                rows = here[here["condition"] == condition]
                values = [_headline(rows, experiment) for experiment in experiments]
                start = place if index == 0 else [""] * len(place)
                last = index == len(conditions) - 1
                table.add_row(*start, _shown(condition), *values, end_section=last)
    return table


def _model_table(data: pd.DataFrame) -> Table:
    table = _empty("Self-correction by model", list(dict.fromkeys(data["experiment"])))
    table.add_column("Model", overflow="fold")
    table.add_column("Condition", no_wrap=True)
    table.add_column("Headline metric", justify="right", no_wrap=True)
    for name in (*BESIDE.values(), "Prompts"):
        table.add_column(name, justify="right", no_wrap=True)
    if (data["num_items"] == 0).any():
        table.caption = (
            f"{table.caption}\n0 prompts: all that was asked stands apart from the overall figures "
            "(names, intersections); take a larger --limit"
        )
    for model, of_model in data.groupby("model", sort=False):
        table.add_row(f"[bold]{_shown(model)}[/bold]")
        for experiment, mine in of_model.groupby("experiment", sort=False):
            conditions = sorted(set(mine["condition"]), key=condition_rank)
            for index, condition in enumerate(conditions):
                rows = mine[mine["condition"] == condition]
                table.add_row(
                    f"  {_short(str(experiment))}" if index == 0 else "",
                    _shown(condition),
                    _headline(rows, str(experiment)),
                    *(_plain(rows, metric) for metric in BESIDE),
                    f"{rows['num_items'].max():,}",
                    end_section=index == len(conditions) - 1,
                )
    return table


def _shown(name: object) -> str:
    """A name as the terminal shows it: neither its brackets nor its control characters act."""
    return escape(escape_controls(name))


def _empty(title: str, experiments: Sequence[str]) -> Table:
    caption = f"{_no_bias(experiments)}; in brackets the 95 % interval over items; –: undefined"
    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )


def _no_bias(experiments: Sequence[str]) -> str:
    """Which value of the headline metrics is no bias: 0, with the exceptions named."""
    other = []
    for experiment in experiments:
        definition = get_experiment(experiment)
        value = definition.headline_metric.unbiased
        if value is None:
            other.append(f"none is for {get_experiment(experiment).title}")
        elif value:
            other.append(f"{compact(value)} for {get_experiment(experiment).title}")
    return "0: no bias" + (f" ({', '.join(other)})" if other else "")


def _heading(experiment: str) -> str:
    definition = get_experiment(experiment)
    return f"{_short(experiment)}\n{definition.headline_metric.label.lower()}"


def _short(experiment: str) -> str:
    return get_experiment(experiment).title.split()[0]


def _headline(rows: pd.DataFrame, experiment: str) -> str:
    mine = rows[
        (rows["experiment"] == experiment) & (rows["metric"] == get_experiment(experiment).headline)
    ]
    if mine.empty:
        return ""
    return compact_with_interval(mine.iloc[0])


def _plain(rows: pd.DataFrame, metric: str) -> str:
    mine = rows[rows["metric"] == metric]
    return "" if mine.empty else compact(mine.iloc[0]["value"])
