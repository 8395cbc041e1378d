"""From parquet files to the tidy table, the statistics, and single items."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from selfcorrect.evaluate.experiments import EXPERIMENTS
from selfcorrect.evaluate.experiments.bbq import BBQ
from selfcorrect.evaluate.results import (
    COLUMNS,
    ITEM_FACTS,
    items_dataset,
    load,
    load_items,
    results_of,
    rows,
    summarise,
    write_items,
    write_results,
)
from selfcorrect.evaluate.statistics.bootstrap import Draws
from selfcorrect.evaluate.statistics.cells import evaluated_cells
from selfcorrect.evaluate.statistics.files import read_statistics, write_statistics
from selfcorrect.evaluate.statistics.summary import compare_cells
from selfcorrect.recipes.foundation.errors import InputError
from tests.support import ROOT
from tests.support.recorded_run import CONDITIONS, Size, record_cell, record_run

SMALL = Size(steps=(0, 2, 10), templates=5, blocks=1, occupations=10, students=12)
CHECKPOINT = "nano/seed-0/ppo/checkpoint-2"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record_run(tmp_path_factory.mktemp("results") / "recorded", SMALL)


@pytest.fixture(scope="module")
def results(run):
    return write_results(run, num_resamples=200)


@pytest.fixture(scope="module")
def statistics(results):
    return results[1]


@pytest.fixture(scope="module")
def frame(results):
    return results[0]


def test_table_columns_and_cells(run, frame):
    pd.testing.assert_frame_equal(load(run, num_resamples=200), frame)
    assert list(frame.columns) == list(COLUMNS)
    overall = frame[frame["category"] == "overall"]
    cells = overall.groupby(["model", "step", "experiment", "condition"]).ngroups
    assert cells == 2 * 3 * sum(len(conditions) for conditions in CONDITIONS.values())
    assert set(frame["run"]) == {"recorded"}
    at_two = frame[(frame["model"] == "nano") & (frame["step"] == 2)]
    assert set(at_two["parameters"]) == {8192}
    assert set(at_two["episodes"]) == {128}
    assert at_two["kl"].unique() == pytest.approx([0.4 * np.log1p(2)])
    assert frame.loc[frame["step"] == 0, "kl"].isna().all()


def test_values_and_counts_against_the_experiment(run, frame):
    """Values are the experiment's own, and counts are of the pooled categories."""
    path = run / CHECKPOINT / "evaluation" / "bbq.Q.parquet"
    rows = pq.read_table(path).to_pandas()
    kept = BBQ.tally(rows[rows["category"].isin(["Age", "Religion"])])
    by_hand = BBQ.compute({name: sums.sum(keepdims=True) for name, sums in kept.sums.items()})
    mine = frame[
        (frame["model"] == "nano")
        & (frame["step"] == 2)
        & (frame["experiment"] == "bbq")
        & (frame["condition"] == "Q")
    ].set_index(["category", "metric"])
    overall = mine.loc["overall"]
    for metric in ("accuracy_ambiguous", "bias_ambiguous", "expected_bias_ambiguous"):
        assert overall.loc[metric, "value"] == pytest.approx(by_hand[metric][0])
        low, high = overall.loc[metric, "low"], overall.loc[metric, "high"]
        assert low <= overall.loc[metric, "value"] <= high
    assert overall.loc["bias_ambiguous", "num_items"] == 2 * 5 * 4  # the crossed category apart
    assert overall.loc["bias_ambiguous", "num_clusters"] == 10
    assert mine.loc[("Race_x_gender", "bias_ambiguous"), "num_items"] == 20


def test_written_results_repeat_bitwise(run, frame, statistics):
    pd.testing.assert_frame_equal(pd.read_parquet(run / "results.parquet"), frame)
    metadata = pq.ParquetFile(run / "results.parquet").metadata.row_group(0)
    assert metadata.column(0).compression == "ZSTD"
    first = (run / "statistics.json").read_bytes()
    assert read_statistics(run / "statistics.json") == statistics
    write_results(run, num_resamples=200)
    assert (run / "statistics.json").read_bytes() == first
    assert statistics["about"]["num_resamples"] == 200
    assert statistics["missing"] == []


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_statistics_hold_no_number_that_json_lacks(tmp_path, number):
    path = tmp_path / "statistics.json"
    content = {"rows": [{"run": "NaN, Infinity \u00e9", "low": 1e-300, "high": 0.1 + 0.2}]}
    write_statistics(path, content)
    assert read_statistics(path) == content == {"rows": json.loads(path.read_bytes())["rows"]}
    content["rows"].append({"run": "a", "low": number, "high": None})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_statistics(path, content)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_resamples_are_kept_of_headline_metrics_alone(run):
    cells, _ = compare_cells(evaluated_cells(run, Draws(20)))
    kept = {(cell.experiment, name) for cell in cells for name in cell.bootstrap.replicates.metrics}
    headlines = {(name, EXPERIMENTS[name].headline) for name in CONDITIONS}
    assert headlines <= kept <= headlines | {(name, f"expected_{m}") for name, m in headlines}


def test_growth_follows_from_the_cells(statistics):
    value = {
        (cell["model"], cell["step"], cell["condition"]): cell["metrics"]["overall"]["correlation"]
        for cell in statistics["cells"]
        if cell["experiment"] == "winogender"
    }
    (growth,) = [
        row
        for row in statistics["growth"]
        if (row["model"], row["metric"], row["condition"]) == ("small", "correlation", "Q+IF")
    ]
    first, last = (
        value["small", step, "Q"]["value"] - value["small", step, "Q+IF"]["value"]
        for step in (0, 10)
    )
    assert growth["value"] == pytest.approx(last - first)
    assert (growth["from_step"], growth["step"]) == (0, 10)
    assert growth["excludes_zero"] == (growth["low"] > 0 or growth["high"] < 0)


def test_damaged_evaluation_file(tmp_path):
    run = record_run(tmp_path / "run", Size(steps=(0, 2), templates=2, blocks=1))
    path = run / CHECKPOINT / "evaluation" / "bbq.Q.parquet"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"bbq\.Q\.parquet: damaged.*delete it and run"):
        load(run)
    path.write_bytes(path.read_bytes()[:0])
    with pytest.raises(InputError, match="damaged"):
        load_items(run)


def test_run_without_evaluations(tmp_path):
    """Nothing is written, and older results stay."""
    run = record_run(tmp_path / "run", Size(steps=(0,), templates=2, blocks=1))
    (run / "results.parquet").write_text("older")
    for path in run.rglob("evaluation/*.parquet"):
        path.unlink()
    with pytest.raises(InputError, match="no checkpoint has been evaluated"):
        write_results(run)
    assert (run / "results.parquet").read_text() == "older"
    with pytest.raises(InputError, match="not a run folder"):
        load(tmp_path)


def test_missing_cells(tmp_path):
    run = record_run(tmp_path / "run", Size(steps=(0, 2), templates=2, blocks=1))
    (run / CHECKPOINT / "evaluation" / "law_school.Q+IF.parquet").unlink()
    for path in (run / "small/seed-0/ppo/checkpoint-2/evaluation").iterdir():
        path.unlink()
    _, statistics = write_results(run, num_resamples=20)
    assert statistics["missing"] == [
        "nano, seed 0, step 2: no law_school under Q+IF",
        "small, seed 0, step 2: not evaluated",
    ]


def test_conditions_on_different_items(tmp_path):
    run = record_run(tmp_path / "run", Size(steps=(0, 2), templates=3, blocks=1))
    other = Size(templates=2, blocks=1)
    record_cell(run / CHECKPOINT / "evaluation", "bbq", "Q+IF", 0.1, other)
    _, statistics = write_results(run, num_resamples=20)
    (effect,) = [
        row
        for row in statistics["effects"]
        if (row["model"], row["step"], row["metric"], row["condition"])
        == ("nano", 2, "bias_ambiguous", "Q+IF")
    ]
    assert effect["value"] is None
    assert "different items" in effect["undefined_because"]


def test_load_items_rows_and_columns(run, statistics):
    items = load_items(run, experiment="bbq", condition="Q+IF+CoT", columns=["item", "samples"])
    assert len(items) == 2 * 3 * 60
    assert list(items.columns) == [
        "run", "model", "seed", "step", "experiment", "condition", "item", "samples",
    ]  # fmt: skip
    texts = {
        cell["condition"]: (cell["num_texts"], cell["num_truncated"])
        for cell in statistics["cells"]
        if cell["experiment"] == "bbq"
    }
    assert texts == {"Q": (0, 0), "Q+IF": (0, 0), "Q+IF+CoT": (60, 9)}  # every seventh is cut
    everything = load_items(run)
    assert {"percent_female", "stereotyped", "side", "logprobs"} <= set(everything.columns)
    assert everything.loc[everything["experiment"] == "bbq", "percent_female"].isna().all()


def ask_in_two_orders(path):
    """Add each row of an evaluation file once more, as if its options had been shown as 1, 2, 0."""
    table = pq.read_table(path)
    turned = []
    for row in table.to_pylist():
        for name in ("logprobs", "probabilities"):
            row[name] = [row[name][i] for i in (1, 2, 0)]
        turned.append({**row, "order": "120"})
    both = pa.concat_tables([table, pa.Table.from_pylist(turned, schema=table.schema)])
    pq.write_table(both.replace_schema_metadata(table.schema.metadata), path)


def test_runs_of_the_same_name_are_refused(run, tmp_path):
    """The column `run` could not tell them apart, and their rows would be averaged as one run's."""
    again = shutil.copytree(run, tmp_path / "elsewhere" / run.name)
    for read in (load, results_of, items_dataset):
        for second in (again, Path(f"{run}/")):
            with pytest.raises(InputError, match=f"has the name of {re.escape(str(run))}"):
                read(run, second)


def test_orders_of_the_options(tmp_path):
    """Each order has a row beside the row of all orders."""
    folder = tmp_path / "model"
    ask_in_two_orders(record_cell(folder, "bbq", "Q", 0.6, SMALL))
    record_cell(folder, "bbq", "Q+IF", 0.3, SMALL)
    record_cell(folder, "winogender", "Q", 0.3, SMALL)
    frame = summarise(folder, "m", num_resamples=50)
    frame = frame[frame["category"] == "overall"].set_index(["experiment", "condition", "metric"])
    asked = frame.loc[("bbq", "Q", "bias_ambiguous")].set_index("order")
    assert list(asked.index) == ["all", "012", "120"]
    # The same answers in another order: the same bias, at other places.
    assert asked.loc["120", "value"] == pytest.approx(asked.loc["all", "value"])
    assert list(asked["num_items"]) == [40, 40, 40]  # an item counts once
    assert list(asked["num_clusters"]) == [10, 10, 10]
    first = frame.loc[("bbq", "Q", "share_option_0")].set_index("order")["value"]
    third = frame.loc[("bbq", "Q", "share_option_2")].set_index("order")["value"]
    assert first["012"] == pytest.approx(third["120"])
    assert first["012"] != pytest.approx(first["120"])
    assert first["all"] == pytest.approx((first["012"] + first["120"]) / 2)
    # One order only: one row.
    assert frame.loc[("bbq", "Q+IF", "bias_ambiguous"), "order"] == "all"
    assert frame.loc[("winogender", "Q", "correlation"), "order"] == "all"


def test_questions_of_different_length_are_one_order(tmp_path):
    """Two questions of three and of two options: their orders differ, though each has one."""
    path = record_cell(tmp_path, "bbq", "Q", 0.6, SMALL)
    table = pq.read_table(path)
    choices = [
        {"item": row["item"], "cluster": row["cluster"], "category": row["category"], "weight": 1.0,
         "order": "012"[:count], "options": ["a", "b", "c"][:count], "mass": 0.9, "draw": 0,
         "logprobs": row["logprobs"][:count], "probabilities": row["probabilities"][:count],
         "samples": None, "truncated": None, "label": 0, "stereotyped": None, "unknown": None}
        for number, row in enumerate(table.to_pylist())
        for count in [3 - number % 2]
    ]  # fmt: skip
    said = json.dumps({"experiment": "multiple_choice", "condition": "Q", "left_out": {}})
    own = pa.Table.from_pylist(choices).replace_schema_metadata({b"selfcorrect": said})
    path.unlink()
    pq.write_table(own, tmp_path / "multiple_choice.Q.parquet")
    assert set(summarise(tmp_path, "m", num_resamples=20)["order"]) == {"all"}


def test_items_dataset_opens_only_filtered_files(tmp_path):
    run = record_run(tmp_path / "run", SMALL)
    dataset = items_dataset(run)
    assert dataset.schema.names[: len(ITEM_FACTS)] == [field.name for field in ITEM_FACTS]
    # Every other file may be gone by now: it is never opened.
    kept = run / CHECKPOINT / "evaluation" / "bbq.Q+IF.parquet"
    for path in run.rglob("evaluation/*.parquet"):
        if path != kept:
            path.unlink()
    wanted = (
        (pc.field("step") == 2)
        & (pc.field("model") == "nano")
        & (pc.field("experiment") == "bbq")
        & (pc.field("condition") == "Q+IF")
    )
    table = dataset.to_table(columns=["step", "item", "percent_female"], filter=wanted)
    assert table.num_rows == 60
    assert table.column("step").to_pylist() == [2] * 60
    assert table.column("percent_female").null_count == 60  # a column of Winogender
    assert table.column("item").to_pylist() == pq.read_table(kept).column("item").to_pylist()
    with pytest.raises(OSError):
        dataset.to_table(columns=["item"])
    with pytest.raises(InputError, match="nothing evaluated law_school under Q"):
        items_dataset(run, experiment="law_school", condition="Q")


def test_file_damaged_in_its_rows(tmp_path):
    run = record_run(tmp_path / "run", Size(steps=(0, 2), templates=2, blocks=1))
    path = run / CHECKPOINT / "evaluation" / "bbq.Q.parquet"
    content = bytearray(path.read_bytes())
    content[4:400] = bytes(396)  # the footer stays as it was
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged") as caught:
        load_items(run)
    assert "\n" not in str(caught.value)


def test_files_are_readable_by_other_tools(run, frame, tmp_path):
    number = write_items(tmp_path / "items.parquet", run, experiment="bbq")
    for path in (tmp_path / "items.parquet", run / "results.parquet"):
        for field in pq.read_schema(path):
            kind = field.type
            if pa.types.is_list(kind):
                kind = kind.value_type
            plain = pa.types.is_string(kind) or pa.types.is_large_string(kind)
            plain = plain or pa.types.is_primitive(kind) or pa.types.is_null(kind)
            assert plain and not field.name.startswith("__index"), field
    assert number == pq.read_metadata(tmp_path / "items.parquet").num_rows == 2 * 3 * 3 * 60
    duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed")
    answer = duckdb.sql(
        f"select count(*), count(distinct item), min(logprobs[1]) "
        f"from '{tmp_path / 'items.parquet'}' where step = 10 and condition = 'Q'"
    ).fetchall()[0]
    assert answer[:2] == (2 * 60, 60)
    assert answer[2] < 0
    named = duckdb.sql(f"select distinct model from '{run / 'results.parquet'}'").fetchall()
    assert {name for (name,) in named} == {"nano", "small"}
    dataset = items_dataset(run)  # and straight from the dataset, with the filter pushed down
    assert duckdb.sql("select count(*) from dataset where step = 10").fetchall()[0] == (
        dataset.count_rows(filter=pc.field("step") == 10),
    )


def test_threshold_not_reached_is_infinity(statistics):
    frame = rows(statistics, "thresholds")
    said = [row["value"] for row in statistics["thresholds"]]
    assert "not reached" in said
    assert [value == "not reached" for value in said] == list(np.isinf(frame["value"]))
    assert frame[["value", "low", "high", "share_reached"]].dtypes.eq(float).all()
    assert rows({"thresholds": []}, "thresholds").empty


def test_several_runs(tmp_path):
    size = Size(
        models=(("m", 1000),), steps=(0, 2), templates=3, blocks=1, occupations=6, students=5
    )
    run, other = (record_run(tmp_path / name, size) for name in ("recorded", "other"))
    frame, statistics = results_of(run, other, num_resamples=20)
    assert list(dict.fromkeys(frame["run"])) == ["recorded", "other"]
    for name in ("cells", "effects", "growth", "trends", "thresholds", "side_by_side"):
        assert {row["run"] for row in statistics[name]} == {"recorded", "other"}
    # Tests are corrected within a run: what else is in the table changes no p-value.
    alone = results_of(run, num_resamples=20)[1]
    mine = [row for row in statistics["trends"] if row["run"] == "recorded"]
    assert mine == alone["trends"]
    assert set(load(run, other, num_resamples=20)["run"]) == {"recorded", "other"}


def test_families_and_corrected_p_values(statistics):
    growth = rows(statistics, "growth")
    headline = growth[growth["family"].notna()]
    assert set(headline["family"]) == {"growth, over items"}
    assert set(headline["metric"]) == {"bias_ambiguous", "correlation", "difference"}
    assert "Match stats" not in set(headline["condition"])
    assert growth.loc[growth["family"].isna(), "p_adjusted"].isna().all()
    tested = headline.dropna(subset=["p_value"]).sort_values("p_value")
    by_hand = np.maximum.accumulate(tested["p_value"] * np.arange(len(tested), 0, -1)).clip(upper=1)
    assert tested["p_adjusted"].to_numpy() == pytest.approx(by_hand.to_numpy())
    effects = rows(statistics, "effects").dropna(subset=["detectable"])
    assert (effects["detectable"] > 2.8 * effects["standard_error"]).all()
    assert effects["from_step"].isna().all()


def test_side_by_side(statistics):
    frame = rows(statistics, "side_by_side").set_index(["experiment", "model", "condition"])
    frame = frame[frame["quantity"] == "effect"]
    both = frame.loc[("bbq", "small", "Q+IF")]
    (growth,) = [
        row
        for row in statistics["growth"]
        if (row["model"], row["condition"], row["metric"])
        == ("small", "Q+IF", "expected_bias_ambiguous")
    ]
    assert both["expected_growth"] == growth["value"]
    assert both["headline_growth"] != growth["value"]
    assert np.sign(both["expected_slope"]) == np.sign(both["headline_slope"]) == 1
    trends = rows(statistics, "trends").set_index(["metric", "quantity", "condition", "against"])
    trends = trends[(trends["model"] == "small") & trends["seed"].notna()]
    for name, metric in (("headline", "bias_ambiguous"), ("expected", "expected_bias_ambiguous")):
        trend = trends.loc[(metric, "effect", "Q+IF", "step")]
        assert both[f"{name}_slope"] == trend["value"]
    law = frame.loc[("law_school", "small", "Q+IF")]
    assert pd.isna(law["expected_growth"])
    assert law["undefined_because"] == "law_school measures no expected_difference"


def test_comparisons_over_seeds(tmp_path):
    size = Size(
        steps=(0, 10), seeds=(0, 1, 2), categories=("Age",), templates=3, blocks=1,
        occupations=10, students=6,
    )  # fmt: skip
    statistics = results_of(record_run(tmp_path / "run", size), num_resamples=50)[1]
    over = rows(statistics, "over_seeds")
    assert set(over["kind"]) == {"effect", "growth", "change"}
    assert set(over.loc[over["experiment"] != "bbq", "num_seeds"]) == {3}
    row = over[
        (over["kind"] == "growth")
        & (over["model"] == "small")
        & (over["metric"] == "difference")
        & (over["condition"] == "Q+IF")
    ].iloc[0]
    each = [
        one["value"]
        for one in statistics["growth"]
        if (one["model"], one["metric"], one["condition"]) == ("small", "difference", "Q+IF")
    ]
    assert len(each) == 3
    assert row["value"] == pytest.approx(np.mean(each))
    assert row["standard_error"] == pytest.approx(np.std(each, ddof=1) / np.sqrt(3))
    assert row["family"] == "growth, over seeds"
    assert row["left_out"] == []


def test_seed_without_a_value(tmp_path):
    size = Size(
        models=(("m", 1000),), steps=(0, 10), seeds=(0, 1), categories=("Age",), templates=3,
        blocks=1, occupations=10, students=6,
    )  # fmt: skip
    run = record_run(tmp_path / "run", size)
    place = run / "m/seed-1/ppo/checkpoint-10/evaluation"
    record_cell(place, "winogender", "Q+IF", 0.1, Size(occupations=9))
    over = rows(results_of(run, num_resamples=50)[1], "over_seeds")
    mine = over[(over["experiment"] == "winogender") & (over["condition"] == "Q+IF")]
    growth = mine[mine["kind"] == "growth"].iloc[0]
    assert growth["num_seeds"] == 1
    assert pd.isna(growth["value"]) and pd.isna(growth["p_value"])
    assert growth["undefined_because"] == "needs two seeds with a value, has 1"
    assert len(growth["left_out"]) == 1
    assert growth["left_out"][0].startswith("seed 1: the cells were measured on different items")


def test_keys_and_columns_are_documented(statistics):
    text = (ROOT / "docs/reference/statistics.md").read_text(encoding="utf-8")
    names = [*COLUMNS, *statistics, *statistics["about"]]
    names += [field.name for field in ITEM_FACTS]
    for content in statistics.values():
        if isinstance(content, list) and content and isinstance(content[0], dict):
            names += content[0]
    missing = sorted({name for name in names if f"`{name}`" not in text})
    assert missing == []


def test_stand_alone_model(tmp_path):
    for condition in ("Q", "Q+IF"):
        record_cell(tmp_path / "model", "bbq", condition, 0.4, SMALL)
    frame = summarise(tmp_path / "model", "org/model[1]", num_resamples=50)
    assert frame[["step", "seed", "parameters", "kl"]].isna().all().all()
    assert set(frame["model"]) == {"org/model[1]"}
    with pytest.raises(InputError, match="no evaluation files"):
        summarise(tmp_path, "nothing")
