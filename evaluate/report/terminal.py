"""The table that a run or an evaluation prints at its end; fits 100 columns."""

from collections.abc import Iterator, Sequence

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from selfcorrect.evaluate.experiments import get_experiment
from selfcorrect.evaluate.experiments.base import condition_rank
from selfcorrect.evaluate.experiments.tally import OVERALL
from selfcorrect.evaluate.statistics.cells import ALL_ORDERS
from selfcorrect.evaluate.statistics.formatting import compact, compact_with_interval
from selfcorrect.evaluate.statistics.significance import mean_over_seeds
from selfcorrect.recipes.foundation.printable import escape_controls


def closing_table(frame: pd.DataFrame) -> Table:
    """Return headline metrics with their 95 % intervals, from the tidy table of results.py.

    For runs: the first and last step of each run and model, a row per condition, means where there
    are several seeds. For stand-alone models (no step): a row per experiment and condition, with
    accuracies and option mass beside the headline metric.
    """
    if "order" in frame:
        frame = frame[frame["order"] == ALL_ORDERS]
    overall = frame[frame["category"] == OVERALL]
    if overall["step"].notna().any():
        return _run_table(overall[overall["step"].notna()])
    # A small sample may hold only categories that no overall value pools, such as BBQ's names.
    keys = ["model", "experiment", "condition"]
    measured = set(overall[keys].itertuples(index=False, name=None))
    unpooled = frame[~frame[keys].apply(tuple, axis=1).isin(measured)].drop_duplicates(keys)
    unpooled = unpooled.assign(category=OVERALL, metric="none", value=None, num_items=0)
    parts = [part for part in (overall, unpooled) if len(part)]
    return _model_table(pd.concat(parts) if parts else overall)


def _run_table(data: pd.DataFrame) -> Table:
    experiments = list(dict.fromkeys(data["experiment"]))
    identity = ["model"]
    if data["run"].nunique() > 1:
        identity.insert(0, "run")
    has_seeds = data.groupby(["run", "model"])["seed"].nunique().max() > 1
    unit = "seeds, or items where there is one seed" if has_seeds else "items"
    table = results_table("First and last step", _caption(experiments, unit))
    for name in identity:
        table.add_column(name.capitalize(), overflow="fold")
    if has_seeds:
        table.add_column("Seeds", justify="right")
    table.add_column("Step", justify="right", no_wrap=True)
    table.add_column("Condition", no_wrap=True)
    for experiment in experiments:
        table.add_column(_heading(experiment), justify="right", no_wrap=True)
    for _, of_model in data.groupby(["run", "model"], sort=False):
        for step in sorted({of_model["step"].min(), of_model["step"].max()}):
            checkpoint = of_model[of_model["step"] == step]
            names = [_escape(checkpoint.iloc[0][name]) for name in identity]
            if has_seeds:
                names.append(str(checkpoint["seed"].nunique()))
            names.append(str(step))
            for condition, rows, last in _by_condition(checkpoint):
                values = [_headline(rows, experiment) for experiment in experiments]
                table.add_row(*names, _escape(condition), *values, end_section=last)
                names = [""] * len(names)
    return table


def _model_table(data: pd.DataFrame) -> Table:
    experiments = list(dict.fromkeys(data["experiment"]))
    columns = {
        name: metric.column
        for experiment in experiments
        for name, metric in get_experiment(experiment).metrics.items()
        if metric.column
    }
    table = results_table("Self-correction by model", _caption(experiments))
    table.add_column("Model", overflow="fold")
    table.add_column("Condition", no_wrap=True)
    table.add_column("Headline metric", justify="right", no_wrap=True)
    for name in (*columns.values(), "Items"):
        table.add_column(name, justify="right", no_wrap=True)
    if (data["num_items"] == 0).any():
        table.caption = (
            f"{table.caption}\n0 items: the sample has only categories that no overall value "
            "pools (names, intersections); use a larger --limit"
        )
    for model, of_model in data.groupby("model", sort=False):
        table.add_row(f"[bold]{_escape(model)}[/bold]")
        for experiment, of_experiment in of_model.groupby("experiment", sort=False):
            name = f"  {_short_title(str(experiment))}"
            for condition, rows, last in _by_condition(of_experiment):
                table.add_row(
                    name,
                    _escape(condition),
                    _headline(rows, str(experiment)),
                    *(_value(rows, metric) for metric in columns),
                    f"{rows['num_items'].max():,}",
                    end_section=last,
                )
                name = ""
    return table


def _by_condition(data: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame, bool]]:
    """Yield each condition, its rows, and whether it is the last one."""
    conditions = sorted(set(data["condition"]), key=condition_rank)
    for condition in conditions:
        yield condition, data[data["condition"] == condition], condition == conditions[-1]


def _escape(name: object) -> str:
    """Escape rich's markup and control characters in a name."""
    return escape(escape_controls(name))


def results_table(title: str, caption: str) -> Table:
    """Return an empty table in the style of all tables of results."""
    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )


def _caption(experiments: Sequence[str], unit: str = "items") -> str:
    """Return which value of the headline metrics is no bias, 0 and its exceptions, and a key."""
    exceptions = []
    for experiment in map(get_experiment, experiments):
        value = experiment.headline_metric.unbiased
        if value is None or value:
            exceptions.append(
                f"{'none' if value is None else compact(value)} for {experiment.title}"
            )
    unbiased = "0: no bias" + (f" ({', '.join(exceptions)})" if exceptions else "")
    return f"{unbiased}; in brackets 95 % intervals over {unit}; –: undefined"


def _heading(experiment: str) -> str:
    return f"{_short_title(experiment)}\n{get_experiment(experiment).headline_metric.label.lower()}"


def _short_title(experiment: str) -> str:
    return get_experiment(experiment).title.split()[0]


def _headline(rows: pd.DataFrame, experiment: str) -> str:
    headline = get_experiment(experiment).headline
    rows = rows[(rows["experiment"] == experiment) & (rows["metric"] == headline)]
    if rows.empty:
        return ""
    if len(rows) > 1:
        return compact_with_interval(mean_over_seeds(rows["value"].dropna().tolist()))
    return compact_with_interval({end: rows.iloc[0][end] for end in ("value", "low", "high")})


def _value(rows: pd.DataFrame, metric: str) -> str:
    rows = rows[rows["metric"] == metric]
    return "" if rows.empty else compact(rows.iloc[0]["value"])
