"""Cells for tests of trends and thresholds, with hand-made replicates and no evaluation file."""

from typing import Any

import numpy as np

from selfcorrect.evaluate.statistics.bootstrap import Draws, Replicates
from selfcorrect.evaluate.statistics.comparisons import Cell

METRIC = "bias_ambiguous"
SIZES = {"small": 1_000, "middle": 10_000, "large": 100_000}
BLOCK = np.zeros(20)  # twenty items without any noise: every resample gives the value itself


def resampled_cell(
    value: float,
    *,
    model: str = "small",
    seed: int = 0,
    step: int = 0,
    condition: str = "Q",
    items: np.ndarray = BLOCK,
    draws: Draws | None = None,
    **replaced: Any,
) -> Cell:
    """Return a cell whose metric is `value` plus the mean of `items`, one number per item.

    `replaced` may give `metrics`, `population` and `kl` in place of the usual ones.
    """
    weights = (draws or Draws(200)).weights("all", np.ones(len(items)))
    metrics = replaced.get("metrics", {METRIC: weights @ (value + items) / len(items)})
    population = replaced.get("population", b"items")
    return Cell(
        run="r",
        model=model,
        parameters=SIZES[model],
        seed=seed,
        step=step,
        experiment="bbq",
        condition=condition,
        replicates=Replicates(population, metrics, len(items) - 1),
        kl=replaced.get("kl", None if step == 0 else 0.0025 * step**2),
    )
