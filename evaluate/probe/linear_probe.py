"""A linear probe per layer: which of two options agrees with the stereotype, held out by group.

What is read are contrasts: an option's hidden state less the mean of its pair's two. What is held
out is a template (no template is in training and test) or a whole category, where a probe
meets people it has never seen. "Trained on" another condition: fitted to that condition's states
of the training part, applied to this one's states of the held-out part.
"""

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd

from selfcorrect.evaluate.experiments.tally import (
    OVERALL,
    mean_columns,
    means,
    pool,
    sum_by_cluster,
)
from selfcorrect.evaluate.statistics.bootstrap import Draws, bootstrap

TEMPLATE, CATEGORY = "template", "category"  # what is held out
STRENGTHS = tuple(10.0**power for power in range(-5, 0))  # C of the logistic regression
INNER_FOLDS = 3
NUM_SHUFFLES = 5

Progress = Callable[[str, int, int], None]  # what, how much is done, how much there is
Vectors = Mapping[str, np.ndarray]  # condition -> contrasts (pairs, layers, hidden)


def probe_layers(
    vectors: Vectors,
    frame: pd.DataFrame,
    *,
    folds: int,
    seed: int,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Held-out accuracy of every layer, trained on each condition, applied to each.

    `vectors` holds contrasts of shape (pairs, layers, hidden) per condition. `frame` has a row per
    pair: `cluster` (the template), `category`, and whether the `first` option agrees. Where there
    are three categories or more, each is also held out as a whole.

    The interval is a bootstrap over templates of the held-out answers; it does not contain what
    another training set would change. `baseline_accuracy` is the mean of NUM_SHUFFLES probes of the
    same strength, trained and tested on labels that a coin exchanges, one toss for all pairs of a
    template: what chance looks like, and above one half if templates leaked from test to training.
    """
    tables, draws = [], Draws()
    held_outs = [TEMPLATE] + ([CATEGORY] if frame["category"].nunique() > 2 else [])
    num_layers = next(iter(vectors.values())).shape[1]
    steps, done = len(held_outs) * len(vectors) * num_layers, 0
    for held_out in held_outs:
        groups = frame["cluster" if held_out == TEMPLATE else "category"].to_numpy(dtype=str)
        parts = folds if held_out == TEMPLATE else len(set(groups))
        for trained_on in vectors:
            right: dict[str, dict[str, np.ndarray]] = {condition: {} for condition in vectors}
            for layer in range(num_layers):
                here = {name: states[:, layer].astype(float) for name, states in vectors.items()}
                answers = _held_out_answers(here, trained_on, frame, groups, parts, seed)
                for condition, (true, shuffled) in answers.items():
                    right[condition] |= {f"true {layer}": true, f"shuffled {layer}": shuffled}
                done += 1
                if progress is not None:
                    progress("probes", done, steps)
            for condition, columns in right.items():
                table = _summarise(frame, columns, num_layers, draws)
                tables.append(
                    table.assign(trained_on=trained_on, condition=condition, held_out=held_out)
                )
    rows = pd.concat(tables, ignore_index=True)
    leading = ["trained_on", "condition", "held_out", "layer", "category"]
    return rows[[*leading, *(name for name in rows.columns if name not in leading)]]


def _held_out_answers(
    vectors: Vectors,
    trained_on: str,
    frame: pd.DataFrame,
    groups: np.ndarray,
    parts: int,
    seed: int,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By condition, what share of each pair is answered rightly: with true, with shuffled labels.

    Every array has shape (pairs,): 1 right, 0 wrong, 0.5 where the probe cannot tell the options.
    """
    from sklearn.model_selection import GroupKFold

    first = frame["first"].to_numpy(dtype=bool)
    shuffled = [first ^ flips for flips in _coins(frame["cluster"].to_numpy(dtype=str), seed)]
    found = {name: (np.empty(len(frame)), np.zeros(len(frame))) for name in vectors}
    for train, test in GroupKFold(parts).split(groups, groups=groups):
        half = vectors[trained_on][train]
        strength = _strength(half, first[train], groups[train])
        for labels in (first, *shuffled):
            direction = _direction(half, labels[train], strength)
            for name, states in vectors.items():
                right = _right(states[test] @ direction, labels[test])
                if labels is first:
                    found[name][0][test] = right
                else:
                    found[name][1][test] += right / len(shuffled)
    return found


def _strength(half: np.ndarray, first: np.ndarray, groups: np.ndarray) -> float:
    """The C of the least log loss on groups held out within the training part."""
    from sklearn.model_selection import GroupKFold

    inner = GroupKFold(min(INNER_FOLDS, len(set(groups))))
    losses = np.zeros(len(STRENGTHS))
    for train, test in inner.split(groups, groups=groups):
        for index, strength in enumerate(STRENGTHS):
            scores = half[test] @ _direction(half[train], first[train], strength)
            losses[index] += np.logaddexp(0, np.where(first[test], -scores, scores)).sum()
    return STRENGTHS[int(losses.argmin())]


def _direction(half: np.ndarray, first: np.ndarray, strength: float) -> np.ndarray:
    """Logistic regression with L2 penalty on standardised states: a vector of shape (hidden,).

    Both options of a pair are rows, one the negative of the other: the classes are balanced, the
    means 0, and no intercept is needed.
    """
    from sklearn import config_context
    from sklearn.linear_model import LogisticRegression

    scale = np.sqrt((half**2).mean(axis=0))
    scale[scale == 0] = 1
    rows, labels = half / scale, np.concatenate([first, ~first])
    # sklearn's own checks take longer than such small fits.
    with config_context(assume_finite=True, skip_parameter_validation=True):
        probe = LogisticRegression(C=strength, fit_intercept=False, max_iter=1000)
        probe.fit(np.concatenate([rows, -rows]), labels)
    return np.asarray(probe.coef_[0] / scale)


def _right(scores: np.ndarray, first: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.sign(scores) * np.where(first, 1, -1)


def _coins(clusters: np.ndarray, seed: int) -> np.ndarray:
    """Which pairs exchange their labels, (shuffles, pairs): a template's pairs all or none."""
    names, codes = np.unique(clusters, return_inverse=True)
    tosses = np.random.default_rng(seed).integers(0, 2, (NUM_SHUFFLES, len(names)))
    return tosses.astype(bool)[:, codes]


def _summarise(
    frame: pd.DataFrame, right: Mapping[str, np.ndarray], num_layers: int, draws: Draws
) -> pd.DataFrame:
    """Accuracy and interval per layer and category, from what was right of each pair."""
    tally = sum_by_cluster(frame, mean_columns(right))
    estimates = bootstrap(tally, lambda sums: means(pool(sums)), draws=draws).estimates
    rows = []
    for category, found in estimates.items():
        members = frame if category == OVERALL else frame[frame["category"] == category]
        for layer in range(num_layers):
            accuracy = found[f"true {layer}"]
            rows.append(
                {
                    "layer": layer,
                    "category": category,
                    "accuracy": accuracy.value,
                    "low": accuracy.low,
                    "high": accuracy.high,
                    "baseline_accuracy": found[f"shuffled {layer}"].value,
                    "num_pairs": len(members),
                    "num_clusters": members["cluster"].nunique(),
                }
            )
    return pd.DataFrame(rows)
