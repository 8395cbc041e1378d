"""Stimuli: the dialogues of an experiment's conditions, validated, and filled in per item."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from selfcorrect.evaluate.prompts.items import Item
from selfcorrect.recipes.foundation.errors import InputError

SAMPLE = "{sample}"
CRITIQUE = "critique"
PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a dialogue; the last is the assistant's, which the scored options continue.

    If `text` ends in `SAMPLE`, the model samples the rest of the turn.
    """

    role: Literal["system", "human", "assistant"]
    text: str


@dataclass(frozen=True, slots=True)
class ThoughtfulTurn(Turn):
    """An open turn whose `text` follows the model's thoughts in a block of their own.

    If `thought` ends in `SAMPLE`, the model samples the rest of it.
    """

    thought: str = ""


def _read_turn(value: Any) -> Any:
    if isinstance(value, Turn):
        return value
    shape = "a turn is {human: text}, {assistant: text} or, as the first turn, {system: text}"
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError(shape)
    ((role, text),) = value.items()
    if role not in ("system", "human", "assistant") or not isinstance(text, str):
        raise ValueError(shape)
    return Turn(role, text)


def _read_names(value: Any) -> Any:
    # YAML reads an unquoted yes or no as true or false, which would be scored as "True".
    if isinstance(value, list) and any(isinstance(word, bool) for word in value):
        raise ValueError('put quotes around "yes" and "no", which YAML reads as true and false')
    return value


def _read_keys(value: Any) -> Any:
    return {str(k): v for k, v in value.items()} if isinstance(value, dict) else value


def _read_condition(value: Any) -> Any:
    return {"dialogue": value} if isinstance(value, list) else value


Dialogue = Annotated[list[Annotated[Turn, BeforeValidator(_read_turn)]], Field(min_length=1)]
Word = Annotated[str, Field(min_length=1)]
Answer = Literal["letter", "text"]
Words = Annotated[tuple[Word, ...], BeforeValidator(_read_names)]
Three = Annotated[tuple[Word, Word, Word], BeforeValidator(_read_names)]
Pair = Annotated[tuple[Word, Word], BeforeValidator(_read_names)]
Named = Annotated[dict[Word, Word], BeforeValidator(_read_keys)]


class Condition(BaseModel, extra="forbid", frozen=True):
    """A dialogue, and where options are shown, whether their letter or their text is scored.

    `judged` says whether the condition is judged against a bias; a condition that asks for the
    statistics of the world is not, so its effect is in no test, threshold or summary.
    """

    dialogue: Dialogue
    answer: Answer | None = None
    judged: bool = True


Conditions = dict[Word, Annotated[Condition, BeforeValidator(_read_condition)]]


class Section(BaseModel, extra="forbid", frozen=True):
    """The keys that the stimuli of all experiments share; each experiment has a subclass.

    `texts` are named pieces of wording, for use as placeholders in dialogues and later texts.
    `controls` are conditions that are asked only when they are named. `critiques` is an evaluation
    file whose sampled texts replace the text `critique`, item by item.
    """

    placeholders: ClassVar[frozenset[str]]  # filled from an item's fields
    shows_options: ClassVar[bool] = False  # whether prompts list the options, so that order matters

    critiques: Path | None = None  # before `texts`, whose meaning depends on it
    texts: dict[Word, str] = Field(default_factory=dict)
    conditions: Annotated[Conditions, Field(min_length=1)]
    controls: Conditions = Field(default_factory=dict)

    @field_validator("texts")
    @classmethod
    def _expand_texts(cls, texts: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        expanded: dict[str, str] = {}
        fields = cls._fields(info)
        for name, text in texts.items():
            if name in cls.placeholders:
                raise ValueError(f"{name}: items have a placeholder of this name; choose another")
            if name not in fields:
                _check_placeholders(name, text, {*fields, *expanded})
                expanded[name] = _fill(text, expanded)
        return expanded

    @classmethod
    def _fields(cls, info: ValidationInfo) -> frozenset[str]:
        """Return the placeholders that are filled from an item's fields."""
        has_critiques = info.data.get("critiques") is not None
        return cls.placeholders | ({CRITIQUE} if has_critiques else frozenset())

    @field_validator("conditions", "controls")
    @classmethod
    def _expand_conditions(
        cls, given: dict[str, Condition], info: ValidationInfo
    ) -> dict[str, Condition]:
        texts: dict[str, str] = info.data.get("texts", {})
        expanded = {}
        for name, condition in given.items():
            dialogue = [Turn(turn.role, _fill(turn.text, texts)) for turn in condition.dialogue]
            _check_dialogue(name, dialogue, cls._fields(info))
            if condition.answer is not None and not cls.shows_options:
                raise ValueError(
                    f"{name}: remove `answer`: the prompts of this experiment show no options"
                )
            expanded[name] = condition.model_copy(update={"dialogue": dialogue})
        return expanded

    @model_validator(mode="after")
    def _names_are_distinct(self) -> "Section":
        if shared := sorted(set(self.conditions) & set(self.controls)):
            raise ValueError(f"controls: {shared[0]} is also a condition; rename one")
        return self

    def condition(self, name: str) -> Condition:
        """Return a condition or control; raise InputError for an unknown name."""
        condition = self.conditions.get(name) or self.controls.get(name)
        if condition is None:
            known = ", ".join([*self.conditions, *self.controls])
            raise InputError(f"unknown condition {name!r}; the stimuli have {known}")
        return condition

    def turns(self, condition: str, item: Item, order: Sequence[int] | None = None) -> list[Turn]:
        """Return the dialogue of `condition` for `item`; InputError for an unknown condition.

        `order` lists the indices of the options as shown; None keeps the file's order. Values may
        contain braces. Only the marker of sampled text is refused in a value, since it could not be
        told from the template's.
        """
        dialogue = self.condition(condition).dialogue
        values = self._values(item, order)
        if self.critiques is not None:
            field = critique_field(range(len(item.options)) if order is None else order)
            values = {**values, CRITIQUE: item.fields.get(field, f"{{{CRITIQUE}}}")}
        if any(SAMPLE in value for value in values.values()):
            raise InputError(
                f"item {item.id}: its text contains {SAMPLE}, which marks sampled text; reword it"
            )
        return [Turn(turn.role, _fill(turn.text, values)) for turn in dialogue]

    def continuations(
        self, condition: str, item: Item, order: Sequence[int] | None = None
    ) -> tuple[str, ...]:
        """Return the continuations to score, in the order shown."""
        return item.options if order is None else tuple(item.options[i] for i in order)

    def num_samples(self, condition: str) -> int:
        """Return the number of turns that the model samples under `condition`."""
        return sum(SAMPLE in turn.text for turn in self.condition(condition).dialogue)

    def uses_critiques(self, condition: str) -> bool:
        """Return whether a condition's dialogue holds the critiques of another model."""
        if self.critiques is None:
            return False
        return any(f"{{{CRITIQUE}}}" in turn.text for turn in self.condition(condition).dialogue)

    def continued(self, condition: str) -> str | None:
        """Return the condition that this one continues after the last text it samples, if any.

        Both have the same dialogue up to there; then this one samples further texts.
        """
        dialogue = self.condition(condition).dialogue[:-2]
        starts = {n: c.dialogue[:-2] for n, c in {**self.conditions, **self.controls}.items()}
        shorter = {
            name: start
            for name, start in starts.items()
            if start
            and start[-1].text.endswith(SAMPLE)
            and len(start) < len(dialogue)
            and dialogue[: len(start)] == start
        }
        return max(shorter, key=lambda name: len(shorter[name]), default=None)

    def _values(self, item: Item, order: Sequence[int] | None) -> Mapping[str, str]:
        return item.fields


class ChoiceSection(Section):
    """The keys of experiments whose prompts show options, which items hold as ans0, ans1, ...

    With `answer: letter` the labels are scored, with `answer: text` the option texts; a condition
    can override it. The placeholder `{options}` lists all options with their labels.
    """

    shows_options: ClassVar[bool] = True

    answer: Answer
    labels: Words = ()

    @model_validator(mode="after")
    def _check_labels(self) -> "ChoiceSection":
        if len(set(self.labels)) < len(self.labels):
            raise ValueError("labels: must be different from each other")
        conditions = {**self.conditions, **self.controls}.values()
        if "letter" in {self.answer, *(c.answer for c in conditions)} and not self.labels:
            raise ValueError("labels: required by `answer: letter`")
        return self

    def continuations(
        self, condition: str, item: Item, order: Sequence[int] | None = None
    ) -> tuple[str, ...]:
        """Return the options' texts, or as many labels, each after a space."""
        if (self.condition(condition).answer or self.answer) == "text":
            return super().continuations(condition, item, order)
        return tuple(f" {label}" for label in self._labels(item))

    def _values(self, item: Item, order: Sequence[int] | None) -> Mapping[str, str]:
        indices = range(len(item.options)) if order is None else order
        answers = [item.fields[f"ans{index}"] for index in indices]
        values = {**item.fields, **{f"ans{i}": answer for i, answer in enumerate(answers)}}
        if self.labels:
            shown = zip(self._labels(item), answers, strict=True)
            answers = [f"{label} {answer}" for label, answer in shown]
        return {**values, "options": " ".join(answers)}

    def _labels(self, item: Item) -> tuple[str, ...]:
        if len(item.options) > len(self.labels):
            raise InputError(
                f"item {item.id}: {len(item.options)} options, but the stimuli have only "
                f"{len(self.labels)} labels; add labels, or use answer: text"
            )
        return self.labels[: len(item.options)]


def usual_dialogues(between: str = "\n\n") -> dict[str, dict[str, list[dict[str, str]]]]:
    """Return the usual conditions and controls, as a stimuli file gives them, built from `texts`.

    The texts are task, instruction, neutral, inverted, thinking, neutral_thinking, final_question
    and answer (the open turn); `between` separates the task from an instruction.
    """

    def human(*texts: str) -> dict[str, str]:
        return {"human": between.join(f"{{{text}}}" for text in texts)}

    opened = {"assistant": "{answer}"}
    ending = [{"human": "{final_question}"}, opened]
    return {
        "conditions": {
            "Q": [human("task"), opened],
            "Q+IF": [human("task", "instruction"), opened],
            "Q+IF+CoT": [
                human("task", "instruction"),
                {"assistant": "{thinking}{sample}"},
                *ending,
            ],
        },
        "controls": {
            "Q+neutral": [human("task", "neutral"), opened],
            "Q+inverted": [human("task", "inverted"), opened],
            "Q+CoT": [human("task"), {"assistant": "{neutral_thinking}{sample}"}, *ending],
            "IF+Q": [human("instruction", "task"), opened],
            "system IF": [{"system": "{instruction}"}, human("task"), opened],
        },
    }


def spelled(order: Sequence[int]) -> str:
    """Return how results spell an order of options: "120", or "10,0,..." past ten options."""
    return ("" if len(order) <= 10 else ",").join(str(index) for index in order)


def critique_field(order: Sequence[int]) -> str:
    """Return the name of an item's field with the critique of its options in this order."""
    return f"{CRITIQUE} {spelled(order)}"


def option_orders(num_options: int, permutations: int) -> list[tuple[int, ...]]:
    """Return the orders in which n options are shown.

    `permutations` 1 is the published order; 3 is its n rotations, with every option equally often
    at every position; 6 adds the rotations of the reversed order: 2n orders, which are all orders
    for three options (2 for n = 2, where both directions are the same).
    """
    plain = tuple(range(num_options))
    if permutations == 1:
        return [plain]
    starts = [plain] if permutations == 3 else [plain, plain[::-1]]
    rotations = [line[i:] + line[:i] for line in starts for i in range(num_options)]
    return list(dict.fromkeys(rotations))


def _fill(template: str, values: Mapping[str, str]) -> str:
    """Fill a template in one pass, so that braces inside a value are kept."""
    return PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), template)


def _check_placeholders(name: str, text: str, allowed: Iterable[str]) -> None:
    unknown = sorted(set(PLACEHOLDER.findall(text)) - set(allowed))
    if unknown:
        known = ", ".join(sorted(f"{{{placeholder}}}" for placeholder in allowed))
        raise ValueError(f"{name}: unknown placeholder {{{unknown[0]}}}; known: {known}")


def _check_dialogue(name: str, dialogue: Sequence[Turn], allowed: frozenset[str]) -> None:
    turns = dialogue[1:] if dialogue[0].role == "system" else dialogue
    roles = [turn.role for turn in turns]
    if not roles or roles != ["human", "assistant"] * (len(roles) // 2):
        raise ValueError(
            f"{name}: turns must alternate (optional system, human, assistant, ...) and end with "
            "the assistant's"
        )
    for turn in dialogue:
        sampled = turn.role == "assistant" and turn is not dialogue[-1]
        text = turn.text.removesuffix(SAMPLE) if sampled else turn.text
        if SAMPLE in text:
            raise ValueError(
                f"{name}: {SAMPLE} is only allowed at the end of an assistant turn before the last"
            )
        _check_placeholders(name, text, allowed)
