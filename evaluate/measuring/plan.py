"""Plan an evaluation: items, conditions and option orders, cell by cell, the same for any model."""

import datetime
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from selfcorrect.evaluate.experiments.wording import Stimuli
from selfcorrect.evaluate.measuring.critiques import with_critiques
from selfcorrect.evaluate.prompts.dialogue import Style, read_style, with_thoughts
from selfcorrect.evaluate.prompts.items import Item, LoadedItems
from selfcorrect.evaluate.prompts.stimuli import (
    Section,
    ThoughtfulTurn,
    Turn,
    option_orders,
    spelled,
)
from selfcorrect.evaluate.scoring.engine import Sampling
from selfcorrect.recipes.foundation.errors import InputError

# Bump when the same plan would produce different rows; older cells are then re-measured.
FORMAT = 2


@dataclass(frozen=True, slots=True)
class Question:
    """One item with its options in one order: the dialogue, and the continuations to score."""

    item: Item
    order: str  # "120": the file's option 1 is shown first; "10,0,..." past ten options
    options: tuple[str, ...]
    ask: Callable[[], list[Turn]]

    @property
    def turns(self) -> list[Turn]:
        """The dialogue, written when it is needed: a prompt is often known already."""
        return self.ask()


@dataclass(frozen=True)
class PlannedCell:
    """One experiment under one condition; questions are generated when they are needed."""

    experiment: str
    condition: str
    section: Section
    loaded: LoadedItems
    permutations: int
    style: Style
    sampling: Sampling | None  # None: no turn is sampled

    @property
    def name(self) -> str:
        """The name in progress and messages."""
        return f"{self.experiment} {self.condition}"

    @property
    def file_name(self) -> str:
        """The name of the cell's file."""
        return cell_file_name(self.experiment, self.condition)

    @property
    def items(self) -> list[Item]:
        """The items, in the order of the file's rows."""
        return self.loaded.items

    def questions(self, part: slice = slice(None)) -> Iterator[Question]:
        """Yield the questions of some items, each item in all planned option orders."""
        permutations = self.permutations if self.section.shows_options else 1
        for item in self.items[part]:
            for order in option_orders(len(item.options), permutations):
                yield Question(
                    item,
                    spelled(order),
                    self.section.continuations(self.condition, item, order),
                    partial(self._turns, item, order),
                )

    def _turns(self, item: Item, order: Sequence[int]) -> list[Turn]:
        """Return the dialogue; where the template has a block for thoughts, reasoning is in it."""
        turns = self.section.turns(self.condition, item, order)
        thinks = self.style.thinking is not None and self.style.thinking.on is not None
        return with_thoughts(turns) if thinks else turns

    @property
    def samples_thoughts(self) -> bool:
        """Whether the model writes into its template's block for thoughts."""
        first = next(self.questions(slice(1)), None)
        return first is not None and isinstance(first.turns[-1], ThoughtfulTurn)

    @cached_property
    def settings_digest(self) -> str:
        """SHA-256 of everything that decides the rows: items, wording, orders, style, sampling.

        The date is apart: whether a template asks for it is known once there is a tokenizer.
        """
        settings = {
            "format": FORMAT,
            "experiment": self.experiment,
            "condition": self.condition,
            "wording": self.section.condition(self.condition).model_dump(
                mode="json",
                exclude={"judged"},  # affects statistics, not the rows
            ),
            "section": self.section.model_dump(
                mode="json", exclude={"texts", "conditions", "controls", "critiques"}
            ),
            "permutations": self.permutations if self.section.shows_options else 1,
            "style": self.style.template,
            "sampling": None if self.sampling is None else asdict(self.sampling),
            "items": self.loaded.digest,
        }
        if self.style.arguments:
            settings["chat_template_kwargs"] = self.style.arguments
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def cell_file_name(experiment: str, condition: str) -> str:
    """Return the name of a cell's file; its metadata hold the condition's exact spelling."""
    return f"{experiment}.{re.sub(r'[^A-Za-z0-9+-]', '_', condition)}.parquet"


@dataclass(frozen=True)
class EvaluationPlan:
    """The cells to measure, for any number of models."""

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
    chat_template_kwargs: Mapping[str, Any] | None = None,
    date: str | None = None,
    spoken_of: Collection[str] = (),
) -> EvaluationPlan:
    """Load the items of each experiment, and return the cells to measure.

    `conditions` None means all conditions, without controls. A condition that an experiment lacks
    is skipped for it. `limit` and `seed` select the items (see `Experiment.load`); `seed` also
    seeds the samples, of which each question gets `samples`. `permutations` (1, 3 or 6) selects
    the orders in which options are shown (`option_orders`). `style` is "auto", "chat", "plain"
    (`dialogue.Style`) or the path of a chat template. `chat_template_kwargs` are passed to chat
    templates, and `date` (ISO) is the day for those that write today's date, by default today.
    `spoken_of` are the categories of BBQ that feedback was made of (`Experiment.without`).

    Raises InputError for unknown experiments, for a condition that no experiment has, and for
    unusable data.
    """
    from selfcorrect.evaluate.experiments import EXPERIMENTS

    sections = {name: stimuli.section(name) for name in experiments}
    elsewhere = {
        condition
        for name in EXPERIMENTS
        if name not in sections and name in stimuli.sections
        for condition in (*stimuli.sections[name].conditions, *stimuli.sections[name].controls)
    }
    chosen = _chosen_conditions(sections, conditions, elsewhere)
    sampling = Sampling(max_new_tokens, temperature, seed, samples)
    day = date or datetime.date.today().isoformat()
    written = read_style(style, chat_template_kwargs, day)
    cells = []
    for name, section in sections.items():
        if not (data_dir / name).is_dir():
            raise InputError(
                f"{data_dir / name}: folder not found; put the files of {name} there "
                f"(published files: `selfcorrect data fetch {name}`)"
            )
        loaded = EXPERIMENTS[name].without(spoken_of).load(data_dir, section, limit, seed)
        criticised = loaded
        if section.critiques is not None and any(map(section.uses_critiques, chosen[name])):
            orders = permutations if section.shows_options else 1
            criticised = with_critiques(loaded, section.critiques, orders)
        cells += [
            PlannedCell(
                name,
                condition,
                section,
                criticised if section.uses_critiques(condition) else loaded,
                permutations,
                written,
                sampling if section.num_samples(condition) else None,
            )
            for condition in chosen[name]
        ]
    _check_file_names(cells)
    return EvaluationPlan(cells)


def _chosen_conditions(
    sections: dict[str, Section], conditions: Sequence[str] | None, elsewhere: Set[str]
) -> dict[str, list[str]]:
    """Return the conditions to ask per experiment; those of other experiments only are skipped.

    Raises InputError for a condition that no experiment has (`elsewhere`: those not chosen), and if
    the chosen experiments have none.
    """
    if conditions is None:
        return {name: list(section.conditions) for name, section in sections.items()}
    known = {name: [*section.conditions, *section.controls] for name, section in sections.items()}
    asked = {condition for names in known.values() for condition in names} & set(conditions)
    for condition in conditions:
        if condition not in asked and (not asked or condition not in elsewhere):
            available = ", ".join(dict.fromkeys(c for names in known.values() for c in names))
            raise InputError(
                f"unknown condition {condition!r}; {', '.join(sections)} have {available}"
            )
    return {
        name: [condition for condition in dict.fromkeys(conditions) if condition in names]
        for name, names in known.items()
    }


def _check_file_names(cells: Sequence[PlannedCell]) -> None:
    owners: dict[str, str] = {}
    for cell in cells:
        owner = owners.setdefault(cell.file_name, cell.name)
        if owner != cell.name:
            raise InputError(
                f"conditions {owner!r} and {cell.name!r} would share {cell.file_name}; rename one"
            )
