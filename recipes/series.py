"""A series: checkpoints trained elsewhere, named by model, seed and step, and how to measure them.

It is to an evaluation what a recipe is to a run; docs/guides/series.md has examples.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, JsonValue, model_validator

from selfcorrect.recipes.schema import RESERVED_NAMES, Evaluate, Launch, Name, Recipe, Section
from selfcorrect.recipes.society.settings import SocietySettings

METHOD = "series"  # the folder of its checkpoints, where training writes ppo, grpo, sft or dpo
PLACEHOLDERS = ("{step}", "{seed}")
SIZE_TOLERANCE = 0.1  # published names round: OLMo 2 "13B" has 13.7 billion parameters
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmMbBtT]?)")
_POWERS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}

Count = Annotated[int, Field(ge=0)]


class Given(Section):
    """Checkpoints of one model, and where they are; {step} and {seed} stand for the numbers."""

    model: Name
    path: str = Field(description="folder, .gguf file or hub name; may contain {step} and {seed}")
    revision: str | None = Field(
        None,
        description="branch, tag or commit on the hub, such as step_{step}; in it and in a folder, "
        "* stands for anything, as in stage1-step{step}-tokens*",
    )
    gguf_file: str | None = Field(None, description="file in the folder; may contain {step}")
    base: str | None = Field(
        None, description="base model of an adapter, where it has moved; default: as saved"
    )
    steps: list[Count] | None = Field(
        None,
        description="default: every step that the hub's branches or the folders have. `step: n` "
        "is short for one",
    )
    seeds: list[Count] | None = Field(
        None, description="training seeds; default: 0, or those that folders have for {seed}"
    )
    size: str | None = Field(
        None, description="parameters, such as 1.4B, which the configuration must confirm"
    )
    trust_remote_code: bool = False

    @model_validator(mode="before")
    @classmethod
    def _expand_single(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        given = dict(given)
        for single, several in (("step", "steps"), ("seed", "seeds")):
            if single in given:
                if several in given:
                    raise ValueError(f"give either {single} or {several}")
                given[several] = [given.pop(single)]
        if isinstance(given.get("size"), int | float):
            given["size"] = str(given["size"])
        return given

    @model_validator(mode="after")
    def _check_numbers(self) -> "Given":
        if self.size is not None and parse_size(self.size) is None:
            raise ValueError(f"size: {self.size!r} is not a number such as 410M or 1.4B")
        for key, numbers, placeholder in (
            ("steps", self.steps, "{step}"),
            ("seeds", self.seeds, "{seed}"),
        ):
            if numbers is not None and not numbers:
                raise ValueError(f"{key} is empty")
            if numbers is not None and len(set(numbers)) < len(numbers):
                repeated = next(n for n in numbers if numbers.count(n) > 1)
                raise ValueError(f"{key} has {repeated} twice")
            if placeholder in self.pattern:
                continue
            if numbers is not None and len(numbers) > 1:
                raise ValueError(
                    f"{key}: several, but neither path nor revision contains {placeholder}"
                )
            if numbers is None and key == "steps":
                raise ValueError("step is missing, or {step} in path or revision")
        return self

    @property
    def pattern(self) -> str:
        """Path, revision and GGUF file in one text, in which {step} and {seed} are looked for."""
        return " ".join(part for part in (self.path, self.revision, self.gguf_file) if part)

    @property
    def is_listed(self) -> bool:
        """Whether seeds and steps are known; otherwise they are those that exist."""
        return self.steps is not None and (self.seeds is not None or "{seed}" not in self.pattern)

    @property
    def is_searched(self) -> bool:
        """Whether the hub or the disk must be looked at to know the checkpoints' names."""
        return not self.is_listed or "*" in self.pattern

    def places(self) -> Iterator[tuple["Numbers", "Place"]]:
        """Yield seed and step with path, revision and file of each listed checkpoint."""
        for seed in (self.seeds or [0]) if self.is_listed else []:
            for step in self.steps or []:
                yield Numbers(seed, step), self.place(seed, step)

    def place(self, seed: int | None, step: int | None) -> "Place":
        """Return the place with the numbers filled in; a placeholder for None stays."""
        return Place(
            *(
                None if text is None else fill(text, seed, step)
                for text in (self.path, self.revision, self.gguf_file)
            )
        )


class Numbers(NamedTuple):
    """Seed and step of a checkpoint."""

    seed: int
    step: int


class Place(NamedTuple):
    """Where a checkpoint is: a folder, file or hub name, its revision and its file."""

    path: str | None
    revision: str | None
    gguf_file: str | None

    def __str__(self) -> str:
        text = str(self.path) if self.gguf_file is None else f"{self.path}/{self.gguf_file}"
        return text if self.revision is None else f"{text}@{self.revision}"


class Asked(Section):
    """The benchmarks of a series."""

    society: SocietySettings | None = None
    benchmarks: Path | None = Field(None, description="folder with bbq/, winogender/, law_school/")
    stimuli: Path | None = Field(None, description="YAML with conditions of your own")

    @model_validator(mode="after")
    def _check_source(self) -> "Asked":
        if (self.society is None) == (self.benchmarks is None):
            raise ValueError("give either benchmarks or society")
        return self


class MeasuredModel(NamedTuple):
    """What an evaluation needs to know of a model, as of a recipe's."""

    name: str
    trust_remote_code: bool


class Series(Section):
    """Checkpoints that were trained elsewhere, and their evaluation."""

    name: Name
    description: str = ""
    checkpoints: Annotated[list[Given], Field(min_length=1)]
    keep_weights: bool = Field(
        True,
        description="false: weights that were fetched from the hub for a checkpoint are removed "
        "once it is measured; folders of yours never are",
    )
    steps_are: str = Field(
        "training steps", description="the unit of steps, as figures and tables name it"
    )
    chat_template_kwargs: dict[str, JsonValue] = Field(
        default_factory=dict, description="arguments of chat templates"
    )
    chat_template_date: date | None = Field(
        None, description="the day for chat templates that write today's date"
    )
    data: Asked
    evaluate: Evaluate = Evaluate(attach="off")
    launch: Launch = Launch()

    @model_validator(mode="before")
    @classmethod
    def _measure_saved_weights(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("evaluate"), dict):
            return {**given, "evaluate": {"attach": "off", **given["evaluate"]}}
        return given

    @model_validator(mode="after")
    def _check_checkpoints(self) -> "Series":
        if self.evaluate.attach != "off":
            raise ValueError("evaluate.attach: a series is not trained here: remove the key")
        names = {given.model for given in self.checkpoints}
        if reserved := RESERVED_NAMES.intersection(names):
            raise ValueError(f"checkpoints: the name {min(reserved)} is reserved; rename the model")
        check_repeats(
            (given.model, *numbers) for given in self.checkpoints for numbers, _ in given.places()
        )
        sizes: dict[str, float] = {}
        for given in self.checkpoints:
            size = None if given.size is None else parse_size(given.size)
            if size is not None and sizes.setdefault(given.model, size) != size:
                raise ValueError(f"checkpoints: {given.model} is given two sizes")
        slurm = self.launch.slurm
        if slurm is not None and (unknown := sorted(set(slurm.models) - names)):
            raise ValueError(f"launch.slurm.models: the series has no model {unknown[0]!r}")
        if self.launch.starts_processes:
            raise ValueError("launch: processes and deepspeed are for training: remove them")
        return self

    @property
    def models(self) -> list[MeasuredModel]:
        """The models, in the order of the file."""
        trusted = {given.model for given in self.checkpoints if given.trust_remote_code}
        names = dict.fromkeys(given.model for given in self.checkpoints)
        return [MeasuredModel(name, name in trusted) for name in names]

    @property
    def seeds(self) -> list[int]:
        """All seeds that are listed."""
        return sorted({seed for given in self.checkpoints for seed in given.seeds or [0]})

    @property
    def is_discovered(self) -> bool:
        """Whether checkpoints are looked for, so that there may be more later."""
        return not all(given.is_listed for given in self.checkpoints)

    def listed(self) -> set[tuple[str, int, int]]:
        """Return model, seed and step of the checkpoints that are listed."""
        return {
            (given.model, *numbers) for given in self.checkpoints for numbers, _ in given.places()
        }


Measured = Recipe | Series
"""What a run folder's recipe.yaml holds: checkpoints trained here, or elsewhere."""


def check_repeats(keys: Iterable[tuple[str, int, int]]) -> None:
    """Raise ValueError if a checkpoint is named twice."""
    seen = set()
    for key in keys:
        if key in seen:
            model, seed, step = key
            raise ValueError(f"checkpoints: {model}, seed {seed}, step {step} is given twice")
        seen.add(key)


def fill(text: str, seed: int | None, step: int | None) -> str:
    """Return the text with the numbers in place of {seed} and {step}; None leaves one as it is."""
    for placeholder, number in zip(PLACEHOLDERS, (step, seed), strict=True):
        if number is not None:
            text = text.replace(placeholder, str(number))
    return text


def pattern_of(text: str) -> re.Pattern[str]:
    """Return what matches the text with numbers for {step} and {seed}, as groups, and any *."""
    parts, named = [], set[str]()
    for part in re.split(r"(\{step\}|\{seed\}|\*)", text):
        name = part.strip("{}")
        if part == "*":
            parts.append("[^/]*")
        elif part not in PLACEHOLDERS:
            parts.append(re.escape(part))
        elif name in named:
            parts.append(f"(?P={name})")
        else:
            named.add(name)
            parts.append(f"(?P<{name}>[0-9]+)")
    return re.compile("".join(parts))


def parse_size(text: str) -> float | None:
    """Return the number of parameters that 410M, 1.4B or 1400000000 stands for."""
    match = _SIZE.fullmatch(text.strip())
    return float(match[1]) * _POWERS[match[2].lower()] if match else None


def with_steps(series: Series, found: Mapping[int, Iterable[Numbers]]) -> Series:
    """Return the series with the numbers found for its entries, by position, in place of patterns.

    Seeds with the same steps share an entry. An entry for which nothing was found stays as it is.
    """
    entries: list[Given] = []
    for index, given in enumerate(series.checkpoints):
        if not (numbers := list(found.get(index, ()))):
            entries.append(given)
            continue
        steps_by_seed: dict[int, list[int]] = {}
        for seed, step in sorted(numbers):
            steps_by_seed.setdefault(seed, []).append(step)
        seeds_by_steps: dict[tuple[int, ...], list[int]] = {}
        for seed, steps in steps_by_seed.items():
            seeds_by_steps.setdefault(tuple(steps), []).append(seed)
        for same_steps, seeds in seeds_by_steps.items():
            numbers_of = {"seeds": seeds, "steps": list(same_steps)}
            entries.append(given.model_copy(update=numbers_of))
    return series.model_copy(update={"checkpoints": entries})
