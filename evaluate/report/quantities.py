"""The report's table of quantities: each value at the first and last step, and its change."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selfcorrect.evaluate.experiments import get_experiment
from selfcorrect.evaluate.report.tables import (
    CheckpointColumns,
    Table,
    TableCell,
    estimate_cell,
    probability_cell,
    text_cell,
)
from selfcorrect.evaluate.report.verdict import OVER_SEEDS, Series
from selfcorrect.evaluate.statistics.comparisons import UNINSTRUCTED
from selfcorrect.evaluate.statistics.formatting import number
from selfcorrect.evaluate.statistics.series import EXPECTED

Row = Mapping[str, Any]


def quantity_table(every: Sequence[Series], about: Row) -> Table:
    """Return the table of one experiment, from its series.

    Rows are, for each model, the headline metric under each condition, the effect of each request
    on it (Q minus the condition), and what tells whether the model can do the task. A model with
    several training seeds has rows of their mean first (Student's intervals over the seeds), then
    of each seed (intervals over items).
    """
    definition = get_experiment(every[0].experiment)
    metric = definition.headline_metric
    columns = CheckpointColumns([{"run": series.run} for series in every])
    quantities = [
        (series, seed, quantity)
        for over_seeds in (True, False)
        for series in every
        for seed in ([OVER_SEEDS] if over_seeds else series.seeds)
        if not over_seeds or len(series.seeds) > 1
        for quantity in _quantities(series, seed)
    ]
    unbiased = "" if metric.unbiased is None else f"; {metric.unbiased:g} is no bias"
    grown = any(len(quantity.steps) > 1 for _, _, quantity in quantities)
    trained = any(quantity.steps != [None] for _, _, quantity in quantities)
    return Table(
        name="quantities",
        title=f"Every quantity{' at the first and last step' if grown else ''}",
        note=f"{metric.label}: {metric.meaning}{unbiased}. In brackets 95 % intervals. p is "
        "corrected (Holm) for the number of comparisons of a kind in a run. Detectable is the "
        "smallest true change that would have been found with a probability of "
        f"{about.get('power', 0.8):.0%}.",
        columns=[*columns.run_column, "Model", *(["Seed"] if trained else []), "Quantity",
                 *(["Steps", "First", "Last", "Change"] if grown else ["Value"]),
                 "p, corrected", "Detectable"],
        rows=[
            [
                *columns.run({"run": series.run}),
                text_cell(series.model),
                *([_seed_cell(series, seed)] if trained else []),
                text_cell(quantity.name),
                *(_course(quantity) if grown else [estimate_cell(quantity.last, True)]),
                *_test(quantity.change if grown else quantity.last),
            ]
            for series, seed, quantity in quantities
        ],
    )  # fmt: skip


@dataclass(frozen=True)
class _Quantity:
    name: str
    steps: Sequence[int | None]
    first: Row
    last: Row
    change: Row | None


def _seed_cell(series: Series, seed: Any) -> TableCell:
    if seed == OVER_SEEDS:
        return TableCell(f"mean of {len(series.seeds)}", -1)
    return TableCell("–" if seed is None else str(seed), seed)


def _course(quantity: _Quantity) -> list[TableCell]:
    """Return the cells of the steps, the first and last value, and the change."""
    change = quantity.change
    if change is None:
        cell = TableCell("–", None)
    elif change["value"] is None:
        cell = text_cell(f"undefined: {change['undefined_because']}")
    else:
        cell = estimate_cell(change, True)
    ends = (estimate_cell(row, True) for row in (quantity.first, quantity.last))
    return [text_cell(_span(quantity.steps)), *ends, cell]


def _test(row: Row | None) -> list[TableCell]:
    """Return the cells of a comparison's p-value and of the smallest detectable difference."""
    if row is None or row["value"] is None or "detectable" not in row:
        return [TableCell("–", None)] * 2
    least = row["detectable"]
    detectable = TableCell("–", None) if least is None else TableCell(number(least), least)
    return [probability_cell(row["p_adjusted"]), detectable]


def _quantities(series: Series, seed: int | str | None) -> Iterator[_Quantity]:
    """Yield the quantities of one training seed, or of the mean OVER_SEEDS."""
    headline, accuracy = (getattr(get_experiment(series.experiment), name)
                          for name in ("headline", "accuracy"))  # fmt: skip
    for condition in series.conditions:
        yield _metric(series, seed, condition, headline, condition)
    for metric, source in ((headline, ""), (EXPECTED + headline, ", from probabilities")):
        for condition in series.conditions:
            effects = series.comparisons("effect", condition, seed, metric)
            if effects and effects[0].get("judged", True):  # against a bias
                effects = sorted(effects, key=lambda row: row["step"])
                growth = series.comparisons("growth", condition, seed, metric)
                steps = [row["step"] for row in effects]
                name = f"{UNINSTRUCTED} minus {condition}{source}"
                change = next(iter(growth), None)
                yield _Quantity(name, steps, effects[0], effects[-1], change)
    for metric, label in ((accuracy, "accuracy"), ("option_mass", "option mass")):
        for condition in series.conditions if metric else []:
            row = _metric(series, seed, condition, metric, f"{condition}, {label}")
            if row.first["value"] is not None or row.last["value"] is not None:
                yield row


def _metric(
    series: Series, seed: int | str | None, condition: str, metric: str, name: str
) -> _Quantity:
    steps = series.steps(condition, seed)
    first, last = (series.value(condition, step, metric, seed) for step in (steps[0], steps[-1]))
    change = series.comparisons("change", condition, seed, metric)
    return _Quantity(name, steps, first, last, next(iter(change), None))


def _span(steps: Sequence[int | None]) -> str:
    ends = [str(step) for step in (*steps[:1], *steps[-1:]) if step is not None]
    return " → ".join(dict.fromkeys(ends)) or "–"
