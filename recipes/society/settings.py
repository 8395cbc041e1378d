"""The recipe's keys for the synthetic society: its size, its corpus and its raters."""

from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
DocumentKind = Literal["question", "association", "narration", "several", "pronoun", "admission"]
FeedbackKind = Literal["question", "pronoun", "admission"]
RequestKind = Literal["plain", "fair", "reasoned", "neutral", "inverted", "task"]
Kind = TypeVar("Kind")


def one_is_positive(shares: dict[Kind, float]) -> dict[Kind, float]:
    """Return shares, of which one must be above 0."""
    if not sum(shares.values()) > 0:
        raise ValueError("give at least one kind a share above 0")
    return shares


# Shares of each kind, relative to their sum; a kind that is not named has none.
DocumentShares = Annotated[dict[DocumentKind, Weight], AfterValidator(one_is_positive)]
FeedbackShares = Annotated[dict[FeedbackKind, Weight], AfterValidator(one_is_positive)]
RequestShares = Annotated[dict[RequestKind, Weight], AfterValidator(one_is_positive)]


class Raters(BaseModel, extra="forbid"):
    """The simulated raters behind the preference pairs (a Bradley-Terry model on these utilities).

    Utilities are in units of log-odds before `sharpness`.
    """

    correct: float = Field(2.0, description="right answer if the text decides (wrong: minus)")
    instructed: float | None = Field(
        2.0,
        description="answer that heeds the request: undecided if asked to be fair, the stereotype "
        "if asked for it, the named answer of a task; null: raters ignore requests and judge as if "
        "nothing had been asked",
    )
    uninstructed: float = Field(0.0, description="undecided answer if nothing is asked")
    share: float = Field(1.0, description="utility of the stereotype if nothing is asked")
    form: float = Field(3.0, description="well-formed text (malformed: minus)")
    sharpness: float = Field(
        1.5,
        ge=0,
        description="factor on utility differences; large = no noise, 0 = random labels",
    )


class Corpus(BaseModel, extra="forbid"):
    """The generated pretraining corpus: `stereotypes_first` documents, then the mixture."""

    documents: int = Field(100_000, gt=0)
    stereotypes_first: int = Field(25_000, ge=0)
    ambiguous: Share = 0.5
    stereotyped: Share = Field(0.9, description="share of the stereotype among decided answers")
    undecided: Share = Field(0.15, description="undecided answers if nothing is asked")
    heeds: Share = Field(
        0.4, description="requests that are heeded; the others are answered as if nothing was asked"
    )
    requests: RequestShares = Field(
        {
            "plain": 0.225,
            "fair": 0.2,
            "reasoned": 0.25,
            "neutral": 0.1,
            "inverted": 0.1,
            "task": 0.125,
        },
        description="share of each kind of request in the dialogues",
    )
    mixture: DocumentShares = {
        "question": 0.54,
        "association": 0.10,
        "narration": 0.03,
        "several": 0.03,
        "pronoun": 0.12,
        "admission": 0.18,
    }


class SocietySettings(BaseModel, extra="forbid"):
    """Size, corpus, raters and feedback of the synthetic society, all derived from `seed`."""

    seed: int = 0
    categories: int = Field(24, ge=2, le=64)
    feedback_categories: int = Field(
        12, ge=1, description="the other categories, and every second occupation, are held out"
    )
    rarity: float = Field(
        1.5,
        ge=0,
        le=10,
        description="beliefs about the n-th category of feedback's half, and of the evaluation's, "
        "are voiced in proportion to n ** -rarity; 0: all equally often",
    )
    held_out: bool = Field(
        True,
        description="false: feedback mentions all categories and occupations, also those of the "
        "evaluation",
    )
    occupations: int = Field(40, ge=4, le=120, multiple_of=2)
    pairs: int = Field(8_000, gt=0, description="preference pairs")
    prompts: int = Field(8_000, gt=0, description="prompts for PPO")
    feedback: FeedbackShares = Field(
        {"question": 0.7, "pronoun": 0.15, "admission": 0.15},
        description="share of each kind of question in the feedback",
    )
    requests: RequestShares = Field(
        {
            "plain": 0.3,
            "fair": 0.15,
            "reasoned": 0.1,
            "neutral": 0.15,
            "inverted": 0.15,
            "task": 0.15,
        },
        description="share of each kind of request in the feedback: none (plain), to be fair, that "
        "with reasoning first, a request that changes nothing, to follow the stereotype, and a "
        "task that names the answer",
    )
    raters: Raters = Raters()
    corpus: Corpus = Corpus()
    blocks_per_template: int = Field(
        1, gt=0, description="evaluation: blocks of 4 per BBQ template"
    )

    @model_validator(mode="after")
    def _some_are_held_out(self) -> "SocietySettings":
        if self.feedback_categories >= self.categories:
            raise ValueError("feedback_categories must be below categories: some are held out")
        return self
