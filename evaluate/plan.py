"""What is to be measured: items and their dialogues, cell by cell, the same for every model."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from selfcorrect.evaluate.dialogue import Style
from selfcorrect.evaluate.items import Item
from selfcorrect.evaluate.stimuli import Stimuli, Turn
from selfcorrect.recipes.errors import InputError

# Raised whenever the same plan would give other rows; files of another format are measured anew.
FORMAT = 1


@dataclass(frozen=True)
class Sampling:
    """How the model's own text is drawn where a condition asks for it."""

    max_new_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class PlannedCell:
    """One experiment under one condition: its items, each with its dialogue."""

    experiment: str
    condition: str
    items: list[Item]
    dialogues: list[list[Turn]]
    left_out: dict[str, int]
    style: Style
    sampling: Sampling | None  # None where the condition has no sample

    @property
    def name(self) -> str:
        """For progress and messages."""
        return f"{self.experiment} {self.condition}"

    @property
    def file_name(self) -> str:
        """The condition's own spelling stands in the file's metadata."""
        return f"{self.experiment}.{re.sub(r'[^A-Za-z0-9+-]', '_', self.condition)}.parquet"

    @cached_property
    def settings_digest(self) -> str:
        """SHA-256 of all that decides what is asked: items, dialogues, style, sampling."""
        digest = hashlib.sha256()
        settings = [FORMAT, self.experiment, self.condition, self.style, self.left_out]
        sampling = None if self.sampling is None else asdict(self.sampling)
        digest.update(json.dumps([*settings, sampling], sort_keys=True).encode())
        for item, dialogue in zip(self.items, self.dialogues, strict=True):
            asked = [asdict(item), [asdict(turn) for turn in dialogue]]
            digest.update(json.dumps(asked, sort_keys=True).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class EvaluationPlan:
    """The cells to measure, loaded and filled in: the same plan serves any number of models."""

    cells: list[PlannedCell]

    @property
    def settings_digest(self) -> str:
        """SHA-256 over the cells' digests."""
        digests = "\n".join(cell.settings_digest for cell in self.cells)
        return hashlib.sha256(digests.encode()).hexdigest()


def plan(
    data_dir: Path,
    stimuli: Stimuli,
    experiments: Sequence[str],
    conditions: Sequence[str] | None,
    *,
    limit: int | None = None,
    seed: int = 0,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    style: Style = "auto",
) -> EvaluationPlan:
    """Load the items and fill in their dialogues, experiment by experiment.

    `conditions` None means all that are offered. A condition that one experiment does not offer is
    skipped for it. `limit` and `seed` choose
    the items (see each experiment's `load`); `seed` also drives the samples.

    Raises InputError for unknown experiments, for a condition that none of them offers, and for
    whatever is wrong with the data.
    """
    from selfcorrect.evaluate.experiments import EXPERIMENTS

    offered = {name: stimuli.section(name).conditions for name in experiments}
    known = list(dict.fromkeys(name for conditions_ in offered.values() for name in conditions_))
    conditions = known if conditions is None else conditions
    for condition in conditions:
        if condition not in known:
            names = ", ".join(experiments)
            raise InputError(f"condition {condition!r}: {names} have only {', '.join(known)}")
    sampling = Sampling(max_new_tokens, temperature, seed)
    cells = []
    for name in dict.fromkeys(experiments):
        section = stimuli.section(name)
        loaded = EXPERIMENTS[name].load(data_dir, stimuli, limit, seed)
        for condition in dict.fromkeys(conditions):
            if condition not in offered[name]:
                continue
            dialogues = [section.turns(condition, item) for item in loaded.items]
            own = sampling if section.samples(condition) else None
            left_out = dict(loaded.left_out)
            cells.append(
                PlannedCell(name, condition, loaded.items, dialogues, left_out, style, own)
            )
    _check_file_names(cells)
    return EvaluationPlan(cells)


def _check_file_names(cells: Sequence[PlannedCell]) -> None:
    seen: dict[str, str] = {}
    for cell in cells:
        other = seen.setdefault(cell.file_name, cell.name)
        if other != cell.name:
            raise InputError(
                f"conditions {other!r} and {cell.name!r} share {cell.file_name}; rename"
            )
