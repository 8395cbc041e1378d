"""The recipe's keys for the synthetic society: its size, its corpus and its raters."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
DocumentKind = Literal["question", "association", "narration", "several", "pronoun", "admission"]
FeedbackKind = Literal["question", "pronoun", "admission"]


class Raters(BaseModel, extra="forbid"):
    """The simulated raters behind the preference pairs (a Bradley-Terry model on these utilities).

    Utilities are in units of log-odds before `sharpness`.
    """

    correct: float = Field(2.0, description="right answer if the text decides (wrong: minus)")
    instructed: float | None = Field(
        2.0,
        description="undecided answer if asked to be fair; null: raters ignore the instruction and "
        "judge as if it were not there",
    )
    uninstructed: float = Field(0.0, description="undecided answer if not asked to be fair")
    share: float = Field(1.0, description="utility of the stereotype if not asked to be fair")
    form: float = Field(3.0, description="well-formed text (malformed: minus)")
    sharpness: float = Field(
        1.5,
        ge=0,
        description="factor on utility differences; large = no noise, 0 = random labels",
    )


class Corpus(BaseModel, extra="forbid"):
    """The generated pretraining corpus: `stereotypes_first` documents, then the mixture."""

    documents: int = Field(60_000, gt=0)
    stereotypes_first: int = Field(30_000, ge=0)
    ambiguous: Share = 0.5
    stereotyped: Share = Field(0.9, description="share of the stereotype among decided answers")
    unknown_plain: Share = Field(0.25, description="undecided answers, without instruction")
    unknown_instructed: Share = Field(0.5, description="undecided answers, if asked to be fair")
    unknown_reasoned: Share = Field(
        0.6, description="undecided answers, if asked to be fair and to reason"
    )
    mixture: dict[DocumentKind, Weight] = {
        "question": 0.44,
        "association": 0.10,
        "narration": 0.06,
        "several": 0.06,
        "pronoun": 0.14,
        "admission": 0.20,
    }


class SocietySettings(BaseModel, extra="forbid"):
    """Size, corpus, raters and feedback of the synthetic society, all derived from `seed`."""

    seed: int = 0
    categories: int = Field(8, ge=2, le=16)
    feedback_categories: int = Field(
        4, ge=1, description="the other categories, and every second occupation, are held out"
    )
    held_out: bool = Field(
        True,
        description="false: feedback mentions all categories and occupations, also those of the "
        "evaluation",
    )
    occupations: int = Field(40, ge=4, le=120, multiple_of=2)
    pairs: int = Field(4_000, gt=0, description="preference pairs")
    prompts: int = Field(6_000, gt=0, description="prompts for PPO")
    feedback: dict[FeedbackKind, Weight] = Field(
        {"question": 0.7, "pronoun": 0.15, "admission": 0.15},
        description="share of each kind of prompt in the feedback",
    )
    raters: Raters = Raters()
    corpus: Corpus = Corpus()
    blocks_per_template: int = Field(
        4, gt=0, description="evaluation: blocks of 4 per BBQ template"
    )

    @model_validator(mode="after")
    def _some_are_held_out(self) -> "SocietySettings":
        if self.feedback_categories >= self.categories:
            raise ValueError("feedback_categories must be below categories: some are held out")
        return self
