"""How answers move from a condition to the one that continues its dialogue."""

import math

import numpy as np
import pandas as pd
import pytest

from selfcorrect.evaluate.experiments.bbq import BBQ
from selfcorrect.evaluate.experiments.wording import load_stimuli
from selfcorrect.evaluate.measuring.measure import measure
from selfcorrect.evaluate.report.experiment_tables import round_table
from selfcorrect.evaluate.report.tables import CheckpointColumns
from selfcorrect.evaluate.results import results_of, summarise
from selfcorrect.evaluate.statistics.bootstrap import Draws
from selfcorrect.evaluate.statistics.rounds import QUANTITIES, round_answers, round_estimates
from tests.support.tiny_models import tiny_model, tiny_plan, tiny_tokenizer


def frame(answers, draw=0):
    """Rows of {item: option of the file, or log-probabilities}, shown in the order 1, 2, 0."""
    rows = []
    for number, (item, answer) in enumerate(answers.items()):
        logprobs = [-9.0, -9.0, -9.0] if isinstance(answer, int) else answer
        if isinstance(answer, int):
            logprobs[(1, 2, 0).index(answer)] = -0.01
        rows.append(
            {
                "item": item, "cluster": f"template {number // 2}", "category": "Age",
                "weight": 1.0, "order": "120", "draw": draw, "logprobs": np.array(logprobs),
                "mass": 1.0, "context": "disambiguated" if item == "clear" else "ambiguous",
                "stereotyped": 0, "label": 2, "unknown": 2,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def estimates(before, after):
    old, new = (round_answers(BBQ, rows) for rows in (before, after))
    return round_estimates(BBQ, old, new, Draws(20))


def test_changes_and_flips_by_hand():
    nothing = [math.nan] * 3
    before = frame({"a": 0, "b": 1, "c": 0, "d": 2, "clear": 0, "lost": nothing})
    after = frame({"a": 2, "b": 0, "c": 1, "d": 2, "clear": 1, "lost": 0})
    found = estimates(before, after)
    assert set(found) == set(QUANTITIES)
    # Of five answered pairs four change. Of the four ambiguous ones, a and c leave the stereotyped
    # option 0, and b turns to it.
    assert found["share_changed"].value == pytest.approx(4 / 5)
    assert found["flips_away"].value == pytest.approx(2 / 4)
    assert found["flips_towards"].value == pytest.approx(1 / 4)
    assert found["share_changed"].low <= 4 / 5 <= found["share_changed"].high


def test_entropy_is_that_of_the_mean_over_draws_and_items_count_once():
    sure = [[0.0, -math.inf, -math.inf], [-math.inf, 0.0, -math.inf]]
    before = pd.concat([frame({"a": sure[0], "b": 0}, draw) for draw in (0, 1)])
    after = pd.concat([frame({"a": sure[draw], "b": 0}, draw) for draw in (0, 1)])
    found = estimates(before, after)
    assert found["answer_entropy_before"].value == pytest.approx(_entropy_of_b() / 2)
    assert found["answer_entropy"].value == pytest.approx((math.log(2) + _entropy_of_b()) / 2)
    # One of the two draws of a changes, none of b.
    assert found["share_changed"].value == pytest.approx(1 / 4)


def _entropy_of_b():
    chances = np.exp([-0.01, -9, -9]) / np.exp([-0.01, -9, -9]).sum()
    return float(-(chances * np.log(chances)).sum())


def test_rounds_without_common_answers_are_empty():
    assert estimates(frame({"a": 0}), frame({"b": 0})) == {}


def test_continued_conditions_are_those_that_begin_with_the_same_texts():
    section = load_stimuli().section("bbq")
    continued = {
        name: section.continued(name) for name in {**section.conditions, **section.controls}
    }
    assert {name: before for name, before in continued.items() if before} == {
        "Q+reviews 1": "Q+reviews 0",
        "Q+reviews 2": "Q+reviews 1",
        "Q+reviews 3": "Q+reviews 2",
        "Q+critique": "Q+reviews 0",
        "Q+diagnose+correct": "Q+reviews 0",
    }


def test_rounds_are_in_the_table_and_in_the_report(tmp_path):
    """`reviews 2` of the tiny stimuli continues `reviews 1` with one more text."""
    plan = tiny_plan(tmp_path / "data", ["reviews 1", "reviews 2"], samples=2)
    measure(plan, tiny_model(), tiny_tokenizer(), tmp_path / "models" / "mine" / "digest")
    table = summarise(tmp_path / "models" / "mine" / "digest", "mine", 20)
    of_rounds = table[table["metric"].isin(QUANTITIES)]
    assert set(of_rounds["condition"]) == {"reviews 2"} and len(of_rounds) == len(QUANTITIES)
    changed = of_rounds.set_index("metric").loc["share_changed"]
    assert 0 < changed["value"] < 1 and changed["num_items"] == 6
    _, statistics = results_of(tmp_path / "models", num_resamples=20)
    rounds = statistics["rounds"]
    assert {row["continues"] for row in rounds} == {"reviews 1"}
    assert {row["undefined_because"] for row in rounds} == {None}
    shown = round_table(rounds, CheckpointColumns(statistics["cells"]))
    assert len(shown.rows) == 1 and len(shown.rows[0]) == len(shown.columns)
