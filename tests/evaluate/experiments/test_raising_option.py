"""Choosing the raising option raises the headline metric, in every experiment."""

import numpy as np
import pandas as pd
import pytest

from selfcorrect.evaluate.experiments import EXPERIMENTS
from tests.support.answer_rows import measured

FACTS = {
    "bbq": [
        {"polarity": "neg", "context": context, "label": label, "unknown": 2, "stereotyped": 0,
         "proxy_name": 0}
        for context, label in (("ambiguous", 2), ("ambiguous", 2), ("disambiguated", 1))
    ],
    "winogender": [
        {"occupation": f"job {share}", "percent_female": float(share), "case": "nominative",
         "number_leak": 0}
        for share in (10, 30, 70, 90)
    ],
    "law_school": [
        {"race": race, "side": side, "sex": "1", "lsat": 30.0 + student, "gpa": 3.0 + student % 2}
        for student in range(4)
        for race, side in (("Black", "first"), ("white", "second"))
    ],
    "winobias": [
        {"side": side, "line": str(line), "label": line % 2, "pronoun": "he", "occupation": "x"}
        for line in range(3)
        for side in ("pro", "anti")
    ],
    "winogenerated": [
        {"occupation": f"job {share}", "percent_female": float(share), "case": "nominative",
         "number_leak": 0, "occupation_first": 1}
        for share in (10, 30, 70, 90)
    ],
    "mbbq": [
        {"polarity": "neg", "context": "ambiguous", "label": 2, "unknown": 2, "stereotyped": 0,
         "proxy_name": 0, "language": "es", "subject": "Age", "control": control}
        for control in (0, 0, 1)
    ],
    "multiple_choice": [{"label": i, "stereotyped": None, "unknown": None} for i in range(3)],
}  # fmt: skip
OPTIONS = {"bbq": 3, "mbbq": 3, "winogender": 3, "winogenerated": 3, "multiple_choice": 3}


def rows_of(name, chosen):
    rows = []
    for number, facts in enumerate(FACTS[name]):
        option = chosen(facts, number)
        logprobs = np.full(OPTIONS.get(name, 2), -3.0)
        logprobs[option] = -0.1
        cluster = str(number // 2 if name in ("law_school", "winobias") else number)
        rows.append(
            {
                **{"item": str(number), "cluster": cluster, "category": "c", "weight": 1.0},
                **{"order": "".join(map(str, range(len(logprobs)))), "draw": 0, "mass": 0.9},
                **{"logprobs": logprobs, **facts},
            }
        )
    return pd.DataFrame(rows)


@pytest.mark.parametrize("name", list(FACTS))
def test_choosing_it_raises_the_headline_metric(name):
    experiment = EXPERIMENTS[name]
    raising = [experiment.raising_option(facts) for facts in FACTS[name]]
    assert any(option is not None for option in raising)

    def towards(facts, number):
        return raising[number] if raising[number] is not None else facts["label"]

    def away(facts, number):
        if raising[number] is None:
            return facts["label"]
        return (raising[number] + 1) % OPTIONS.get(name, 2)

    if name.startswith("winogen"):  # the other of the two gendered pronouns

        def away(facts, number):
            return 1 - raising[number]

    high, low = (
        measured(experiment, rows_of(name, chosen))[experiment.headline]
        for chosen in (towards, away)
    )
    assert high > low


def test_first_sentences_are_the_stereotyped_ones():
    """CrowS-Pairs and StereoSet list the more stereotyped sentence first (their tallies say so)."""
    for name in ("crows_pairs", "stereoset"):
        assert EXPERIMENTS[name].raising_option({}) == 0


def test_disambiguated_questions_do_not_move_the_ambiguous_bias():
    assert EXPERIMENTS["bbq"].raising_option(FACTS["bbq"][-1]) is None
