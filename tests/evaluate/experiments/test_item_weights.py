"""An item counts once, however often it was asked: in every experiment, metric and interval."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from selfcorrect.evaluate.experiments import EXPERIMENTS
from selfcorrect.evaluate.experiments.tally import average_items, sum_by_cluster
from selfcorrect.evaluate.experiments.wording import load_stimuli
from selfcorrect.evaluate.statistics.bootstrap import Draws, bootstrap
from tests.support import bbq_rows

OCCUPATIONS = {"clerk": 40, "smith": 3, "baker": 80, "pilot": 10}
TEMPLATES = [
    f"{job}\tguest\t0\tThe $OCCUPATION told the $PARTICIPANT that $NOM_PRONOUN {end}.\n"
    for job in OCCUPATIONS
    for end in ("was late", "could pay")
]
SENTENCES = [
    ("The clerk met [the developer] because [{}] was late.", "he", "she"),
    ("The developer met [the clerk] because [{}] was late.", "she", "he"),
    ("The nurse met [the developer] because [{}] was late.", "he", "she"),
]


def _winobias(side):
    return "".join(
        f"{number} {text.format(pronouns[side])}\n"
        for number, (text, *pronouns) in enumerate(SENTENCES, 1)
    )


FILES = {
    "winogender/templates.tsv": "occupation(0)\tother-participant(1)\tanswer\tsentence\n"
    + "".join(TEMPLATES),
    "winogender/occupations-stats.tsv": "occupation\tbls_pct_female\n"
    + "".join(f"{job}\t{share}\n" for job, share in OCCUPATIONS.items()),
    "law_school/law_data.csv": "race,sex,LSAT,UGPA\n"
    + "".join(f"White,{1 + i % 2},{30 + 2 * i},{2 + (i * i) % 7 / 5}\n" for i in range(8)),
    "crows_pairs/crows_pairs_anonymized.csv": ",sent_more,sent_less,stereo_antistereo,bias_type\n"
    + "".join(
        f"{i},They were {'s' * i}.,You were f.,{('stereo', 'antistereo')[i % 2]},age\n"
        for i in range(6)
    ),
    "stereoset/dev.jsonl": "".join(
        json.dumps(
            {
                "type": "intersentence" if i % 3 else "intrasentence",
                "target": f"job {i // 2}",
                "bias_type": "profession",
                "context": f"Was BLANK {i}?",
                "stereotype": "s" * (3 + i),
                "anti-stereotype": "a" * 5,
                "unrelated": "u" * (9 - i),
            }
        )
        + "\n"
        for i in range(7)
    ),
    "winogenerated/winogenerated_examples.jsonl": "".join(
        json.dumps(
            {
                "index": i,
                "occupation": job,
                "other_person": "guest",
                "pronoun_options": ["he", "she", "they"],
                "sentence_with_blank": f"The {job} told the guest that _ {('was', 'could')[i % 2]}",
                "BLS_percent_women_2019": OCCUPATIONS[job],
            }
        )
        + "\n"
        for i, job in enumerate([*OCCUPATIONS, *OCCUPATIONS, "clerk"])
    ),
    **{
        f"mbbq/Age{control}_{language}.jsonl": "".join(
            json.dumps(row) + "\n"
            for k in range(3)
            for row in bbq_rows.block(4 * k, template=k // 2)
        )
        for control in ("", "_control")
        for language in ("es", "tr")
    },
    "winobias/pro_stereotyped_type1.txt.dev": _winobias(0),
    "winobias/anti_stereotyped_type1.txt.dev": _winobias(1),
    "winobias/female_occupations.txt": "clerk\nnurse\n",
    "winobias/male_occupations.txt": "developer\n",
    "multiple_choice/own.jsonl": "".join(
        json.dumps(
            {
                "id": i,
                "question": "?",
                "options": ["x", "y", "z", "w"][: 2 + i % 3],
                "label": i % 2,
                "stereotyped": 0,
                "unknown": 1,
            }
        )
        + "\n"
        for i in range(7)
    ),
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    records = [row for k in range(5) for row in bbq_rows.block(4 * k, template=k // 2)]
    return bbq_rows.write(folder, records)


def asked(item, rng):
    """Return one row with random scores of an item, shown in a random order."""
    order = rng.permutation(len(item.options))
    logprobs = np.log(rng.dirichlet(np.ones(len(order) + 1))[1:])
    return {
        "item": item.id,
        "cluster": item.cluster,
        "category": item.category,
        "weight": item.weight,
        "order": "".join(map(str, order)),
        "logprobs": logprobs,
        "mass": float(np.exp(logprobs).sum()),
        **item.facts,
    }


def metrics_and_intervals(experiment, rows):
    tally = experiment.tally(pd.DataFrame(rows))
    estimates = bootstrap(tally, experiment.compute, draws=Draws(50)).estimates["overall"]
    return {
        f"{name} {end}": getattr(estimate, end)
        for name, estimate in estimates.items()
        for end in ("value", "low", "high")
    }


def loaded(name, data_dir):
    section = load_stimuli().section(name)
    return EXPERIMENTS[name].load(data_dir, section, None, 0).items


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_repeating_an_item_changes_no_metric_and_no_interval(name, data_dir):
    rng = np.random.default_rng(0)
    once = [asked(item, rng) for item in loaded(name, data_dir)]
    often = [row for i, row in enumerate(once) for _ in range(1 + i % 4)]
    rng.shuffle(often)
    expected = metrics_and_intervals(EXPERIMENTS[name], once)
    assert sum(not math.isnan(value) for value in expected.values()) > 5
    got = metrics_and_intervals(EXPERIMENTS[name], often)
    assert got == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_unanswered_rows_of_an_answered_item_change_only_their_share(name, data_dir):
    rng = np.random.default_rng(1)
    once = [asked(item, rng) for item in loaded(name, data_dir)]
    unanswered = [
        row | {"logprobs": np.full(len(row["logprobs"]), fill), "mass": np.nan}
        for i, row in enumerate(once)
        for fill in [np.nan, -math.inf][: i % 3]
    ]
    experiment = EXPERIMENTS[name]
    expected = metrics_and_intervals(experiment, once)
    got = metrics_and_intervals(experiment, [*unanswered, *once])
    shares = {key: value for key, value in got.items() if "share_unparsed" in key}
    assert got | dict.fromkeys(shares) == pytest.approx(
        expected | dict.fromkeys(shares), nan_ok=True
    )
    if shares:
        by_item = [1 - 1 / (1 + i % 3) for i in range(len(once))]
        assert shares["share_unparsed value"] == pytest.approx(np.mean(by_item))


@pytest.mark.parametrize("name", ["bbq", "multiple_choice", "crows_pairs"])
def test_share_is_the_mean_over_items_of_their_mean_answers(name, data_dir):
    """By hand: rows are averaged by item first, and items then weigh the same."""
    rng = np.random.default_rng(2)
    rows = [
        asked(item, rng) for i, item in enumerate(loaded(name, data_dir)) for _ in range(1 + i % 4)
    ]
    frame = pd.DataFrame(rows)
    right = [
        float(int(row.order[int(np.argmax(row.logprobs))]) == getattr(row, "label", 0))
        for row in frame.assign(
            order=frame["order"] if name != "crows_pairs" else "01"
        ).itertuples()
    ]
    by_item = frame.assign(right=right).groupby("item")["right"].mean()
    metrics = metrics_and_intervals(EXPERIMENTS[name], rows)
    if name == "bbq":
        ambiguous = frame.groupby("item")["context"].first() == "ambiguous"
        assert metrics["accuracy_ambiguous value"] == pytest.approx(by_item[ambiguous].mean())
        assert metrics["accuracy_disambiguated value"] == pytest.approx(by_item[~ambiguous].mean())
    else:
        headline = EXPERIMENTS[name].headline
        assert metrics[f"{headline} value"] == pytest.approx(by_item.mean())
        assert by_item.mean() != pytest.approx(np.mean(right))


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != "multiple_choice"])
def test_cells_added_up_together_are_the_same_as_alone(name, data_dir):
    """Multiple choice is left out: its items differ in their number of options."""
    experiment, rng = EXPERIMENTS[name], np.random.default_rng(3)
    rows = [asked(item, rng) for item in loaded(name, data_dir) for _ in range(2)]
    asked_rows = pd.DataFrame(rows).drop(columns=["logprobs", "mass"])
    answers = np.log(rng.dirichlet(np.ones(len(rows[0]["logprobs"])), (3, len(rows))))
    answers[1, ::3] = np.nan
    answers[2, 1::5] = -math.inf
    mass = np.exp(answers).sum(axis=-1)
    together = experiment.tally_together(asked_rows, answers, mass)
    for tally, logprobs, of_cell in zip(together, answers, mass, strict=True):
        alone = experiment.tally(asked_rows.assign(logprobs=list(logprobs), mass=of_cell))
        assert alone.clusters == tally.clusters and list(alone.sums) == list(tally.sums)
        for key, values in alone.sums.items():
            assert tally.sums[key] == pytest.approx(values), key


def test_sums_refuse_items_that_would_count_twice():
    frame = pd.DataFrame({"item": ["a", "a", "b"], "category": "c", "cluster": ["1", "1", "2"]})
    values = {"x": np.array([1.0, np.nan, 3.0]), "y": np.array([True, False, True])}
    with pytest.raises(ValueError, match="call average_items first"):
        sum_by_cluster(frame, values)
    items, means = average_items(frame, values)
    assert list(items["item"]) == ["a", "b"]
    assert list(means["x"]) == [1, 3] and list(means["y"]) == [0.5, 1]
