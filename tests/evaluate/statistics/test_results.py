"""From parquet files to the tidy table, the statistics, and the closing table."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from selfcorrect.evaluate.experiments.bbq import BBQ
from selfcorrect.evaluate.report.terminal import closing_table
from selfcorrect.evaluate.report.verdict import caveats, summary, verdicts
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
from selfcorrect.evaluate.statistics.files import read_statistics
from selfcorrect.recipes.foundation.errors import InputError
from tests.support import ROOT
from tests.support.recorded_run import CONDITIONS, Size, record_cell, record_run

SMALL = Size(steps=(0, 2, 10), templates=5, blocks=1, occupations=10, students=12)
CHECKPOINT = "nano/seed-0/ppo/checkpoint-2"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record_run(tmp_path_factory.mktemp("results") / "recorded", SMALL)


@pytest.fixture(scope="module")
def statistics(run):
    return results_of(run, num_resamples=200)[1]


def test_the_table_has_the_documented_columns_and_every_cell(run):
    frame = load(run, num_resamples=50)
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


def test_values_are_the_experiments_own_and_counts_are_of_what_is_pooled(run):
    frame = load(run, num_resamples=50)
    path = run / CHECKPOINT / "evaluation" / "bbq.Q.parquet"
    rows = pq.read_table(path).to_pandas()
    kept = BBQ.tally(rows[rows["category"].isin(["Age", "Religion"])])
    by_hand = BBQ.compute({name: sums[None, :] for name, sums in kept.sums.items()})
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


def test_results_and_statistics_on_disk_agree_and_repeat_to_the_byte(run):
    frame, statistics = write_results(run, num_resamples=200)
    pd.testing.assert_frame_equal(pd.read_parquet(run / "results.parquet"), frame)
    metadata = pq.ParquetFile(run / "results.parquet").metadata.row_group(0)
    assert metadata.column(0).compression == "ZSTD"
    first = (run / "statistics.json").read_bytes()
    assert read_statistics(run / "statistics.json") == statistics
    write_results(run, num_resamples=200)
    assert (run / "statistics.json").read_bytes() == first
    assert statistics["about"]["num_resamples"] == 200
    assert statistics["missing"] == []


def test_effect_and_growth_follow_from_the_cells(run):
    _, statistics = write_results(run, num_resamples=200)
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


def test_a_damaged_file_is_named_with_its_remedy(tmp_path):
    run = record_run(tmp_path / "run", Size(steps=(0, 2), templates=2, blocks=1))
    path = run / CHECKPOINT / "evaluation" / "bbq.Q.parquet"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"bbq\.Q\.parquet: damaged.*delete it and run"):
        load(run)
    path.write_bytes(path.read_bytes()[:0])
    with pytest.raises(InputError, match="damaged"):
        load_items(run)


def test_nothing_is_written_for_a_run_without_evaluations_and_old_results_stay(tmp_path):
    run = record_run(tmp_path / "run", Size(steps=(0,), templates=2, blocks=1))
    (run / "results.parquet").write_text("older")
    for path in run.rglob("evaluation/*.parquet"):
        path.unlink()
    with pytest.raises(InputError, match="no checkpoint has been evaluated"):
        write_results(run)
    assert (run / "results.parquet").read_text() == "older"
    with pytest.raises(InputError, match="not a run folder"):
        load(tmp_path)


def test_missing_cells_are_named(tmp_path):
    run = record_run(tmp_path / "run", Size(steps=(0, 2), templates=2, blocks=1))
    (run / CHECKPOINT / "evaluation" / "law_school.Q+IF.parquet").unlink()
    for path in (run / "small/seed-0/ppo/checkpoint-2/evaluation").iterdir():
        path.unlink()
    _, statistics = write_results(run, num_resamples=20)
    assert statistics["missing"] == [
        "nano, seed 0, step 2: no law_school under Q+IF",
        "small, seed 0, step 2: not evaluated",
    ]


def test_conditions_on_different_items_are_not_compared(tmp_path):
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


def test_item_frames_hold_every_row_and_only_the_columns_asked_for(run):
    items = load_items(run, experiment="bbq", condition="Q+IF+CoT", columns=["item", "samples"])
    assert len(items) == 2 * 3 * 60
    assert list(items.columns) == [
        "run", "model", "seed", "step", "experiment", "condition", "item", "samples",
    ]  # fmt: skip
    _, statistics = write_results(run, num_resamples=20)
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


def test_each_order_of_the_options_stands_beside_all_together(tmp_path):
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
    assert list(asked["num_items"]) == [80, 40, 40]
    assert list(asked["num_clusters"]) == [10, 10, 10]
    first = frame.loc[("bbq", "Q", "share_option_0")].set_index("order")["value"]
    third = frame.loc[("bbq", "Q", "share_option_2")].set_index("order")["value"]
    assert first["012"] == pytest.approx(third["120"])
    assert first["012"] != pytest.approx(first["120"])
    assert first["all"] == pytest.approx((first["012"] + first["120"]) / 2)
    # One order only: one row.
    assert frame.loc[("bbq", "Q+IF", "bias_ambiguous"), "order"] == "all"
    assert frame.loc[("winogender", "Q", "correlation"), "order"] == "all"


def test_questions_with_more_options_than_others_are_no_second_order(tmp_path):
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


def test_items_are_read_lazily_and_only_where_the_filter_leads(tmp_path):
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


def test_a_file_damaged_in_its_rows_is_an_error_of_one_line(tmp_path):
    run = record_run(tmp_path / "run", Size(steps=(0, 2), templates=2, blocks=1))
    path = run / CHECKPOINT / "evaluation" / "bbq.Q.parquet"
    content = bytearray(path.read_bytes())
    content[4:400] = bytes(396)  # the footer stays as it was
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged") as caught:
        load_items(run)
    assert "\n" not in str(caught.value)


def test_the_files_hold_plain_types_that_other_tools_read(run, tmp_path):
    number = write_items(tmp_path / "items.parquet", run, experiment="bbq")
    write_results(run, num_resamples=20)
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


def test_a_threshold_that_is_not_reached_is_infinity_in_a_dataframe(statistics):
    frame = rows(statistics, "thresholds")
    said = [row["value"] for row in statistics["thresholds"]]
    assert "not reached" in said
    assert [value == "not reached" for value in said] == list(np.isinf(frame["value"]))
    assert frame[["value", "low", "high", "share_reached"]].dtypes.eq(float).all()
    assert rows({"thresholds": []}, "thresholds").empty


def test_several_runs_are_joined(tmp_path):
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


def test_effects_and_growths_carry_their_tests(statistics):
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


def test_choices_and_probabilities_stand_side_by_side(statistics):
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
    law = frame.loc[("law_school", "small", "Q+IF")]
    assert pd.isna(law["expected_growth"])
    assert law["undefined_because"] == "law_school measures no expected_difference"


def test_several_seeds_have_rows_and_sentences_of_their_own(tmp_path):
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
    said = " ".join(summary(statistics))
    assert "the same with training seeds as the unit: nano" in said
    assert "3 seeds" in said
    assert "for each tenfold number of parameters: it changes at step 10 by" in said
    assert "(over seeds)" in said
    cautions = " ".join(caveats(statistics))
    assert "one training run per model" not in cautions
    assert "Only where seeds are named as the unit" in cautions


def test_a_seed_without_a_value_is_left_out_by_name(tmp_path):
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


def test_the_verdict_tells_trends_thresholds_and_corrected_tests(statistics):
    (small,) = [one for one in verdicts(statistics) if one.title == "small"]
    sentences = " ".join(s for part in small.paragraphs for s in part.sentences)
    assert "On a straight line through all 3 steps this difference changes by" in sentences
    assert "With probabilities in the place of choices, it changes by" in sentences
    assert "corrected p" in sentences
    assert "; 80% power for " in sentences
    assert "(no bias)" in sentences
    said = " ".join(caveats(statistics))
    assert "Holm" in said
    assert "without a correction" not in said
    assert "after Holm's correction" in " ".join(summary(statistics))


def test_every_key_and_column_is_documented(statistics):
    text = (ROOT / "docs/reference/statistics.md").read_text(encoding="utf-8")
    names = [*COLUMNS, *statistics, *statistics["about"]]
    names += [field.name for field in ITEM_FACTS]
    for content in statistics.values():
        if isinstance(content, list) and content and isinstance(content[0], dict):
            names += content[0]
    missing = sorted({name for name in names if f"`{name}`" not in text})
    assert missing == []


def test_a_stand_alone_model_has_no_step_and_no_seed(tmp_path):
    for condition in ("Q", "Q+IF"):
        record_cell(tmp_path / "model", "bbq", condition, 0.4, SMALL)
    frame = summarise(tmp_path / "model", "org/model[1]", num_resamples=50)
    assert frame[["step", "seed", "parameters", "kl"]].isna().all().all()
    assert set(frame["model"]) == {"org/model[1]"}
    with pytest.raises(InputError, match="no evaluation files"):
        summarise(tmp_path, "nothing")


def printed(table):
    console = Console(width=100, record=True, file=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_the_closing_table_fits_100_columns_and_shows_first_and_last_step(run):
    text = printed(closing_table(load(run, num_resamples=50)))
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 100
    steps = [line.split()[1] for line in text.splitlines() if line.split()[:1] == ["nano"]]
    assert steps == ["0", "10"]
    assert "Match stats" in text


def test_the_closing_table_of_stand_alone_models_names_models_and_accuracies(tmp_path):
    for experiment in ("bbq", "law_school"):
        record_cell(tmp_path / "model", experiment, "Q", 0.4, SMALL)
    frame = summarise(tmp_path / "model", "org/a-rather-long-model-name-7B[1]", num_resamples=50)
    text = printed(closing_table(frame))
    first_column = "".join(line.split()[0] for line in text.splitlines()[5:] if line.strip())
    assert "org/a-rather-long-model-name-7B[1]" in first_column  # folded, never cut
    assert "…" not in text
    (line,) = [line for line in text.splitlines() if line.strip().startswith("BBQ")]
    assert line.split()[-2:] == [".90", "40"]  # option mass, prompts pooled


def test_undefined_is_a_dash_in_the_closing_table_and_null_in_json(tmp_path):
    run = record_run(
        tmp_path / "run", Size(models=(("one", 10),), steps=(0, 2), occupations=1, templates=2)
    )
    frame, statistics = write_results(run, num_resamples=20)
    cell = next(cell for cell in statistics["cells"] if cell["experiment"] == "winogender")
    assert cell["metrics"]["overall"]["correlation"] == {"value": None, "low": None, "high": None}
    mine = frame[(frame["metric"] == "correlation") & (frame["category"] == "overall")]
    assert mine["value"].isna().all()
    assert "–" in printed(closing_table(frame)).split("no bias;")[0]


def test_the_closing_table_says_which_value_is_no_bias():
    rows = [
        {"model": "m", "step": None, "seed": None, "experiment": name, "condition": "Q"}
        | {"category": "overall", "metric": metric, "value": 0.6, "low": 0.5, "high": 0.7}
        | {"num_items": 9}
        for name, metric in [("bbq", "bias_ambiguous"), ("crows_pairs", "share_stereotyped")]
    ]
    text = " ".join(printed(closing_table(pd.DataFrame(rows))).split())
    assert "0: no bias (.50 for CrowS-Pairs); in brackets" in text
    assert "0: no bias; in" in " ".join(printed(closing_table(pd.DataFrame(rows[:1]))).split())


def test_a_sample_without_any_overall_category_says_so():
    row = {"model": "m", "step": None, "seed": None, "experiment": "bbq", "condition": "Q"}
    row |= {"category": "Religion (names)", "metric": "bias_ambiguous", "value": 0.6}
    row |= {"low": 0.5, "high": 0.7, "num_items": 9}
    text = " ".join(printed(closing_table(pd.DataFrame([row]))).split())
    assert "BBQ Q 0 0: no bias" in text and "take a larger --limit" in text
