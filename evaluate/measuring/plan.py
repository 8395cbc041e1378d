"""What is to be measured: items, conditions and orders, cell by cell, the same for every model."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from selfcorrect.evaluate.experiments.wording import Stimuli
from selfcorrect.evaluate.prompts.dialogue import read_style
from selfcorrect.evaluate.prompts.items import Item, LoadedItems
from selfcorrect.evaluate.prompts.stimuli import Section, Turn, option_orders
from selfcorrect.evaluate.scoring.engine import Sampling
from selfcorrect.recipes.foundation.errors import InputError

# Raised whenever the same plan would give other rows; files of another format are measured anew.
FORMAT = 2


@dataclass(frozen=True, slots=True)
class Question:
    """One item with its options in one order: what is asked, and the continuations to score."""

    item: Item
    order: str  # "120": the first place shows the file's option 1; "10,0,..." past ten options
    options: tuple[str, ...]
    turns: list[Turn]


@dataclass(frozen=True)
class PlannedCell:
    """One experiment under one condition; its questions are filled in when they are needed."""

    experiment: str
    condition: str
    section: Section
    loaded: LoadedItems
    permutations: int
    style: str
    sampling: Sampling | None  # None where the model writes nothing by itself

    @property
    def name(self) -> str:
        """For progress and messages."""
        return f"{self.experiment} {self.condition}"

    @property
    def file_name(self) -> str:
        """See `cell_file_name`."""
        return cell_file_name(self.experiment, self.condition)

    @property
    def items(self) -> list[Item]:
        """The items, in the order of the results."""
        return self.loaded.items

    @property
    def left_out(self) -> dict[str, int]:
        """How many items are left out of a metric, by reason."""
        return self.loaded.left_out

    def questions(self, part: slice = slice(None)) -> Iterator[Question]:
        """The questions of some items, each item in all orders that are asked for."""
        permutations = self.permutations if self.section.shows_options else 1
        for item in self.items[part]:
            for order in option_orders(len(item.options), permutations):
                yield Question(
                    item,
                    ("" if len(order) <= 10 else ",").join(str(index) for index in order),
                    self.section.continuations(self.condition, item, order),
                    self.section.turns(self.condition, item, order),
                )

    @cached_property
    def settings_digest(self) -> str:
        """SHA-256 of all that decides what is asked: items, wording, orders, style, sampling."""
        settings = {
            "format": FORMAT,
            "experiment": self.experiment,
            "condition": self.condition,
            "wording": self.section.condition(self.condition).model_dump(
                mode="json",
                exclude={"judged"},  # decides what is made of the rows, not what is asked
            ),
            "section": self.section.model_dump(
                mode="json", exclude={"texts", "conditions", "controls"}
            ),
            "permutations": self.permutations if self.section.shows_options else 1,
            "style": self.style,
            "sampling": None if self.sampling is None else asdict(self.sampling),
            "items": self.loaded.digest,
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def cell_file_name(experiment: str, condition: str) -> str:
    """The name of a cell's file; the condition's own spelling stands in its metadata."""
    return f"{experiment}.{re.sub(r'[^A-Za-z0-9+-]', '_', condition)}.parquet"


@dataclass(frozen=True)
class EvaluationPlan:
    """The cells to measure: the same plan serves any number of models."""

    cells: list[PlannedCell]

    @property
    def settings_digest(self) -> str:
        """SHA-256 over the cells' digests."""
        digests = "\n".join(cell.settings_digest for cell in self.cells)
        return hashlib.sha256(digests.encode()).hexdigest()


def plan_evaluation(
    data_dir: Path,
    stimuli: Stimuli,
    experiments: Sequence[str],
    conditions: Sequence[str] | None,
    *,
    limit: int | None = None,
    seed: int = 0,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    samples: int = 1,
    permutations: int = 1,
    style: str = "auto",
) -> EvaluationPlan:
    """Load the items, experiment by experiment, and say under which conditions they are asked.

    `conditions` None means all that are offered, without the controls. A condition that one
    experiment does not offer is skipped for it. `limit` and `seed` choose the items (see each
    experiment's `load`); `seed` also drives the samples, `samples` of them per question.
    `permutations` (1, 3 or 6) says in how many orders options are shown (`option_orders`).
    `style` is "auto", "chat", "plain" (`dialogue.render`) or the path of a chat template.

    Raises InputError for unknown experiments, for a condition that none of them offers, and for
    whatever is wrong with the data.
    """
    from selfcorrect.evaluate.experiments import EXPERIMENTS

    sections = {name: stimuli.section(name) for name in experiments}
    offered = _offered(sections, conditions)
    sampling = Sampling(max_new_tokens, temperature, seed, samples)
    style = read_style(style)
    cells = []
    for name, section in sections.items():
        if not (data_dir / name).is_dir():
            raise InputError(
                f"{data_dir / name}: no such folder; put the files of {name} there "
                f"(published ones: `selfcorrect data fetch {name}`)"
            )
        loaded = EXPERIMENTS[name].load(data_dir, section, limit, seed)
        cells += [
            PlannedCell(
                name,
                condition,
                section,
                loaded,
                permutations,
                style,
                sampling if section.num_samples(condition) else None,
            )
            for condition in offered[name]
        ]
    _check_file_names(cells)
    return EvaluationPlan(cells)


def _offered(sections: dict[str, Section], asked: Sequence[str] | None) -> dict[str, list[str]]:
    """Each experiment's conditions among those asked for; InputError for one that none has."""
    if asked is None:
        return {name: list(section.conditions) for name, section in sections.items()}
    known = {name: [*section.conditions, *section.controls] for name, section in sections.items()}
    for condition in asked:
        if not any(condition in names for names in known.values()):
            every = ", ".join(dict.fromkeys(c for names in known.values() for c in names))
            raise InputError(f"condition {condition!r}: {', '.join(sections)} have only {every}")
    return {
        name: [condition for condition in dict.fromkeys(asked) if condition in names]
        for name, names in known.items()
    }


def _check_file_names(cells: Sequence[PlannedCell]) -> None:
    seen: dict[str, str] = {}
    for cell in cells:
        other = seen.setdefault(cell.file_name, cell.name)
        if other != cell.name:
            raise InputError(
                f"conditions {other!r} and {cell.name!r} share {cell.file_name}; rename"
            )
