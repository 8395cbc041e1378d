"""Law-school admission: distinct students with weights, and the exact mean difference."""

import math
import zlib

import numpy as np
import pandas as pd
import pytest
from statsmodels.api import WLS, add_constant

from selfcorrect.evaluate.experiments import law_school
from selfcorrect.evaluate.experiments.law_school import LAW_SCHOOL
from selfcorrect.evaluate.experiments.wording import load_stimuli
from selfcorrect.evaluate.statistics.bootstrap import Draws, bootstrap
from selfcorrect.recipes.foundation.errors import InputError
from tests.support.answer_rows import published as published_folder

STIMULI = load_stimuli().section("law_school")
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
    return LAW_SCHOOL.load(folder, stimuli, limit, seed)


def with_races(*pairs):
    return STIMULI.model_copy(update={"races": list(pairs)})


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
    tally = LAW_SCHOOL.tally(table)
    sums = {name: np.array([(values * tally.units).sum()]) for name, values in tally.sums.items()}
    metrics = LAW_SCHOOL.compute(sums)
    by_sex = {"difference_sex_1", "difference_sex_2"} if table["sex"].nunique() > 1 else set()
    others = {name for name in LAW_SCHOOL.metrics if "sex" not in name}
    assert set(metrics) == others | by_sex
    return {name: float(values[0]) for name, values in metrics.items()}


# --- items -------------------------------------------------------------------------------------


def test_items_of_distinct_students(tmp_path):
    items = loaded(write(tmp_path)).items
    assert [(i.fields["sex"], i.fields["lsat"], i.fields["gpa"]) for i in items[::2]] == [
        ("female", "39", "3.1"),
        ("male", "28", "2.7"),
        ("male", "36.5", "3.0"),
    ]
    assert [item.weight for item in items] == [3, 3, 1, 1, 1, 1]
    # A copy that spells the same numbers otherwise asks the same.
    spelt = ROWS.replace(",1,39.0,3.1", ",1.0,39,3.10").replace(",2,36.5,3.0", ",2.00,36.50,3")
    assert spelt != ROWS and loaded(write(tmp_path, HEAD + spelt)).items == items
    assert [item.fields["race"] for item in items] == ["Black", "white"] * 3
    assert [item.facts["side"] for item in items] == ["first", "second"] * 3
    assert {item.category for item in items} == {"Black-white"}
    assert len({item.cluster for item in items}) == 3 and len({item.id for item in items}) == 6


def test_options_have_no_leading_space(tmp_path):
    item = loaded(write(tmp_path)).items[0]
    assert item.options == ("yes", "no")
    assert STIMULI.turns("Q", item)[-1].text.endswith('"')


def test_pairs_of_races_are_categories(tmp_path):
    items = loaded(write(tmp_path), stimuli=with_races(("a b", "c d"), ("c d", "e"))).items
    assert [item.category for item in items] == ["a b-c d"] * 6 + ["c d-e"] * 6
    assert len({item.cluster for item in items}) == 6


def test_only_named_sexes_are_asked_about(tmp_path):
    women = STIMULI.model_copy(update={"sexes": {"1": "woman"}})
    loaded_items = loaded(write(tmp_path), stimuli=women)
    assert [item.fields["sex"] for item in loaded_items.items] == ["woman"] * 2
    assert [item.weight for item in loaded_items.items] == [3, 3]
    assert loaded_items.left_out == {law_school.UNASKED: 2}
    assert loaded(tmp_path).left_out == {}


def test_sexes_without_names_are_shown_as_in_the_file(tmp_path):
    items = loaded(write(tmp_path), stimuli=STIMULI.model_copy(update={"sexes": {}})).items
    assert items[0].fields["sex"] == "1"


# --- metrics -----------------------------------------------------------------------------------


def test_difference_is_a_weighted_mean_over_students(tmp_path):
    items = loaded(write(tmp_path)).items
    gap = {"39": 0.1, "28": -0.2, "36.5": 0.3}

    def chance(item):
        half = gap[item.fields["lsat"]] / 2
        return 0.5 + half if item.facts["side"] == "first" else 0.5 - half

    metrics = measured(frame(items, chance))
    assert metrics["difference"] == pytest.approx((3 * 0.1 - 0.2 + 0.3) / 5)

    def logit(p):
        return math.log(p / (1 - p))

    expected = (3 * 2 * logit(0.55) + 2 * logit(0.4) + 2 * logit(0.65)) / 5
    assert metrics["difference_logit"] == pytest.approx(expected)
    assert metrics["base_rate"] == pytest.approx(0.5) and metrics["option_mass"] == pytest.approx(
        0.8
    )


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
    metrics = measured(frame(loaded(write(tmp_path)).items, lambda item: 0.3))
    assert metrics["difference"] == 0 and metrics["difference_logit"] == 0
    assert metrics["base_rate"] == pytest.approx(0.3)


def test_swapped_pair_changes_the_sign(tmp_path):
    def chance(item):
        return 0.7 if item.facts["race"] == "Black" else 0.4

    one = measured(frame(loaded(write(tmp_path)).items, chance))
    other = loaded(write(tmp_path), stimuli=with_races(("white", "Black"))).items
    assert one["difference"] == pytest.approx(0.3)
    assert measured(frame(other, chance))["difference"] == pytest.approx(-0.3)


def test_unanswered_side_leaves_the_student_out(tmp_path):
    items = loaded(write(tmp_path)).items
    table = frame(items, lambda item: 0.6 if item.facts["side"] == "first" else 0.5)
    table.at[0, "logprobs"] = np.array([-math.inf, -math.inf])
    metrics = measured(table)
    assert metrics["difference"] == pytest.approx(0.1) and metrics["base_rate"] == pytest.approx(
        0.55
    )
    half = table.drop(index=0)  # a row that is not there at all
    assert measured(half)["difference"] == pytest.approx(0.1)
    table["logprobs"] = [np.array([math.nan, -1.0])] * len(table)
    assert math.isnan(measured(table)["difference"])


def test_certain_answers_have_no_logit(tmp_path):
    items = loaded(write(tmp_path)).items
    metrics = measured(frame(items, lambda item: 1.0 if item.facts["side"] == "first" else 0.0))
    assert metrics["difference"] == 1 and math.isnan(metrics["difference_logit"])


def test_difference_by_sex_is_over_the_students_of_that_sex(tmp_path):
    items = loaded(write(tmp_path)).items
    gap = {"39": 0.1, "28": -0.2, "36.5": 0.3}  # 3 women; a man and a man

    def chance(item):
        half = gap[item.fields["lsat"]] / 2
        return 0.5 + half if item.facts["side"] == "first" else 0.5 - half

    metrics = measured(frame(items, chance))
    assert metrics["difference_sex_1"] == pytest.approx(0.1)
    assert metrics["difference_sex_2"] == pytest.approx((-0.2 + 0.3) / 2)
    assert metrics["difference"] == pytest.approx((3 * 0.1 - 0.2 + 0.3) / 5)
    table = frame(items, chance)
    table["sex"] = ["f"] * 2 + ["m"] * 4  # another file's codes: it is not said who they are
    assert math.isnan(measured(table)["difference_sex_1"])


@pytest.fixture
def applicants(tmp_path):
    """300 rows, many alike; LSAT and GPA are correlated."""
    rng = np.random.default_rng(2)
    lsat = rng.integers(28, 46, 300)
    gpa = np.round(2 + lsat / 30 + rng.normal(0, 0.3, 300), 1)
    rows = zip(rng.integers(1, 3, 300), lsat, gpa, strict=True)
    text = "".join(f"{i},White,{s},{x}.0,{g},0\n" for i, (s, x, g) in enumerate(rows))
    items = loaded(write(tmp_path, HEAD + text)).items
    assert len(items) < 2 * 290 and max(item.weight for item in items) > 2
    return items


def uneven(item):
    """p(yes) rises with both scores, with a gap between the races and some noise."""
    noise = np.random.default_rng(zlib.crc32(item.id.encode())).normal(0, 0.4)
    side = 0.3 if item.facts["side"] == "first" else 0
    odds = (item.facts["lsat"] - 36) / 6 + 1.5 * (item.facts["gpa"] - 3.2) + side + noise
    return 1 / (1 + math.exp(-odds))


def regressed(items, response, weights=None):
    """Slopes per standard deviation, by statsmodels, over students (both sides' mean)."""
    first, second = items[::2], items[1::2]
    y = [(response(a) + response(b)) / 2 for a, b in zip(first, second, strict=True)]
    weights = np.array([item.weight for item in first]) if weights is None else weights
    scores = np.array([[item.facts["lsat"], item.facts["gpa"]] for item in first])
    mean = np.average(scores, axis=0, weights=weights)
    spread = np.sqrt(np.average((scores - mean) ** 2, axis=0, weights=weights))
    fitted = WLS(y, add_constant((scores - mean) / spread), weights=weights).fit()
    return list(fitted.params[1:])


def test_merit_is_weighted_least_squares_per_standard_deviation(applicants):
    metrics = measured(frame(applicants, uneven))
    expected = regressed(applicants, uneven)
    assert [metrics["merit_lsat"], metrics["merit_gpa"]] == pytest.approx(expected, abs=1e-9)
    expected = regressed(applicants, lambda item: math.log(uneven(item) / (1 - uneven(item))))
    logits = [metrics["merit_lsat_logit"], metrics["merit_gpa_logit"]]
    assert logits == pytest.approx(expected, abs=1e-9)
    unweighted = regressed(applicants, uneven, np.ones(len(applicants) // 2))
    assert abs(metrics["merit_lsat"] - unweighted[0]) > 1e-4


def test_resamples_equal_repeated_students(applicants):
    """A resample of 300 students draws 299 of them; differences and slopes are those of its sum."""
    tally = LAW_SCHOOL.tally(frame(applicants, uneven))
    draws = Draws(50)
    estimates = bootstrap(tally, LAW_SCHOOL.compute, draws=draws).replicates.metrics
    order = np.argsort([item.cluster for item in applicants[::2]], kind="stable")
    weights = draws.weights("Black-white", tally.units)
    gaps = np.array([uneven(applicants[2 * i]) - uneven(applicants[2 * i + 1]) for i in order])
    for row in range(51):
        here = np.empty(len(order))
        here[order] = weights[row]
        expected = [np.average(gaps, weights=weights[row]), *regressed(applicants, uneven, here)]
        got = [estimates[name][row] for name in ("difference", "merit_lsat", "merit_gpa")]
        assert got == pytest.approx(expected, abs=1e-9)
    assert weights[1:].sum(axis=1) == pytest.approx(300)


def test_merit_is_undefined_without_spread_and_zero_without_dependence(tmp_path, applicants):
    metrics = measured(frame(applicants, lambda item: 0.3))
    for name in ("merit_lsat", "merit_gpa", "merit_lsat_logit", "merit_gpa_logit"):
        assert metrics[name] == pytest.approx(0, abs=1e-12), name
    one_gpa = "".join(f"{i},White,1,{20 + i}.0,3.1,0\n" for i in range(7))
    follows = "".join(f"{i},White,1,{20 + i}.0,{2 + i / 10:.1f},0\n" for i in range(9))
    for text in (one_gpa, follows, "0,White,1,39,3.1,0\n"):
        items = loaded(write(tmp_path, HEAD + text)).items
        assert len(items) >= 2
        metrics = measured(frame(items, uneven))
        assert math.isnan(metrics["merit_lsat"]) and math.isnan(metrics["merit_gpa"])


def test_pairs_of_races_are_pooled_in_the_overall_figure(tmp_path):
    chance = {"Black": 0.7, "white": 0.4, "Asian": 0.5}
    items = loaded(write(tmp_path), stimuli=with_races(("Black", "white"), ("Asian", "white")))
    tally = LAW_SCHOOL.tally(frame(items.items, lambda item: chance[item.facts["race"]]))
    pooled = LAW_SCHOOL.overall_categories(tally.categories)
    estimates = bootstrap(tally, LAW_SCHOOL.compute, pooled, Draws(100)).estimates
    assert estimates["Black-white"]["difference"].value == pytest.approx(0.3)
    assert estimates["Asian-white"]["difference"].value == pytest.approx(0.1)
    assert estimates["overall"]["difference"].value == pytest.approx(0.2)
    assert set(estimates) == {"overall", "Black-white", "Asian-white"}


# --- sampling ----------------------------------------------------------------------------------


def test_limit_keeps_the_expectation(tmp_path):
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


def test_limit_above_all_students_keeps_their_weights(tmp_path):
    write(tmp_path)
    assert loaded(tmp_path, 6) == loaded(tmp_path)
    assert sum(item.weight for item in loaded(tmp_path, 2).items) == 2
    assert len(loaded(tmp_path, 1).items) == 2
    assert loaded(tmp_path, 4, 5) == loaded(tmp_path, 4, 5)


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (",race,sex,LSAT\n0,White,1,39.0\n", "'UGPA' is missing"),
        (HEAD + "0,White,1,high,3.1,0\n", "line 2: LSAT must be a number, not 'high'"),
        (HEAD + "0,White,1,39,nan,0\n", "line 2: UGPA must be a number"),
        (HEAD + ROWS + "12,White,1,39\n", "line 7: 4 columns"),
        (HEAD + ROWS + "12,White,1,39,3,1,0\n", "line 7: 7 columns"),
        (HEAD + ROWS + "12,White,1,39, ,0\n", "line 7: UGPA is empty"),
        (HEAD + ROWS + "9,White,1,38,3.1,0\n", "line 7: row number '9' appears twice.*line 5$"),
        (HEAD + '0,"White,1,39,3.1,0\n1,White,1,39,3.1,0\n', "line 2: .*quotation mark"),
        (HEAD + '0,"White,1,39,3.1,0\n1,Black",1,39,3.1,0\n', "line 2: .*quotation mark"),
        (HEAD + '0,"Wh"ite,1,39,3.1,0\n', "line 2: .*quotation mark"),
        (HEAD + "0,White,3,39,3.1,0\n", "no student of sex 1, 2"),
        (HEAD.replace("UGPA", "UGPA,UGPA"), "column 'UGPA' appears twice"),
        (HEAD, "no rows below the header"),
        ("", "no rows below the header"),
    ],
)
def test_bad_files_are_refused_with_their_line(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as caught:
        loaded(write(tmp_path, text))
    assert "law_data.csv" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("length", "message"),
    [(10_485_760, "longer than 1,000,000 bytes"), (200_000, r"field larger .*131072")],
)
def test_limit_of_bytes_per_row(tmp_path, length, message):
    with pytest.raises(InputError, match=f"line 7: {message}") as caught:
        loaded(write(tmp_path, HEAD + ROWS + "12," + "x" * length))
    assert len(str(caught.value)) < 400


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"law_data\.csv: cannot be read"):
        loaded(tmp_path)
    path = write(tmp_path) / "law_school" / "law_data.csv"
    path.write_bytes((HEAD + ROWS).encode().replace(b"Asian", b"As\xeean"))
    with pytest.raises(InputError, match=r"law_data\.csv, line 4: not UTF-8"):
        loaded(tmp_path)


def test_equal_rows_are_several_students(tmp_path):
    """125 of the published rows repeat another apart from their number."""
    items = loaded(write(tmp_path, HEAD + "3,White,1,39,3.1,0\n4,White,1,39,3.1,0\n")).items
    assert [item.weight for item in items] == [2, 2]
    unnumbered = "sex,UGPA,LSAT,race\r\n1,3.1,39.0,White\r\n1,3.1,39.0,White\r\n"
    assert loaded(write(tmp_path, "\ufeff" + unnumbered)).items == items


# --- the published file ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published():
    return published_folder("law_school")


def test_published_counts(published):
    items = loaded(published).items
    assert len(items) == 3_888 and len({item.cluster for item in items}) == 1_944
    assert sum(item.weight for item in items) == 2 * 21_791
    assert loaded(published).left_out == {}
    women = sum(item.weight for item in items if item.fields["sex"] == "female")
    assert women == 2 * 9_537
    assert {item.fields["race"] for item in items} == {"Black", "white"}
    assert all(not item.fields["lsat"].endswith(".0") for item in items)
    mean = np.average([i.facts["lsat"] for i in items], weights=[i.weight for i in items])
    small = loaded(published, 400).items
    drawn = np.average([i.facts["lsat"] for i in small], weights=[i.weight for i in small])
    assert drawn == pytest.approx(mean, abs=0.3)


def test_published_weights_equal_all_rows(published):
    """The metrics of 1,944 weighted students are those over each of the 21,791 rows."""
    items = loaded(published).items
    metrics = measured(frame(items, uneven))
    rows = pd.read_csv(published / "law_school" / "law_data.csv")
    names = {(i.facts["sex"], i.facts["lsat"], i.facts["gpa"]): i for i in items[::2]}
    others = {(i.facts["sex"], i.facts["lsat"], i.facts["gpa"]): i for i in items[1::2]}
    keys = list(zip(rows["sex"].astype(str), rows["LSAT"], rows["UGPA"], strict=True))
    gaps = {key: uneven(names[key]) - uneven(others[key]) for key in names}
    assert metrics["difference"] == pytest.approx(np.mean([gaps[key] for key in keys]), abs=1e-12)
    everyone = [one for key in keys for one in (names[key], others[key])]
    expected = regressed(everyone, uneven, np.ones(len(keys)))
    assert [metrics["merit_lsat"], metrics["merit_gpa"]] == pytest.approx(expected, abs=1e-9)
