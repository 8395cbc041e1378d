"""Compute the study's primary numbers as docs/results/study/announcement.md announces them.

    python scripts/study/primary.py runs

Each number has one value per training seed, tested by a two-sided one-sample t-test. Holm's
correction is over these numbers alone. Everything else about the study is exploratory.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from selfcorrect.evaluate.statistics.formatting import p_value, without_leading_zero
from selfcorrect.evaluate.statistics.significance import POWER, correct
from selfcorrect.scripts.study.findings import Number, Results, over
from selfcorrect.scripts.study.records import read_json, table

LADDER, NO_FAIRNESS, TASKS = "society-ladder", "ablation-fair-0", "ablation-tasks-only"
NOT_ZERO = 0.05  # bias above which a condition is "not at zero", as a mean over seeds
LEVEL = 0.05
# Reasoning is sampled, so its bias is compared by probabilities, not by the likeliest answer.
BY_PROBABILITY = "expected_bias_ambiguous"
HOLDS, OPPOSITE, NOT_SHOWN = "holds", "the opposite", "not shown"


@dataclass(frozen=True)
class Primary:
    """A primary number: one value per seed, and the side (1 or -1) that the announcement expects.

    `p_adjusted` is Holm's p over all primary numbers, None where a number has no p.
    """

    title: str
    expected: int
    values: tuple[float, ...]
    p_adjusted: float | None = None

    @property
    def number(self) -> Number:
        """The mean over seeds, with interval and p-value if there are values that differ."""
        return over(self.values) if self.values else Number(None, None, None)

    @property
    def judgement(self) -> str:
        """Whether the announced direction holds after correction."""
        if self.p_adjusted is None or self.p_adjusted >= LEVEL:
            return NOT_SHOWN
        return HOLDS if fmean(self.values) * self.expected > 0 else OPPOSITE


def specific_growth(results: Results, model: str) -> list[float]:
    """Return how much Q+neutral less Q+IF grows from step 0 to the last, by seed; or []."""
    cells = [
        results.at(model, step, "bbq", condition)
        for step in (0, results.steps[-1])
        for condition in ("Q+neutral", "Q+IF")
    ]
    return results.growth(model, "Q+neutral", "Q+IF") if all(cells) else []


def slopes(results: Results, by_model: dict[str, list[float]]) -> list[float]:
    """Return each seed's slope of a value over log10 of parameters; [] if a value is missing."""
    if not all(by_model.values()):
        return []
    sizes = np.log10([results.models[model] for model in by_model])
    fits: np.ndarray = np.polyfit(sizes, np.array(list(by_model.values())), 1)
    return [float(slope) for slope in fits[0]]


def reasoning_beyond_instruction(results: Results) -> list[float]:
    """Return bias under Q+IF less that under Q+IF+CoT by seed, over the cells not at zero.

    The cells are models and steps where both biases are above NOT_ZERO in the mean over seeds.
    """
    cells = []
    for model in results.models:
        for step in results.steps:
            instructed, reasoned = (
                results.at(model, step, "bbq", condition, BY_PROBABILITY)
                for condition in ("Q+IF", "Q+IF+CoT")
            )
            if all(bias and fmean(bias) > NOT_ZERO for bias in (instructed, reasoned)):
                cells.append(np.array(instructed) - np.array(reasoned))
    return [float(value) for value in np.mean(cells, axis=0)] if cells else []


def primary_numbers(ladder: Results, arms: dict[str, Results]) -> list[Primary]:
    """Return the six numbers with Holm's p-values; those of an arm not in `arms` are undefined."""
    largest = list(ladder.models)[-1]
    growths = {model: specific_growth(ladder, model) for model in ladder.models}
    plain = {model: ladder.at(model, 0, "bbq", "Q") for model in ladder.models}

    def of_arm(name: str) -> list[float]:
        if name not in arms:
            return []
        [model] = arms[name].models
        return specific_growth(arms[name], model)

    numbers = [
        Primary(
            f"The specific effect (Q+neutral less Q+IF) grows with RLHF steps, {largest}",
            1,
            tuple(growths[largest]),
        ),
        Primary(
            "That growth increases with size (slope over log10 parameters)",
            1,
            tuple(slopes(ladder, growths)),
        ),
        Primary(
            "Before RLHF, bias under Q increases with size (slope over log10 parameters)",
            1,
            tuple(slopes(ladder, plain)),
        ),
        Primary(
            "Reasoning lowers bias below the instruction alone, where neither is at zero",
            1,
            tuple(reasoning_beyond_instruction(ladder)),
        ),
        Primary(
            "Feedback on non-moral tasks alone makes the specific effect grow",
            1,
            tuple(of_arm(TASKS)),
        ),
        Primary(
            "Feedback that never asks for fairness makes the specific effect shrink",
            -1,
            tuple(of_arm(NO_FAIRNESS)),
        ),
    ]
    measured = [number.number.p_value for number in numbers]
    # A number without a p counts as 1: the family has six numbers, whatever was run.
    rows: list[dict[str, Any]] = [
        {"run": "", "family": "primary", "p_value": 1.0 if p is None else p} for p in measured
    ]
    correct(rows)
    return [
        Primary(n.title, n.expected, n.values, None if p is None else row["p_adjusted"])
        for n, p, row in zip(numbers, measured, rows, strict=True)
    ]


def detectable(seeds: int, tests: int) -> float:
    """Return the mean, in standard deviations between seeds, that is found with 80 % power.

    The level is LEVEL / `tests`: Holm's for the smallest of so many p-values.
    """
    from statsmodels.stats.power import TTestPower

    return float(TTestPower().solve_power(nobs=seeds, alpha=LEVEL / tests, power=POWER))


def primary_table(numbers: Sequence[Primary]) -> str:
    """Return the numbers as a Markdown table."""

    def p(value: float | None) -> str:
        return "–" if value is None else without_leading_zero(p_value(value))

    rows = [[n.title, n.number, p(n.number.p_value), p(n.p_adjusted), n.judgement] for n in numbers]
    return table(["primary number", "mean over seeds", "p", "Holm's p", "judged"], rows)


def read_results(runs: Path) -> tuple[Results, dict[str, Results]]:
    """Return the ladder's results, and those of the finished arms by name."""
    arms = {
        name: Results(read_json(runs / name / "statistics.json"))
        for name in (TASKS, NO_FAIRNESS)
        if (runs / name / "statistics.json").is_file()
    }
    return Results(read_json(runs / LADDER / "statistics.json")), arms


def main(words: Sequence[str] | None = None) -> None:
    """Print the primary numbers of a folder of runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, help="folder of the run folders")
    runs = parser.parse_args(words).runs
    if not (runs / LADDER / "statistics.json").is_file():
        parser.error(f"{runs / LADDER}/statistics.json: missing; `selfcorrect run {LADDER}`")
    print(primary_table(primary_numbers(*read_results(runs))))


if __name__ == "__main__":
    main()
