"""The statistics in plain sentences that claim no more than their intervals do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selfcorrect.evaluate.experiments import get_experiment
from selfcorrect.evaluate.experiments.base import Experiment, condition_rank
from selfcorrect.evaluate.experiments.tally import OVERALL
from selfcorrect.evaluate.report.trend_sentences import (
    change_with_size,
    corrected_p,
    effect_along_steps,
    growth_over_seeds,
    in_brackets,
    step_without_bias,
)
from selfcorrect.evaluate.statistics.comparisons import UNINSTRUCTED
from selfcorrect.evaluate.statistics.formatting import number, with_interval

Row = Mapping[str, Any]
# With less probability than this on the options, the choice between them means little.
LITTLE_MASS = 0.5
CLEAR = 0.05  # a corrected p-value below it counts as clear
MOST_MISSING = 12  # missing cells that are named one by one


@dataclass(frozen=True)
class Verdict:
    """The sentences on one model and seed, by experiment."""

    title: str
    paragraphs: list["Paragraph"]


@dataclass(frozen=True)
class Paragraph:
    """The sentences on one experiment, with the meaning of its headline metric."""

    heading: str
    meaning: str
    sentences: list[str]


def verdicts(statistics: Row) -> list[Verdict]:
    """Return one verdict per model and seed, in the order of the cells (small to large)."""
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for cell in statistics["cells"]:
        groups.setdefault((cell["run"], cell["model"], cell["seed"]), []).append(cell)
    seeds = {seed for _, _, seed in groups}
    return [
        Verdict(
            title=model if len(seeds) == 1 else f"{model}, seed {seed}",
            paragraphs=_paragraphs(statistics, cells, (run, model, seed)),
        )
        for (run, model, seed), cells in groups.items()
    ]


def caveats(statistics: Row) -> list[str]:
    """Return what the reader must keep in mind, and which cells are missing."""
    training_runs = {(cell["model"], cell["seed"]) for cell in statistics["cells"]}
    models = {model for model, _ in training_runs}
    sentences = [statistics["about"]["interval"]]
    if len(training_runs) == len(models):
        sentences.append(
            "There is one training run per model, so it is not known how much another training "
            "seed would change these numbers."
        )
    else:
        sentences.append(
            "Intervals of a single training run are over items. Only numbers over training seeds "
            "say what another training run might give."
        )
    num_tests = len(_headlines(statistics["growth"]))
    if num_tests > 1:
        sentences.append(
            f"{num_tests} changes of effects are tested. Their intervals are not widened for that "
            "number: by chance alone, about one in twenty excludes zero. The p-values are "
            "corrected for it (Holm): by chance, at most one in twenty such reports has any below "
            f"{CLEAR}."
        )
    missing = statistics["missing"]
    if missing:
        rest = len(missing) - MOST_MISSING
        more = f"; and {rest} more" if rest > 0 else ""
        sentences.append(f"Missing: {'; '.join(missing[:MOST_MISSING])}{more}.")
    return sentences


def summary(statistics: Row) -> list[str]:
    """Return, by experiment and instruction, in how many models the effect grew, and with size."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in _headlines(statistics["growth"]):
        groups.setdefault((row["experiment"], row["condition"]), []).append(row)
    sentences = []
    for (name, condition), rows in groups.items():
        title, difference = get_experiment(name).title, f"{UNINSTRUCTED} minus {condition}"
        sentences.append(f"{title}: from the first to the last step, {difference} {_count(rows)}.")
        for kind, write in (("over_seeds", growth_over_seeds), ("trends", change_with_size)):
            of_condition = [
                row
                for row in _headlines(statistics.get(kind, []))
                if (row["experiment"], row["condition"]) == (name, condition)
            ]
            sentences += [f"{title}: {text}." for text in write(of_condition, difference)]
    return sentences


def _count(rows: Sequence[Row]) -> str:
    """Return in how many models the effect went which way; with one model, by how much."""
    if len(rows) == 1:
        return _change(rows[0])
    counts: dict[str, int] = {}
    for row in rows:
        direction = _direction(row)
        counts[direction] = counts.get(direction, 0) + 1
    text = ", ".join(f"{direction} in {count}" for direction, count in counts.items())
    tests = [row["p_adjusted"] for row in rows if row["excludes_zero"]]
    tests = [p < CLEAR for p in tests if p is not None]
    clear = f"; clear after Holm's correction in {sum(tests)}" if tests else ""
    return f"{text} of {len(rows)} training runs{clear}"


def _direction(row: Row) -> str:
    """Return the direction of a change in words; up or down only if the interval excludes zero."""
    if row["value"] is None:
        return "is undefined"
    if row["excludes_zero"] is None:
        return "has no interval"
    if not row["excludes_zero"]:
        return "shows no clear change"
    return "rises" if row["value"] > 0 else "falls"


def _change(row: Row) -> str:
    """Return the direction and size of a change: "rises (0.300 [0.100, 0.500])"."""
    if row["value"] is None:
        return f"is undefined ({row['undefined_because']})"
    if row["excludes_zero"] is None:
        return f"changes by {with_interval(row)}"
    notes = [with_interval(row), *corrected_p(row), *_power(row)]
    return f"{_direction(row)}{in_brackets(notes)}"


def _value(row: Row) -> str:
    """Return an effect with its interval and whether that excludes zero."""
    if row["value"] is None:
        return f"undefined ({row['undefined_because']})"
    if row["excludes_zero"] is None:
        return with_interval(row)
    side = "excludes zero" if row["excludes_zero"] else "includes zero"
    return with_interval(row) + in_brackets([side, *_power(row)])


def _power(row: Row) -> list[str]:
    """Return the difference that would probably have been found, where none was."""
    least = row["detectable"]
    return [] if row["excludes_zero"] or least is None else [f"80% power for {number(least)}"]


def _headlines(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of headline metrics under conditions that are judged against a bias."""
    return [
        row
        for row in rows
        if row["metric"] == get_experiment(row["experiment"]).headline and row.get("judged", True)
    ]


def _paragraphs(
    statistics: Row, cells: Sequence[Row], key: tuple[str, str, int]
) -> list[Paragraph]:
    kinds = ("effects", "growth", "changes", "trends", "thresholds", "side_by_side")
    paragraphs = []
    for name in dict.fromkeys(cell["experiment"] for cell in cells):
        experiment = get_experiment(name)
        rows = {
            kind: [
                row
                for row in statistics.get(kind, [])
                if (row["run"], row["model"], row["seed"]) == key
                and row["experiment"] == name
                and row.get("metric", experiment.headline) == experiment.headline
            ]
            for kind in kinds
        }
        metric = experiment.headline_metric
        meaning = metric.meaning
        if metric.unbiased is not None:
            meaning = f"{meaning}; {metric.unbiased:g} is no bias"
        of_experiment = [cell for cell in cells if cell["experiment"] == name]
        sentences: list[str] = []
        for condition in sorted({c["condition"] for c in of_experiment}, key=condition_rank):
            of_condition = [cell for cell in of_experiment if cell["condition"] == condition]
            sentences.append(_course(of_condition, experiment.headline, rows["changes"]))
            sentences += step_without_bias(rows["thresholds"], condition)
            if condition != UNINSTRUCTED and of_condition[0].get("judged", True):
                sentences += _effect(rows, condition)
        sentences += _ability(experiment, of_experiment)
        paragraphs.append(
            Paragraph(f"{experiment.title}: {metric.label}", f"{meaning}.", sentences)
        )
    return paragraphs


def _course(cells: Sequence[Row], metric: str, changes: Sequence[Row]) -> str:
    """Return one condition's metric at the first and the last step, and its change."""
    first = min(cells, key=lambda cell: cell["step"])
    last = max(cells, key=lambda cell: cell["step"])
    condition = first["condition"]
    start, end = (with_interval(_overall(cell, metric)) for cell in (first, last))
    if first is last:
        return f"{condition}: {end} at step {last['step']}, the only one measured."
    text = f"{condition}: {start} at step {first['step']}, {end} at step {last['step']}"
    for change in changes:
        if change["condition"] == condition:
            return f"{text}; {_change(change)}."
    return f"{text}; the metric is missing at one of the two."


def _effect(rows: Mapping[str, Sequence[Row]], condition: str) -> list[str]:
    """Return the instruction's effect at the first and last step, and whether it grew."""
    effects = [row for row in rows["effects"] if row["condition"] == condition]
    if not effects:
        return [f"The effect of {condition} is unknown: {UNINSTRUCTED} was not measured beside it."]
    effects = sorted(effects, key=lambda row: row["step"])
    shown = effects[:1] if len(effects) == 1 else [effects[0], effects[-1]]
    values = ", ".join(f"{_value(row)} at step {row['step']}" for row in shown)
    growth = "".join(f"; {_change(row)}" for row in rows["growth"] if row["condition"] == condition)
    sentence = f"{UNINSTRUCTED} minus {condition}: {values}{growth}."
    return [sentence, *effect_along_steps(rows, condition)]


def _ability(experiment: Experiment, cells: Sequence[Row]) -> list[str]:
    """Return accuracy and option mass at the last step: an unable model can look unbiased."""
    step = max(cell["step"] for cell in cells)
    last = [cell for cell in cells if cell["step"] == step]
    sentences = []
    if experiment.accuracy is not None and (shares := _shares(last, experiment.accuracy, 1.0)):
        accuracy = experiment.metrics[experiment.accuracy]
        chance = "" if accuracy.chance is None else f" (chance {accuracy.chance:.0%})"
        sentences.append(f"{accuracy.label}{chance} at step {step}: {shares}.")
    if shares := _shares(last, "option_mass", LITTLE_MASS):
        sentences.append(
            f"Probability on the options at step {step}: {shares}. With so little, the choice "
            "between the options means little."
        )
    return sentences


def _shares(cells: Sequence[Row], metric: str, largest: float) -> str:
    """Return "95% under Q, 93% under Q+IF" for the cells whose share is at most `largest`."""
    shares = [(cell["condition"], _overall(cell, metric)["value"]) for cell in cells]
    return ", ".join(
        f"{share:.0%} under {condition}"
        for condition, share in shares
        if share is not None and share <= largest
    )


def _overall(cell: Row, metric: str) -> Row:
    undefined = {"value": None, "low": None, "high": None}
    estimate: Row = cell["metrics"].get(OVERALL, {}).get(metric, undefined)
    return estimate
