"""Linear probes by layer: which of two options agrees with the stereotype, held out by group.

The inputs are contrasts: an option's hidden state minus the mean of the two in its pair. Templates
are held out (no template is in training and test), or whole categories, so that a probe is tested
on groups it has never seen. A probe "trained on" another condition is fitted to that condition's
states of the training part and applied to this condition's states of the held-out part.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from selfcorrect.evaluate.experiments.tally import (
    OVERALL,
    average_items,
    mean_columns,
    means,
    sum_by_cluster,
)
from selfcorrect.evaluate.statistics.bootstrap import Draws, bootstrap
from selfcorrect.recipes.foundation.progress import Progress, no_progress

TEMPLATE, CATEGORY = "template", "category"  # the kinds of held-out groups
STRENGTHS = tuple(10.0**power for power in range(-5, 0))  # C of the logistic regression
INNER_FOLDS = 3
NUM_SHUFFLES = 5

Vectors = Mapping[str, np.ndarray]  # condition -> contrasts (pairs, layers, hidden)


def probe_layers(
    vectors: Vectors,
    frame: pd.DataFrame,
    *,
    folds: int,
    seed: int,
    progress: Progress = no_progress,
) -> pd.DataFrame:
    """Return the held-out accuracy of every layer, trained on each condition, applied to each.

    `vectors` holds contrasts of shape (pairs, layers, hidden) per condition. `frame` has a row per
    pair: `cluster` (the template), `category`, and whether the `first` option agrees. With three
    categories or more, whole categories are also held out.

    The interval is a bootstrap of the held-out answers over templates; it does not cover other
    training sets. `baseline_accuracy` is the mean of NUM_SHUFFLES probes with the same C, trained
    and tested on labels that are swapped at random, with one coin toss per template. It shows
    chance, and would be above one half if templates leaked from test to training.
    """
    tables, draws = [], Draws()
    held_outs = [TEMPLATE] + ([CATEGORY] if frame["category"].nunique() > 2 else [])
    num_layers = next(iter(vectors.values())).shape[1]
    total, done = len(held_outs) * len(vectors) * num_layers, 0
    for held_out in held_outs:
        groups = frame["cluster" if held_out == TEMPLATE else "category"].to_numpy(dtype=str)
        parts = folds if held_out == TEMPLATE else len(set(groups))
        for trained_on in vectors:
            right: dict[str, dict[str, np.ndarray]] = {condition: {} for condition in vectors}
            for layer in range(num_layers):
                states = {name: array[:, layer].astype(float) for name, array in vectors.items()}
                answers = _held_out_answers(states, trained_on, frame, groups, parts, seed)
                for condition, (true, shuffled) in answers.items():
                    right[condition] |= {f"true {layer}": true, f"shuffled {layer}": shuffled}
                done += 1
                progress("probes", done, total)
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
    """Return by condition which pairs are answered correctly, with true and with shuffled labels.

    Every array has shape (pairs,): 1 correct, 0 wrong, 0.5 if the probe cannot tell the options.
    """
    from sklearn.model_selection import GroupKFold

    first = frame["first"].to_numpy(dtype=bool)
    shuffled = [first ^ flips for flips in _toss_coins(frame["cluster"].to_numpy(dtype=str), seed)]
    correct = {name: (np.empty(len(frame)), np.zeros(len(frame))) for name in vectors}
    for train, test in GroupKFold(parts).split(groups, groups=groups):
        half = vectors[trained_on][train]
        strength = _choose_strength(half, first[train], groups[train])
        for labels in (first, *shuffled):
            direction = _fit_direction(half, labels[train], strength)
            for name, states in vectors.items():
                right = _correct(states[test] @ direction, labels[test])
                if labels is first:
                    correct[name][0][test] = right
                else:
                    correct[name][1][test] += right / len(shuffled)
    return correct


def _choose_strength(half: np.ndarray, first: np.ndarray, groups: np.ndarray) -> float:
    """Return the C with the smallest log loss on groups held out within the training part."""
    from sklearn.model_selection import GroupKFold

    inner = GroupKFold(min(INNER_FOLDS, len(set(groups))))
    losses = np.zeros(len(STRENGTHS))
    for train, test in inner.split(groups, groups=groups):
        for index, strength in enumerate(STRENGTHS):
            scores = half[test] @ _fit_direction(half[train], first[train], strength)
            losses[index] += np.logaddexp(0, np.where(first[test], -scores, scores)).sum()
    return STRENGTHS[int(losses.argmin())]


def _fit_direction(half: np.ndarray, first: np.ndarray, strength: float) -> np.ndarray:
    """Fit a logistic regression with L2 penalty on standardised states; return (hidden,) weights.

    Both options of a pair are rows, one the negative of the other. So the classes are balanced, the
    means are 0, and no intercept is needed.
    """
    from sklearn import config_context
    from sklearn.linear_model import LogisticRegression

    scale = np.sqrt((half**2).mean(axis=0))
    scale[scale == 0] = 1
    rows, labels = half / scale, np.concatenate([first, ~first])
    # scikit-learn's checks take longer than such small fits.
    with config_context(assume_finite=True, skip_parameter_validation=True):
        probe = LogisticRegression(C=strength, fit_intercept=False, max_iter=1000)
        probe.fit(np.concatenate([rows, -rows]), labels)
    return np.asarray(probe.coef_[0] / scale)


def _correct(scores: np.ndarray, first: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.sign(scores) * np.where(first, 1, -1)


def _toss_coins(clusters: np.ndarray, seed: int) -> np.ndarray:
    """Return which pairs swap labels, shape (shuffles, pairs): a template's pairs all or none."""
    names, codes = np.unique(clusters, return_inverse=True)
    tosses = np.random.default_rng(seed).integers(0, 2, (NUM_SHUFFLES, len(names)))
    return tosses.astype(bool)[:, codes]


def _summarise(
    frame: pd.DataFrame, right: Mapping[str, np.ndarray], num_layers: int, draws: Draws
) -> pd.DataFrame:
    """Return accuracy and interval per layer and category, from each pair's correct answers."""
    pairs, shares = average_items(frame, right)  # a question in several orders counts once
    tally = sum_by_cluster(pairs, mean_columns(shares))
    estimates = bootstrap(tally, means, draws=draws).estimates
    rows = []
    for category, by_layer in estimates.items():
        members = frame if category == OVERALL else frame[frame["category"] == category]
        for layer in range(num_layers):
            accuracy = by_layer[f"true {layer}"]
            rows.append(
                {
                    "layer": layer,
                    "category": category,
                    "accuracy": accuracy.value,
                    "low": accuracy.low,
                    "high": accuracy.high,
                    "baseline_accuracy": by_layer[f"shuffled {layer}"].value,
                    "num_pairs": len(members),
                    "num_clusters": members["cluster"].nunique(),
                }
            )
    return pd.DataFrame(rows)
