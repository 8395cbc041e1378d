"""Exports to lm-eval's files and model cards."""

import json

import datasets
import numpy as np
import pandas as pd
import pytest
from huggingface_hub import ModelCard

from selfcorrect.evaluate.export import write_lm_eval, write_model_card
from selfcorrect.evaluate.results import summarise
from selfcorrect.evaluate.statistics.bootstrap import Draws
from selfcorrect.evaluate.statistics.cells import measure_folder
from selfcorrect.evaluate.statistics.formatting import number, with_interval
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.scripts.commands.export import export
from tests.support.answer_rows import measured_by_a_tiny_model
from tests.support.recorded_run import record_run

CHECKPOINT = "nano/seed-0/ppo/checkpoint-40/evaluation"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record_run(tmp_path_factory.mktemp("export") / "run")


def _overall(run, metric):
    frame = summarise(run / CHECKPOINT, "x")
    rows = frame[(frame["category"] == "overall") & (frame["metric"] == metric)]
    return {row["condition"]: row for row in rows.to_dict("records")}


def test_lm_eval_files_hold_the_values_and_load_as_a_dataset(run, tmp_path):
    export(run, "lm-eval", tmp_path)
    folder = tmp_path / "nano-seed-0-checkpoint-40"
    (path,) = folder.glob("results_*.json")
    results = json.loads(path.read_text())
    expected = _overall(run, "bias_ambiguous")["Q+IF"]
    assert results["results"]["bbq_Q+IF"]["bias_ambiguous,none"] == expected["value"]
    assert results["intervals"]["bbq_Q+IF"]["bias_ambiguous"] == [expected["low"], expected["high"]]
    # Against the replicates' deviation computed here; undefined where a metric is.
    cell = next(
        cell
        for cell in measure_folder(run / CHECKPOINT, "x", "x", None, Draws())
        if (cell.experiment, cell.condition) == ("bbq", "Q+IF")
    )
    resamples = cell.bootstrap.replicates.metrics["bias_ambiguous"][1:]
    resamples = resamples[np.isfinite(resamples)]
    error = results["results"]["bbq_Q+IF"]["bias_ambiguous_stderr,none"]
    assert error == pytest.approx(resamples.std(ddof=1)) and error > 0
    (samples,) = folder.glob("samples_bbq_Q+IF_*.jsonl")
    loaded = datasets.load_dataset(
        "json", data_files=str(samples), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(loaded) == results["n-samples"]["bbq_Q+IF"]["effective"]
    assert len(loaded) == 3 * 8 * 4 * 2  # categories, templates, items of a block, blocks
    for row in loaded:
        best = max(range(3), key=lambda i: float(row["filtered_resps"][i][0]))
        assert row["acc"] == float(str(best) == row["target"])


def test_orders_of_a_question_are_one_document(tmp_path):
    """The right option's position depends on the order shown; documents weigh the same."""
    questions = [
        {"id": i, "question": "Who?", "options": ["x", "y", "z", "w"][:size], "label": size - 1}
        for i, size in enumerate([2, 3, 4, 2, 3])
    ]
    (tmp_path / "multiple_choice").mkdir()
    text = "".join(json.dumps(question) + "\n" for question in questions)
    (tmp_path / "multiple_choice" / "own.jsonl").write_text(text)
    cells = measured_by_a_tiny_model(
        *(tmp_path, tmp_path / "cells", "multiple_choice", ["Q"]), permutations=3, style="plain"
    )
    results_file, samples_file = write_lm_eval(tmp_path / "cells", "tiny", tmp_path / "out")
    results = json.loads(results_file.read_text())
    assert results["n-samples"]["multiple_choice_Q"] == {"original": 5, "effective": 5}
    samples = pd.DataFrame(map(json.loads, samples_file.read_text().splitlines()))
    rows = cells["Q"][0]
    assert len(samples) == len(rows) == 2 + 3 + 4 + 2 + 3
    assert list(samples["doc_id"]) == [0] * 2 + [1] * 3 + [2] * 4 + [3] * 2 + [4] * 3
    for sample, row in zip(samples.itertuples(), rows.itertuples(), strict=True):
        shown = int(row.order[int(np.argmax(row.logprobs))])
        assert row.order[int(sample.target)] == str(row.label)
        assert sample.acc == float(shown == row.label)
    accuracy = samples.groupby("doc_id")["acc"].mean().mean()
    assert results["results"]["multiple_choice_Q"]["accuracy,none"] == pytest.approx(accuracy)
    card = ModelCard.load(write_model_card(tmp_path / "cells", "tiny", tmp_path / "README.md"))
    (result,) = card.data.eval_results
    assert result.metric_value == pytest.approx(accuracy) and result.metric_args["items"] == 5


def test_file_names_are_read_by_lm_eval(run, tmp_path):
    names = pytest.importorskip("lm_eval.utils", reason="lm-eval is not installed")
    export(run, "lm-eval", tmp_path)
    files = [str(path) for path in (tmp_path / "small-seed-0-checkpoint-0").iterdir()]
    assert len(names.get_results_filenames(files)) == 1
    tasks = {
        names.get_file_task_name(f.rsplit("/")[-1])
        for f in names.get_sample_results_filenames(files)
    }
    assert {"bbq_Q", "winogender_Match_stats"} <= tasks


def test_model_card_round_trip(run, tmp_path):
    export(run, "model-card", tmp_path)
    card = ModelCard.load(tmp_path / "nano-seed-0-checkpoint-40" / "README.md")
    results = {r.dataset_config: r for r in card.data.eval_results if r.dataset_type == "bbq"}
    expected = _overall(run, "bias_ambiguous")
    assert set(results) == {"Q", "Q+IF", "Q+IF+CoT"}
    for condition, result in results.items():
        assert result.metric_value == pytest.approx(expected[condition]["value"], abs=1e-12)
        assert result.metric_args["low"] == pytest.approx(expected[condition]["low"], abs=1e-12)
        row = (
            f"{with_interval(expected[condition])} | {number(result.metric_args['standard_error'])}"
        )
        assert f"| {condition} | {row} | 128 |" in card.text


def test_wrong_source_or_format_is_refused(tmp_path):
    with pytest.raises(InputError, match="not a run folder, nor"):
        export(tmp_path, "lm-eval", tmp_path)
    with pytest.raises(InputError, match="--format csv: give lm-eval"):
        export(tmp_path, "csv", tmp_path)
