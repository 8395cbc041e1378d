"""Stimuli: what an experiment asks under each condition, as data that is checked and filled in."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from selfcorrect.evaluate.prompts.items import Item
from selfcorrect.recipes.foundation.errors import InputError

SAMPLE = "{sample}"
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a dialogue; the last turn is the assistant's, left open for what is scored.

    After `turns` has filled it, `text` can still end in `SAMPLE`: there the model writes its own.
    """

    role: Literal["system", "human", "assistant"]
    text: str


def _read_turn(value: Any) -> Any:
    if isinstance(value, Turn):
        return value
    shape = "a turn is {human: text}, {assistant: text} or, first of all, {system: text}"
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError(shape)
    ((role, text),) = value.items()
    if role not in ("system", "human", "assistant") or not isinstance(text, str):
        raise ValueError(shape)
    return Turn(role, text)


def _read_names(value: Any) -> Any:
    # YAML reads an unquoted yes or no as true or false; say so instead of scoring "True".
    if isinstance(value, list) and any(isinstance(word, bool) for word in value):
        raise ValueError('put quotes around the words "yes" and "no"')
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


class Condition(BaseModel):
    """A dialogue, and where options are shown, whether their letter or their text is scored.

    `judged` says whether the condition is judged against a bias; a condition that asks for the
    statistics of the world is not, so its effect is in no test, threshold or summary.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dialogue: Dialogue
    answer: Answer | None = None
    judged: bool = True


Conditions = dict[Word, Annotated[Condition, BeforeValidator(_read_condition)]]


class Section(BaseModel):
    """What the stimuli of every experiment share; each experiment's own `Stimuli` is one.

    `texts` are pieces of wording by name, for use as placeholders in dialogues and in later texts.
    `controls` are conditions that are asked only when they are named.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    placeholders: ClassVar[frozenset[str]]  # what the experiment's items fill in
    shows_options: ClassVar[bool] = False  # whether prompts list them, so that order matters

    texts: dict[Word, str] = Field(default_factory=dict)
    conditions: Annotated[Conditions, Field(min_length=1)]
    controls: Conditions = Field(default_factory=dict)

    @field_validator("texts")
    @classmethod
    def _expand_texts(cls, texts: dict[str, str]) -> dict[str, str]:
        expanded: dict[str, str] = {}
        for name, text in texts.items():
            if name in cls.placeholders:
                raise ValueError(
                    f"{name}: the items have a placeholder of this name; choose another"
                )
            _check_placeholders(name, text, {*cls.placeholders, *expanded})
            expanded[name] = _fill(text, expanded)
        return expanded

    @field_validator("conditions", "controls")
    @classmethod
    def _expand_conditions(
        cls, given: dict[str, Condition], info: ValidationInfo
    ) -> dict[str, Condition]:
        texts: dict[str, str] = info.data.get("texts", {})
        expanded = {}
        for name, condition in given.items():
            dialogue = [Turn(turn.role, _fill(turn.text, texts)) for turn in condition.dialogue]
            _check_dialogue(name, dialogue, cls.placeholders)
            if condition.answer is not None and not cls.shows_options:
                raise ValueError(f"{name}: answer is for experiments whose prompts show options")
            expanded[name] = condition.model_copy(update={"dialogue": dialogue})
        return expanded

    @model_validator(mode="after")
    def _names_are_distinct(self) -> "Section":
        if twice := sorted(set(self.conditions) & set(self.controls)):
            raise ValueError(f"controls: {twice[0]} is a condition already")
        return self

    def condition(self, name: str) -> Condition:
        """A condition or control; raises InputError for a name that is neither."""
        found = self.conditions.get(name) or self.controls.get(name)
        if found is None:
            known = ", ".join([*self.conditions, *self.controls])
            raise InputError(f"condition {name!r}: not in the stimuli, which have {known}")
        return found

    def turns(self, condition: str, item: Item, order: Sequence[int] | None = None) -> list[Turn]:
        """The dialogue of `condition` for `item`; raises InputError for an unknown condition.

        `order` says which of the file's options each place shows, None as the file has them.
        Values are put in as they are, so their own braces are safe. Only the marker of the model's
        own text inside a value is refused, since nobody could tell it from the template's.
        """
        dialogue = self.condition(condition).dialogue
        values = self._values(item, order)
        if any(SAMPLE in value for value in values.values()):
            raise InputError(f"item {item.id}: its text holds {SAMPLE}, the marker of a sample")
        return [Turn(turn.role, _fill(turn.text, values)) for turn in dialogue]

    def continuations(
        self, condition: str, item: Item, order: Sequence[int] | None = None
    ) -> tuple[str, ...]:
        """The continuations to score, in the order shown."""
        return item.options if order is None else tuple(item.options[i] for i in order)

    def num_samples(self, condition: str) -> int:
        """How many turns the model writes by itself under `condition` before it is scored."""
        return sum(SAMPLE in turn.text for turn in self.condition(condition).dialogue)

    def _values(self, item: Item, order: Sequence[int] | None) -> Mapping[str, str]:
        return item.fields


class ChoiceSection(Section):
    """For experiments whose prompts show their options, which items hold as ans0, ans1, ...

    With `answer: letter` the labels are scored, with `answer: text` the option texts; a condition
    can say otherwise for itself. The placeholder `{options}` is all of them with their labels.
    """

    shows_options: ClassVar[bool] = True

    answer: Answer
    labels: Words = ()

    @model_validator(mode="after")
    def _check_labels(self) -> "ChoiceSection":
        if len(set(self.labels)) < len(self.labels):
            raise ValueError("labels: two are the same")
        asked = {self.answer, *(c.answer for c in {**self.conditions, **self.controls}.values())}
        if "letter" in asked and not self.labels:
            raise ValueError("labels: answer: letter needs them")
        return self

    def continuations(
        self, condition: str, item: Item, order: Sequence[int] | None = None
    ) -> tuple[str, ...]:
        """The options' texts, or as many labels, each after a space."""
        if (self.condition(condition).answer or self.answer) == "text":
            return super().continuations(condition, item, order)
        return tuple(f" {label}" for label in self._labels(item))

    def _values(self, item: Item, order: Sequence[int] | None) -> Mapping[str, str]:
        places = range(len(item.options)) if order is None else order
        answers = [item.fields[f"ans{index}"] for index in places]
        values = {**item.fields, **{f"ans{i}": answer for i, answer in enumerate(answers)}}
        if self.labels:
            shown = zip(self._labels(item), answers, strict=True)
            answers = [f"{label} {answer}" for label, answer in shown]
        return {**values, "options": " ".join(answers)}

    def _labels(self, item: Item) -> tuple[str, ...]:
        if len(item.options) > len(self.labels):
            raise InputError(
                f"item {item.id}: {len(item.options)} options, but the stimuli have "
                f"{len(self.labels)} labels; add labels, or use answer: text"
            )
        return self.labels[: len(item.options)]


def usual_dialogues(between: str = "\n\n") -> dict[str, dict[str, list[dict[str, str]]]]:
    """Conditions and controls, as a stimuli file gives them, over eight `texts` of one's own.

    The texts are task, instruction, neutral, inverted, thinking, neutral_thinking, final_question
    and answer (the open turn); `between` stands between the task and what is asked besides.
    """

    def asked(*texts: str) -> dict[str, str]:
        return {"human": between.join(f"{{{text}}}" for text in texts)}

    opened = {"assistant": "{answer}"}
    finally_ = [{"human": "{final_question}"}, opened]
    return {
        "conditions": {
            "Q": [asked("task"), opened],
            "Q+IF": [asked("task", "instruction"), opened],
            "Q+IF+CoT": [
                asked("task", "instruction"),
                {"assistant": "{thinking}{sample}"},
                *finally_,
            ],
        },
        "controls": {
            "Q+neutral": [asked("task", "neutral"), opened],
            "Q+inverted": [asked("task", "inverted"), opened],
            "Q+CoT": [asked("task"), {"assistant": "{neutral_thinking}{sample}"}, *finally_],
            "IF+Q": [asked("instruction", "task"), opened],
            "system IF": [{"system": "{instruction}"}, asked("task"), opened],
        },
    }


def option_orders(num_options: int, permutations: int) -> list[tuple[int, ...]]:
    """The orders in which options are shown: 1 as published; 3 rotations, every option at every
    place equally often; 6 rotations in both directions, which for three options is all of them.

    With n options "3" is n orders and "6" is 2n (2 for n = 2, where both directions are the same).
    """
    plain = tuple(range(num_options))
    if permutations == 1:
        return [plain]
    starts = [plain] if permutations == 3 else [plain, plain[::-1]]
    rotations = [line[i:] + line[:i] for line in starts for i in range(num_options)]
    return list(dict.fromkeys(rotations))


def _fill(template: str, values: Mapping[str, str]) -> str:
    """Put values into a template in one pass: braces inside a value are left alone."""
    return _PLACEHOLDER.sub(lambda found: values.get(found[1], found[0]), template)


def _check_placeholders(where: str, text: str, allowed: Iterable[str]) -> None:
    unknown = sorted(set(_PLACEHOLDER.findall(text)) - set(allowed))
    if unknown:
        known = ", ".join(sorted(f"{{{name}}}" for name in allowed))
        raise ValueError(f"{where}: unknown placeholder {{{unknown[0]}}}; there are {known}")


def _check_dialogue(name: str, dialogue: Sequence[Turn], allowed: frozenset[str]) -> None:
    spoken = dialogue[1:] if dialogue[0].role == "system" else dialogue
    if [turn.role for turn in spoken] != list(_expected_roles(len(spoken))):
        raise ValueError(
            f"{name}: turns alternate, human first (or system before), the last is the assistant's"
        )
    for turn in dialogue:
        sampled = turn.role == "assistant" and turn is not dialogue[-1]
        text = turn.text.removesuffix(SAMPLE) if sampled else turn.text
        if SAMPLE in text:
            raise ValueError(
                f"{name}: {SAMPLE} stands at the end of an assistant turn, not the last"
            )
        _check_placeholders(name, text, allowed)


def _expected_roles(num_turns: int) -> Iterator[str]:
    """human, assistant, ...; an odd number cannot end with the assistant, so it never matches."""
    even = num_turns + num_turns % 2
    return itertools.islice(itertools.cycle(("human", "assistant")), max(2, even))
