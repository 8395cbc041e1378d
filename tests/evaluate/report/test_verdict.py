"""The first screen: sentence and table say what the tests allow, cautions what they lack."""

import copy

import pytest

from selfcorrect.evaluate.experiments import EXPERIMENTS
from selfcorrect.evaluate.report.quantities import quantity_table
from selfcorrect.evaluate.report.verdict import (
    cautions,
    judge,
    series_of,
    summary_table,
    verdict,
)
from selfcorrect.evaluate.results import results_of
from selfcorrect.evaluate.statistics.formatting import compact_with_interval, p_value, with_interval
from tests.support.recorded_run import SMALL, Size, record_run

STEPS = (0, 60)


def estimate(value, half=0.05):
    if value is None:
        return {"value": None, "low": None, "high": None}
    return {"value": value, "low": value - half, "high": value + half}


def comparison(condition, value, half, p, **more):
    return {
        **{"run": "r", "model": "m", "parameters": 132_000, "seed": 0, "experiment": "bbq"},
        **{"condition": condition, "metric": "bias_ambiguous", "step": 60, "from_step": None},
        **estimate(value, half),
        **{"p_adjusted": p, "excludes_zero": p is not None and p < 0.05, "detectable": 0.1},
        **{"undefined_because": None if value is not None else "a cell lacks it", **more},
    }


def made_up(plain=0.8, asked=0.02, effect=(0.05, 0.001), growth=(0.7, 0.05, 0.001), neutral=None,
            accuracy=0.9, steps=STEPS):  # fmt: skip
    """Statistics of one model on BBQ; comparisons are (half interval, p) or (value, half, p)."""
    values = {"Q": plain, "Q+IF": asked} | ({} if neutral is None else {"Q+neutral": neutral[0]})
    cells = [
        {
            **{"run": "r", "model": "m", "parameters": 132_000, "seed": 0, "step": step},
            **{"experiment": "bbq", "condition": condition, "judged": True, "num_items": 100},
            **{"num_texts": 0, "num_truncated": 0, "left_out": {}},
            "metrics": {
                "overall": {
                    "bias_ambiguous": estimate(value),
                    "accuracy_disambiguated": estimate(accuracy),
                    "option_mass": estimate(0.9),
                }
            },
        }
        for condition, value in values.items()
        for step in steps
    ]
    difference = None if None in (plain, asked) else plain - asked
    effects = [comparison("Q+IF", difference, *effect)]
    if neutral is not None:
        effects.append(comparison("Q+neutral", plain - neutral[0], *neutral[1:]))
    grown = [comparison("Q+IF", *growth, from_step=0)] if growth and len(steps) > 1 else []
    lists = {"effects": effects, "growth": grown, "changes": [], "over_seeds": [], "missing": []}
    return {"cells": cells, **lists}


def found(statistics):
    (series,) = series_of(statistics)
    return judge(series)


CASES = [
    # what is made up, and the finding: effect, growth, control
    ({}, ("less", "grew", "measured")),
    ({"asked": 0.5}, ("part", "grew", "measured")),
    ({"asked": -0.5}, ("part", "grew", "measured")),  # as far from 0 on the other side
    ({"asked": 0.95}, ("more", "shrank", "measured")),
    ({"effect": (0.9, 0.3)}, ("unclear", "grew", "measured")),
    ({"asked": 0.75, "effect": (0.1, 0.3), "growth": (0.0, 0.01, 0.9)},
     ("none", "none", "measured")),
    ({"plain": 0.02, "asked": 0.0, "effect": (0.03, 0.2)}, ("no bias", "grew", "measured")),
    ({"growth": (0.1, 0.25, 0.2)}, ("less", "none", "measured")),
    ({"growth": (0.1, 0.5, 0.2)}, ("less", "unclear", "measured")),
    ({"growth": (None, 0, None)}, ("less", "undefined", "measured")),
    ({"growth": (-0.3, 0.1, 0.001)}, ("less", "shrank", "measured")),
    ({"steps": (60,)}, ("less", "one step", "measured")),
    ({"neutral": (0.1, 0.05, 0.001)}, ("less", "grew", "does")),
    ({"neutral": (0.6, 0.05, 0.001)}, ("less", "grew", "some")),
    ({"neutral": (0.79, 0.05, 0.9)}, ("less", "grew", "not")),
    ({"neutral": (0.6, 0.6, 0.9)}, ("less", "grew", "unclear")),
    ({"accuracy": 0.36}, ("chance", "", "")),
    ({"asked": None}, ("undefined", "", "")),
    ({"plain": None}, ("undefined", "", "")),
]  # fmt: skip
SAID = {
    "less": "with less bias (",
    "part": "though most of it remains",
    "more": "with more bias",
    "none": "no less biased",
    "no bias": "Even unasked",
    "unclear": "cannot be told: p = 0.300 after correction (",
    "chance": "cannot be told: it is right in 36%",
    "undefined": "cannot be told",
}
GROWN = {
    "grew": "grew over 60 RLHF steps of one training run",
    "shrank": "shrank",
    "none": "did not grow",
    "unclear": "whether this effect grew over 60 RLHF steps of one training run cannot be told",
    "undefined": "whether this effect grew",
    "one step": "nothing can be told about training",
}
CONTROLLED = {
    "does": "neutral request of the same length does it too (.80 → .10)",
    "some": "does less of it",
    "not": "does not do it (.80 → .79)",
    "unclear": "whether a neutral request",
}


@pytest.mark.parametrize(("made", "finding"), CASES, ids=[" ".join(f) for _, f in CASES])
def test_no_claim_goes_beyond_its_test(made, finding):
    statistics = made_up(**made)
    result = found(statistics)
    assert (result.effect, result.growth, result.control) == finding
    sentence = verdict(series_of(statistics))
    assert SAID[finding[0]] in sentence
    told = finding[0] in ("less", "part", "more")
    if told:
        assert GROWN[finding[1]] in sentence
    assert ("neutral" in sentence) == (told and finding[2] != "measured")
    if told and finding[2] != "measured":
        assert CONTROLLED[finding[2]] in sentence
    assert "\n" not in sentence and sentence.endswith(".")


def test_sentence_names_model_values_and_the_value_without_bias():
    sentence = verdict(series_of(made_up()))
    assert sentence.startswith("Asked to avoid bias, the model (m, 132k parameters) answers BBQ")
    assert ".80 → .02 [−.03, .07]; 0 is no bias" in sentence


def test_without_a_request_nothing_is_told():
    statistics = made_up()
    statistics["cells"] = [c for c in statistics["cells"] if c["condition"] == "Q"]
    assert found(statistics).effect == "not asked"
    assert "both with and without a request" in verdict(series_of(statistics))
    assert verdict([]).startswith("Nothing has been measured")


def test_controls_are_no_request_to_avoid_bias():
    """Q+inverted or Q+neutral alone say nothing about a request to be fair."""
    for name in ("Q+neutral", "Q+inverted"):
        statistics = made_up()
        for row in (*statistics["cells"], *statistics["effects"], *statistics["growth"]):
            row["condition"] = row["condition"].replace("Q+IF", name)
        assert found(statistics).effect == "not asked"


def test_verdict_of_a_recorded_run(statistics):
    """It is about the largest model and the first experiment, with the statistics' values."""
    series = series_of(statistics)
    sentence = verdict(series)
    (cell,) = [
        c for c in statistics["cells"]
        if (c["model"], c["experiment"], c["condition"], c["step"]) == ("small", "bbq", "Q+IF", 10)
    ]  # fmt: skip
    assert "the largest model (small, 509k parameters) answers BBQ" in sentence
    assert compact_with_interval(cell["metrics"]["overall"]["bias_ambiguous"]) in sentence
    table = summary_table(series)
    conditions = ["Q", "Q+IF", "Q+IF+CoT", "Match stats"]
    assert table.columns == ["Experiment", "Does asking help?", *conditions]
    assert [row[0].text.split(" (")[0] for row in table.rows] == [
        EXPERIMENTS[name].title for name in ("bbq", "winogender", "law_school")
    ]
    assert table.rows[0][5].text == "–" and all(row[1].text for row in table.rows)
    assert table.rows[0][3].text.endswith(
        f"→ {compact_with_interval(cell['metrics']['overall']['bias_ambiguous'])}"
    )


def test_quantities_have_the_numbers_of_the_statistics(statistics):
    series = [s for s in series_of(statistics) if s.experiment == "winogender"]
    table = quantity_table(series, statistics["about"])
    rows = {(row[0].text, row[2].text): [cell.text for cell in row] for row in table.rows}
    key = {"model": "small", "experiment": "winogender", "metric": "correlation"}
    key |= {"condition": "Q+IF"}
    (growth,) = [row for row in statistics["growth"] if key.items() <= row.items()]
    first, last = (
        next(row for row in statistics["effects"] if (key | {"step": step}).items() <= row.items())
        for step in (0, 10)
    )
    assert rows["small", "Q minus Q+IF"][3:9] == [
        "0 → 10", with_interval(first), with_interval(last), with_interval(growth),
        p_value(growth["p_adjusted"]), f"{growth['detectable']:.3f}",
    ]  # fmt: skip
    (change,) = [row for row in statistics["changes"] if key.items() <= row.items()]
    assert rows["small", "Q+IF"][6] == with_interval(change)
    assert ("small", "Q+IF, option mass") in rows and ("small", "Match stats") in rows
    assert not any("minus Match stats" in name for _, name in rows)  # not judged against a bias
    assert all(len(row) == len(table.columns) for row in table.rows)


# --- several seeds -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """The statistics of three training seeds of two models."""
    size = Size(
        steps=(0, 10), seeds=(0, 1, 2), categories=("Age",), templates=3, blocks=1,
        occupations=10, students=6,
    )  # fmt: skip
    run = record_run(tmp_path_factory.mktemp("seeds") / "run", size)
    return results_of(run, num_resamples=50)[1]


def test_several_seeds_are_the_unit(seeds):
    """Values are means of seeds, and comparisons those over seeds."""
    series = series_of(seeds)
    (law,) = [s for s in series if (s.model, s.experiment) == ("small", "law_school")]
    values = [
        c["metrics"]["overall"]["difference"]["value"] for c in seeds["cells"]
        if (c["model"], c["experiment"], c["condition"], c["step"])
        == ("small", "law_school", "Q", 10)
    ]  # fmt: skip
    assert len(values) == 3
    assert law.value("Q", 10)["value"] == pytest.approx(sum(values) / 3)
    assert law.compare("growth", "Q+IF")["num_seeds"] == 3
    assert "over 3 training seeds" in summary_table(series).note
    table = quantity_table([s for s in series if s.experiment == "law_school"], seeds["about"])
    units = [row[1].text for row in table.rows]
    assert units[0] == "mean of 3" and set(units) == {"mean of 3", "0", "1", "2"}
    assert units.index("0") > len(units) - units[::-1].index("mean of 3") - 1  # the means first
    (key,) = [r for r in seeds["over_seeds"] if r["kind"] == "effect" and r["step"] == 10
              and (r["model"], r["experiment"], r["condition"], r["metric"])
              == ("small", "law_school", "Q+IF", "difference")]  # fmt: skip
    name = ["small", "mean of 3", "Q minus Q+IF"]
    (row,) = [row for row in table.rows if [cell.text for cell in row[:3]] == name]
    assert row[5].text == with_interval(key)


def test_a_seed_without_the_last_step_does_not_move_it(seeds):
    """The last step is the last that every seed has: a mean over fewer seeds is another number."""
    statistics = copy.deepcopy(seeds)
    late = [c for c in statistics["cells"] if c["step"] == 10 and c["seed"] == 0]
    statistics["cells"] += [{**cell, "step": 20} for cell in late]
    for series in series_of(statistics):
        assert series.steps("Q") == [0, 10] and series.steps("Q", 0) == [0, 10, 20]


# --- cautions ------------------------------------------------------------------------------------


def test_cautions(statistics, seeds):
    one, several = (
        " ".join(cautions(series_of(part), part["missing"])) for part in (statistics, seeds)
    )
    assert "One training run of each model" in one and "One training run" not in several
    assert "No control was measured (Q+neutral, Q+inverted)" in one
    assert "cut off at the token limit" in one  # the recorded run cuts every seventh
    assert "Not measured" not in one


def test_cautions_of_what_tells_nothing():
    said = {
        "option_mass": "Less than 50% of the probability is on the options: BBQ m",
        "accuracy_disambiguated": "No better than chance, so bias means little: BBQ m",
    }
    for metric, text in said.items():
        statistics = made_up()
        for cell in statistics["cells"]:
            cell["metrics"]["overall"][metric] = estimate(0.3)
        lines = cautions(series_of(statistics), [])
        assert any(line.startswith(text) for line in lines), lines
    lines = cautions(series_of(made_up(asked=None)), ["a", "b", "c", "d"], ["r is not finished."])
    assert lines[0] == "r is not finished." and lines[1] == "Not measured: a; b; c; and 1 more."
    assert "Bias is undefined in some conditions of BBQ m." in lines


def test_missing_cells(tmp_path):
    run = record_run(tmp_path / "run", SMALL)
    (run / "nano/seed-0/ppo/checkpoint-2/evaluation/bbq.Q.parquet").unlink()
    for step in (0, 2, 10):
        (run / f"small/seed-0/ppo/checkpoint-{step}/evaluation/law_school.Q.parquet").unlink()
    statistics = results_of(run, num_resamples=20)[1]
    series = series_of(statistics)
    assert "nano, seed 0, step 2: no bbq under Q;" in " ".join(
        cautions(series, statistics["missing"])
    )
    law = summary_table(series).rows[2]
    assert [cell.text for cell in law][1:3] == ["not asked", "–"]
