"""The figure of the reward model's score and the raters' utility shows the checkpoints' numbers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from selfcorrect.evaluate.figures.overoptimisation import answer_table, overoptimisation
from selfcorrect.evaluate.figures.select import NothingToDraw
from selfcorrect.evaluate.run_folder import AnswerWorth, find_checkpoints
from tests.support.recorded_run import Size, record_run

SIZE = Size(steps=(0, 2, 10), seeds=(0, 1), templates=2, blocks=1, occupations=4, students=4)
# KL, score and utility by step: the score rises throughout, the utility falls in the end.
WORTH = {0: (0.0, 0.5, -1.0), 2: (0.25, 1.0, 0.0), 10: (4.0, 2.0, -2.0)}


def run_with(
    folder: Path,
    steps: tuple[int, ...],
    errors: float | None = None,
    seeds: tuple[int, ...] = (0, 1),
) -> Path:
    run = record_run(folder / "run", replace(SIZE, seeds=seeds))
    for checkpoint in find_checkpoints(run):
        record = checkpoint.record
        if record.step in steps:
            kl, score, utility = WORTH[record.step]
            offset = 3.0 * record.seed  # reward models of different seeds have different zeros
            worth = AnswerWorth(
                num=256, utility=utility, score=score + offset, kl=kl, utility_error=errors
            )
            record.model_copy(update={"answers": worth}).write(checkpoint.folder)
    return run


def test_lines_are_changes_since_the_first_checkpoint_over_the_root_of_kl(tmp_path: Path) -> None:
    run = run_with(tmp_path, (0, 2, 10))
    figure = overoptimisation(run)
    proxy, gold = figure.axes
    for ax, expected in ((proxy, [0, 0.5, 1.5]), (gold, [0, 1.0, -1.0])):
        lines = {line.get_label(): line for line in ax.get_lines()}
        named = [line for label, line in lines.items() if not label.startswith("_")]
        assert len(named) == 2  # a line per model
        for line in named:
            assert np.asarray(line.get_xdata(), dtype=float) == pytest.approx([0, 0.5, 2])
            assert np.asarray(line.get_ydata(), dtype=float) == pytest.approx(expected)


def test_bars_are_over_seeds_or_over_the_answers_of_one(tmp_path: Path) -> None:
    """The seeds' changes agree, so theirs have no width; one seed's are 1.96 standard errors."""
    for seeds, errors, expected in (
        ((0,), 0.3, [0, 1.96 * 0.3 * 2**0.5]),
        ((0, 1), 0.3, [None, None]),
    ):
        run = run_with(tmp_path / f"{len(seeds)} {errors}", (0, 2), errors, seeds)
        gold = overoptimisation(run).axes[1]
        assert len(gold.collections) == 2  # a model each
        for bars in gold.collections:
            halves = [np.ptp(ends[:, 1]) / 2 if len(ends) else None for ends in bars.get_segments()]
            assert halves == pytest.approx(expected, abs=1e-3)


def test_a_run_without_such_records_has_no_figure(tmp_path: Path) -> None:
    for steps in ((), (2,)):
        with pytest.raises(NothingToDraw, match="fewer than two steps"):
            overoptimisation(run_with(tmp_path / str(steps), steps))


def test_an_estimate_of_kl_below_zero_counts_as_zero(tmp_path: Path) -> None:
    run = run_with(tmp_path, (0, 2, 10))
    checkpoint = next(c for c in find_checkpoints(run) if c.record.step == 2)
    worth = AnswerWorth(num=256, utility=0.0, score=0.0, kl=-0.01)
    checkpoint.record.model_copy(update={"answers": worth}).write(checkpoint.folder)
    assert answer_table(run)["root"].min() == 0
