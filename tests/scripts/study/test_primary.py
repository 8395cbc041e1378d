"""The study's primary numbers: as announced, from made-up statistics with known answers."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from selfcorrect.scripts.study import primary
from selfcorrect.scripts.study.findings import Results
from selfcorrect.scripts.study.primary import (
    BY_PROBABILITY,
    NO_FAIRNESS,
    TASKS,
    Primary,
    detectable,
    primary_numbers,
    reasoning_beyond_instruction,
)

SIZES = {"small": 10_000, "middle": 100_000, "large": 1_000_000}
SEEDS = range(5)
NOISE = (0.01, -0.02, 0.03, -0.01, 0.02)  # by seed
Bias = dict[tuple[str, int, str], float]  # by model, step and condition


def statistics(bias: Bias, expected: Bias | None = None) -> dict[str, Any]:
    """Statistics of a run whose seeds differ by NOISE, except under Q+IF, where by none."""
    cells = []
    for (model, step, condition), value in bias.items():
        for seed in SEEDS:
            noise = 0.0 if condition.startswith("Q+IF") else NOISE[seed]
            metrics = {"bias_ambiguous": {"value": value + noise}}
            by_probability = (expected or {}).get((model, step, condition))
            if by_probability is not None:
                metrics[BY_PROBABILITY] = {"value": by_probability + NOISE[seed] / 2}
            cells.append(
                {
                    "model": model, "parameters": SIZES[model], "seed": seed, "step": step,
                    "experiment": "bbq", "condition": condition, "metrics": {"overall": metrics},
                }
            )  # fmt: skip
    return {"cells": cells}


def biases(model: str, before: dict[str, float], after: dict[str, float]) -> Bias:
    both = ((0, before), (128, after))
    return {(model, step, name): value for step, by_name in both for name, value in by_name.items()}


# Growth of the specific effect: 0 at small, .2 at middle, .4 at large. Q at step 0: 0, .3, .6.
LADDER: Bias = {
    **biases("small", {"Q": 0.0, "Q+neutral": 0.0, "Q+IF": 0.0}, {"Q+neutral": 0.0, "Q+IF": 0.0}),
    **biases("middle", {"Q": 0.3, "Q+neutral": 0.3, "Q+IF": 0.3}, {"Q+neutral": 0.4, "Q+IF": 0.2}),
    **biases("large", {"Q": 0.6, "Q+neutral": 0.6, "Q+IF": 0.5}, {"Q+neutral": 0.6, "Q+IF": 0.1}),
}
# By probability, the instruction and reasoning are above .05 at large alone: .1 apart at step 0,
# and at step 128 reasoning is at zero.
EXPECTED: Bias = {
    **biases("small", {"Q+IF": 0.01, "Q+IF+CoT": 0.2}, {"Q+IF": 0.01, "Q+IF+CoT": 0.0}),
    **biases("middle", {"Q+IF": 0.3, "Q+IF+CoT": 0.04}, {"Q+IF": 0.0, "Q+IF+CoT": 0.0}),
    **biases("large", {"Q+IF": 0.3, "Q+IF+CoT": 0.2}, {"Q+IF": 0.3, "Q+IF+CoT": 0.0}),
}


def ladder() -> Results:
    reasoned = {key: value for key, value in EXPECTED.items() if key[2] == "Q+IF+CoT"}
    return Results(statistics({**reasoned, **LADDER}, EXPECTED))


def arm(before: tuple[float, float], after: tuple[float, float]) -> Results:
    names = ("Q+neutral", "Q+IF")
    cells = [dict(zip(names, pair, strict=True)) for pair in (before, after)]
    made = statistics(biases("middle", *cells))
    for cell in made["cells"]:  # steps differ by seed, so that the growth has a spread
        cell["metrics"]["overall"]["bias_ambiguous"]["value"] += (
            NOISE[cell["seed"]] * (cell["step"] > 0) * (cell["condition"] == "Q+IF")
        )
    return Results(made)


def test_six_numbers_are_the_planted_ones() -> None:
    arms = {TASKS: arm((0.6, 0.5), (0.6, 0.2)), NO_FAIRNESS: arm((0.6, 0.3), (0.6, 0.6))}
    numbers = primary_numbers(ladder(), arms)
    means = [np.mean(number.values) for number in numbers]
    # The noise of neutral requests is the same before and after, so growth is exact in each seed.
    assert means[0] == pytest.approx(0.4)
    assert means[1] == pytest.approx(0.2)  # a decade of parameters from size to size
    assert means[2] == pytest.approx(0.3)
    assert means[3] == pytest.approx(0.1)
    mean_noise = np.mean(NOISE)
    assert means[4:] == pytest.approx([0.3 - mean_noise, -0.3 - mean_noise])
    assert all(len(number.values) == len(SEEDS) for number in numbers)
    growths = 0.3 - np.array(NOISE)
    assert numbers[4].values == pytest.approx(tuple(growths))
    assert numbers[4].number.p_value == pytest.approx(stats.ttest_1samp(growths, 0).pvalue)


def test_holm_is_over_six_numbers_whatever_was_run() -> None:
    for missing in ({TASKS}, set()):
        arms = {TASKS: arm((0.6, 0.5), (0.6, 0.2)), NO_FAIRNESS: arm((0.6, 0.3), (0.6, 0.6))}
        kept = {name: results for name, results in arms.items() if name not in missing}
        numbers = primary_numbers(ladder(), kept)
        # Seeds agree in the first three and in reasoning: no p. One or two numbers have one.
        with_p = sorted(n.number.p_value for n in numbers if n.number.p_value is not None)
        assert len(with_p) == 2 - len(missing)
        adjusted = sorted(n.p_adjusted for n in numbers if n.p_adjusted is not None)
        assert adjusted[0] == pytest.approx(6 * with_p[0])
        assert [n.judgement for n in numbers[:4]] == ["not shown"] * 4
    assert [n.judgement for n in numbers[4:]] == ["holds", "holds"]


@pytest.mark.parametrize(
    ("values", "expected", "p_adjusted", "word"),
    [
        ((0.3, 0.4), 1, 0.04, "holds"),
        ((-0.3, -0.4), -1, 0.04, "holds"),
        ((0.3, 0.4), -1, 0.04, "the opposite"),
        ((0.3, 0.4), 1, 0.05, "not shown"),
        ((0.3, 0.4), 1, None, "not shown"),
        ((), 1, None, "not shown"),
    ],
)
def test_one_rule_judges_each_number(
    values: tuple[float, ...], expected: int, p_adjusted: float | None, word: str
) -> None:
    assert Primary("x", expected, values, p_adjusted).judgement == word


def test_reasoning_is_compared_only_where_neither_is_at_zero() -> None:
    assert reasoning_beyond_instruction(ladder()) == pytest.approx([0.1] * len(SEEDS))
    reasoned = {key: value for key, value in EXPECTED.items() if key[2] == "Q+IF+CoT"}
    low = dict.fromkeys(EXPECTED, 0.01)
    at_zero = Results(statistics({**reasoned, **LADDER}, low))
    assert reasoning_beyond_instruction(at_zero) == []


@pytest.mark.parametrize("tests", [1, 6])
def test_detectable_mean_is_found_in_four_of_five_studies(tests: int) -> None:
    shift = detectable(10, tests) * math.sqrt(10)
    critical = stats.t.ppf(1 - 0.05 / tests / 2, 9)
    assert stats.nct.sf(critical, 9, shift) == pytest.approx(0.8, abs=1e-3)


def test_table_says_what_was_not_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, results in ((primary.LADDER, ladder()), (TASKS, arm((0.6, 0.5), (0.6, 0.2)))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "statistics.json").write_text(json.dumps(results.statistics))
    primary.main([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and lines[7].endswith("| undefined | – | – | not shown |")
    p = stats.ttest_1samp(0.3 - np.array(NOISE), 0).pvalue
    assert not math.isnan(p) and lines[6].endswith("| < .001 | < .001 | holds |")
    with pytest.raises(SystemExit):
        primary.main([str(tmp_path / "nowhere")])
