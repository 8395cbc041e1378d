"""The page on real models: its numbers are the statistics' own, and what is missing is named."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from selfcorrect.evaluate.results import results_of
from selfcorrect.scripts.study import real_models
from selfcorrect.scripts.study.records import wrapped
from tests.support.recorded_run import Size, record_cell, record_run

SIZE = Size(
    models=(("nano", 8_192), ("small", 509_000)), steps=(0, 40), templates=8, blocks=1,
    occupations=8, students=8,
)  # fmt: skip
REWARDS = np.linspace(-1, 1, 40)


def trained(folder: Path) -> Path:
    """A run of two models after 0 and 40 steps; only the first one's record is there."""
    run = record_run(folder, SIZE)
    for evaluation in run.glob("*/*/ppo/checkpoint-*/evaluation"):
        step = int(evaluation.parent.name.split("-")[1])
        record_cell(evaluation, "bbq", "Q+neutral", 0.5 + step / 400, SIZE)
    log = [
        {"ppo_step": step, "objective/score": reward, "objective/kl": 0.1}
        for step, reward in enumerate(REWARDS, 1)
    ]
    record = {"seconds": 10800, "evaluation_seconds": 3600, "peak_memory_mb": 2048, "log": log}
    (run / "nano/seed-0/ppo/stage.json").write_text(json.dumps(record))
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    trained(folder / "real-ladder")
    untrained = record_run(folder / "real-models", Size(**{**vars(SIZE), "steps": (0,)}))
    facts = {
        "models": ["nano", "small", "large"], "begun": "2026-01-02 03:04:05 UTC", "cores": 2,
        "processor": "A CPU",
        "versions": {"torch": "2", "transformers": "5", "trl": "1"},
    }  # fmt: skip
    (untrained / "run.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="module")
def text(runs: Path) -> str:
    (runs / "docs").mkdir()
    (runs / "docs/discussion.md").write_text("What a reader may conclude.\n")
    real_models.main([str(runs), "--docs", str(runs / "docs")])
    return (runs / "docs/index.md").read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    return re.split(r"^## ", text.split(f"## {heading}\n")[1], flags=re.MULTILINE)[0]


def test_growth_is_the_difference_of_the_statistics_growths(runs: Path) -> None:
    rows = real_models.growths(real_models.checkpoints_of(runs / "real-ladder"))
    _, statistics = results_of(runs / "real-ladder")
    growth = {
        (row["model"], row["condition"]): row["value"]
        for row in statistics["growth"]
        if (row["experiment"], row["metric"]) == ("bbq", "bias_ambiguous")
    }
    assert [row["model"] for row in rows] == ["nano", "small"]
    for row in rows:
        model = row["model"]
        expected = growth[model, "Q+IF"] - growth[model, "Q+neutral"]
        assert row["growth"].value == pytest.approx(expected)
        assert row["growth"].low < row["growth"].value < row["growth"].high
        assert row["p_adjusted"] >= row["p_value"]
    assert rows[1]["growth"].value > 0.3
    unfinished = [c for c in real_models.checkpoints_of(runs / "real-ladder") if c.model == "nano"]
    longer = [*unfinished, *(dataclasses.replace(c, model="long", step=99) for c in unfinished[:1])]
    assert real_models.growths(longer) == []


def test_page_shows_numbers_and_names_what_is_missing(text: str) -> None:
    assert "What a reader may conclude." in text
    assert "A CPU" in text
    assert "Not measured without training: large." in text
    able = section(text, "Can they do the task?")
    assert re.search(r"\| small \| .*\| (yes|no) \| not measured \|", able)
    untrained = section(text, "Without training")
    assert untrained.count("Not measured.") == 3  # Winogenerated, answers by text, reasoning
    assert "| model | Q | Q+IF | Q+neutral less Q+IF |" in untrained  # as the run's conditions
    trained = section(text, "With PPO")
    assert re.search(r"^\| small \| 0 \| 0 to 40 \|", trained, re.MULTILINE)


def test_rewards_of_the_first_and_the_last_steps(text: str) -> None:
    [row] = [line for line in text.splitlines() if line.startswith("| nano | 0 | 2.0 | 1.0 | 2.0 ")]
    first, last = REWARDS[:10].mean(), REWARDS[-10:].mean()
    assert f"| −{-first:.2f} | {last:.2f} | {last - first:.2f} [".replace("0.", ".") in row


def test_ability_needs_an_interval_above_chance() -> None:
    estimate = real_models.Estimate
    assert real_models._ability(estimate(0.5, 0.34, 0.6)) == "yes"
    assert real_models._ability(estimate(0.5, 0.33, 0.6)) == "no"


def test_command_names_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        real_models.main([str(tmp_path)])
    assert "real-models/run.json: missing" in capsys.readouterr().err


def test_prose_is_wrapped_and_tables_are_not() -> None:
    prose, row = "word " * 60, "| a | b |\n| --- | --- |\n| " + "x" * 200 + " | y |"
    lines = wrapped(f"{prose}\n\n{row}").splitlines()
    assert max(map(len, lines[:3])) <= 116
    assert lines[-3:] == row.splitlines()
