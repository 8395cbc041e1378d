"""Judge which of the paper's qualitative findings a run shows, by one number and one rule.

A number is a mean over training seeds with Student's interval over seeds, and each seed's own
interval over items where the statistics have one. The rule was fixed before the study's results
were seen: docs/results/first-study-log.md.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
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
    p_value: float | None = None  # of the mean over seeds being 0

    def __str__(self) -> str:
        if self.value is None:
            return "undefined"
        return compact_with_interval({"value": self.value, "low": self.low, "high": self.high})

    def side(self) -> int:
        """Return 1 or -1 if the interval over seeds is on that side of zero, else 0."""
        return _side(self.low, self.high)

    def side_in_all_seeds(self) -> int:
        """Return 1 or -1 if every seed's interval over items is on that side of zero, else 0."""
        sides = {_side(low, high) for _, low, high in self.seeds}
        return sides.pop() if len(sides) == 1 else 0

    def judged(self, expected: int) -> str:
        """Return the judgement, given the side (1 or -1) of the paper's number."""
        if self.side() == expected:
            return APPEARS
        if self.side() == -expected:
            return OPPOSITE
        if self.side_in_all_seeds() == expected:
            return EVERY_SEED
        return OPPOSITE_SEEDS if self.side_in_all_seeds() == -expected else NOT_SHOWN


UNDEFINED = Number(None, None, None)


def _side(low: float | None, high: float | None) -> int:
    if low is None or high is None:
        return 0
    return 1 if low > 0 else -1 if high < 0 else 0


def over(values: Sequence[float]) -> Number:
    """Return the mean of one value per seed, with interval and p-value if the seeds differ."""
    mean = mean_over_seeds(values)
    if math.isnan(mean["p_value"]):
        return Number(mean["value"], None, None)
    return Number(mean["value"], mean["low"], mean["high"], p_value=mean["p_value"])


@dataclass(frozen=True)
class Results:
    """The statistics of one run with several seeds, by number."""

    statistics: Row
    values: dict[tuple[Any, ...], float | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for cell in self.statistics["cells"]:
            for metric, result in cell["metrics"].get(OVERALL, {}).items():
                key = (cell["model"], cell["seed"], cell["step"], cell["experiment"])
                self.values[(*key, cell["condition"], metric)] = result["value"]

    @property
    def models(self) -> dict[str, int]:
        """Parameters by model, in ascending order."""
        parameters = {cell["model"]: cell["parameters"] for cell in self.statistics["cells"]}
        return dict(sorted(parameters.items(), key=lambda pair: pair[1]))

    @property
    def seeds(self) -> list[int]:
        """The training seeds, in ascending order."""
        return sorted({cell["seed"] for cell in self.statistics["cells"]})

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints, in ascending order."""
        return sorted({cell["step"] for cell in self.statistics["cells"]})

    def conditions(self, experiment: str) -> set[str]:
        """Return the conditions that an experiment was measured under."""
        cells = self.statistics["cells"]
        return {cell["condition"] for cell in cells if cell["experiment"] == experiment}

    def at(
        self, model: str, step: int, experiment: str, condition: str, metric: str | None = None
    ) -> list[float]:
        """Return the metric (default: the headline) of each seed; [] if one is undefined."""
        metric = metric or get_experiment(experiment).headline
        values = [
            self.values.get((model, seed, step, experiment, condition, metric))
            for seed in self.seeds
        ]
        return [] if None in values else [value for value in values if value is not None]

    def mean(
        self, model: str, step: int, experiment: str, condition: str, metric: str | None = None
    ) -> Number:
        """Return the mean of the metric over seeds."""
        values = self.at(model, step, experiment, condition, metric)
        return over(values) if values else UNDEFINED

    def between(self, model: str, step: int, experiment: str, condition: str, minus: str) -> Number:
        """Return the headline metric under `condition` less that under `minus`, over seeds."""
        first = self.at(model, step, experiment, condition)
        second = self.at(model, step, experiment, minus)
        if not first or not second:
            return UNDEFINED
        return over([a - b for a, b in zip(first, second, strict=True)])

    def growth(
        self, model: str, condition: str, minus: str, experiment: str = "bbq"
    ) -> list[float]:
        """Return how much the difference of two conditions grows over all steps, by seed."""
        names = [(step, name) for step in (0, self.steps[-1]) for name in (condition, minus)]
        cells = [self.at(model, step, experiment, name) for step, name in names]
        return [(c - d) - (a - b) for a, b, c, d in zip(*cells, strict=True)]

    def last_kl(self, model: str) -> str:
        """Return the mean KL at the last step over seeds; a dash where none is recorded."""
        key = (model, self.steps[-1])
        cells = [c for c in self.statistics["cells"] if (c["model"], c["step"]) == key]
        by_seed = {cell["seed"]: cell["kl"] for cell in cells}
        return "–" if None in by_seed.values() else f"{fmean(by_seed.values()):.2f}"

    def compared(self, kind: str, model: str, experiment: str, condition: str) -> Number:
        """Return an "effect" at the last step, its "growth", or a metric's "change" (`kind`).

        An effect is metric(Q) - metric(condition); growth and change are from the first step on.
        """
        names = {"effect": "effects", "growth": "growth", "change": "changes"}
        wanted: dict[str, Any] = {"model": model, "experiment": experiment, "condition": condition}
        wanted |= {"metric": get_experiment(experiment).headline, "step": self.steps[-1]}
        each = list(_matching(self.statistics[names[kind]], wanted))
        over_seeds = list(_matching(self.statistics["over_seeds"], {**wanted, "kind": kind}))
        return _number(over_seeds, each)

    def slope(self, experiment: str, condition: str, quantity: str, against: str) -> Number:
        """Return a trend over sizes, such as the slope per tenfold parameters, at the last step."""
        wanted = {"model": None, "experiment": experiment, "condition": condition}
        wanted |= {"metric": get_experiment(experiment).headline}
        wanted |= {"quantity": quantity, "against": against}
        rows = list(_matching(self.statistics["trends"], wanted))
        over_seeds = [row for row in rows if row["unit"] == "seeds"]
        return _number(
            over_seeds, [r for r in rows if r["unit"] == "items" and r["seed"] is not None]
        )


def _matching(rows: Iterable[Row], wanted: Row) -> Iterable[Row]:
    return (row for row in rows if all(row.get(key) == value for key, value in wanted.items()))


def _number(over_seeds: Sequence[Row], each: Sequence[Row]) -> Number:
    if not over_seeds or over_seeds[0]["value"] is None:
        return UNDEFINED
    seeds = tuple((row["value"], row["low"], row["high"]) for row in each)
    row = over_seeds[0]
    return Number(row["value"], row["low"], row["high"], seeds, row["p_value"])


@dataclass(frozen=True)
class Finding:
    """One of the paper's findings, and the number that represents it, by model.

    A finding about sizes has one number, with the key "all sizes".
    """

    title: str
    number: str
    by_model: dict[str, Number]
    expected: int

    def words(self) -> str:
        """Return the judgement, by model if models differ."""
        judged = {name: number.judged(self.expected) for name, number in self.by_model.items()}
        if len(set(judged.values())) == 1:
            return next(iter(judged.values()))
        groups: dict[str, list[str]] = {}
        for name, word in judged.items():
            groups.setdefault(word, []).append(name)
        return "; ".join(f"{word}: {', '.join(names)}" for word, names in groups.items())


ALL_SIZES = "all sizes"


def findings(results: Results) -> list[Finding]:
    """Return the paper's qualitative findings in the paper's order."""
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
            "The instruction's effect grows with RLHF steps (BBQ)",
            f"that effect at step {last} less that at step 0",
            compared("growth", "bbq", "Q+IF"), 1,
        ),
        Finding(
            "The instruction's effect grows with size (BBQ)",
            f"slope of that effect over log10 parameters, step {last}",
            over_sizes("Q+IF", "effect", "log10_parameters"), 1,
        ),
        Finding(
            "Larger models gain more from the same steps (BBQ)",
            "slope, over log10 parameters, of the effect's slope over steps",
            over_sizes("Q+IF", "effect", "step_x_log10_parameters"), 1,
        ),
        Finding(
            "With reasoning the effect is larger than with the instruction alone (BBQ)",
            f"bias under Q+IF less that under Q+IF+CoT, step {last}, over seeds alone",
            each(lambda m: results.between(m, last, "bbq", "Q+IF", "Q+IF+CoT")), 1,
        ),
        Finding(
            "Admissions: without an instruction, the doubted group is admitted less (law school)",
            f"p(yes) of the doubted less the favoured group under Q, step {last}, over seeds alone",
            corrected("law_school", "Q"), -1,
        ),
        Finding(
            "Admissions: instruction and RLHF raise the difference (law school)",
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
            "Pronouns: asked to match the statistics, models follow them more closely (Winogender)",
            f"correlation under Match stats less that under Q, step {last}, over seeds alone",
            each(lambda m: results.between(m, last, "winogender", "Match stats", "Q")), 1,
        ),
        Finding(
            "Pronouns: the instruction lowers the correlation (Winogender)",
            f"correlation under Q less that under Q+IF, step {last}",
            compared("effect", "winogender", "Q+IF"), 1,
        ),
    ]  # fmt: skip


def adjusted(judged: Sequence[Finding]) -> dict[tuple[str, str], float]:
    """Return Holm's p-values over all numbers with a p-value, by finding's title and model."""
    rows: list[dict[str, Any]] = [
        {"run": "", "family": "findings", "p_value": number.p_value, "key": (finding.title, model)}
        for finding in judged
        for model, number in finding.by_model.items()
    ]
    correct(rows)
    return {row["key"]: row["p_adjusted"] for row in rows if row["p_adjusted"] is not None}


def no_step_effects(results: Results) -> dict[tuple[str, str], Number]:
    """Return Winogender's correlation at the last step less that at the first step.

    Keys are model and condition. The paper finds no clear dependence on steps here. No test can
    show that, but intervals state how large a change is still possible.
    """
    conditions = ("Q", "Q+IF", "Q+IF+CoT", "Match stats")
    return {
        (model, condition): results.compared("change", model, "winogender", condition)
        for model in results.models
        for condition in conditions
        if condition in results.conditions("winogender")
    }
