"""How answers move over rounds: from a condition to one whose dialogue goes on after its texts.

`Q+reviews 2` continues `Q+reviews 1`, and the model writes the same texts in both up to there,
since random numbers do not depend on the condition. So the answers of one item, order and draw are
compared one by one. Quantities after Liu et al. 2025 (arXiv 2510.07290), who show convergence over
rounds.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import entr

from selfcorrect.evaluate.experiments.base import Experiment
from selfcorrect.evaluate.experiments.tally import (
    OVERALL,
    average_items,
    option_order,
    probabilities,
    ratio,
    sum_by_cluster,
)
from selfcorrect.evaluate.statistics.bootstrap import Draws, Estimate, bootstrap

QUANTITIES = {
    "share_changed": "share of answers that differ from those of the round before",
    "flips_towards": "share of answers that turn to the option that raises the headline metric",
    "flips_away": "share of answers that turn away from that option",
    "answer_entropy_before": "entropy of an item's answer in the round before, nats: of the "
    "options' probabilities, averaged over draws",
    "answer_entropy": "the same in this round",
}
_KEYS = ["item", "order", "draw"]


def round_answers(experiment: Experiment, frame: pd.DataFrame) -> pd.DataFrame:
    """Return the answer of each row: its option in the file (NaN without one), and its entropy.

    `raising` is the option that raises the headline metric, NaN where there is none. `entropy` is
    that of the item's mean probabilities over the draws of one order.
    """
    choices, raising, shares = [], [], []
    rows: list[dict[str, Any]] = frame.to_dict("records")  # type: ignore[assignment]
    for row in rows:
        logprobs = np.asarray(row["logprobs"], dtype=float)
        (chances,) = probabilities(logprobs[None])
        order = option_order(str(row["order"]), len(logprobs))
        choices.append(np.nan if np.isnan(chances[0]) else float(order[int(chances.argmax())]))
        option = experiment.raising_option(row)
        raising.append(np.nan if option is None or pd.isna(option) else float(option))
        shares.append(chances)
    answers = frame[[*_KEYS, "cluster", "category", "weight"]].reset_index(drop=True)
    answers = answers.assign(choice=choices, raising=raising, entropy=np.nan)
    for places in answers.groupby(["item", "order"]).indices.values():
        known = [shares[place] for place in places if not np.isnan(shares[place]).any()]
        if known:
            answers.loc[places, "entropy"] = entr(np.mean(known, axis=0)).sum()
    return answers


def round_estimates(
    experiment: Experiment, before: pd.DataFrame, after: pd.DataFrame, draws: Draws
) -> dict[str, Estimate]:
    """Return the QUANTITIES of a round over the pooled categories, from `round_answers`.

    Only rows with an answer in both rounds count. An item counts once: its orders and draws are
    averaged first. Empty if the rounds share no such rows.
    """
    columns = [*_KEYS, "choice", "entropy"]
    rows = after.merge(before[columns], on=_KEYS, suffixes=("", "_before"))
    rows = rows[rows["choice"].notna() & rows["choice_before"].notna()]
    if rows.empty:
        return {}
    rows = rows.reset_index(drop=True)
    old, new, raising = (rows[name].to_numpy() for name in ("choice_before", "choice", "raising"))
    changed, known = old != new, ~np.isnan(raising)
    values = {
        "share_changed": changed.astype(float),
        "flips_towards": np.where(known, changed & (new == raising), np.nan),
        "flips_away": np.where(known, changed & (old == raising), np.nan),
        "answer_entropy_before": rows["entropy_before"].to_numpy(),
        "answer_entropy": rows["entropy"].to_numpy(),
    }
    items, means = average_items(rows, values)
    counts = {f"count_{name}": ~np.isnan(column) for name, column in means.items()}
    tally = sum_by_cluster(items, {**means, **counts}, items["weight"].to_numpy(dtype=float))
    pooled = experiment.overall_categories(tally.categories)
    return bootstrap(tally, _compute, pooled, draws).estimates[OVERALL]


def _compute(sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: ratio(sums[name], sums[f"count_{name}"]) for name in QUANTITIES}
