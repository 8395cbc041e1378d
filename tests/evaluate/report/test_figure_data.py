"""The data of the page's figures: points with the table's values, lines with the log's."""

import json

import numpy as np
import pandas as pd
import pytest

from selfcorrect.evaluate.experiments import EXPERIMENTS
from selfcorrect.evaluate.report.figure_data import (
    MOST_RAW_POINTS,
    figure_data,
    looks,
    training_data,
)
from selfcorrect.evaluate.results import results_of


@pytest.fixture(scope="module")
def results(recorded_run):
    return results_of(recorded_run, num_resamples=50)


def points(entry):
    """The points as a table, with names in place of their indices."""
    table = pd.DataFrame(entry["points"])
    for name, key in (("condition", "conditions"), ("category", "categories")):
        table[name] = [entry[key][index] for index in table[name]]
    table["metric"] = [entry["metrics"][index]["name"] for index in table["metric"]]
    table["model"] = [entry["jobs"][index]["model"] for index in table["job"]]
    return table


def test_points_have_the_values_of_the_table(results):
    frame, statistics = results
    data = figure_data(frame, statistics["effects"])
    assert [entry["name"] for entry in data] == ["bbq", "winogender", "law_school"]
    json.dumps(data, allow_nan=False)
    for entry in data:
        headline = EXPERIMENTS[entry["name"]].headline
        shown = points(entry)
        mine = shown[shown["metric"] == headline].astype({"value": float})
        theirs = frame[(frame["experiment"] == entry["name"]) & (frame["metric"] == headline)]
        keys = ["model", "step", "condition", "category"]
        both = mine.merge(theirs.astype({"step": int}), on=keys, suffixes=("", "_table"))
        assert len(both) == len(mine) == len(theirs)
        for name in ("value", "low", "high", "num_items", "num_clusters"):
            np.testing.assert_allclose(
                both[name].astype(float), both[f"{name}_table"].astype(float), atol=1e-5
            )


def test_points_of_effects(results):
    frame, statistics = results
    entry = figure_data(frame, statistics["effects"])[2]
    shown = points(entry)
    effects = shown[shown["metric"] == "effect"].set_index(["model", "step", "condition"])
    law = {"experiment": "law_school", "metric": "difference"}
    rows = [row for row in statistics["effects"] if law.items() <= row.items()]
    assert len(rows) == len(effects) == 2 * 3 * 2
    for row in rows:
        point = effects.loc[(row["model"], row["step"], row["condition"])]
        assert point["value"] == pytest.approx(row["value"], abs=1e-5)
        assert point["num_items"] == 20


def test_x_values(results):
    """Before the first update √KL is 0; there is no reward yet; below 0 there is no root."""
    frame, _ = results
    frame = frame.assign(kl=frame["kl"].where(frame["step"] != 2, -0.01))
    shown = points(figure_data(frame, [])[0])
    by_step = shown[shown["model"] == "small"].drop_duplicates("step").set_index("step")
    assert by_step.loc[0, "root_kl"] == 0 and np.isnan(by_step.loc[0, "reward"])
    assert np.isnan(by_step.loc[2, "root_kl"]) and by_step.loc[10, "root_kl"] > 0


def test_undefined_values_stay_undefined(results):
    frame, _ = results
    entry = figure_data(frame.assign(value=np.nan, low=np.nan, high=np.nan), [])[0]
    assert set(entry["points"]["value"]) == {None}
    assert [metric["name"] for metric in entry["metrics"]] == ["bias_ambiguous"]


def test_looks_differ():
    names = ["Q", "Q+IF", "Q+IF+CoT", "Match stats", "Q+neutral", "Q+inverted"]
    found = looks(names)
    assert set(found) == set(names)
    for key in ("color", "shape", "sign"):
        assert len({look[key] for look in found.values()}) == len(names)


def test_every_logged_step_counts_but_not_every_one_is_a_point():
    steps = np.arange(2 * MOST_RAW_POINTS)
    table = pd.DataFrame({"model": "m", "seed": "0", "step": steps, "reward": 1.0, "kl": 0.0})
    table.loc[1::2, "reward"] = 3.0  # the steps that are no points
    (line,) = training_data({"r": table})
    assert line["every"] == 2 and len(line["step"]) == MOST_RAW_POINTS
    assert set(line["reward"]) == {1} and line["smooth_reward"][100] == pytest.approx(2, abs=0.01)
    assert training_data({"r": table[:0]}) == []
