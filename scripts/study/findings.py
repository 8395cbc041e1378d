"""Which of the paper's qualitative findings a run shows: one number each, and a rule for all.

A number is taken over training seeds (mean, and Student's interval with the seed as the unit), with
each seed's own interval over items beside it where the statistics have one. The rule was fixed
before the study was looked at: docs/results/study/log.md.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from selfcorrect.evaluate.experiments import get_experiment
from selfcorrect.evaluate.experiments.tally import OVERALL
from selfcorrect.evaluate.statistics.formatting import compact_with_interval
from selfcorrect.evaluate.statistics.significance import correct, mean_over_seeds

Row = Mapping[str, Any]
APPEARS, EVERY_SEED, OPPOSITE = "appears", "in every seed", "the opposite"
OPPOSITE_SEEDS, NOT_SHOWN = "the opposite, in every seed", "not shown"


@dataclass(frozen=True)
class Number:
    """A mean over seeds with its interval, and (value, low, high) over items of each seed."""

    value: float | None
    low: float | None
    high: float | None
    seeds: tuple[tuple[float, float | None, float | None], ...] = ()
    p_value: float | None = None  # over seeds, that it is 0

    def __str__(self) -> str:
        if self.value is None:
            return "undefined"
        return compact_with_interval({"value": self.value, "low": self.low, "high": self.high})

    def side(self) -> int:
        """1 or -1 where the interval over seeds lies on one side of zero, else 0."""
        return _side(self.low, self.high)

    def side_in_all_seeds(self) -> int:
        """1 or -1 where every seed's interval over items lies on that side, else 0."""
        sides = {_side(low, high) for _, low, high in self.seeds}
        return sides.pop() if len(sides) == 1 else 0

    def judged(self, expected: int) -> str:
        """The word for it, where the paper has a number on the side `expected` (1 or -1)."""
        if self.side() == expected:
            return APPEARS
        if self.side() == -expected:
            return OPPOSITE
        if self.side_in_all_seeds() == expected:
            return EVERY_SEED
        return OPPOSITE_SEEDS if self.side_in_all_seeds() == -expected else NOT_SHOWN


def _side(low: float | None, high: float | None) -> int:
    if low is None or high is None:
        return 0
    return 1 if low > 0 else -1 if high < 0 else 0


def over(values: Sequence[float]) -> Number:
    """Mean of one value a seed, with Student's interval and p-value where the seeds differ."""
    found = mean_over_seeds(values)
    if math.isnan(found["p_value"]):
        return Number(found["value"], None, None)
    return Number(found["value"], found["low"], found["high"], p_value=found["p_value"])


@dataclass(frozen=True)
class Results:
    """The statistics of one run of several seeds, asked for one number at a time."""

    statistics: Row
    values: dict[tuple[Any, ...], float | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for cell in self.statistics["cells"]:
            for metric, found in cell["metrics"].get(OVERALL, {}).items():
                key = (cell["model"], cell["seed"], cell["step"], cell["experiment"])
                self.values[(*key, cell["condition"], metric)] = found["value"]

    @property
    def models(self) -> dict[str, int]:
        """Parameters by model, small to large."""
        found = {cell["model"]: cell["parameters"] for cell in self.statistics["cells"]}
        return dict(sorted(found.items(), key=lambda pair: pair[1]))

    @property
    def seeds(self) -> list[int]:
        """The training seeds."""
        return sorted({cell["seed"] for cell in self.statistics["cells"]})

    @property
    def steps(self) -> list[int]:
        """The kept steps."""
        return sorted({cell["step"] for cell in self.statistics["cells"]})

    def conditions(self, experiment: str) -> set[str]:
        """What was asked in an experiment."""
        cells = self.statistics["cells"]
        return {cell["condition"] for cell in cells if cell["experiment"] == experiment}

    def at(
        self, model: str, step: int, experiment: str, condition: str, metric: str | None = None
    ) -> list[float]:
        """The metric (default: the headline) of each seed; none at all where one is undefined."""
        metric = metric or get_experiment(experiment).headline
        found = [
            self.values.get((model, seed, step, experiment, condition, metric))
            for seed in self.seeds
        ]
        return [] if None in found else [value for value in found if value is not None]

    def mean(
        self, model: str, step: int, experiment: str, condition: str, metric: str | None = None
    ) -> Number:
        """The metric over seeds."""
        found = self.at(model, step, experiment, condition, metric)
        return over(found) if found else Number(None, None, None)

    def between(self, model: str, step: int, experiment: str, condition: str, minus: str) -> Number:
        """The headline metric under `condition` less that under `minus`, seed by seed."""
        first = self.at(model, step, experiment, condition)
        second = self.at(model, step, experiment, minus)
        if not first or not second:
            return Number(None, None, None)
        return over([a - b for a, b in zip(first, second, strict=True)])

    def compared(self, kind: str, model: str, experiment: str, condition: str) -> Number:
        """An effect at the last step, its growth, or a metric's change (kind) from first to last.

        `kind` is "effect", "growth" or "change"; an effect is metric(Q) - metric(condition).
        """
        names = {"effect": "effects", "growth": "growth", "change": "changes"}
        wanted: dict[str, Any] = {"model": model, "experiment": experiment, "condition": condition}
        wanted |= {"metric": get_experiment(experiment).headline, "step": self.steps[-1]}
        each = list(_matching(self.statistics[names[kind]], wanted))
        whole = list(_matching(self.statistics["over_seeds"], {**wanted, "kind": kind}))
        return _number(whole, each)

    def slope(self, experiment: str, condition: str, quantity: str, against: str) -> Number:
        """A trend over sizes: per tenfold parameters ("log10_parameters"), at the last step."""
        wanted = {"model": None, "experiment": experiment, "condition": condition}
        wanted |= {"metric": get_experiment(experiment).headline}
        wanted |= {"quantity": quantity, "against": against}
        rows = list(_matching(self.statistics["trends"], wanted))
        whole = [row for row in rows if row["unit"] == "seeds"]
        return _number(whole, [r for r in rows if r["unit"] == "items" and r["seed"] is not None])


def _matching(rows: Iterable[Row], wanted: Row) -> Iterable[Row]:
    return (row for row in rows if all(row.get(key) == value for key, value in wanted.items()))


def _number(whole: Sequence[Row], each: Sequence[Row]) -> Number:
    if not whole or whole[0]["value"] is None:
        return Number(None, None, None)
    seeds = tuple((row["value"], row["low"], row["high"]) for row in each)
    row = whole[0]
    return Number(row["value"], row["low"], row["high"], seeds, row["p_value"])


@dataclass(frozen=True)
class Finding:
    """One of the paper's findings, the number that stands for it by model, and the words for it.

    Where the finding is about sizes, there is one number, under the key "all sizes".
    """

    title: str
    number: str
    by_model: dict[str, Number]
    expected: int

    def words(self) -> str:
        """The judgement; by model where models differ."""
        judged = {name: number.judged(self.expected) for name, number in self.by_model.items()}
        if len(set(judged.values())) == 1:
            return next(iter(judged.values()))
        groups: dict[str, list[str]] = {}
        for name, word in judged.items():
            groups.setdefault(word, []).append(name)
        return "; ".join(f"{word}: {', '.join(names)}" for word, names in groups.items())


ALL_SIZES = "all sizes"


def findings(results: Results) -> list[Finding]:
    """The paper's qualitative findings in its order, as far as what was asked allows."""
    last = results.steps[-1]

    def each(take: Callable[[str], Number]) -> dict[str, Number]:
        return {model: take(model) for model in results.models}

    def compared(kind: str, experiment: str, condition: str) -> dict[str, Number]:
        return each(lambda model: results.compared(kind, model, experiment, condition))

    def over_sizes(condition: str, quantity: str, against: str) -> dict[str, Number]:
        return {ALL_SIZES: results.slope("bbq", condition, quantity, against)}

    def corrected(experiment: str, condition: str) -> dict[str, Number]:
        return each(lambda model: results.mean(model, last, experiment, condition))

    return [
        Finding(
            "Without an instruction, bias grows with size (BBQ)",
            f"slope of the bias under Q over log10 parameters, step {last}",
            over_sizes("Q", "metric", "log10_parameters"), 1,
        ),
        Finding(
            "The instruction works after RLHF (BBQ)",
            f"bias under Q less that under Q+IF, step {last}", compared("effect", "bbq", "Q+IF"), 1,
        ),
        Finding(
            "What the instruction does grows with RLHF steps (BBQ)",
            f"that difference at step {last} less that at step 0",
            compared("growth", "bbq", "Q+IF"), 1,
        ),
        Finding(
            "What it does grows with size (BBQ)",
            f"slope of that difference over log10 parameters, step {last}",
            over_sizes("Q+IF", "effect", "log10_parameters"), 1,
        ),
        Finding(
            "Larger models profit more from the same steps (BBQ)",
            "slope, over log10 parameters, of the difference's slope over steps",
            over_sizes("Q+IF", "effect", "step_x_log10_parameters"), 1,
        ),
        Finding(
            "With reasoning first it is stronger than with the instruction alone (BBQ)",
            f"bias under Q+IF less that under Q+IF+CoT, step {last}, over seeds alone",
            each(lambda m: results.between(m, last, "bbq", "Q+IF", "Q+IF+CoT")), 1,
        ),
        Finding(
            "Admissions: unasked, the doubted group is admitted less (law school)",
            f"p(yes) of the doubted less the favoured group under Q, step {last}, over seeds alone",
            corrected("law_school", "Q"), -1,
        ),
        Finding(
            "Admissions: the instruction and RLHF move the difference up (law school)",
            f"difference under Q+IF at step {last} less that at step 0",
            compared("change", "law_school", "Q+IF"), 1,
        ),
        Finding(
            "Admissions: past parity, over-correction with the instruction (law school)",
            f"difference under Q+IF at step {last} above 0, over seeds alone",
            corrected("law_school", "Q+IF"), 1,
        ),
        Finding(
            "Admissions: past parity, over-correction with reasoning (law school)",
            f"difference under Q+IF+CoT at step {last} above 0, over seeds alone",
            corrected("law_school", "Q+IF+CoT"), 1,
        ),
        Finding(
            "Pronouns: asked to match the statistics, models do so more than unasked (Winogender)",
            f"correlation under Match stats less that under Q, step {last}, over seeds alone",
            each(lambda m: results.between(m, last, "winogender", "Match stats", "Q")), 1,
        ),
        Finding(
            "Pronouns: asked to be fair, the correlation falls (Winogender)",
            f"correlation under Q less that under Q+IF, step {last}",
            compared("effect", "winogender", "Q+IF"), 1,
        ),
    ]  # fmt: skip


def adjusted(judged: Sequence[Finding]) -> dict[tuple[str, str], float]:
    """Holm's p-values over all numbers that have one, by the finding's title and the model."""
    rows: list[dict[str, Any]] = [
        {"run": "", "family": "findings", "p_value": number.p_value, "at": (finding.title, model)}
        for finding in judged
        for model, number in finding.by_model.items()
    ]
    correct(rows)
    return {row["at"]: row["p_adjusted"] for row in rows if row["p_adjusted"] is not None}


def no_step_effects(results: Results) -> dict[tuple[str, str], Number]:
    """Winogender's correlation at the last step less that at the first, by model and condition.

    The paper sees no clear dependence on steps here, which no test can show: intervals say how
    large a change is still possible.
    """
    conditions = ("Q", "Q+IF", "Q+IF+CoT", "Match stats")
    return {
        (model, condition): results.compared("change", model, "winogender", condition)
        for model in results.models
        for condition in conditions
        if condition in results.conditions("winogender")
    }
