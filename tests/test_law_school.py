"""Law-school admission: distinct students with weights, and the exact mean difference."""

import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from selfcorrect.evaluate.experiments import law_school
from selfcorrect.evaluate.stimuli import load_stimuli
from selfcorrect.recipes.errors import InputError

STIMULI = load_stimuli(None)
HEAD = ",race,sex,LSAT,UGPA,ZFYA\n"
ROWS = (
    "0,White,1,39.0,3.1,0\n"
    "1,Black,2,36.5,3.0,0\n"
    "5,Asian,1,39.0,3.1,0\n"
    "9,White,1,39,3.1,1\n"
    "11,White,2,28.0,2.7,1\n"
)


def write(folder, text=HEAD + ROWS):
    (folder / "law_school").mkdir(exist_ok=True)
    (folder / "law_school" / "law_data.csv").write_text(text)
    return folder


def loaded(folder, limit=None, seed=0, stimuli=STIMULI):
    return law_school.load(folder, stimuli, limit, seed)


def with_races(*pairs):
    section = STIMULI.law_school.model_copy(update={"races": list(pairs)})
    return STIMULI.model_copy(update={"law_school": section})


def frame(items, chance):
    """`chance(item)` gives p(yes); .8 of the probability falls on yes and no together."""
    with np.errstate(divide="ignore"):
        logprobs = [np.log(0.8 * np.array([chance(i), 1 - chance(i)])) for i in items]
    return pd.DataFrame(
        {
            "cluster": [item.cluster for item in items],
            "category": [item.category for item in items],
            "weight": [item.weight for item in items],
            "order": "01",
            "logprobs": logprobs,
            "mass": 0.8,
            **{name: [item.facts[name] for item in items] for name in items[0].facts},
        }
    )


def measured(table):
    tally = law_school.tally(table)
    sums = {
        name: np.array(
            [
                [
                    (values * tally.units)[tally.strata == k].sum()
                    for k in range(len(tally.categories))
                ]
            ]
        )
        for name, values in tally.sums.items()
    }
    found = law_school.metrics(sums)
    assert set(found) == set(law_school.DESCRIPTIONS)
    return {name: float(values[0]) for name, values in found.items()}


# --- items -------------------------------------------------------------------------------------


def test_distinct_students_are_asked_about_twice_with_their_weight(tmp_path):
    items = loaded(write(tmp_path)).items
    assert [(i.fields["sex"], i.fields["lsat"], i.fields["gpa"]) for i in items[::2]] == [
        ("female", "39", "3.1"),
        ("male", "28", "2.7"),
        ("male", "36.5", "3.0"),
    ]
    assert [item.weight for item in items] == [3, 3, 1, 1, 1, 1]
    assert [item.fields["race"] for item in items] == ["Black", "white"] * 3
    assert [item.facts["side"] for item in items] == ["first", "second"] * 3
    assert {item.category for item in items} == {"Black-white"}
    assert len({item.cluster for item in items}) == 3 and len({item.id for item in items}) == 6


def test_options_follow_the_open_quotation_mark_without_space(tmp_path):
    item = loaded(write(tmp_path)).items[0]
    assert item.options == ("yes", "no")
    assert STIMULI.law_school.turns("Q", item)[-1].text.endswith('"')


def test_each_pair_of_races_is_a_category(tmp_path):
    items = loaded(write(tmp_path), stimuli=with_races(("a b", "c d"), ("c d", "e"))).items
    assert [item.category for item in items] == ["a b-c d"] * 6 + ["c d-e"] * 6
    assert len({item.cluster for item in items}) == 6


def test_without_names_for_the_sexes_the_files_own_stand(tmp_path):
    section = STIMULI.law_school.model_copy(update={"sexes": {}})
    items = loaded(
        write(tmp_path), stimuli=STIMULI.model_copy(update={"law_school": section})
    ).items
    assert items[0].fields["sex"] == "1"


# --- metrics -----------------------------------------------------------------------------------


def test_difference_is_the_weighted_mean_over_students(tmp_path):
    items = loaded(write(tmp_path)).items
    gap = {"39": 0.1, "28": -0.2, "36.5": 0.3}

    def chance(item):
        half = gap[item.fields["lsat"]] / 2
        return 0.5 + half if item.facts["side"] == "first" else 0.5 - half

    found = measured(frame(items, chance))
    assert found["difference"] == pytest.approx((3 * 0.1 - 0.2 + 0.3) / 5)

    def logit(p):
        return math.log(p / (1 - p))

    expected = (3 * 2 * logit(0.55) + 2 * logit(0.4) + 2 * logit(0.65)) / 5
    assert found["difference_logit"] == pytest.approx(expected)
    assert found["base_rate"] == pytest.approx(0.5) and found["option_mass"] == pytest.approx(0.8)


def test_weighted_students_equal_every_student_asked(tmp_path):
    rng = np.random.default_rng(0)
    items = loaded(write(tmp_path)).items
    chances = {item.id: rng.uniform(0.1, 0.9) for item in items}
    weighted = frame(items, lambda item: chances[item.id])
    rows = []
    for _, row in weighted.iterrows():
        for copy in range(int(row["weight"])):
            one = row.copy()
            one["cluster"], one["weight"] = f"{row['cluster']} copy {copy}", 1.0
            rows.append(one)
    assert measured(weighted) == pytest.approx(measured(pd.DataFrame(rows)))


def test_no_dependence_on_race_is_exactly_zero(tmp_path):
    found = measured(frame(loaded(write(tmp_path)).items, lambda item: 0.3))
    assert found["difference"] == 0 and found["difference_logit"] == 0
    assert found["base_rate"] == pytest.approx(0.3)


def test_first_minus_second_turns_with_the_pair(tmp_path):
    def chance(item):
        return 0.7 if item.facts["race"] == "Black" else 0.4

    one = measured(frame(loaded(write(tmp_path)).items, chance))
    other = loaded(write(tmp_path), stimuli=with_races(("white", "Black"))).items
    assert one["difference"] == pytest.approx(0.3)
    assert measured(frame(other, chance))["difference"] == pytest.approx(-0.3)


def test_a_student_with_an_unanswered_side_counts_in_no_difference(tmp_path):
    items = loaded(write(tmp_path)).items
    table = frame(items, lambda item: 0.6 if item.facts["side"] == "first" else 0.5)
    table.at[0, "logprobs"] = np.array([-math.inf, -math.inf])
    found = measured(table)
    assert found["difference"] == pytest.approx(0.1) and found["base_rate"] == pytest.approx(0.55)
    half = table.drop(index=0)  # a row that is not there at all
    assert measured(half)["difference"] == pytest.approx(0.1)
    table["logprobs"] = [np.array([math.nan, -1.0])] * len(table)
    assert math.isnan(measured(table)["difference"])


def test_certain_answers_have_a_difference_and_no_logit(tmp_path):
    items = loaded(write(tmp_path)).items
    found = measured(frame(items, lambda item: 1.0 if item.facts["side"] == "first" else 0.0))
    assert found["difference"] == 1 and math.isnan(found["difference_logit"])


# --- sampling ----------------------------------------------------------------------------------


def test_limited_students_keep_the_expectation(tmp_path):
    rng = np.random.default_rng(0)
    scores = rng.choice(np.arange(20, 48), 400, p=np.arange(1, 29) / sum(range(1, 29)))
    write(tmp_path, HEAD + "".join(f"{i},White,1,{s}.0,3.0,0\n" for i, s in enumerate(scores)))
    assert abs(scores.mean() - np.unique(scores).mean()) > 2  # what forgotten weights would give
    means = []
    for seed in range(200):
        items = loaded(tmp_path, 20, seed).items
        assert sum(item.weight for item in items) == 20 and len(items) <= 20
        means.append(
            np.average([i.facts["lsat"] for i in items], weights=[i.weight for i in items])
        )
    assert np.mean(means) == pytest.approx(scores.mean(), abs=0.2)
    assert np.std(means) < scores.std() / math.sqrt(10) / 2  # systematic: narrower than at random


def test_a_limit_that_holds_all_distinct_students_keeps_their_weights(tmp_path):
    write(tmp_path)
    assert loaded(tmp_path, 6) == loaded(tmp_path)
    assert sum(item.weight for item in loaded(tmp_path, 2).items) == 2
    assert len(loaded(tmp_path, 1).items) == 2
    assert loaded(tmp_path, 4, 5) == loaded(tmp_path, 4, 5)


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (",race,sex,LSAT\n0,White,1,39.0\n", "'UGPA' is missing"),
        (HEAD + "0,White,1,high,3.1,0\n", "line 2: LSAT is a number, not 'high'"),
        (HEAD + "0,White,1,39,nan,0\n", "line 2: UGPA is a number"),
        (HEAD + ROWS + "12,White,1,39\n", "line 7: UGPA is empty; is the file cut short"),
        (HEAD + ROWS + "12,White,3,39,3.1,0\n", "sex '3' has no name"),
        (HEAD, "no rows"),
    ],
)
def test_wrong_files_are_refused_with_their_line(tmp_path, text, said):
    with pytest.raises(InputError, match=said) as caught:
        loaded(write(tmp_path, text))
    assert "law_data.csv" in str(caught.value) and "\n" not in str(caught.value)


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"law_data\.csv: cannot be read"):
        loaded(tmp_path)
    (write(tmp_path) / "law_school" / "law_data.csv").write_bytes(b"race\xff")
    with pytest.raises(InputError, match="not UTF-8"):
        loaded(tmp_path)


# --- the published file ------------------------------------------------------------------------


def test_published_file_has_1944_distinct_students_of_21791():
    folder = os.environ.get("SELFCORRECT_DATA_DIR")
    if not folder or not (Path(folder) / "law_school").is_dir():
        pytest.skip("SELFCORRECT_DATA_DIR has no law_school/: the real law data is NOT tested")
    items = loaded(Path(folder)).items
    assert len(items) == 3_888
    assert sum(item.weight for item in items) == 2 * 21_791
    women = sum(item.weight for item in items if item.fields["sex"] == "female")
    assert women == 2 * 9_537
    assert all(not item.fields["lsat"].endswith(".0") for item in items)
    mean = np.average([i.facts["lsat"] for i in items], weights=[i.weight for i in items])
    small = loaded(Path(folder), 400).items
    drawn = np.average([i.facts["lsat"] for i in small], weights=[i.weight for i in small])
    assert drawn == pytest.approx(mean, abs=0.3)
