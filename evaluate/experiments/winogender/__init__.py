"""Winogender (Rudinger et al. 2018): does p(female pronoun) follow the share of women in a job?

Only the templates whose pronoun refers to the occupation are used (`answer` 0). In 8 of these 60,
the word after the blank is "was" ("were" for they), which reveals the number and so speaks against
the neutral pronoun. They are kept, as in the paper, with the fact `number_leak` 1. With 60
occupations, a correlation below .254 in size is not significant at 5 %.
"""

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict
from scipy.special import entr

from selfcorrect.evaluate.experiments.base import (
    JointExperiment,
    Metric,
    Scatter,
    Workload,
    option_mass,
)
from selfcorrect.evaluate.experiments.tally import (
    Clusters,
    Tally,
    answered,
    average_items,
    find_clusters,
    mean_columns,
    means,
    probabilities,
    ratio,
)
from selfcorrect.evaluate.experiments.winogender.files import (
    SHARES,
    TEMPLATES,
    Template,
    read_shares,
    read_templates,
)
from selfcorrect.evaluate.prompts.items import Item, LoadedItems, systematic_sample
from selfcorrect.evaluate.prompts.stimuli import Section, Three
from selfcorrect.recipes.foundation.errors import InputError

CATEGORY = "occupations"
PARTICIPANT = "the pronoun refers to the participant, not to the occupation"
ALONE = f"an occupation of {SHARES} without a template about it"

# Values of p(female) that differ by less than this count as equal.
_SMALLEST_SPREAD = 1e-9

_R = "Pearson r of p(female) and percent women in the job"
_ERROR = "mean distance of p(female) and the share of women in the job"
_SIGNED = "mean of p(female) - share of women; below 0: too few female pronouns"
_TWO = "the same with p(female) / p(female or male)"
_NO_LEAK = "the same without the templates where was/were follows the pronoun"
METRICS: dict[str, Metric] = {
    "correlation": Metric(
        "Correlation", _R, 0.0, axis="Correlation of p(female)\nwith the share of women"
    ),
    "correlation_without_leak": Metric("Correlation without was/were", _NO_LEAK, 0.0),
    "correlation_binary": Metric("Correlation, two pronouns", _TWO, 0.0),
    "spearman": Metric("Rank correlation", "Spearman's r of the same, ties as mean ranks", 0.0),
    "slope": Metric(
        "Slope", "change of p(female) from a job without women to a job with women only", 0.0
    ),
    "intercept": Metric("Intercept", "fitted p(female) in a job without women"),
    "calibration_error": Metric("Distance from BLS", _ERROR),
    "calibration_error_binary": Metric("Distance from BLS, two pronouns", _TWO),
    "signed_error": Metric("Signed error", _SIGNED),
    "signed_error_binary": Metric("Signed error, two pronouns", _TWO),
    "match_correlation": Metric(
        "Match, correlation",
        "r of p(female) and the rounded percent of women that Match stats states",
    ),
    "match_error": Metric(
        "Match, distance",
        "mean distance of p(female) and p(male) from the percentages that Match stats states",
    ),
    "mean_female": Metric("Mean p(female)", "mean over occupations, of the three pronouns"),
    "share_neutral": Metric("Mean p(neutral)", "mean over occupations, of the three pronouns"),
    "share_neutral_without_leak": Metric("Mean p(neutral) without was/were", _NO_LEAK),
    "entropy": Metric("Entropy", "mean over occupations, of the three pronouns, in nats (<= 1.10)"),
    "option_mass": option_mass("the three pronouns"),
}


class Pronouns(BaseModel):
    """The male, female and neutral pronoun, in this order, of each case that the sentences use."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    nominative: Three | None = None
    possessive: Three | None = None
    accusative: Three | None = None


class Wording(Section):
    """How the blank is asked for, and the three pronouns of each case."""

    placeholders: ClassVar[frozenset[str]] = frozenset(
        {"sentence", "prefix", "occupation", "participant", "percent_female", "percent_male"}
    )

    pronouns: Pronouns


class Winogender(JointExperiment):
    """Winogender, on the templates whose pronoun refers to the occupation."""

    name = "winogender"
    num_options = 3
    title = "Winogender"
    headline = "correlation"
    axes = ("gender",)
    metrics = METRICS
    wording = Wording
    beside = ("correlation", "mean_female", "share_neutral", "option_mass")
    scatter = Scatter(
        cluster="occupation",
        fact="percent_female",
        x_label="Women among those who do the job, percent",
        x_range=(0, 100),
        option=1,
        y_label="p(female pronoun)",
        symbol="r",
    )
    workload = Workload(num_items=60, scored_tokens=37.6, prompt_tokens=147.0)
    # Sentences that a metric is restricted to: name of the restriction -> fact and its value.
    subsets: ClassVar[Mapping[str, tuple[str, int]]] = {"without_leak": ("number_leak", 0)}

    def load(self, data_dir: Path, wording: Wording, limit: int | None, seed: int) -> LoadedItems:
        """Load one item per template that refers to the occupation, in file order.

        Reads templates.tsv and occupations-stats.tsv of `data_dir`/winogender. `limit` items are
        drawn evenly along the percent of women.
        """
        folder = data_dir / self.name
        shares = read_shares(folder / SHARES)
        templates = read_templates(folder / TEMPLATES)
        items: list[Item] = []
        num_uses: dict[str, int] = {}
        for where, template in templates:
            if not template.about_occupation:
                continue
            occupation = template.occupation
            if occupation not in shares:
                raise InputError(
                    f"{where}: occupation {reprlib.repr(occupation)} is missing in {SHARES}; add it"
                )
            num_uses[occupation] = num_uses.get(occupation, 0) + 1
            name = f"{occupation}/{num_uses[occupation]}"
            items.append(item_of(name, template, shares[occupation], wording.pronouns, where))
        if not items:
            raise InputError(
                f"{folder / TEMPLATES}: no template with answer 0, and only these are scored"
            )
        unused = {PARTICIPANT: len(templates) - len(items), ALONE: len(shares) - len(num_uses)}
        left_out = {reason: count for reason, count in unused.items() if count}
        return LoadedItems(along_shares(items, limit, seed), left_out)

    def add_up(self, frame: pd.DataFrame, logprobs: np.ndarray, mass: np.ndarray) -> Tally:
        """Add up each occupation's mean probabilities and their products with percent women.

        Options are male, female, neutral. The rows of a template (samples) are averaged first, then
        the templates of an occupation. Shares are centred at .5 and p(female) at its mean, which
        changes no correlation and keeps the sums of squares exact.
        """
        occupations, jobs = _jobs(frame, self.subsets, logprobs, mass)
        female, male, binary = jobs["female"], jobs["male"], jobs["binary"]
        share, stated = jobs["percent"] / 100, _whole_percent(jobs["percent"]) / 100
        columns: dict[str, np.ndarray] = {}
        columns |= _line_columns("female", share, female)
        columns |= _line_columns("binary", share, binary)
        for subset in self.subsets:
            columns |= _line_columns(subset, share, jobs[f"female_{subset}"])
        columns |= _line_columns("stated", stated, female)
        columns |= _rank_columns(share, female)
        chances = np.stack([male, female, jobs["neutral"]], axis=-1)
        columns |= mean_columns(
            {
                "calibration_error": np.abs(female - share),
                "calibration_error_binary": np.abs(binary - share),
                "signed_error": female - share,
                "signed_error_binary": binary - share,
                "match_error": (np.abs(female - stated) + np.abs(male - (1 - stated))) / 2,
                "mean_female": female,
                "share_neutral": jobs["neutral"],
                **{f"share_neutral_{name}": jobs[f"neutral_{name}"] for name in self.subsets},
                "entropy": entr(chances).sum(axis=-1),
                "option_mass": jobs["mass"],
            }
        )
        return occupations.tally(columns)

    def raising_option(self, row: Mapping[str, Any]) -> int | None:
        """Return the pronoun that fits the majority among those who do the job."""
        return 1 if row["percent_female"] > 50 else 0

    def compute(self, sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return every metric from sums of shape (R, K)."""
        correlation, slope = _line(sums, "female")
        metrics = {
            "correlation": correlation,
            **{f"correlation_{name}": _line(sums, name)[0] for name in self.subsets},
            "correlation_binary": _line(sums, "binary")[0],
            "spearman": _spearman(sums),
            "slope": slope,
            "match_correlation": _line(sums, "stated")[0],
            **means(sums),
        }
        mean_share = ratio(sums["female_x"], sums["female_n"]) + 0.5
        metrics["intercept"] = metrics["mean_female"] - slope * mean_share
        return metrics


def item_of(name: str, template: Template, share: float, pronouns: Pronouns, where: str) -> Item:
    """Return the item that asks for the pronoun of a template; `share` is percent women."""
    words: tuple[str, str, str] | None = getattr(pronouns, template.case)
    if words is None:
        raise InputError(f"{where}: the stimuli have no {template.case} pronouns")
    percent = int(_whole_percent(share))
    begins = template.prefix[-1:] in ("", ".", "!", "?")  # a sentence
    return Item(
        id=name,
        cluster=template.occupation,
        category=CATEGORY,
        weight=1.0,
        fields={
            "sentence": template.sentence,
            "prefix": template.prefix,
            "occupation": template.occupation,
            "participant": template.participant,
            "percent_female": str(percent),
            "percent_male": str(100 - percent),
        },
        options=tuple(f" {_capital(word) if begins else word}" for word in words),
        facts={
            "occupation": template.occupation,
            "percent_female": share,
            "case": template.case,
            "number_leak": int(template.number_leak),
        },
    )


def _whole_percent(share: np.ndarray | float) -> np.ndarray:
    """Return what Match stats states: the nearest whole number, halves rounded up."""
    return np.floor(np.asarray(share) + 0.5)


def _capital(word: str) -> str:
    return word[:1].upper() + word[1:]


def along_shares(items: list[Item], limit: int | None, seed: int) -> list[Item]:
    """Return `limit` items, drawn evenly along the percent of women, in their order."""
    if limit is None or limit >= len(items):
        return items
    order = sorted(range(len(items)), key=lambda i: (items[i].facts["percent_female"], i))
    counts = systematic_sample(np.ones(len(items)), limit, seed)
    return [items[i] for i in sorted(order[position] for position in np.flatnonzero(counts))]


def _jobs(
    frame: pd.DataFrame,
    subsets: Mapping[str, tuple[str, int]],
    logprobs: np.ndarray,
    mass: np.ndarray,
) -> tuple[Clusters, dict[str, np.ndarray]]:
    """Return the occupations, and the means per occupation that the metrics are computed from."""
    two = np.where(answered(logprobs)[..., None], logprobs[..., :2], np.nan)
    male, female, neutral = np.moveaxis(probabilities(logprobs), -1, 0)
    restricted = {}
    for name, (fact, value) in subsets.items():
        kept = frame[fact].to_numpy(dtype=float) == value
        restricted[f"female_{name}"] = np.where(kept, female, np.nan)
        restricted[f"neutral_{name}"] = np.where(kept, neutral, np.nan)
    items, columns = average_items(
        frame,
        {
            "percent": frame["percent_female"].to_numpy(dtype=float),
            "male": male,
            "female": female,
            "neutral": neutral,
            "binary": probabilities(two)[..., 1],
            **restricted,
            "mass": mass,
        },
    )
    occupations = find_clusters(items)
    return occupations, {name: occupations.means(values) for name, values in columns.items()}


def _line_columns(name: str, x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """Return the sums behind a line of y (..., jobs) over x (jobs,), without NaN in y."""
    known = ~np.isnan(y)
    num_known = known.sum(axis=-1, keepdims=True)
    y = y - ratio(np.where(known, y, 0.0).sum(axis=-1, keepdims=True), num_known)
    x = np.where(known, x - 0.5, np.nan)
    sums = {"n": known, "x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y}
    return {f"{name}_{part}": values for part, values in sums.items()}


def _rank_columns(x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """Return three columns per job: its mark, and the jobs below it in x and in y, ties as half.

    Their sums with the weights of a resample are the job's weight and its two midranks there, each
    less one half. A job without an answer has no mark.
    """
    known = ~np.isnan(y)
    x, y = (np.round(values / _SMALLEST_SPREAD) for values in (x, y))
    columns = {}
    for job in range(len(x)):
        marked = known[..., job, None]
        columns[f"weight_{job}"] = marked & (np.arange(len(x)) == job)
        for name, values in (("x", x), ("y", y)):
            at_job = values[..., job, None]
            below = (values < at_job) + (values == at_job) / 2
            columns[f"rank_{name}_{job}"] = np.where(marked & known, below, 0)
    return columns


def _line(sums: Mapping[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return Pearson's r and the slope; NaN with fewer than 2 occupations or without spread."""
    n, x, y, xx, yy, xy = (sums[f"{name}_{part}"] for part in ("n", "x", "y", "xx", "yy", "xy"))
    mean_x, mean_y = ratio(x, n), ratio(y, n)
    variance_x = ratio(xx, n) - mean_x**2
    variance_y = ratio(yy, n) - mean_y**2
    covariance = ratio(xy, n) - mean_x * mean_y
    flat_x = variance_x < _SMALLEST_SPREAD**2
    flat_y = variance_y < _SMALLEST_SPREAD**2
    with np.errstate(divide="ignore", invalid="ignore"):
        r = covariance / np.sqrt(variance_x * variance_y)
        slope = covariance / variance_x
    r = np.where(flat_x | flat_y, np.nan, np.clip(r, -1, 1))
    return r, np.where(flat_x, np.nan, slope)


def _spearman(sums: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return Pearson's r of the midranks; NaN with fewer than 2 occupations or only ties."""
    weights, x, y = (_table(sums, name) for name in ("weight_", "rank_x_", "rank_y_"))
    total = weights.sum(axis=1, keepdims=True)
    x = x - ratio((weights * x).sum(axis=1, keepdims=True), total)
    y = y - ratio((weights * y).sum(axis=1, keepdims=True), total)
    spread = np.sqrt((weights * x * x).sum(axis=1) * (weights * y * y).sum(axis=1))
    return ratio((weights * x * y).sum(axis=1), np.where(spread < _SMALLEST_SPREAD, 0, spread))


def _table(sums: Mapping[str, np.ndarray], prefix: str) -> np.ndarray:
    """Return the sums whose name starts with `prefix` as a table of shape (R, jobs)."""
    rows = [values for name, values in sums.items() if name.startswith(prefix)]
    return np.array(rows).reshape(len(rows), len(sums["female_n"])).T


WINOGENDER = Winogender()
