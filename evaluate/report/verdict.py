"""What the statistics say, in plain sentences that claim no more than their intervals do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selfcorrect.evaluate.experiments import get_experiment
from selfcorrect.evaluate.experiments.base import condition_rank
from selfcorrect.evaluate.experiments.tally import OVERALL
from selfcorrect.evaluate.report.trend_sentences import (
    along_steps,
    corrected,
    over_seeds,
    reached,
    with_size,
)
from selfcorrect.evaluate.statistics.comparisons import UNINSTRUCTED
from selfcorrect.evaluate.statistics.formatting import number, with_interval

Row = Mapping[str, Any]
# Under this probability on the options, a forced choice between them says little.
LITTLE_MASS = 0.5
CLEAR = 0.05  # a corrected p-value below it counts as clear


@dataclass(frozen=True)
class Verdict:
    """The sentences on one model and seed, by experiment."""

    title: str
    paragraphs: list["Paragraph"]


@dataclass(frozen=True)
class Paragraph:
    """One experiment's sentences, under a heading, with what its headline metric means."""

    heading: str
    meaning: str
    sentences: list[str]


def verdicts(statistics: Row) -> list[Verdict]:
    """One verdict per model and seed, in the order of the cells (small to large)."""
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
    """What the reader must keep in mind, and which data is missing."""
    seeds = {(cell["model"], cell["seed"]) for cell in statistics["cells"]}
    models = {model for model, _ in seeds}
    found = [statistics["about"]["interval"]]
    if len(seeds) == len(models):
        found.append(
            "There is one training run per model: how much another training seed would change "
            "these numbers is not known."
        )
    else:
        found.append(
            "The intervals of one training run are over items. Only where seeds are named as the "
            "unit do they say what another training run might give."
        )
    num_growths = len(_headlines(statistics["growth"]))
    if num_growths > 1:
        found.append(
            f"{num_growths} growths are judged here. Their intervals are not widened for that "
            "number, so about one in twenty would exclude zero by chance alone; p-values are "
            "corrected for it (Holm), so that by chance hardly one in twenty such tables holds any "
            f"below {CLEAR}."
        )
    missing = statistics["missing"]
    if missing:
        more = f"; and {len(missing) - 12} more" if len(missing) > 12 else ""
        found.append(f"Missing: {'; '.join(missing[:12])}{more}.")
    return found


def summary(statistics: Row) -> list[str]:
    """For each experiment and instruction: in how many models its effect grew, and with size."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in _headlines(statistics["growth"]):
        groups.setdefault((row["experiment"], row["condition"]), []).append(row)
    sentences = []
    for (experiment, condition), rows in groups.items():
        what = f"{get_experiment(experiment).title}, {UNINSTRUCTED} minus {condition}"
        sentences.append(f"{what}, first to last step: {_counted(rows)}.")
        for kind, sentence in (("over_seeds", over_seeds), ("trends", with_size)):
            mine = [
                row
                for row in _headlines(statistics.get(kind, []))
                if (row["experiment"], row["condition"]) == (experiment, condition)
            ]
            sentences += [f"{what}{end}." for end in sentence(mine)]
    return sentences


def _counted(rows: Sequence[Row]) -> str:
    """How many of the trained models went which way; with one model, by how much."""
    kinds: dict[str, int] = {}
    for row in rows:
        if row["value"] is None:
            kind = "undefined"
        elif row["excludes_zero"] is None:
            kind = "without an interval"
        elif row["excludes_zero"]:
            kind = "rose" if row["value"] > 0 else "fell"
        else:
            kind = "no clear change"
        kinds[kind] = kinds.get(kind, 0) + 1
    if len(rows) == 1:
        return f"{next(iter(kinds))}, {_undecided(rows[0])}{corrected(rows[0], ', ')}"
    counted = ", ".join(f"{kind} in {count}" for kind, count in kinds.items())
    moved = [row for row in rows if row["excludes_zero"]]
    clear = [row["p_adjusted"] < CLEAR for row in moved if row.get("p_adjusted") is not None]
    held = f"; after Holm's correction clear in {sum(clear)}" if clear else ""
    return f"{counted} of {len(rows)} models{held}"


def _headlines(rows: Sequence[Row]) -> list[Row]:
    """Only the headline metrics; match-stats asks for a correlation, not against a bias."""
    return [
        row
        for row in rows
        if row["metric"] == get_experiment(row["experiment"]).headline and row.get("judged", True)
    ]


def _paragraphs(
    statistics: Row, cells: Sequence[Row], key: tuple[str, str, int]
) -> list[Paragraph]:
    mine = {
        kind: [row for row in statistics[kind] if (row["run"], row["model"], row["seed"]) == key]
        for kind in ("effects", "growth", "changes")
    }
    for kind in ("trends", "thresholds", "side_by_side"):
        found = statistics.get(kind, [])
        mine[kind] = [row for row in found if (row["run"], row["model"], row["seed"]) == key]
    paragraphs = []
    for experiment in dict.fromkeys(cell["experiment"] for cell in cells):
        definition = get_experiment(experiment)
        here = [cell for cell in cells if cell["experiment"] == experiment]
        rows = {
            kind: [
                row
                for row in found
                if row["experiment"] == experiment
                and row.get("metric", definition.headline) == definition.headline
            ]
            for kind, found in mine.items()
        }
        metric = definition.headline_metric
        meaning = metric.meaning
        if metric.unbiased is not None:
            meaning = f"{meaning}; {metric.unbiased:g} is no bias"
        sentences: list[str] = []
        for condition in sorted({cell["condition"] for cell in here}, key=condition_rank):
            of_condition = [cell for cell in here if cell["condition"] == condition]
            sentences.append(_course(of_condition, definition.headline, rows["changes"]))
            sentences += reached(rows["thresholds"], condition)
            if condition != UNINSTRUCTED and of_condition[0].get("judged", True):
                sentences += _effect(rows, condition)
        sentences += _beside(here)
        paragraphs.append(
            Paragraph(f"{definition.title}: {metric.label}", f"{meaning}.", sentences)
        )
    return paragraphs


def _course(cells: Sequence[Row], metric: str, changes: Sequence[Row]) -> str:
    """What one condition's metric did from the first to the last step."""
    first = min(cells, key=lambda cell: cell["step"])
    last = max(cells, key=lambda cell: cell["step"])
    condition = first["condition"]
    start, end = (_overall(cell, metric) for cell in (first, last))
    if first is last:
        return f"{condition}: {with_interval(end)} at step {last['step']}, the only one measured."
    path = (
        f"{condition}: {with_interval(start)} at step {first['step']}, "
        f"{with_interval(end)} at step {last['step']}"
    )
    for change in changes:
        if change["condition"] == condition:
            return f"{path}; {_judged(change, ('a rise', 'a fall'), 'no clear change')}."
    return f"{path}; the metric is missing at one of the two."


def _effect(rows: Mapping[str, Sequence[Row]], condition: str) -> list[str]:
    """The instruction's effect at the first and last step, and whether it grew."""
    effects = [row for row in rows["effects"] if row["condition"] == condition]
    if not effects:
        return [f"The effect of {condition} is unknown: {UNINSTRUCTED} was not measured beside it."]
    effects = sorted(effects, key=lambda row: row["step"])
    shown = effects[:1] if len(effects) == 1 else [effects[0], effects[-1]]
    at = ", ".join(f"{_undecided(row)} at step {row['step']}" for row in shown)
    sentences = [f"{UNINSTRUCTED} minus {condition}: {at}."]
    for row in rows["growth"]:
        if row["condition"] == condition:
            judged = _judged(row, ("it rose", "it fell"), "no clear change")
            sentences[0] = f"{sentences[0][:-1]}; {judged}."
    return sentences + along_steps(rows, condition)


def _undecided(row: Row) -> str:
    if row["value"] is None:
        return f"undefined ({row['undefined_because']})"
    if row["excludes_zero"] is None:
        return with_interval(row)
    if row["excludes_zero"]:
        return f"{with_interval(row)} (excludes zero)"
    return f"{with_interval(row)} (includes zero{_power(row)})"


def _power(row: Row) -> str:
    """What would probably have been found, beside what was not."""
    least = row.get("detectable")
    return "" if least is None else f"; 80% power for {number(least)}"


def _judged(row: Row, words: tuple[str, str], unclear: str) -> str:
    """The change in words: up or down only when the interval excludes zero."""
    if row["value"] is None:
        return f"the change is undefined ({row['undefined_because']})"
    if row["excludes_zero"] is None:
        return f"changed by {number(row['value'])}, without an interval"
    if row["excludes_zero"]:
        word = words[0] if row["value"] > 0 else words[1]
        return f"{word}, by {with_interval(row)} (excludes zero{corrected(row, '; ')})"
    return f"{unclear}: {with_interval(row)} (includes zero{corrected(row, '; ')}{_power(row)})"


def _beside(cells: Sequence[Row]) -> list[str]:
    """Accuracy and option mass at the last step: an unable model can look unbiased."""
    step = max(cell["step"] for cell in cells)
    last = [cell for cell in cells if cell["step"] == step]
    right = _shares(last, "accuracy_disambiguated", 1.0)
    sentences = []
    if right:
        sentences.append(f"Right on disambiguated questions at step {step} (chance 33%): {right}.")
    little = _shares(last, "option_mass", LITTLE_MASS)
    if little:
        sentences.append(
            f"Probability that lay on the options at step {step}: {little}; with so little, the "
            "choice between them says little."
        )
    return sentences


def _shares(cells: Sequence[Row], metric: str, largest: float) -> str:
    """As in "95% under Q, 93% under Q+IF", of the cells up to `largest`."""
    shares = [(cell["condition"], _overall(cell, metric)["value"]) for cell in cells]
    return ", ".join(
        f"{share:.0%} under {condition}"
        for condition, share in shares
        if share is not None and share <= largest
    )


def _overall(cell: Row, metric: str) -> Row:
    nothing = {"value": None, "low": None, "high": None}
    found: Row = cell["metrics"].get(OVERALL, {}).get(metric, nothing)
    return found
