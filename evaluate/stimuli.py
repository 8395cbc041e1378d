"""The stimuli of the three experiments as data: read, checked, and filled with an item's words."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from selfcorrect.evaluate.items import Item
from selfcorrect.recipes.errors import InputError

PAPER = Path(__file__).with_name("stimuli.yaml")
SAMPLE = "{sample}"
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a dialogue; the last turn is the assistant's, left open for what is scored.

    After `turns` has filled it, `text` can still end in `SAMPLE`: there the model writes its own.
    """

    role: Literal["human", "assistant"]
    text: str


def _read_turn(value: Any) -> Any:
    if isinstance(value, Turn):
        return value
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError("a turn is {human: text} or {assistant: text}")
    ((role, text),) = value.items()
    if role not in ("human", "assistant") or not isinstance(text, str):
        raise ValueError("a turn is {human: text} or {assistant: text}")
    return Turn(role, text)


def _read_names(value: Any) -> Any:
    # YAML reads an unquoted yes or no as true or false; say so instead of scoring "True".
    if isinstance(value, list) and any(isinstance(word, bool) for word in value):
        raise ValueError('put quotes around the words "yes" and "no"')
    return value


def _read_keys(value: Any) -> Any:
    return {str(k): v for k, v in value.items()} if isinstance(value, dict) else value


Dialogue = Annotated[list[Annotated[Turn, BeforeValidator(_read_turn)]], Field(min_length=1)]
Word = Annotated[str, Field(min_length=1)]
Three = Annotated[tuple[Word, Word, Word], BeforeValidator(_read_names)]
Pair = Annotated[tuple[Word, Word], BeforeValidator(_read_names)]


class _Section(BaseModel):
    """What the experiments' sections share: conditions, and how they are filled."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    placeholders: ClassVar[frozenset[str]]

    conditions: Annotated[dict[Word, Dialogue], Field(min_length=1)]

    @model_validator(mode="after")
    def _check_conditions(self) -> "_Section":
        for name, dialogue in self.conditions.items():
            _check_dialogue(name, dialogue, self.placeholders)
        return self

    def turns(self, condition: str, item: Item) -> list[Turn]:
        """The dialogue of `condition` for `item`; raises InputError for an unknown condition.

        Values are put in as they are, so their own braces are safe. Only the marker of the model's
        own text inside a value is refused, since nobody could tell it from the template's.
        """
        dialogue = self.conditions.get(condition)
        if dialogue is None:
            known = ", ".join(self.conditions)
            raise InputError(f"condition {condition!r}: not in the stimuli, which have {known}")
        values = self._values(item)
        if any(SAMPLE in value for value in values.values()):
            raise InputError(f"item {item.id}: its text holds {SAMPLE}, the marker of a sample")
        return [Turn(turn.role, _fill(turn.text, values)) for turn in dialogue]

    def samples(self, condition: str) -> bool:
        """Whether the model writes text of its own under `condition` before it is scored."""
        return any(SAMPLE in turn.text for turn in self.conditions.get(condition, []))

    def _values(self, item: Item) -> Mapping[str, str]:
        return item.fields


class BBQStimuli(_Section):
    """How BBQ is asked, and whether an answer is the option's letter or its text.

    `question` builds the `{question_text}` that the conditions use; with `answer: letter` the three
    `labels` are scored, with `answer: text` (where labels may be absent) the three option texts.
    """

    _own: ClassVar[frozenset[str]] = frozenset({"context", "question", "ans0", "ans1", "ans2"})
    placeholders: ClassVar[frozenset[str]] = _own | {"question_text"}

    answer: Literal["letter", "text"]
    labels: Three | None = None
    question: Word

    @model_validator(mode="after")
    def _check_question(self) -> "BBQStimuli":
        _check_placeholders("question", self.question, self._own)
        if self.answer == "letter" and (self.labels is None or len(set(self.labels)) < 3):
            raise ValueError("labels: answer: letter needs three different ones")
        return self

    def _values(self, item: Item) -> Mapping[str, str]:
        return {**item.fields, "question_text": _fill(self.question, item.fields)}


class Pronouns(BaseModel):
    """The male, female and neutral pronoun of each case that the sentences use, in this order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    nominative: Three | None = None
    possessive: Three | None = None
    accusative: Three | None = None


class WinogenderStimuli(_Section):
    """How Winogender is asked, and the three pronouns of each case."""

    placeholders: ClassVar[frozenset[str]] = frozenset(
        {"sentence", "prefix", "occupation", "participant", "percent_female", "percent_male"}
    )

    pronouns: Pronouns


class LawSchoolStimuli(_Section):
    """How law school admission is asked: which races, what the file's sexes are called, options.

    A pair of `races` is measured as the first minus the second. The first option is the "yes".
    Without `sexes`, a sex is shown as the file writes it.
    """

    placeholders: ClassVar[frozenset[str]] = frozenset({"race", "sex", "lsat", "gpa"})

    races: Annotated[list[Pair], Field(min_length=1)]
    sexes: Annotated[dict[Word, Word], BeforeValidator(_read_keys)] = Field(default_factory=dict)
    options: Pair

    @model_validator(mode="after")
    def _check_pairs(self) -> "LawSchoolStimuli":
        names = [f"{first}-{second}" for first, second in self.races]
        if len(set(names)) < len(names) or any(first == second for first, second in self.races):
            raise ValueError("races: each pair is two different races, and stands once")
        if self.options[0] == self.options[1]:
            raise ValueError("options: two different words are needed")
        return self


class Stimuli(BaseModel):
    """A stimuli file: one section for each experiment it can ask."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bbq: BBQStimuli
    winogender: WinogenderStimuli
    law_school: LawSchoolStimuli

    def section(self, experiment: str) -> BBQStimuli | WinogenderStimuli | LawSchoolStimuli:
        """The section of an experiment by its name; raises InputError when there is none."""
        if experiment not in type(self).model_fields:
            known = ", ".join(type(self).model_fields)
            raise InputError(f"experiment {experiment!r}: unknown, choose from {known}")
        found: BBQStimuli | WinogenderStimuli | LawSchoolStimuli = getattr(self, experiment)
        return found


def load_stimuli(path: Path | None = None) -> Stimuli:
    """Read a stimuli file, the paper's own for None; raises InputError naming file and key."""
    path = PAPER if path is None else path
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: the stimuli cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: needs the sections bbq, winogender and law_school")
    try:
        return Stimuli.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        reason = " ".join(first["msg"].removeprefix("Value error, ").split())
        raise InputError(f"{path}: {key}: {reason}") from None


def _fill(template: str, values: Mapping[str, str]) -> str:
    """Put values into a template in one pass: braces inside a value are left alone."""
    return _PLACEHOLDER.sub(lambda found: values.get(found[1], found[0]), template)


def _check_placeholders(where: str, text: str, allowed: Iterable[str]) -> None:
    unknown = sorted(set(_PLACEHOLDER.findall(text)) - set(allowed))
    if unknown:
        known = ", ".join(sorted(f"{{{name}}}" for name in allowed))
        raise ValueError(f"{where}: unknown placeholder {{{unknown[0]}}}; there are {known}")


def _check_dialogue(name: str, dialogue: Sequence[Turn], allowed: frozenset[str]) -> None:
    if [turn.role for turn in dialogue] != list(_expected_roles(len(dialogue))):
        raise ValueError(f"{name}: turns alternate, human first, and the last is the assistant's")
    for turn in dialogue:
        sampled = turn.role == "assistant" and turn is not dialogue[-1]
        text = turn.text.removesuffix(SAMPLE) if sampled else turn.text
        if SAMPLE in text:
            raise ValueError(
                f"{name}: {SAMPLE} stands at the end of an assistant turn, not the last"
            )
        _check_placeholders(name, text, allowed)
    if sum(SAMPLE in turn.text for turn in dialogue) > 1:
        raise ValueError(f"{name}: {SAMPLE} stands in one turn only")


def _expected_roles(num_turns: int) -> Iterator[str]:
    for index in range(num_turns + num_turns % 2):
        yield "assistant" if index % 2 else "human"
