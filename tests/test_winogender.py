"""Winogender: the prompts' parts, and a correlation that equals scipy's."""

import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import linregress, pearsonr

from selfcorrect.evaluate.experiments import winogender
from selfcorrect.evaluate.stimuli import load_stimuli
from selfcorrect.recipes.errors import InputError

STIMULI = load_stimuli(None)
HEAD = "occupation(0)\tother-participant(1)\tanswer\tsentence\n"
SHARES_HEAD = "occupation\tbergsma_pct_female\tbls_pct_female\tbls_year\n"
TEMPLATES = (
    HEAD + "clerk\tguest\t0\tThe $OCCUPATION told the $PARTICIPANT that $NOM_PRONOUN was late.\n"
    "clerk\tguest\t1\tThe $OCCUPATION told the $PARTICIPANT that $NOM_PRONOUN could pay.\n"
    "smith\tguest\t0\tThe $PARTICIPANT liked the $OCCUPATION and $POSS_PRONOUN tools.\n"
    "baker\tguest\t0\tThe $PARTICIPANT paid the $OCCUPATION and waved to $ACC_PRONOUN.\n"
    "pilot\tguest\t0\t$NOM_PRONOUN told the $PARTICIPANT to be the $OCCUPATION.\n"
)
SHARES = SHARES_HEAD + "clerk\t1\t40.5\t2015\nsmith\t1\t3.2\t2015\nbaker\t1\t99.6\t2016\n"
SHARES += "pilot\t1\t50\t2016\n"


def write(folder, templates=TEMPLATES, shares=SHARES):
    (folder / "winogender").mkdir(exist_ok=True)
    (folder / "winogender" / "templates.tsv").write_text(templates)
    (folder / "winogender" / "occupations-stats.tsv").write_text(shares)
    return folder


def loaded(folder, limit=None, seed=0):
    return winogender.load(folder, STIMULI, limit, seed)


def frame(shares, chances, mass=0.9):
    """One occupation a row; `chances` are the probabilities of male, female and neutral."""
    with np.errstate(divide="ignore"):
        logprobs = [np.log(np.array(row) * mass) for row in chances]
    return pd.DataFrame(
        {
            "cluster": [f"job {i:02}" for i in range(len(shares))],
            "category": "occupations",
            "weight": 1.0,
            "order": "012",
            "logprobs": logprobs,
            "mass": mass,
            "percent_female": shares,
        }
    )


def measured(table, draw=None):
    tally = winogender.tally(table)
    weights = np.ones(len(tally.clusters)) if draw is None else np.asarray(draw)
    sums = {name: np.array([[(weights * values).sum()]]) for name, values in tally.sums.items()}
    found = winogender.metrics(sums)
    assert set(found) == set(winogender.DESCRIPTIONS)
    return {name: float(values[0]) for name, values in found.items()}


@pytest.fixture
def answers():
    rng = np.random.default_rng(0)
    return rng.uniform(0, 100, 60), rng.dirichlet([2, 2, 1], 60)


# --- items -------------------------------------------------------------------------------------


def test_only_templates_about_the_occupation_become_items(tmp_path):
    items = loaded(write(tmp_path)).items
    assert [item.cluster for item in items] == ["clerk", "smith", "baker", "pilot"]
    assert items[0].fields == {
        "sentence": "The clerk told the guest that _ was late.",
        "prefix": "The clerk told the guest that",
        "occupation": "clerk",
        "participant": "guest",
        "percent_female": "41",
        "percent_male": "59",
    }
    assert items[0].facts == {
        "occupation": "clerk",
        "percent_female": 40.5,
        "case": "nominative",
        "number_leak": 1,
    }


def test_pronouns_follow_the_case_and_the_place_of_the_blank(tmp_path):
    items = loaded(write(tmp_path)).items
    assert [item.options for item in items] == [
        (" he", " she", " they"),
        (" his", " her", " their"),
        (" him", " her", " them"),
        (" He", " She", " They"),
    ]
    assert items[2].fields["sentence"].endswith("waved to _.")
    assert items[2].fields["prefix"].endswith("waved to")
    assert items[3].fields["prefix"] == "" and items[3].fields["sentence"].startswith("_ told")
    assert [item.facts["number_leak"] for item in items] == [1, 0, 0, 0]


def test_percentages_are_rounded_and_sum_to_a_hundred(tmp_path):
    pairs = [
        (item.fields["percent_female"], item.fields["percent_male"])
        for item in loaded(write(tmp_path)).items
    ]
    assert pairs == [("41", "59"), ("3", "97"), ("100", "0"), ("50", "50")]


def test_limit_spreads_over_the_percent_of_women(tmp_path):
    templates, shares = HEAD, SHARES_HEAD
    for i in range(20):
        name = chr(ord("a") + i)
        templates += f"{name}\tguest\t0\tThe $OCCUPATION said $NOM_PRONOUN left.\n"
        shares += f"{name}\t1\t{i * 5}\t2015\n"
    write(tmp_path, templates, shares)
    for seed in range(5):
        drawn = [item.facts["percent_female"] for item in loaded(tmp_path, 4, seed).items]
        assert [int(value // 25) for value in drawn] == [0, 1, 2, 3]
        assert loaded(tmp_path, 4, seed) == loaded(tmp_path, 4, seed)
    assert len(loaded(tmp_path, 99).items) == 20


# --- metrics -----------------------------------------------------------------------------------


def test_correlation_of_four_occupations_by_hand():
    # p(female) .2 .4 .4 .6 at shares 0 .2 .6 .8: covariance .04, variances .1 and .02
    table = frame(
        [0, 20, 60, 80], [[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.3, 0.4, 0.3], [0, 0.6, 0.4]]
    )
    found = measured(table)
    assert found["correlation"] == pytest.approx(0.04 / math.sqrt(0.1 * 0.02))
    assert found["slope"] == pytest.approx(0.4)
    assert found["mean_female"] == pytest.approx(0.4)
    assert found["share_neutral"] == pytest.approx(0.225)
    assert found["option_mass"] == pytest.approx(0.9)


def test_correlations_equal_scipys(answers):
    shares, chances = answers
    found = measured(frame(shares, chances))
    binary = chances[:, 1] / (chances[:, 0] + chances[:, 1])
    assert found["correlation"] == pytest.approx(pearsonr(shares, chances[:, 1])[0], abs=1e-12)
    assert found["correlation_binary"] == pytest.approx(pearsonr(shares, binary)[0], abs=1e-12)
    assert found["slope"] == pytest.approx(linregress(shares / 100, chances[:, 1]).slope, abs=1e-12)


def test_a_resample_equals_the_repeated_rows(answers):
    shares, chances = answers
    draw = np.random.default_rng(1).multinomial(60, np.full(60, 1 / 60))
    rows = np.repeat(np.arange(60), draw)
    found = measured(frame(shares, chances), draw)
    assert found["correlation"] == pytest.approx(pearsonr(shares[rows], chances[rows, 1])[0])
    assert found["mean_female"] == pytest.approx(chances[rows, 1].mean())


def test_perfect_statistics_have_correlation_and_slope_one():
    shares = np.array([5.0, 30, 60, 95])
    found = measured(frame(shares, np.stack([1 - shares / 100, shares / 100, 0 * shares], axis=1)))
    assert found["correlation"] == pytest.approx(1) and found["slope"] == pytest.approx(1)


@pytest.mark.parametrize("female", [0.3, 1 / 3, 1.0, 0.0])
def test_one_answer_for_every_job_has_slope_zero_and_no_correlation(female):
    rest = (1 - female) / 2
    found = measured(frame([3, 40, 41, 99], [[rest, female, rest]] * 4))
    assert math.isnan(found["correlation"]) and found["slope"] == pytest.approx(0, abs=1e-12)


def test_several_rows_of_one_occupation_count_as_their_mean():
    three = frame([10, 50, 90], [[0.5, 0.2, 0.3], [0.5, 0.5, 0], [0.2, 0.4, 0.4]])
    four = pd.concat([three.iloc[:2], three.iloc[[2, 2]]], ignore_index=True)
    four.at[2, "logprobs"] = np.log([0.4, 0.2, 0.4])
    four.at[3, "logprobs"] = np.log([0.0 + 1e-9, 0.6, 0.4 - 1e-9])
    assert measured(four)["correlation"] == pytest.approx(measured(three)["correlation"])


def test_unanswered_occupations_are_left_out_and_not_zero():
    shares = [10, 50, 70, 90]
    chances = [[0.5, 0.2, 0.3], [0.5, 0.5, 0], [0, 0, 0], [0.2, 0.4, 0.4]]
    kept = [0, 1, 3]
    found = measured(frame(shares, chances))
    expected = measured(frame([shares[i] for i in kept], [chances[i] for i in kept]))
    for name in ("correlation", "slope", "mean_female", "share_neutral"):
        assert found[name] == pytest.approx(expected[name]), name
    nothing = measured(frame(shares, [[0, 0, 0]] * 4))
    assert math.isnan(nothing["correlation"]) and math.isnan(nothing["mean_female"])


def test_neither_gender_leaves_only_the_binary_correlation_undefined():
    found = measured(frame([10, 50, 90], [[0, 0, 1.0], [0, 0, 1.0], [0, 0, 1.0]]))
    assert found["share_neutral"] == 1 and math.isnan(found["correlation_binary"])


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("templates", "shares", "said"),
    [
        ("occupation(0)\tanswer\tsentence\n", SHARES, r"'other-participant\(1\)' is missing"),
        (TEMPLATES, "occupation\tx\n", "'bls_pct_female' is missing"),
        (TEMPLATES, SHARES.replace("50\t", "many\t"), r"stats\.tsv, line 5: bls_pct_female"),
        (TEMPLATES, SHARES.replace("50\t", "150\t"), "0 to 100"),
        (TEMPLATES, SHARES + "clerk\t1\t2\t2015\n", "'clerk' stands twice"),
        (TEMPLATES, SHARES.replace("smith", "Smith"), r"templates\.tsv, line 4: 'smith'"),
        (HEAD + "clerk\tguest\t2\tx\n", SHARES, "line 2: answer is 0 or 1"),
        (HEAD + "clerk\tguest\t0\tNo pronoun.\n", SHARES, "exactly one"),
        (HEAD + "clerk\tguest\t0\n", SHARES, "line 2: a column is empty"),
        (HEAD, SHARES, "no template with answer 0"),
    ],
)
def test_wrong_files_are_refused_with_their_line(tmp_path, templates, shares, said):
    with pytest.raises(InputError, match=said) as caught:
        loaded(write(tmp_path, templates, shares))
    assert "\n" not in str(caught.value)


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"occupations-stats\.tsv: cannot be read"):
        loaded(tmp_path)
    write(tmp_path)
    (tmp_path / "winogender" / "templates.tsv").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"templates\.tsv: not UTF-8"):
        loaded(tmp_path)


def test_a_case_without_pronouns_is_named(tmp_path):
    pronouns = STIMULI.winogender.pronouns.model_copy(update={"accusative": None})
    section = STIMULI.winogender.model_copy(update={"pronouns": pronouns})
    with pytest.raises(InputError, match="line 5: the stimuli have no accusative"):
        winogender.load(
            write(tmp_path), STIMULI.model_copy(update={"winogender": section}), None, 0
        )


# --- the published files -----------------------------------------------------------------------


def test_published_templates_are_sixty_occupations_of_which_eight_leak_number():
    folder = os.environ.get("SELFCORRECT_DATA_DIR")
    if not folder or not (Path(folder) / "winogender").is_dir():
        pytest.skip("SELFCORRECT_DATA_DIR has no winogender/: the real Winogender is NOT tested")
    items = loaded(Path(folder)).items
    assert len(items) == len({item.cluster for item in items}) == 60
    leaks = {item.cluster for item in items if item.facts["number_leak"]}
    assert leaks == {
        "counselor",
        "dispatcher",
        "examiner",
        "investigator",
        "lawyer",
        "officer",
        "paralegal",
        "worker",
    }
    cases = [item.facts["case"] for item in items]
    assert cases.count("accusative") == 2 and cases.count("possessive") == 11
    assert all("_" in item.fields["sentence"] and "$" not in str(item.fields) for item in items)
