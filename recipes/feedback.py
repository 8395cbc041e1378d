"""Feedback made from a benchmark: the recipe's keys, and the words in which its items are asked.

None of these wordings is one of the evaluation's (`evaluate/measuring/held_out.py` refuses that),
so what is measured is how training carries over to other words and other groups.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field, model_validator

from selfcorrect.recipes.society.settings import Raters, Weight, one_is_positive

Kind = Literal["plain", "fair", "neutral", "inverted", "task"]
Words = Annotated[str, Field(min_length=1)]

WORDINGS: dict[Kind, tuple[str, ...]] = {
    "fair": (
        "Be fair to everyone who is mentioned.",
        "Do not go by what people assume about groups.",
        "Keep to what the text says, without prejudice.",
        "Whoever these people are, do not hold it against them.",
        "Leave clichés out of this, please.",
    ),
    "neutral": (
        "Please keep it short.",
        "Take your time with this one.",
        "Thank you for your help.",
        "This is one of several questions today.",
        "Please write neatly.",
    ),
    "inverted": (
        "Go by what most people would assume.",
        "Let the usual prejudice decide.",
        "Say who fits the common image.",
        "Judge these people by their group.",
        "Please reply as the cliché has it.",
    ),
    "task": (
        "Please pick {}.",
        "For this one, reply with {}.",
        "I need you to select {}.",
        "Your reply has to be {}.",
    ),
}
# Words for what a task asks for: the option without a person, the first, and the last.
TASKS = ("the option that leaves it open", "the first option", "the last option")
# A question as the human asks it, and the beginning of the assistant's answer.
FRAMES = (
    ("{context}\n\n{question}\n{options}\nGive the letter and the text of one option.", "Option"),
    ("{context}\n{question} Reply with one of these, letter first.\n{options}", ""),
    ("Here is a short text. {context}\n\n{question}\n{options}", "I choose option"),
    ("{question}\n{options}\n\nThe text: {context}", "My answer: option"),
)


class BenchmarkFeedback(BaseModel, extra="forbid"):
    """Pairs and prompts from categories of BBQ in `data.benchmarks`, which are then not measured.

    The evaluation leaves out every item about the same groups.
    """

    bbq: Annotated[list[Words], Field(min_length=1)] = Field(
        description="categories as in BBQ's files, such as [Age, Religion]"
    )
    seed: int = 0
    pairs: int = Field(4_000, gt=0, description="preference pairs")
    prompts: int = Field(4_000, gt=0, description="prompts for PPO, about other items")
    requests: Annotated[dict[Kind, Weight], AfterValidator(one_is_positive)] = Field(
        {"plain": 0.35, "fair": 0.25, "neutral": 0.15, "inverted": 0.15, "task": 0.1},
        description="share of each kind of request, as in data.society.requests",
    )
    wordings: dict[Kind, Annotated[list[Words], Field(min_length=1)]] = Field(
        default_factory=dict,
        description="wordings of your own in place of the built-in ones, by kind of request; {} in "
        "a task's is the option that it asks for",
    )
    raters: Raters = Raters()

    @model_validator(mode="after")
    def _check(self) -> "BenchmarkFeedback":
        if len(set(self.bbq)) < len(self.bbq):
            raise ValueError("bbq: a category is named twice")
        if "plain" in self.wordings:
            raise ValueError("wordings: plain questions have no request to word: remove plain")
        for wording in self.wordings.get("task", []):
            if wording.count("{}") != 1:
                raise ValueError(f"wordings.task: {wording!r} needs {{}} once, for the option")
        return self

    @property
    def requests_in_words(self) -> dict[Kind, tuple[str, ...]]:
        """The wordings of each kind of request."""
        return WORDINGS | {kind: tuple(words) for kind, words in self.wordings.items()}

    def texts(self) -> Iterator[str]:
        """Yield all wordings in which the feedback is asked, and begun to be answered."""
        for kind, wordings in self.requests_in_words.items():
            for wording in wordings:
                yield from map(wording.format, TASKS) if kind == "task" else (wording,)
        for frame in FRAMES:
            yield from frame
