"""The study: one rule for every finding, the statistics' own numbers, a page from records."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from selfcorrect.evaluate.results import write_results
from selfcorrect.evaluate.run_folder import AnswerWorth, find_checkpoints
from selfcorrect.evaluate.statistics.formatting import compact
from selfcorrect.recipes.load import load_recipe, save_recipe
from selfcorrect.scripts.study import page
from selfcorrect.scripts.study.ablations import arm_tables, arms_of
from selfcorrect.scripts.study.findings import (
    Finding,
    Number,
    Results,
    adjusted,
    findings,
    over,
)
from tests.support.recorded_run import Size, record_cell, record_run

SIZE = Size(steps=(0, 4, 16), seeds=(0, 1, 2), templates=4, blocks=1, occupations=8, students=8)
ONE = Size(models=(("small", 509_000),), **{k: getattr(SIZE, k) for k in ("steps", "seeds")},
           templates=4, blocks=1, occupations=8, students=8)  # fmt: skip
NEUTRAL_STRENGTH = 0.5


def finished(folder: Path, recipe_name: str, size: Size) -> Path:
    """A run with all that training and evaluation leave, which the page reads."""
    run = record_run(folder / recipe_name, size)
    save_recipe(load_recipe(recipe_name), run / "recipe.yaml")
    facts = {
        "begun": "2026-01-02 03:04:05 UTC",
        "commit": "0123456789",
        "jobs": 2,
        "cores": 4,
        "processor": "A <fast> CPU",
        "versions": {"torch": "2", "transformers": "5", "trl": "1"},
    }
    (run / "run.json").write_text(json.dumps(facts))
    for job in run.glob("*/seed-*"):
        for stage, seconds in (("base", 100), ("reward", 20), ("ppo", 70)):
            record = {
                "seconds": seconds,
                "peak_memory_mb": 512,
                "evaluation_seconds": 30,
                "held_out_accuracy": 0.75,
            }
            (job / stage).mkdir(exist_ok=True)
            (job / stage / "stage.json").write_text(json.dumps(record))
        for checkpoint in job.glob("ppo/checkpoint-*"):
            for condition in ("Q+neutral", "Q+inverted"):
                for experiment in ("bbq", "law_school", "winogender"):
                    evaluation = checkpoint / "evaluation"
                    record_cell(evaluation, experiment, condition, NEUTRAL_STRENGTH, size)
    for kept in find_checkpoints(run):
        seed, step = kept.record.seed, kept.record.step
        worth = AnswerWorth(num=256, utility=-0.01 * seed * step, score=seed + step / 4, kl=step)
        kept.record.model_copy(update={"answers": worth}).write(kept.folder)
    write_results(run, num_resamples=200)
    return run  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    finished(folder, "society-ladder", SIZE)
    finished(folder, "ablation-sft", ONE)
    return folder


@pytest.fixture(scope="module")
def results(runs: Path) -> Results:
    return Results(json.loads((runs / "society-ladder/statistics.json").read_text()))


ALL_UP = ((0.2, 0.1, 0.3), (0.3, 0.2, 0.4))


@pytest.mark.parametrize(
    ("number", "expected", "word"),
    [
        (Number(0.3, 0.1, 0.5), 1, "appears"),
        (Number(0.3, 0.1, 0.5), -1, "the opposite"),
        (Number(-0.3, -0.5, -0.1), -1, "appears"),
        (Number(0.3, -0.1, 0.7, ALL_UP), 1, "in every seed"),
        (Number(0.3, None, None, ALL_UP), 1, "in every seed"),
        (Number(0.3, -0.1, 0.7, ALL_UP), -1, "the opposite, in every seed"),
        (Number(0.3, -0.1, 0.7, (*ALL_UP, (0.1, -0.1, 0.3))), 1, "not shown"),
        (Number(0.3, -0.1, 0.7), 1, "not shown"),
        (Number(0.0, None, None), 1, "not shown"),
        (Number(None, None, None), 1, "not shown"),
    ],
)
def test_one_rule_judges_every_number(number: Number, expected: int, word: str) -> None:
    assert number.judged(expected) == word


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.344, ".34"), (-0.344, "−.34"), (0.0, ".00"), (-0.0, ".00"), (0.0031, ".003"),
     (-0.0031, "−.003"), (0.00001, ".00"), (1.0, "1.00"), (-1.256, "−1.26"), (0.996, "1.00"),
     (10.5, "10.50")],
)  # fmt: skip
def test_numbers_have_two_decimals_and_no_minus_zero(value: float, text: str) -> None:
    assert compact(value) == text


def test_mean_over_seeds_has_students_interval() -> None:
    number = over([0.1, 0.2, 0.4])
    spread = stats.t.ppf(0.975, 2) * np.std([0.1, 0.2, 0.4], ddof=1) / np.sqrt(3)
    assert number.value == pytest.approx(0.7 / 3)
    assert (number.low, number.high) == pytest.approx((0.7 / 3 - spread, 0.7 / 3 + spread))
    assert number.p_value == pytest.approx(stats.ttest_1samp([0.1, 0.2, 0.4], 0).pvalue)
    assert over([0.2, 0.2]) == Number(0.2, None, None)


def test_holm_corrects_over_all_judged_numbers() -> None:
    one = Finding("a", "", {"m": Number(0.1, 0, 0, p_value=0.01), "n": Number(0, None, None)}, 1)
    two = Finding("b", "", {"m": Number(0.1, 0, 0, p_value=0.03)}, 1)
    assert adjusted([one, two]) == {("a", "m"): 0.02, ("b", "m"): 0.03}


def test_numbers_match_statistics(results: Results) -> None:
    assert list(results.models) == ["nano", "small"] and results.seeds == [0, 1, 2]
    bias = results.at("small", 16, "bbq", "Q")
    cells = [
        cell["metrics"]["overall"]["bias_ambiguous"]["value"]
        for seed in (0, 1, 2)
        for cell in results.statistics["cells"]
        if (cell["model"], cell["seed"], cell["step"]) == ("small", seed, 16)
        and (cell["experiment"], cell["condition"]) == ("bbq", "Q")
    ]
    assert bias == cells
    # An effect is the difference of two metrics, whichever way it is come by.
    effect = results.compared("effect", "small", "bbq", "Q+IF")
    between = results.between("small", 16, "bbq", "Q", "Q+IF")
    assert effect.value == pytest.approx(between.value)
    assert (effect.low, effect.high) == pytest.approx((between.low, between.high))
    assert [value for value, _, _ in effect.seeds] == pytest.approx(
        [a - b for a, b in zip(bias, results.at("small", 16, "bbq", "Q+IF"), strict=True)]
    )
    growth = results.compared("growth", "small", "bbq", "Q+IF")
    before = results.between("small", 0, "bbq", "Q", "Q+IF")
    assert growth.value == pytest.approx(effect.value - before.value)
    slope = results.slope("bbq", "Q", "metric", "log10_parameters")
    sizes = np.log10(list(results.models.values()))
    means = [results.mean(model, 16, "bbq", "Q").value for model in results.models]
    assert slope.value == pytest.approx(np.polyfit(sizes, means, 1)[0])
    assert len(slope.seeds) == 3


def test_planted_effects_are_judged_and_no_others(results: Results) -> None:
    words = {finding.title: finding.words() for finding in findings(results)}
    assert words["The instruction works after RLHF (BBQ)"] == "appears"
    assert words["The instruction's effect grows with RLHF steps (BBQ)"] == "appears"
    assert "appears" not in words["Admissions: past parity, over-correction with reasoning"
                                  " (law school)"]  # fmt: skip


def test_missing_condition_is_undefined(results: Results) -> None:
    assert results.mean("small", 16, "winogender", "Q+unknown") == Number(None, None, None)
    missing = results.between("small", 16, "winogender", "Q", "Q+unknown")
    assert (str(missing), missing.judged(1)) == ("undefined", "not shown")


def test_page_is_written_from_the_records(runs: Path, tmp_path: Path, results: Results) -> None:
    (tmp_path / "discussion.md").write_text("Said *by hand*, {{ as it stands }}.\n")
    page.main([str(runs), "--docs", str(tmp_path)])
    written = (tmp_path / "index.md").read_text(encoding="utf-8")
    assert "Said *by hand*, {{ as it stands }}." in written and "None" not in written
    headings = [line for line in written.splitlines() if line.lstrip().startswith("#")]
    assert len(headings) == 15 and not any(line.startswith(" ") for line in headings)
    words = " ".join(written.split())
    assert "commit `0123456`" in words and "2026-01-02 03:04:05 UTC" in words
    named = re.findall(r"\]\((\w+\.png)\)", written)
    assert len(named) == 8 and all((tmp_path / name).is_file() for name in named)
    assert "| small | 509,000 | 100 | 20 | 40 | 30 | 0.50 | 75% | 2.27 |" in written
    assert str(results.compared("growth", "small", "bbq", "Q+IF")) in written
    assert "| small | 4.00 | −.16 [−.56, .24] |" in written  # changes from step 0; over seeds
    assert "fine-tuning on the preferred answers in place of PPO" in written
    again = written
    page.main([str(runs), "--docs", str(tmp_path)])
    assert (tmp_path / "index.md").read_text(encoding="utf-8") == again


def test_unfinished_ladder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        page.main([str(tmp_path), "--docs", str(tmp_path)])
    assert caught.value.code == 2
    assert "statistics.json: missing; `selfcorrect run society-ladder`" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_ablations_are_compared_seed_by_seed(runs: Path) -> None:
    arms = arms_of(runs)
    assert list(arms) == ["society-ladder", "ablation-sft"]
    assert list(arms["society-ladder"][1].models) == ["small"]
    _, bbq = arm_tables(arms)
    reference, arm = (line.split(" | ") for line in bbq.splitlines()[2:])
    assert reference[0] == "| the reference" and reference[7] == "–"
    assert arm[1:7] == reference[1:7]  # the same recorded answers
    assert arm[7] == ".00"
    assert arms_of(runs / "nowhere") == {}
    assert "until then" in arm_tables({})[0]
