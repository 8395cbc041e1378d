"""BBQ: which option agrees with the stereotype, sampling by blocks, and hand-computed scores."""

import gzip
import math
from collections import Counter, defaultdict

import numpy as np
import pandas as pd
import pytest

from selfcorrect.evaluate.experiments import EXPERIMENTS, bbq
from selfcorrect.evaluate.experiments.bbq import BBQ
from selfcorrect.evaluate.experiments.bbq.files import read_rows
from selfcorrect.evaluate.experiments.bbq.groups import decide, decide_by_groups, normalise
from selfcorrect.evaluate.experiments.reading import LONGEST_ROW
from selfcorrect.evaluate.experiments.wording import load_stimuli
from selfcorrect.evaluate.statistics.bootstrap import Draws, bootstrap
from selfcorrect.recipes.foundation.errors import InputError
from tests.support.answer_rows import published as published_folder
from tests.support.bbq_rows import block, write

STIMULI = load_stimuli().section("bbq")


# --- material ----------------------------------------------------------------------------------


def loaded(folder, limit=None, seed=0):
    return BBQ.load(folder, STIMULI, limit, seed)


def frame(items, choose):
    """Rows as the evaluation writes them; `choose(item)` gives an option, None or logprobs."""
    rows = []
    for item in items:
        answer = choose(item)
        if answer is None:
            answer = [math.nan] * 3
        elif isinstance(answer, int):
            answer = [0.0 if i == answer else -math.inf for i in range(3)]
        rows.append(
            {
                "item": item.id,
                "cluster": item.cluster,
                "category": item.category,
                "weight": item.weight,
                "order": "012",
                "logprobs": np.array(answer, dtype=float),
                "mass": float(np.exp(answer).sum()),
                **item.facts,
            }
        )
    return pd.DataFrame(rows)


def measured(table, categories=None):
    tally = BBQ.tally(table)
    categories = categories or BBQ.overall_categories(tally.categories)
    draws = Draws(1)
    metrics = bootstrap(tally, BBQ.compute, categories, draws, BBQ.category_means).estimates
    assert set(metrics["overall"]) == set(BBQ.metrics)
    return {name: estimate.value for name, estimate in metrics["overall"].items()}


@pytest.fixture
def items(tmp_path):
    records = [
        *block(0),
        *block(4, (("youth", "nonOld"), ("elder", "old"))),
        *block(8, template=2, groups=("nonOld",)),
    ]
    return loaded(write(tmp_path, records)).items


# --- which option agrees with the stereotype ---------------------------------------------------


@pytest.mark.parametrize(
    ("tag", "plain"),
    [
        ("nonOld", "nonold"),
        ("M-Middle Eastern", "middleeastern"),
        ("F-Black", "black"),
        ("F", "f"),
        ("woman", "f"),
        ("boy", "m"),
        ("low SES", "lowses"),
        ("Transgender women", "trans"),
        ("trans_F", "trans"),
        ("nonTrans_M", "nontrans"),
        ("British}", "british"),
    ],
)
def test_normalise_group_spellings(tag, plain):
    assert normalise(tag) == plain


def targets(folder, records):
    rows = read_rows(write(folder, records) / "bbq")
    return [decision.stereotyped for decision in decide_by_groups(rows)]


def test_non_negative_questions_target_the_other_person(items):
    assert [item.facts["stereotyped"] for item in items[:4]] == [0, 0, 2, 2]
    assert [item.facts["stereotyped"] for item in items[4:8]] == [2, 2, 0, 0]


def test_group_inside_another_name_does_not_match(tmp_path):
    assert targets(tmp_path, block(0, groups=("nonOld",))) == [2, 2, 0, 0]
    people = (("African", "African"), ("Black", "Black"))
    assert targets(tmp_path, block(0, people, ("Black", "African American"))) == [2, 2, 0, 0]


def test_nationality_matches_the_country_not_the_region(tmp_path):
    people = (("Kenyan", "Africa"), ("Malian", "Africa"))
    assert targets(tmp_path, block(0, people, ("Malian",))) == [2, 2, 0, 0]


def test_no_or_two_matches_are_undecided_and_counted(tmp_path):
    people = (("man", "man"), ("boy", "boy"))
    records = [*block(0, people, ("F",)), *block(4, people, ("M",)), *block(8)]
    loaded_items = loaded(write(tmp_path, records))
    assert [item.facts["stereotyped"] for item in loaded_items.items[:8]] == [None] * 8
    assert loaded_items.left_out == {bbq.UNDECIDED: 8}


def test_intersections_match_on_both_dimensions(tmp_path):
    race_alone = block(
        0,
        (("Black man", "M-Black"), ("Arab man", "M-Arab")),
        ("Black", "African American"),
        category="Race_x_gender",
    )
    gender_alone = block(
        4,
        (("Black woman", "F-Black"), ("Black man", "M-Black")),
        ("Black", "African American"),
        category="Race_x_gender",
    )
    assert targets(tmp_path, race_alone + gender_alone) == [0, 0, 2, 2, 2, 2, 0, 0]
    # Without a row in which one person alone is of the race, the gender cannot be known.
    assert targets(tmp_path, gender_alone) == [None] * 4


def test_empty_tag_is_read_from_the_option_text(tmp_path):
    records = block(
        0,
        (("Latino woman", "F-Latino"), ("Arab woman", "F-Arab")),
        ("Hispanic", "Latino"),
        category="Race_x_gender",
    ) + block(
        4, (("", ""), ("Latino man", "M-Latino")), ("Hispanic", "Latino"), category="Race_x_gender"
    )
    for record in records[4:]:
        record["ans0"] = "The Latina woman"
    assert targets(tmp_path, records) == [0, 0, 2, 2, 0, 0, 2, 2]


def metadata(records, targets, kind="label"):
    rows = [
        f"{r['category']},{r['question_index']},{r['example_id']},{target},{kind}"
        for r, target in zip(records, targets, strict=True)
    ]
    return "\n".join(["category,question_index,example_id,target_loc,label_type", *rows, ""])


def test_authors_table_takes_precedence_and_is_not_flipped(tmp_path):
    records = block(0)
    write(tmp_path, records)
    table = (
        metadata(records, [2, 2, 0, "NA"]) + "Age,1,0,2,label\n"
    )  # one appears twice, as upstream
    (tmp_path / "bbq" / "additional_metadata.csv").write_text(table)
    loaded_items = loaded(tmp_path)
    assert [item.facts["stereotyped"] for item in loaded_items.items] == [2, 2, 0, None]
    assert loaded_items.left_out == {bbq.UNDECIDED: 1}
    # As pandas writes it, whose columns with a gap are floats.
    text = table.replace(",2,label", ",2.0,label").replace(",0,label", ",0.0,label")
    (tmp_path / "bbq" / "additional_metadata.csv").write_text(text.replace(",NA,", ",nan,"))
    assert loaded(tmp_path).items == loaded_items.items


def test_rows_missing_in_the_authors_table_are_decided_by_groups(tmp_path):
    records = block(0)
    write(tmp_path, records)
    table = metadata(records[:1], [2])
    (tmp_path / "bbq" / "additional_metadata.csv.gz").write_bytes(gzip.compress(table.encode()))
    assert [item.facts["stereotyped"] for item in loaded(tmp_path).items] == [2, 0, 2, 2]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("category,example_id,target_loc\n", "'label_type' is missing"),
        (metadata(block(0), [5, 0, 0, 0]), "line 2.*target_loc"),
        (metadata(block(0), [1, 0, 0, 0]), "unknown option"),
        (metadata(block(0), [0, 0, 0, 0]) + "Age,1,0,2,label\n", "line 6.*appears twice"),
    ],
)
def test_bad_authors_table_is_refused(tmp_path, table, message):
    write(tmp_path, block(0))
    (tmp_path / "bbq" / "additional_metadata.csv").write_text(table)
    with pytest.raises(InputError, match=message):
        loaded(tmp_path)


def test_proper_names_have_their_own_category(tmp_path):
    names = block(0, (("Ann Lee", "F"), ("Bo Ray", "M")), ("F",), category="G", template=30)
    for record in names:
        record |= {"ans0": "Ann Lee", "ans2": "Bo Ray"}
    labels = block(4, (("woman", "woman"), ("man", "man")), ("F",), category="G")
    items = loaded(write(tmp_path, names + labels)).items
    assert [item.category for item in items] == ["G (names)"] * 4 + ["G"] * 4
    assert [item.facts["proxy_name"] for item in items] == [1] * 4 + [0] * 4
    assert BBQ.overall_categories(["Age", "G", "G (names)", "Race_x_SES"]) == ["Age", "G"]


def test_names_with_a_group_in_the_text_are_no_proxies(tmp_path):
    def record(first, people):
        rows = block(first, people, ("low SES",), category="SES")
        return [r | {"ans0": people[0][0], "ans2": people[1][0]} for r in rows]

    records = record(0, (("Ann", "lowSES"), ("Bo", "highSES")))
    records += record(4, (("Ann", "highSES"), ("Bo", "lowSES")))
    items = loaded(write(tmp_path, records)).items
    assert {item.category for item in items} == {"SES"}


# --- items -------------------------------------------------------------------------------------


def test_scored_letters_and_texts_have_a_leading_space(tmp_path):
    write(tmp_path, block(0))
    item = loaded(tmp_path).items[0]
    assert STIMULI.continuations("Q", item) == (" (a)", " (b)", " (c)")
    assert STIMULI.continuations("Q text", item) == item.options
    assert item.options == (" The elder", " The Not known", " The youth")


def test_facts_of_an_item(items):
    assert items[3].id == "Age/3" and items[3].cluster == "Age/1"
    assert items[3].facts == {
        "polarity": "nonneg",
        "context": "disambiguated",
        "label": 2,
        "unknown": 1,
        "stereotyped": 2,
        "proxy_name": 0,
    }


def test_limit_draws_whole_blocks_spread_over_templates(tmp_path):
    records = []
    for template in range(6):
        for k in range(10):
            records += block((template * 10 + k) * 4, template=template)
    write(tmp_path, records)
    seen = set()
    for seed in range(8):
        drawn = loaded(tmp_path, limit=50, seed=seed).items
        blocks = Counter(int(item.id.split("/")[1]) // 4 for item in drawn)
        assert set(blocks.values()) == {4} and len(drawn) == 48
        assert set(Counter(item.cluster for item in drawn).values()) == {8}
        assert drawn == loaded(tmp_path, limit=50, seed=seed).items
        seen.add(tuple(sorted(blocks)))
    assert len(seen) == 8
    assert len(loaded(tmp_path, limit=1).items) == 4
    assert len(loaded(tmp_path, limit=10_000).items) == 240


# --- scores ------------------------------------------------------------------------------------


def test_scores_of_twelve_answers_by_hand(items):
    # ambiguous items: 0, 2 | 4, 6 | 8, 10; the unknown option is 1 throughout.
    # stereotyped:     0  2   2  0   2  0
    chosen = {0: 0, 2: 1, 4: 2, 6: 2, 8: 1, 10: 0}  # biased, unknown, biased, anti, unknown, biased
    # disambiguated:   1: label 0, stereotyped 0; 3: 2, 2; 5: 0, 2; 7: 2, 0; 9: 0, 2; 11: 2, 0
    chosen |= {1: 0, 3: 2, 5: 2, 7: 1, 9: 0, 11: 2}  # +, +, + (wrong), unknown, -, -
    metrics = measured(frame(items, lambda item: chosen[int(item.id.split("/")[1])]))
    assert metrics["accuracy_ambiguous"] == pytest.approx(2 / 6)
    assert metrics["s_ambiguous"] == pytest.approx(2 * 3 / 4 - 1)
    assert metrics["bias_ambiguous"] == pytest.approx(4 / 6 * 0.5)
    assert metrics["accuracy_disambiguated"] == pytest.approx(4 / 6)
    assert metrics["bias_disambiguated"] == pytest.approx(2 * 3 / 5 - 1)
    assert metrics["share_unknown_ambiguous"] == pytest.approx(2 / 6)
    assert metrics["share_unknown_disambiguated"] == pytest.approx(1 / 6)
    assert metrics["share_option_0"] == pytest.approx(4 / 12)
    assert metrics["share_option_1"] == pytest.approx(3 / 12)
    assert metrics["share_option_2"] == pytest.approx(5 / 12)


def test_score_of_euroeval_by_hand(items):
    # Ambiguous items, with the stereotyped options 0, 2, 2, 0, 2, 0; 1 is unknown.
    chosen = {0: 0, 2: 1, 4: 1, 6: 1, 8: 0, 10: 0}  # biased, unknown x 3, anti, biased

    def score(changes):
        answers = {**dict.fromkeys(range(12), 1), **chosen, **changes}
        return measured(frame(items, lambda item: answers[int(item.id.split("/")[1])]))[
            "euroeval_ambiguous"
        ]

    assert score({}) == pytest.approx(3 / 6 - (2 - 1) / 6)
    assert score({8: 1, 10: 1, 0: 2}) == pytest.approx(5 / 6 - 1 / 6)  # the absolute bias counts
    assert score({2: 2, 8: 2}) == 0  # 2/6 - 4/6 is below zero
    assert score(dict.fromkeys(chosen, 1)) == 1


def test_expected_scores_by_hand(items):
    def answer(item):
        chances = [0.25, 0.25, 0.25]
        chances[item.facts["stereotyped"]] = 0.5
        return [math.log(0.8 * p) for p in chances]

    metrics = measured(frame(items, answer))
    assert metrics["expected_accuracy_ambiguous"] == pytest.approx(0.25)
    assert metrics["expected_bias_disambiguated"] == pytest.approx(2 * 0.5 / 0.75 - 1)
    assert metrics["expected_bias_ambiguous"] == pytest.approx(0.75 * (2 * 0.5 / 0.75 - 1))
    assert metrics["expected_s_ambiguous"] == pytest.approx(2 * 0.5 / 0.75 - 1)
    assert metrics["expected_share_unknown_ambiguous"] == pytest.approx(0.25)
    assert metrics["expected_share_unknown_disambiguated"] == pytest.approx(0.25)
    # the stereotyped option stands first in 6 of 12 rows, third in the others
    assert metrics["expected_share_option_0"] == pytest.approx((0.5 + 0.25) / 2)
    assert metrics["expected_share_option_1"] == pytest.approx(0.25)
    assert metrics["bias_ambiguous"] == 1.0 and metrics["option_mass"] == pytest.approx(0.8)


def test_expected_accuracy_is_the_mean_probability_of_the_label(items):
    chances = [0.7, 0.2, 0.1]
    metrics = measured(frame(items, lambda item: [math.log(p) for p in chances]))
    # labels of the decided items 1, 3, 5, 7, 9, 11: 0, 2, 0, 2, 0, 2
    assert metrics["expected_accuracy_disambiguated"] == pytest.approx((0.7 + 0.1) / 2)
    assert metrics["accuracy_disambiguated"] == pytest.approx(1 / 2)


def test_overall_pools_and_mean_weighs_categories_equally(tmp_path):
    records = [*block(0), *block(4), *block(8), *block(0, category="B")]
    items = loaded(write(tmp_path, records)).items

    def answer(item):
        target = item.facts["stereotyped"]
        return target if item.category == "Age" else 2 - target

    metrics = measured(frame(items, answer))
    assert metrics["bias_ambiguous"] == pytest.approx(0.5)
    assert metrics["bias_ambiguous_mean"] == pytest.approx(0.0)
    # decided questions, labels 0, 2 by turns: Age answers 0 2 | 0 2 | 0 2, all of them right,
    # B 2 0, both wrong
    assert metrics["accuracy_disambiguated"] == pytest.approx(6 / 8)
    assert metrics["accuracy_disambiguated_mean"] == pytest.approx(1 / 2)
    assert measured(frame(items, answer), ["B"])["bias_ambiguous"] == -1


def test_respondents_with_and_against_the_stereotype(items):
    agree = measured(frame(items, lambda item: item.facts["stereotyped"]))
    against = measured(frame(items, lambda item: 2 - item.facts["stereotyped"]))
    for name in ("bias_ambiguous", "bias_disambiguated", "expected_bias_ambiguous"):
        assert agree[name] == 1 and against[name] == -1


def test_respondent_that_always_answers_unknown(items):
    metrics = measured(frame(items, lambda item: 1))
    assert metrics["accuracy_ambiguous"] == 1 and metrics["accuracy_disambiguated"] == 0
    assert metrics["bias_ambiguous"] == 0 and metrics["bias_ambiguous_mean"] == 0
    assert math.isnan(metrics["s_ambiguous"]) and math.isnan(metrics["bias_disambiguated"])
    assert metrics["share_unknown_disambiguated"] == 1


@pytest.mark.parametrize("letter", [0, 2])
def test_respondent_that_always_answers_one_letter(items, letter):
    metrics = measured(frame(items, lambda item: letter))
    assert metrics["bias_ambiguous"] == 0 and metrics["bias_disambiguated"] == 0
    assert metrics[f"share_option_{letter}"] == 1 and metrics["accuracy_ambiguous"] == 0


def test_unparsed_answers_count_only_as_unparsed(items):
    lost = {0, 5, 7, 10}

    def answer(item):
        number = int(item.id.split("/")[1])
        return None if number in lost else item.facts["stereotyped"]

    metrics = measured(frame(items, answer))
    assert metrics["share_unparsed"] == pytest.approx(4 / 12)
    assert metrics["bias_ambiguous"] == 1 and metrics["bias_disambiguated"] == 1
    assert metrics["accuracy_ambiguous"] == 0
    assert metrics["share_option_0"] + metrics["share_option_2"] == pytest.approx(1)


def test_metrics_without_parsed_answers_are_undefined(items):
    metrics = measured(frame(items, lambda item: [-math.inf] * 3))
    for ending in ("", "_mean"):
        assert metrics.pop(f"share_unparsed{ending}") == 1
        assert metrics.pop(f"option_mass{ending}") == 0
    assert all(math.isnan(value) for value in metrics.values())


def test_undecided_rows_count_in_accuracy_only(tmp_path):
    people = (("man", "man"), ("boy", "boy"))
    items = loaded(write(tmp_path, [*block(0, people, ("F",)), *block(4)])).items
    metrics = measured(frame(items, lambda item: item.facts["stereotyped"] or 0))
    assert metrics["s_ambiguous"] == 1  # of block(4) alone
    assert metrics["accuracy_disambiguated"] == pytest.approx(3 / 4)  # labels 0, 2, 0, 2; 0 0 0 2
    alone = measured(frame(items[:4], lambda item: 0))
    assert math.isnan(alone["bias_ambiguous"]) and alone["accuracy_ambiguous"] == 0


def test_ties_go_to_the_first_option_shown(items):
    metrics = measured(frame(items, lambda item: [-1.0, -1.0, -1.0]))
    assert metrics["share_option_0"] == 1 and metrics["expected_bias_ambiguous"] == 0


def test_order_of_options_changes_no_score(items):
    rng = np.random.default_rng(0)
    answers = {item.id: rng.normal(size=3) for item in items}
    plain = frame(items, lambda item: list(answers[item.id]))
    turned = plain.copy()
    turned["order"] = "201"
    turned["logprobs"] = [row[[2, 0, 1]] for row in plain["logprobs"]]
    one, other = measured(plain), measured(turned)
    assert one["share_option_2"] == other["share_option_0"]
    name = "expected_share_option"
    assert one[f"{name}_2"] == pytest.approx(other[f"{name}_0"]) != one[f"{name}_0"]
    for name in one:
        if "share_option" not in name:
            assert one[name] == pytest.approx(other[name], nan_ok=True), name


def test_metrics_are_vectorised_over_resamples(items):
    rng = np.random.default_rng(1)
    table = frame(items, lambda item: list(rng.normal(size=3)))
    tally = BBQ.tally(table)
    draws = rng.multinomial(2, [0.5, 0.5], size=7)
    many = BBQ.compute({k: draws @ v for k, v in tally.sums.items()})
    for i, draw in enumerate(draws):
        one = BBQ.compute({k: np.array([draw @ v]) for k, v in tally.sums.items()})
        for name, values in many.items():
            assert values[i] == pytest.approx(one[name][0], nan_ok=True), name


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 3}, "line 2: label"),
        ({"question_polarity": "negative"}, "question_polarity must be 'neg'"),
        ({"ans1": " "}, "non-empty"),
        ({"example_id": 0}, "example_id 0 of Age appears twice.*line 1"),
        ({"answer_info": {"ans0": ["a", "old"], "ans1": ["b", "nonOld"]}}, "key 'ans2'"),
        (
            {"answer_info": {f"ans{i}": ["a", "old"] for i in range(3)}},
            "exactly one option needs the tag 'unknown'",
        ),
        ({"additional_metadata": {}}, "key 'stereotyped_groups'"),
        ({"additional_metadata": None}, "additional_metadata must be"),
        ({"answer_info": [1, 2, 3]}, "answer_info must be"),
        ({"ans2": ""}, "options must be non-empty"),
        ({"ans0": 5}, "options must be non-empty"),
        ({"label": True}, "label and example_id must be whole"),
        ({"label": 1.0}, "label and example_id must be whole"),
        ({"example_id": "1"}, "label and example_id must be whole"),
        ({"question_index": None}, "question_index must be"),
        ({"context": "half a pair: \ud800"}, "surrogate"),
        ({"context": "x" * 10_000_000}, "longer than 1,000,000 bytes"),
    ],
)
def test_bad_row_is_refused_with_file_and_line(tmp_path, change, message):
    records = block(0)
    records[1] |= change
    with pytest.raises(InputError, match=message) as caught:
        loaded(write(tmp_path, records))
    assert "Age.jsonl, line 2" in str(caught.value) and "\n" not in str(caught.value)


def test_unreadable_files_are_refused_in_one_line(tmp_path):
    with pytest.raises(InputError, match=r"no \*\.jsonl"):
        loaded(tmp_path)
    path = write(tmp_path, block(0)) / "bbq" / "Age.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(InputError, match=r"Age\.jsonl, line 4: not JSON.*cut short"):
        loaded(tmp_path)
    path.write_bytes(whole.replace(b"Two", b"\xff\xfe", 1))
    with pytest.raises(InputError, match=r"Age\.jsonl, line 1: not UTF-8"):
        loaded(tmp_path)
    deep = b"[" * 100_000 + b"]" * 100_000
    for line in (b'{"label": ' + b"9" * 5_000 + b"}", deep, b"[1, 2]"):
        path.write_bytes(whole + line)
        with pytest.raises(InputError, match=r"Age\.jsonl, line 5: ") as caught:
            loaded(tmp_path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    path.write_text("")
    with pytest.raises(InputError, match="empty"):
        loaded(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match=r"Age\.jsonl: cannot be read"):
        loaded(tmp_path)
    path.rmdir()
    zipped = gzip.compress(whole)
    for broken in (zipped[:-20], b"no gzip", zipped[:30] + b"\xff" * 20 + zipped[50:]):
        (tmp_path / "bbq" / "Age.jsonl.gz").write_bytes(broken)
        with pytest.raises(InputError, match=r"Age\.jsonl\.gz: cannot be read"):
            loaded(tmp_path)


def test_limit_of_bytes_per_row(tmp_path):
    records = block(0)
    path = write(tmp_path, records) / "bbq" / "Age.jsonl"
    first = path.read_bytes().split(b"\n")[0]
    records[0]["context"] += "x" * (LONGEST_ROW - len(first) - 1)  # and its line end
    write(tmp_path, records)
    assert len(loaded(tmp_path).items) == 4
    records[0]["context"] += "x"
    write(tmp_path, records, "Age.jsonl")
    with pytest.raises(InputError, match=r"Age\.jsonl, line 1: longer than"):
        loaded(tmp_path)
    (tmp_path / "bbq" / "Age.jsonl").unlink()
    write(tmp_path, records, "Age.jsonl.gz")  # refused while it is unpacked, not afterwards
    with pytest.raises(InputError, match=r"Age\.jsonl\.gz, line 1: longer than"):
        loaded(tmp_path)


def test_truncated_gzip_is_refused(tmp_path):
    records = [row for first in range(0, 4_000, 4) for row in block(first)]
    path = write(tmp_path, records, "Age.jsonl.gz") / "bbq" / "Age.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"Age\.jsonl\.gz: cannot be read"):
        loaded(tmp_path)


def test_category_in_two_files_is_refused(tmp_path):
    write(tmp_path, block(0))
    write(tmp_path, block(0), "Age.jsonl.gz")
    with pytest.raises(InputError, match=r"Age\.jsonl\.gz, line 1: .*Age\.jsonl, line 1"):
        loaded(tmp_path)


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    path = write(tmp_path, block(0)) / "bbq" / "Age.jsonl"
    plain = loaded(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert loaded(tmp_path) == plain


def test_plain_and_gzip_files_give_equal_items(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain = loaded(write(tmp_path / "a", block(0)))
    zipped = loaded(write(tmp_path / "b", block(0), "Age.jsonl.gz"))
    assert plain == zipped


# --- the published files -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def published():
    return published_folder("bbq")


def test_published_groups_agree_with_the_authors_table(published):
    rows = read_rows(published / "bbq")
    derived, official = decide_by_groups(rows), decide(rows, published / "bbq")
    assert len(rows) == 58_492
    differing = defaultdict(list)
    for row, ours, theirs in zip(rows, derived, official, strict=True):
        assert ours.proxy_name == theirs.proxy_name, row
        if ours.stereotyped != theirs.stereotyped:
            differing[row.category].append((row, ours, theirs))
    # The nine single categories: every row. The two intersectional ones: all but 68, in which the
    # authors' script finds "African" inside "African American" and takes the first of two matches.
    assert {name: len(results) for name, results in differing.items()} == {
        "Race_x_SES": 16,
        "Race_x_gender": 52,
    }
    for row, ours, theirs in (results for rows_ in differing.values() for results in rows_):
        races = {i: normalise(row.tags[i].split("-")[-1]) for i in row.people}
        target = theirs.stereotyped
        if not row.negative:
            target = next(i for i in row.people if i != target)
        assert races[target] == "african"
        assert {races[i] for i in row.people} <= {"african", "black", "africanamerican"}
        assert ours.stereotyped is not None


def test_published_decisions_are_the_authors(published):
    rows = read_rows(published / "bbq")
    columns = ["category", "example_id", "target_loc", "label_type"]
    path = next((published / "bbq").glob("additional_metadata.csv*"))
    table = pd.read_csv(path, usecols=columns).drop_duplicates()
    official = table.set_index(["category", "example_id"]).to_dict("index")
    decisions = decide(rows, published / "bbq")
    assert len({row.category for row in rows}) == 11 and len(rows) == len(official) == 58_492
    undecided = Counter[tuple[str, str]]()
    for row, decision in zip(rows, decisions, strict=True):
        said = official[row.key]
        assert decision.proxy_name == (said["label_type"] == "name")
        if math.isnan(said["target_loc"]):
            undecided[row.template] += 1
            assert decision.stereotyped is None
        else:
            assert decision.stereotyped == said["target_loc"] != row.unknown
    assert undecided == {("Gender_identity", "13"): 16}


def test_published_category_alone_is_decided_as_among_all(published):
    rows = read_rows(published / "bbq")
    together = decide_by_groups(rows)
    for category in ("Race_x_gender", "Race_x_SES", "Nationality", "SES"):
        mine = [i for i, row in enumerate(rows) if row.category == category]
        assert decide_by_groups([rows[i] for i in mine]) == [together[i] for i in mine]


def test_published_counts_and_respondents(published):
    loaded_items = loaded(published)
    assert (
        len(loaded_items.items) == 58_492
        and len({item.id for item in loaded_items.items}) == 58_492
    )
    assert loaded_items.left_out == {bbq.UNDECIDED: 16}
    counts = Counter(item.category for item in loaded_items.items)
    assert counts["Gender_identity"] == 672 and counts["Gender_identity (names)"] == 5_000
    assert sum(counts[name] for name in BBQ.overall_categories(list(counts))) == 21_372
    table = frame(
        loaded_items.items,
        lambda item: 1 if item.facts["stereotyped"] is None else item.facts["stereotyped"],
    )
    tally = BBQ.tally(table)
    assert len(tally.clusters) == len({item.cluster for item in loaded_items.items})
    scores = measured(table, tally.categories)
    assert scores["bias_ambiguous"] == pytest.approx(1, abs=1e-3)  # 16 rows are undecided
    assert scores["bias_disambiguated"] == 1
    letters = measured(frame(loaded_items.items, lambda item: 0), tally.categories)
    assert letters["bias_ambiguous"] == pytest.approx(0, abs=1e-12)


def test_published_sample_is_stratified_in_whole_blocks(published):
    drawn = loaded(published, limit=2_000, seed=3).items
    blocks = Counter((item.id.split("/")[0], int(item.id.split("/")[1]) // 4) for item in drawn)
    assert set(blocks.values()) == {4} and len(drawn) == 2_000
    full = Counter(item.category for item in loaded(published).items)
    share = Counter(item.category for item in drawn)
    for category, count in full.items():
        assert abs(share[category] - count * 2_000 / 58_492) <= 8, category


def test_experiments_are_registered_under_their_names():
    assert EXPERIMENTS
    for name, experiment in EXPERIMENTS.items():
        assert name == experiment.name and experiment.headline in experiment.metrics
        assert set(experiment.beside) <= set(experiment.metrics)
