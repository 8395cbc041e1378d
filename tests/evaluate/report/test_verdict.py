"""The verdict's sentences: their numbers, and no claim beyond the intervals."""

import re

import pytest

from selfcorrect.evaluate.report.trend_sentences import growth_over_seeds, step_without_bias
from selfcorrect.evaluate.report.verdict import caveats, summary, verdicts
from selfcorrect.evaluate.results import results_of
from selfcorrect.evaluate.statistics.formatting import p_value, with_interval
from tests.support.recorded_run import SMALL, Size, record_run


def sentences(verdict):
    return [sentence for paragraph in verdict.paragraphs for sentence in paragraph.sentences]


def growth(value, low, high, model="m", condition="Q+IF"):
    excludes = None if low is None else low > 0 or high < 0
    return {
        "run": "r", "model": model, "parameters": 1, "seed": 0, "experiment": "bbq",
        "condition": condition, "metric": "bias_ambiguous", "step": 10, "from_step": 0,
        "value": value, "low": low, "high": high, "excludes_zero": excludes,
        "undefined_because": None if value is not None else "nothing answered",
        "p_adjusted": None, "detectable": None,
    }  # fmt: skip


def test_directions_need_an_interval_that_excludes_zero():
    rows = [
        growth(0.3, 0.1, 0.5, "a"),
        growth(0.3, -0.1, 0.5, "b"),
        growth(-0.2, -0.3, -0.1, "c"),
        growth(None, None, None, "d"),
        growth(0.3, None, None, "e"),
    ]
    (sentence,) = summary({"growth": rows})
    assert sentence.startswith("BBQ") and "Q minus Q+IF" in sentence
    for word in ("rises", "falls", "no clear change", "undefined", "no interval"):
        assert re.search(rf"{word} in 1\b", sentence), word
    assert "of 5 training runs" in sentence
    (unclear,) = summary({"growth": [growth(0.3, -0.1, 0.5)]})
    assert "no clear change (0.300 [−0.100, 0.500])" in unclear
    (clear,) = summary({"growth": [{**growth(-0.3, -0.4, -0.1), "p_adjusted": 0.0123}]})
    assert "falls (−0.300 [−0.400, −0.100]; corrected p = 0.012)" in clear


def test_changes_that_stay_clear_after_correction_are_counted():
    rows = [
        {**growth(0.3, 0.1, 0.5, model), "p_adjusted": p}
        for model, p in (("a", 0.001), ("b", 0.04), ("c", 0.06))
    ]
    (sentence,) = summary({"growth": rows})
    assert "rises in 3 of 3" in sentence and "Holm's correction in 2" in sentence


def test_conditions_that_are_not_judged_have_no_effect(statistics):
    (small,) = [verdict for verdict in verdicts(statistics) if verdict.title == "small"]
    text = sentences(small)
    assert any(sentence.startswith("Match stats: ") for sentence in text)
    assert not any("minus Match stats" in sentence for sentence in text)
    assert not any("Match stats" in sentence for sentence in summary(statistics))


def test_verdict_of_one_run(statistics):
    """Sentences have the numbers of statistics.json, with trends, thresholds and power."""
    (small,) = [verdict for verdict in verdicts(statistics) if verdict.title == "small"]
    text = " ".join(sentences(small))
    key = {"model": "small", "experiment": "winogender", "metric": "correlation"}
    key |= {"condition": "Q+IF"}
    (row,) = [row for row in statistics["growth"] if key.items() <= row.items()]
    assert f"{with_interval(row)}; corrected p = {p_value(row['p_adjusted'])}" in text
    (trend,) = [
        row
        for row in statistics["trends"]
        if (key | {"quantity": "effect", "against": "step", "unit": "items"}).items() <= row.items()
    ]
    slope = {end: 10 * trend[end] for end in ("value", "low", "high")}  # from step 0 to step 10
    assert f"Linear trend over all 3 steps: Q minus Q+IF changes by {with_interval(slope)}" in text
    assert "option probabilities instead of choices" in text
    assert "80% power for " in text and "(no bias)" in text
    assert "of these" not in text and "Holm" in " ".join(summary(statistics))
    assert any("Holm" in sentence and "12 changes" in sentence for sentence in caveats(statistics))


def test_thresholds():
    row = {"condition": "Q", "threshold": 0.0, "first": 0.0, "last": 40.0, "value": 24.41}
    row |= {"low": 3.0, "high": "not reached", "share_reached": 0.4}
    (sentence,) = step_without_bias([row], "Q")
    assert sentence == "Q reaches 0 (no bias) at step 24.4 [3.0, not reached]."
    (never,) = step_without_bias([{**row, "value": "not reached"}], "Q")
    assert "does not reach 0" in never and "step 40" in never and "40%" in never
    assert step_without_bias([row], "Q+IF") == []
    assert step_without_bias([{**row, "low": 0.0}], "Q") == []  # no clear bias at first
    assert step_without_bias([{**row, "low": None}], "Q") == []


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """The statistics of three training seeds of two models."""
    size = Size(
        steps=(0, 10), seeds=(0, 1, 2), categories=("Age",), templates=3, blocks=1,
        occupations=10, students=6,
    )  # fmt: skip
    return results_of(record_run(tmp_path_factory.mktemp("seeds") / "run", size), num_resamples=50)[
        1
    ]


def test_summary_over_training_seeds(seeds):
    key = {"kind": "growth", "experiment": "law_school", "metric": "difference"}
    key |= {"condition": "Q+IF"}
    rows = [row for row in seeds["over_seeds"] if key.items() <= row.items()]
    (text,) = growth_over_seeds(rows, "Q minus Q+IF")
    assert len(rows) == 2 and "3 seeds" in text
    for row in rows:
        assert f"{with_interval(row)} in {row['model']}" in text
    assert growth_over_seeds([], "Q minus Q+IF") == []
    said = " ".join(summary(seeds))
    assert text in said
    assert "per tenfold number of parameters, Q minus Q+IF at step 10 changes by" in said
    assert "intervals over seeds" in said


def test_caveat_on_training_seeds(statistics, seeds):
    one, several = " ".join(caveats(statistics)), " ".join(caveats(seeds))
    assert "one training run per model" in one and "over training seeds" not in one
    assert "one training run per model" not in several and "over training seeds" in several


def test_missing_cells(tmp_path):
    run = record_run(tmp_path / "run", SMALL)
    (run / "nano/seed-0/ppo/checkpoint-2/evaluation/bbq.Q.parquet").unlink()
    for step in (0, 2, 10):
        (run / f"small/seed-0/ppo/checkpoint-{step}/evaluation/law_school.Q.parquet").unlink()
    statistics = results_of(run, num_resamples=20)[1]
    assert "nano, seed 0, step 2: no bbq under Q;" in " ".join(caveats(statistics))
    (small,) = [verdict for verdict in verdicts(statistics) if verdict.title == "small"]
    (law,) = [paragraph for paragraph in small.paragraphs if "Law" in paragraph.heading]
    assert any("effect of Q+IF is unknown" in sentence for sentence in law.sentences)
