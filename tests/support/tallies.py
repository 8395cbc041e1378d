"""Hand-made tallies with one metric, for tests of resampling."""

from collections.abc import Mapping, Sequence

import numpy as np

from selfcorrect.evaluate.experiments.tally import Tally


def make_tally(
    sums: Mapping[str, Sequence[float]],
    strata: Sequence[int] | None = None,
    units: Sequence[float] | None = None,
    clusters: Sequence[str] | None = None,
    categories: Sequence[str] | None = None,
) -> Tally:
    """Return a tally of clusters; by default all in one category, of one unit each."""
    count = len(next(iter(sums.values())))
    category = np.zeros(count, dtype=int) if strata is None else np.asarray(strata)
    return Tally(
        clusters=list(clusters or [f"t{i:03d}" for i in range(count)]),
        strata=category,
        categories=list(categories or [f"c{k}" for k in range(category.max() + 1)]),
        units=np.ones(count) if units is None else np.asarray(units, dtype=float),
        sums={name: np.asarray(values, dtype=float) for name, values in sums.items()},
    )


def share(sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the metric "share": hits per count, NaN without a count."""
    hits, count = sums["hits"], sums["count"]
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"share": np.where(count > 0, hits / count, np.nan)}
