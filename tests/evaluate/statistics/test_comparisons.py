"""Paired comparisons: hand-computed effects, growths and changes, pairing and coverage."""

import numpy as np
import pytest

from selfcorrect.evaluate.statistics.bootstrap import Draws, Replicates, bootstrap
from selfcorrect.evaluate.statistics.comparisons import Cell, compare
from tests.support.tallies import make_tally, share


def make_cell(step, condition, hits, clusters=None):
    tally = make_tally({"hits": hits, "count": np.full(len(hits), 10)}, clusters=clusters)
    replicates = bootstrap(tally, share, draws=Draws(500)).replicates
    return Cell("run", "m", 10, 0, step, "bbq", condition, replicates)


def find(comparisons, kind, condition, step):
    wanted = kind, condition, step
    (one,) = [c for c in comparisons if (c.kind, c.cell.condition, c.cell.step) == wanted]
    return one


def test_effects_growth_and_change_by_hand():
    cells = [
        make_cell(0, "Q", [5, 5, 8, 2]),
        make_cell(0, "Q+IF", [5, 4, 8, 1]),
        make_cell(20, "Q", [6, 6, 9, 3]),
        make_cell(20, "Q+IF", [1, 1, 4, 0]),
    ]
    comparisons = compare(cells)
    assert find(comparisons, "effect", "Q+IF", 0).estimate.value == pytest.approx((20 - 18) / 40)
    assert find(comparisons, "effect", "Q+IF", 20).estimate.value == pytest.approx((24 - 6) / 40)
    growth = find(comparisons, "growth", "Q+IF", 20)
    assert growth.from_step == 0
    assert growth.estimate.value == pytest.approx((18 - 2) / 40)
    assert find(comparisons, "change", "Q", 20).estimate.value == pytest.approx(4 / 40)
    assert find(comparisons, "change", "Q+IF", 20).estimate.value == pytest.approx(-12 / 40)
    assert len(comparisons) == 5


def test_pairing_removes_shared_variation():
    """Q+IF is .1 below Q in every template: the effect has no spread though each metric has."""
    hits = np.random.default_rng(0).integers(1, 10, 30)
    comparisons = compare([make_cell(0, "Q", hits), make_cell(0, "Q+IF", hits - 1)])
    effect = find(comparisons, "effect", "Q+IF", 0).estimate
    assert (effect.low, effect.high) == (pytest.approx(0.1), pytest.approx(0.1))
    assert effect.excludes_zero


def test_different_items_are_not_compared():
    comparisons = compare(
        [
            make_cell(0, "Q", [1, 2, 3]),
            make_cell(0, "Q+IF", [1, 2, 4], clusters=["t000", "t001", "t009"]),
        ]
    )
    effect = find(comparisons, "effect", "Q+IF", 0)
    assert np.isnan(effect.estimate.value)
    assert "different items" in effect.reason


def test_metric_undefined_in_one_cell():
    population = b"same"
    one = Replicates(population, {"share": np.full(11, 0.3)})
    other = Replicates(population, {"share": np.full(11, np.nan)})
    comparisons = compare(
        [Cell("r", "m", 1, 0, 0, "bbq", "Q", one), Cell("r", "m", 1, 0, 0, "bbq", "Q+IF", other)]
    )
    assert np.isnan(comparisons[0].estimate.value)
    assert "undefined" in comparisons[0].reason


def test_effect_intervals_cover_the_truth():
    """Shares of yes of 30 templates under Q and Q+IF, which answer alike; 300 worlds."""
    rng = np.random.default_rng(12)
    num, size = 300, 20
    covered, errors, detected = 0, [], []
    for world in range(num):
        rates = rng.beta(2, 2, 30)
        hits = rng.binomial(size, rates)
        falls = rng.binomial(hits, rng.uniform(0, 0.4, 30))  # a fifth of the yes is taken back
        draws = Draws(400, seed=world)
        cells = []
        for condition, results in (("Q", hits), ("Q+IF", hits - falls)):
            tally = make_tally({"hits": results, "count": np.full(30, size)})
            replicates = bootstrap(tally, share, draws=draws).replicates
            cells.append(Cell("run", "m", 10, 0, 0, "bbq", condition, replicates))
        effect = find(compare(cells), "effect", "Q+IF", 0)
        covered += effect.estimate.low <= 0.1 <= effect.estimate.high
        errors.append(effect.error)
        assert effect.cell.replicates.degrees == 29
        detected.append(effect.estimate.value)
    assert 0.91 <= covered / num <= 0.98
    # The bootstrap's standard error is what effects really vary by from world to world.
    assert np.mean(errors) == pytest.approx(np.std(detected), rel=0.1)
