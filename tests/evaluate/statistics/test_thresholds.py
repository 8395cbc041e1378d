"""The step at which a threshold is reached: by hand, never reached, and its interval's coverage."""

from dataclasses import replace

import numpy as np
import pytest

from selfcorrect.evaluate.statistics.bootstrap import Draws, Replicates
from selfcorrect.evaluate.statistics.thresholds import NOT_REACHED, ROW, crossing, threshold_steps
from tests.support.resampled_cells import METRIC, resampled_cell


def at(steps, values, threshold=0.0, side=1.0):
    table = np.asarray(values, dtype=float)
    return crossing(np.asarray(steps, dtype=float), table.reshape(len(steps), -1), threshold, side)


def test_crossings_by_hand():
    assert at([0, 10, 20], [0.4, 0.2, -0.2]) == pytest.approx([15])
    assert at([0, 10, 20], [-0.4, -0.2, 0.2], side=-1.0) == pytest.approx([15])
    assert at([0, 10, 40], [0.9, 0.6, 0.3], threshold=0.5) == pytest.approx([20])
    assert at([0, 10, 20], [0.4, 0.0, 0.3]) == pytest.approx(
        [10]
    )  # touching counts, the first time
    # What a sum in another order leaves above the threshold does not decide.
    assert at([0, 10, 20], [0.3, 0.1 + 0.2 - 0.3, 0.2]) == pytest.approx([10])
    assert at([0, 10, 20], [0.4, 0.3, 0.1]) == [np.inf]
    assert at([5, 10], [-0.1, 0.3]) == [5]  # on the other side from the start
    assert np.isnan(at([0, 10], [0.4, np.nan]))
    both = at([0, 10], [[0.4, 0.4], [-0.4, 0.2]])
    assert both == pytest.approx([5, np.inf])


def one_row(cells, **more):
    (row,) = [row for row in threshold_steps(cells, **more) if row["metric"] == METRIC]
    return row


def replicated(step, values, **more):
    """A cell with given replicates: the data's value first."""
    return resampled_cell(0, step=step, metrics={METRIC: np.asarray(values, dtype=float)}, **more)


def test_not_reached():
    resamples = np.linspace(-0.2, 0.3, 101)  # at step 20, against .4 at step 0
    cells = [replicated(0, np.full(102, 0.4)), replicated(20, [0.05, *resamples])]
    row = one_row(cells)
    assert list(row) == list(ROW)
    assert row["value"] == NOT_REACHED
    assert row["share_reached"] == pytest.approx(np.mean(resamples <= 0))
    assert 13 < row["low"] < 14  # .4 / (.4 + .2) of 20, nearly
    assert row["high"] == NOT_REACHED
    assert (row["starts"], row["threshold"], row["first"], row["last"]) == ("above", 0, 0, 20)
    never = one_row([replicated(0, np.full(102, 0.4)), replicated(20, np.full(102, 0.2))])
    assert (never["low"], never["high"], never["share_reached"]) == (NOT_REACHED, NOT_REACHED, 0)


def test_given_threshold_from_below():
    cells = [replicated(0, np.full(50, -0.2)), replicated(10, np.full(50, 0.2))]
    assert one_row(cells)["value"] == pytest.approx(5)
    row = one_row(cells, thresholds={"bbq": 0.1})
    assert [row[name] for name in ("value", "low", "high")] == pytest.approx([7.5] * 3)
    assert row["starts"] == "below"


def test_start_on_the_threshold_and_undefined_values():
    row = one_row([replicated(0, np.zeros(50)), replicated(10, np.full(50, 0.2))])
    assert (row["value"], row["low"], row["starts"]) == (0, None, "at")
    assert "lies on the threshold" in row["undefined_because"]
    alone = one_row([replicated(0, np.full(50, 0.4))])
    assert alone["value"] is None
    assert alone["undefined_because"] == "needs two checkpoints, has 1"
    gaps = np.full(50, 0.2)
    gaps[10:30] = np.nan
    half = one_row([replicated(0, np.full(50, 0.4)), replicated(10, gaps)])
    assert half["value"] == NOT_REACHED
    assert (half["low"], half["share_reached"]) == (None, None)
    assert "too many resamples" in half["undefined_because"]


def test_a_condition_that_is_not_judged_has_no_threshold():
    cells = [replicated(s, np.full(9, 0.4), condition="as many women") for s in (0, 10)]
    assert threshold_steps(cells)
    assert threshold_steps([replace(cell, judged=False) for cell in cells]) == []


def test_interval_coverage():
    """The metric falls on a line from .6 to -.4 over 40 steps, so 0 is reached at 24."""
    rng, steps = np.random.default_rng(8), (0, 10, 20, 30, 40)
    covered, num, reached = 0, 300, 0
    for number in range(num):
        items = rng.normal(0, 0.6, 30)
        draws = Draws(300, number)
        row = one_row(
            [
                resampled_cell(0.6 - 0.025 * step, step=step, items=items + rng.normal(0, 0.3, 30),
                     draws=draws)
                for step in steps
            ]
        )  # fmt: skip
        low, high = (np.inf if end == NOT_REACHED else end for end in (row["low"], row["high"]))
        covered += low <= 24 <= high
        reached += row["value"] != NOT_REACHED
    assert 0.90 <= covered / num <= 0.98
    assert reached / num > 0.97


def test_different_items_have_no_threshold():
    cells = [replicated(0, np.full(9, 0.4)), replicated(10, np.full(9, 0.1), population=b"others")]
    assert "different items" in one_row(cells)["undefined_because"]
    assert isinstance(cells[0].replicates, Replicates)
