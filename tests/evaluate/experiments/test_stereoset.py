"""StereoSet: the authors' scores by hand, synthetic respondents, and the real file."""

import json
import math
from collections import Counter

import numpy as np
import pytest

from selfcorrect.evaluate.experiments import EXPERIMENTS
from selfcorrect.evaluate.experiments.stereoset import STEREOSET
from selfcorrect.evaluate.experiments.wording import load_stimuli
from selfcorrect.recipes.foundation.errors import InputError
from tests.support.answer_rows import measured, measured_by_a_tiny_model, published, rows

STIMULI = load_stimuli().section("stereoset")


def line(kind, target, category, number, **changes):
    """Stereotyped, anti-stereotyped and unrelated sentences of 20, 10 and 40 characters."""
    blank = "BLANK" if kind == "intrasentence" else "here"
    return {
        "type": kind,
        "target": target,
        "bias_type": category,
        "context": f"The {target} was {blank} {number}.",
        "stereotype": f"Stereo {target} {number}".ljust(19, "s") + ".",
        "anti-stereotype": f"Anti {number}".ljust(9, "a") + ".",
        "unrelated": f"Unrelated {target} {number}".ljust(39, "u") + ".",
    } | changes


RECORDS = [
    line("intrasentence", "cook", "profession", 0),
    line("intrasentence", "cook", "profession", 1),
    line("intersentence", "cook", "profession", 2),
    line("intersentence", "chef", "profession", 3),
    line("intrasentence", "aunt", "gender", 4),
]


def write(folder, records=RECORDS, name="dev.jsonl"):
    path = folder / "stereoset" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return folder


def loaded(folder, limit=None, seed=0):
    return STEREOSET.load(folder, STIMULI, limit, seed)


def refused(folder):
    with pytest.raises(InputError) as caught:
        loaded(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return str(caught.value)


# --- items -------------------------------------------------------------------------------------


def test_item_of_each_type(tmp_path):
    items = loaded(write(tmp_path)).items
    assert [item.cluster for item in items] == ["cook"] * 3 + ["chef", "aunt"]
    assert [len(option) for option in items[0].options] == [21, 11, 41]
    assert items[0].options[0].startswith(" Stereo") and items[0].options[1].startswith(" Anti")
    asked = [STIMULI.turns("Q", item)[0].text for item in (items[0], items[2])]
    assert "for BLANK: The cook was BLANK 0." in asked[0]
    assert "right after this one: The cook was here 2." in asked[1]


def test_braces_in_a_context_are_literal(tmp_path):
    record = line("intersentence", "cook", "profession", 0, context="A {context} and {task}.")
    [item] = loaded(write(tmp_path, [record])).items
    assert STIMULI.turns("Q", item)[0].text.endswith(": A {context} and {task}.")


def test_template_without_context_is_refused(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("stereoset: {intersentence: Write something.}")
    with pytest.raises(
        InputError, match=r"own\.yaml: stereoset\.intersentence: must contain \{context\}"
    ):
        load_stimuli(own)


# --- metrics -----------------------------------------------------------------------------------

# Per character (20, 10, 40): 0: stereo -.5, anti -.4, unrelated -.6; 1: -.2, -.9, -.5;
# 2: -.5 each; 3: -1, -.9, -.1; 4: -.1, -.3, -.2.
PER_CHARACTER = [
    (-0.5, -0.4, -0.6),
    (-0.2, -0.9, -0.5),
    (-0.5, -0.5, -0.5),
    (-1.0, -0.9, -0.1),
    (-0.1, -0.3, -0.2),
]


def by_hand(item):
    scores = PER_CHARACTER[int(item.id.rsplit("/", 1)[1])]
    return [score * length for score, length in zip(scores, (20, 10, 40), strict=True)]


def test_scores_are_means_over_terms(tmp_path):
    frame = rows(loaded(write(tmp_path)).items, by_hand)
    metrics = measured(STEREOSET, frame)
    # cook: stereotyped preferred 0, 1, 1/2; related 2/2, 1/2, 1/2 of the comparisons won
    # chef: 0 and 0; aunt: 1 and 1/2
    cook, cook_lm = 1.5 / 3, (1 + 0.5 + 0.5) / 3
    score, lm = (cook + 0 + 1) / 3, (cook_lm + 0 + 0.5) / 3
    assert metrics["stereotype_score"] == pytest.approx(score)
    assert metrics["lm_score"] == pytest.approx(lm)
    assert metrics["icat"] == pytest.approx(lm * min(score, 1 - score) / 0.5)
    # intrasentence: cook 1/2 and 3/4, aunt 1 and 1/2; intersentence: cook 1/2 and 1/2, chef 0, 0
    assert metrics["stereotype_score_intrasentence"] == pytest.approx(0.75)
    assert metrics["lm_score_intrasentence"] == pytest.approx((0.75 + 0.5) / 2)
    assert metrics["icat_intrasentence"] == pytest.approx(0.625 * 0.25 / 0.5)
    assert metrics["stereotype_score_intersentence"] == pytest.approx(0.25)
    assert metrics["lm_score_intersentence"] == pytest.approx(0.25)
    profession = measured(STEREOSET, frame, "profession")
    assert profession["stereotype_score"] == pytest.approx((cook + 0) / 2)
    gender = measured(STEREOSET, frame, "gender")
    assert gender["stereotype_score"] == 1 and gender["icat"] == 0
    assert math.isnan(gender["lm_score_intersentence"])


def test_plain_scores_favour_short_sentences(tmp_path):
    metrics = measured(STEREOSET, rows(loaded(write(tmp_path)).items, by_hand))
    # whole log-probabilities: 0: -10 -4 -24; 1: -4 -9 -20; 2: -10 -5 -20; 3: -20 -9 -4;
    # 4: -2 -3 -8
    assert metrics["stereotype_score_total"] == pytest.approx((1 / 3 + 0 + 1) / 3)
    assert metrics["lm_score_total"] == pytest.approx((1 + 0 + 1) / 3)


@pytest.mark.parametrize(
    ("choose", "score", "lm", "icat"),
    [
        (lambda item: [-1.0, -90.0, -400.0], 1.0, 1.0, 0.0),  # always stereotyped
        (lambda item: [-90.0, -1.0, -400.0], 0.0, 1.0, 0.0),  # always against it
        (lambda item: [-20.0, -10.0, -40.0], 0.5, 0.5, 0.5),  # indifferent
        (lambda item: 2, 0.5, 0.0, 0.0),  # always the unrelated one
        (lambda item: 0, 1.0, 0.75, 0.0),  # anti and unrelated both impossible: equal
    ],
)
def test_synthetic_respondents(tmp_path, choose, score, lm, icat):
    items = loaded(write(tmp_path)).items
    assert {item.facts["type"] for item in items} == {"intrasentence", "intersentence"}
    metrics = measured(STEREOSET, rows(items, choose))
    for scope in ("", "_intrasentence", "_intersentence"):
        assert metrics[f"stereotype_score{scope}"] == score
        assert metrics[f"lm_score{scope}"] == lm
        assert metrics[f"icat{scope}"] == icat


def test_ideal_models_have_icat_one(tmp_path):
    records = [line("intrasentence", "cook", "profession", i) for i in range(4)]
    items = loaded(write(tmp_path, records)).items
    metrics = measured(
        STEREOSET,
        rows(
            items, lambda i: [-1.0, -90, -400] if "/0" in i.id or "/1" in i.id else [-90, -1, -400]
        ),
    )
    assert metrics["icat"] == 1 and metrics["stereotype_score"] == 0.5


def test_unparsed_items_are_counted_and_in_no_score(tmp_path):
    items = loaded(write(tmp_path)).items
    frame = rows(items, lambda i: None if i.cluster == "cook" else by_hand(i))
    metrics = measured(STEREOSET, frame)
    assert metrics["share_unparsed"] == pytest.approx(3 / 5)
    assert metrics["stereotype_score"] == pytest.approx((0 + 1) / 2)


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "word"}, "line 2: type must be .* not 'word'"),
        ({"unrelated": "  "}, "line 2: unrelated must be a non-empty"),
        ({"stereotype": 3}, "line 2: stereotype must be a non-empty"),
        (
            {"context": "No gap."},
            "line 2: context: an intrasentence item must contain the word BLANK",
        ),
        ({"unrelated": RECORDS[1]["stereotype"]}, "line 2: two of stereotype, .* same sentence"),
        ({"target": "chef", "bias_type": "race"}, "line 4: target 'chef' has bias_type"),
        ({"stereotype": "half \ud800."}, "line 2: stereotype contains half of a surrogate pair"),
        ({"context": "BLANK" * 2_000_000}, "line 2: longer than 1,000,000 bytes"),
        (dict(RECORDS[0]), r"line 2: this item appears twice.*dev\.jsonl, line 1"),
    ],
)
def test_bad_row_is_refused_with_its_line(tmp_path, changes, message):
    write(tmp_path, [RECORDS[0], RECORDS[1] | changes, *RECORDS[2:]])
    with pytest.raises(InputError, match=message):
        loaded(tmp_path)
    refused(tmp_path)


def test_missing_keys_are_named(tmp_path):
    for key in RECORDS[0]:
        write(tmp_path, [{name: text for name, text in RECORDS[0].items() if name != key}])
        assert f"line 1: key '{key}' is missing" in refused(tmp_path)


def test_damaged_files_are_refused(tmp_path):
    assert "no *.jsonl here; put the flat form" in refused(tmp_path)
    path = write(tmp_path) / "stereoset" / "dev.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert "line 5: not JSON" in refused(tmp_path) and "cut short" in refused(tmp_path)
    path.write_bytes(whole.replace(b"aunt", b"t\xeda", 1))
    assert "line 5: not UTF-8" in refused(tmp_path)
    path.write_bytes(b"\n\n")
    assert "are empty" in refused(tmp_path)
    path.write_bytes(b"[1, 2]\n")
    assert "line 1: each row must be one JSON object" in refused(tmp_path)
    path.write_bytes(b"[" * 100_000)
    assert "line 1: nested too deep" in refused(tmp_path)
    path.unlink()
    (path.parent / "dev.json").write_text('{"data": {}}')
    assert "not the nested dev.json" in refused(tmp_path)


# --- the real file, and a model ----------------------------------------------------------------


def test_published_counts():
    folder = published("stereoset")
    items = loaded(folder).items
    assert len(items) == 4_229 == len({item.id for item in items})
    assert Counter(item.facts["type"] for item in items) == {
        "intrasentence": 2_106,
        "intersentence": 2_123,
    }
    full = Counter(item.category for item in items)
    assert full == {"race": 1_938, "profession": 1_637, "gender": 497, "religion": 157}
    terms = Counter(category for category, _ in {(i.category, i.cluster) for i in items})
    assert terms == {"race": 36, "profession": 30, "gender": 10, "religion": 3}
    sample = loaded(folder, limit=400).items
    drawn = Counter(item.category for item in sample)
    assert len(sample) == 400
    assert all(abs(drawn[name] - count * 400 / 4_229) < 1 for name, count in full.items())
    assert len({item.cluster for item in sample}) == 79
    # The lengths for which the module takes means per character.
    lengths = [
        [i.facts[f"characters_{k}"] for k in range(3)]
        for i in items
        if i.facts["type"] == "intersentence"
    ]
    assert np.mean(lengths, axis=0) == pytest.approx([45, 49, 35], abs=0.5)


def test_tiny_model_from_plan_to_metrics(tmp_path):
    assert EXPERIMENTS["stereoset"] is STEREOSET
    conditions = ["Q", "Q+IF", "Q+IF+CoT", *STIMULI.controls]
    cells = measured_by_a_tiny_model(
        write(tmp_path), tmp_path / "out", "stereoset", conditions, style="plain"
    )
    assert list(cells) == conditions
    for frame, _ in cells.values():
        metrics = measured(STEREOSET, frame)
        preferred = {}
        for row in frame.itertuples():
            lengths = np.array([row.characters_0, row.characters_1, row.characters_2])
            stereotyped, anti, _ = np.array(row.logprobs) / lengths
            preferred.setdefault(row.cluster, []).append(stereotyped > anti)
        by_term = [np.mean(values) for values in preferred.values()]
        assert metrics["stereotype_score"] == pytest.approx(np.mean(by_term))
        assert metrics["share_unparsed"] == 0
