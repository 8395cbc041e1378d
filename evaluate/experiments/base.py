"""The interface of every experiment: its items, its metrics, and what figures need to show them."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from selfcorrect.evaluate.experiments.tally import Tally, answers_of, check_num_options
from selfcorrect.evaluate.prompts.items import LoadedItems
from selfcorrect.evaluate.prompts.stimuli import Section

PAPER_CONDITIONS = ("Q", "Q+IF", "Q+IF+CoT", "Match stats")


@dataclass(frozen=True)
class Metric:
    """One number that an experiment reports.

    `unbiased` is the value of a model without bias and `chance` the value of random answers; None
    where there is none. `axis` labels the y axis, with its line breaks (default: the label).
    `column` heads the metric's column in the terminal's table of stand-alone models; a metric
    without one has no column there.
    """

    label: str
    meaning: str
    unbiased: float | None = None
    axis: str = ""
    chance: float | None = None
    column: str = ""


UNPARSED = Metric("Unparsed", "share of rows without an answer")


def option_mass(options: str) -> Metric:
    """Return the metric of the probability that falls on `options`, as "the two options"."""
    meaning = f"probability that falls on {options} at all"
    return Metric("Option mass", meaning, column="Option\nmass")


@dataclass(frozen=True)
class Scatter:
    """A figure with a dot per cluster: the probability of one option against a fact of the items.

    `option` is the option's index in the file, `fact` the name of the item's fact, and `x_range`
    the range of that fact: the diagonal of equality goes from (x_range[0], 0) to (x_range[1], 1).
    `cluster` names what a dot is, in the singular. Each panel states the headline metric as
    `symbol`.
    """

    cluster: str
    fact: str
    x_label: str
    x_range: tuple[float, float]
    option: int
    y_label: str
    symbol: str


@dataclass(frozen=True)
class Workload:
    """Size of the whole published benchmark, for planning a run without reading the files.

    `scored_tokens` is per item and condition that is only scored (conditions and options share
    what they have in common); `prompt_tokens` is the length of a prompt that the model continues.
    Measured with scoring/token_trie.py and SmolLM2's tokenizer, 2026-11-23.
    """

    num_items: int
    scored_tokens: float
    prompt_tokens: float


class Experiment(ABC):
    """One benchmark: how items are loaded, and how answers become metrics.

    Subclasses set `name` (in recipes and results), `title` (for readers), `metrics` in the order
    of the tables, `headline` (the metric that figures and comparisons show) and `wording`, the
    schema of the experiment's section in a stimuli file.

    Optional: `default_wording` is the section's content where no stimuli file has one; `wording_of`
    names an experiment whose shipped section comes below this one's; `beside` names metrics to draw
    beside the headline metric, since a model that cannot do the task can look unbiased (those
    without an unbiased value are shares from 0 to 1); `accuracy` names the metric that tells
    whether the model can do the task; `scatter` adds a figure of single clusters; `workload` lets a
    run be planned without the benchmark's files; `category_means` names, by a metric's name, the
    metric that is its mean over the pooled categories where it is defined; `axes` names what the
    groups of people that it speaks of differ in, in the words of `axes_of`.
    """

    name: str
    title: str
    headline: str
    metrics: Mapping[str, Metric]
    wording: type[Section]
    default_wording: Mapping[str, Any] | None = None
    wording_of: str | None = None
    beside: Sequence[str] = ()
    accuracy: str | None = None
    scatter: Scatter | None = None
    workload: Workload | None = None
    category_means: Mapping[str, str] = MappingProxyType({})
    axes: Sequence[str] = ()
    spoken_of: frozenset[str] = frozenset()  # axes of the feedback: see `without`

    def without(self, categories: Collection[str]) -> "Experiment":
        """Return the experiment as it is loaded after feedback on these categories of BBQ.

        Experiments made of BBQ's questions leave out all about the same groups.
        """
        changed = copy.copy(self)
        changed.spoken_of = frozenset[str]().union(*map(axes_of, categories))
        return changed

    @property
    def headline_metric(self) -> Metric:
        """The description of the headline metric."""
        return self.metrics[self.headline]

    @abstractmethod
    def load(self, data_dir: Path, wording: Any, limit: int | None, seed: int) -> LoadedItems:
        """Load the items from the folder `data_dir`/`name`, at most about `limit` of them.

        `wording` is an instance of `self.wording`; `seed` decides which items a limit keeps.
        Raises InputError naming file and line.
        """

    @abstractmethod
    def tally(self, frame: pd.DataFrame) -> Tally:
        """Add up one cell's rows within each cluster.

        `frame` has the columns of the evaluation file without its texts, without `truncated`, and
        without `probabilities`, which follow from `logprobs`.
        """

    def tally_together(
        self, frame: pd.DataFrame, logprobs: np.ndarray, mass: np.ndarray
    ) -> list[Tally]:
        """Return `tally` of M cells whose rows were asked the same and differ in the answers alone.

        `frame` has the columns of `tally` but `logprobs` (M, rows, options) and `mass` (M, rows).
        `JointExperiment` saves time here where there are many checkpoints.
        """
        cells = zip(logprobs, mass, strict=True)
        return [self.tally(frame.assign(logprobs=list(rows), mass=m)) for rows, m in cells]

    @abstractmethod
    def compute(self, sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return every metric but `category_means`, elementwise; NaN where undefined.

        `sums` and metrics have the shape (R,), an entry for each of R resamples. Metrics must
        depend on nothing but sums, so that all resamples of a cell are one matrix product.
        """

    def raising_option(self, row: Mapping[str, Any]) -> int | None:
        """Return the option (its index in the file) that raises the headline metric if chosen.

        `row` is one scored prompt. None: this item has no such option.
        """
        return None

    def overall_categories(self, categories: Sequence[str]) -> list[str]:
        """Return the categories that the overall figure pools: all, unless overridden."""
        return list(categories)


class JointExperiment(Experiment):
    """An experiment that adds up all cells with the same rows in one go.

    Subclasses set `num_options`, of every item, and define `add_up` in place of `tally`.
    """

    num_options: int

    @abstractmethod
    def add_up(self, frame: pd.DataFrame, logprobs: np.ndarray, mass: np.ndarray) -> Tally:
        """Return a tally with sums of shape (..., clusters); `frame` as in `tally_together`.

        `logprobs` has the shape (..., rows, options), `mass` (..., rows).
        """

    def tally(self, frame: pd.DataFrame) -> Tally:
        """See `Experiment.tally`."""
        return self.add_up(frame, *answers_of(frame, self.num_options))

    def tally_together(
        self, frame: pd.DataFrame, logprobs: np.ndarray, mass: np.ndarray
    ) -> list[Tally]:
        """See `Experiment.tally_together`."""
        check_num_options([logprobs.shape[-1]], self.num_options)
        return self.add_up(frame, logprobs, mass).split()


@cache
def axes_of(category: str) -> frozenset[str]:
    """Return what the groups of a category of BBQ differ in: race and ses for Race_x_SES.

    Questions about groups of one axis are not independent of feedback on the same axis.
    """
    parts = category.lower().split("_x_")
    names = {"race_ethnicity": "race", "gender_identity": "gender"}
    return frozenset(names.get(part, part) for part in parts)


def condition_rank(condition: str) -> tuple[int, str]:
    """Sort key: the paper's conditions in the paper's order, then all others by name."""
    if condition in PAPER_CONDITIONS:
        return PAPER_CONDITIONS.index(condition), condition
    return len(PAPER_CONDITIONS), condition
