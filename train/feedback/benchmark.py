"""Feedback made from categories of BBQ: prompts for PPO, and pairs labelled by simulated raters.

The raters are those of the society (`recipes/society/raters.py`). Two people of a template serve
either pairs or prompts, so that PPO asks about items on which no reward model was fitted.
Everything is drawn from the recipe's `data.feedback.seed`.
"""

import logging
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from selfcorrect.evaluate.experiments.bbq.files import Row, read_rows
from selfcorrect.evaluate.experiments.bbq.groups import decide
from selfcorrect.evaluate.experiments.wording import load_stimuli
from selfcorrect.recipes.feedback import FRAMES, TASKS, BenchmarkFeedback
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.schema import Data
from selfcorrect.recipes.society.raters import (
    BeliefCase,
    Meaning,
    Message,
    Preference,
    RatedPrompt,
    draw_preferences,
)
from selfcorrect.recipes.society.requests import draw_request

DEFAULT_LABELS = ("(a)", "(b)", "(c)")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question(BeliefCase):
    """A row of BBQ with its options in some order; an answer is the label of an option."""

    row: Row
    stereotyped: int  # index in the file of the option that agrees with the stereotype
    order: tuple[int, int, int]  # indices in the file, as shown
    labels: tuple[str, str, str]
    is_continued: bool  # whether the answer goes on with a turn that is begun

    def answers(self) -> tuple[str, ...]:
        return self.labels

    def reply(self, answer: str) -> str:
        """Return the option's label and text, which go on with the turn after a space."""
        return f"{' ' if self.is_continued else ''}{answer} {self.text(answer)}"

    def text(self, answer: str) -> str:
        """Return the option's text; some in the files end with a space."""
        return self.row.answers[self._index(answer)].strip()

    def meaning(self, answer: str) -> Meaning:
        index = self._index(answer)
        if not self.row.ambiguous:
            return "right" if index == self.row.label else "wrong"
        if index == self.row.unknown:
            return "undecided"
        return "stereotype" if index == self.stereotyped else "counter"

    def tasks(self) -> tuple[tuple[str, str], ...]:
        """Name the option without a person, or one by its position: no task names a group."""
        unknown = self.labels[self.order.index(self.row.unknown)]
        return tuple(zip(TASKS, (unknown, self.labels[0], self.labels[2]), strict=True))

    def options(self) -> str:
        """Return the options with their labels, one a line."""
        return "\n".join(f"{label} {self.text(label)}" for label in self.labels)

    def _index(self, label: str) -> int:
        return self.order[self.labels.index(label)]


@dataclass(frozen=True)
class Prompt(RatedPrompt[Question]):
    """A dialogue that ends where the assistant answers with an option."""

    def read(self, text: str) -> tuple[str, bool] | None:
        """Read the option's label at the beginning.

        A well-formed answer has nothing else but the option's text and a full stop. With another
        label in it, or before the text of another option, it is no answer.
        """
        written, case = text.strip(), self.case
        label = next((label for label in case.labels if written.startswith(label)), None)
        if label is None:
            return None
        after = written.removeprefix(label).strip()
        if after.removesuffix(".") in ("", case.text(label).removesuffix(".")):
            return label, True
        named = [other for other in case.labels if after.startswith(case.text(other))]
        meant = max(named, key=lambda other: len(case.text(other)), default=label)
        if meant != label or any(other in after for other in case.labels if other != label):
            return None
        return label, False


Rated = tuple[Row, int]  # with the option that agrees with the stereotype
# By template, in groups about the same people
Items = dict[tuple[str, str], list[list[Rated]]]


class Source:
    """The items of a recipe's feedback, from which pairs and prompts are drawn."""

    def __init__(self, data: Data) -> None:
        """Read the categories' items; raises InputError if there are none."""
        assert data.feedback is not None
        if data.benchmarks is None:
            raise InputError(
                "data.benchmarks: name the folder with bbq/, which data.feedback reads"
            )
        self.settings: BenchmarkFeedback = data.feedback
        given: tuple[str, ...] = getattr(load_stimuli(data.stimuli).section("bbq"), "labels", ())
        self.labels = DEFAULT_LABELS if len(given) < 3 else (given[0], given[1], given[2])
        rated = _rated_rows(data.benchmarks / "bbq", self.settings.bbq)
        rng = random.Random(f"items {self.settings.seed}")
        self.for_pairs: dict[str, Items] = {}
        self.for_prompts: dict[str, Items] = {}
        for category in self.settings.bbq:
            self.for_pairs[category], self.for_prompts[category] = _halves(rng, rated[category])

    def prompts(self, number: int) -> Iterator[Prompt]:
        """Yield the prompts of PPO."""
        rng = random.Random(f"prompts {self.settings.seed}")
        for _ in range(number):
            yield self._draw_prompt(rng, self.for_prompts)

    def preferences(self, number: int) -> Iterator[Preference]:
        """Yield pairs of answers with the raters' choice."""
        return draw_preferences(
            random.Random(f"preferences {self.settings.seed}"),
            number,
            self.settings.raters,
            lambda rng: self._draw_prompt(rng, self.for_pairs),
            malformed,
        )

    def _draw_prompt(self, rng: random.Random, categories: dict[str, Items]) -> Prompt:
        """Draw a category, one of its templates, an item of that, and a request or none."""
        templates = categories[rng.choice(self.settings.bbq)]
        row, stereotyped = rng.choice(rng.choice(templates[rng.choice(list(templates))]))
        order = rng.sample(range(3), 3)
        frame, opening = rng.choice(FRAMES)
        case = Question(
            row,
            stereotyped,
            (order[0], order[1], order[2]),
            self.labels,
            is_continued=bool(opening),
        )
        settings = self.settings
        request = draw_request(rng, settings.requests, case.tasks(), settings.requests_in_words)
        question = frame.format(context=row.context, question=row.question, options=case.options())
        parts = [request.text, question] if rng.random() < 0.5 else [question, request.text]
        asked: Message = {"role": "user", "content": "\n\n".join(filter(None, parts))}
        begun: Message = {"role": "assistant", "content": opening}
        return Prompt((asked, begun) if opening else (asked,), case, request)


def malformed(rng: random.Random, prompt: Prompt) -> str:
    """Return an answer without its label, with another's text, twice, or none at all."""
    case = prompt.case
    first, second = rng.sample(case.labels, 2)
    begin = " " if case.is_continued else ""
    kind = rng.randrange(4)
    if kind == 0:
        return f"{begin}{case.text(first)}"
    if kind == 1:
        return f"{begin}{first} {case.text(second)}"
    if kind == 2:
        return f"{begin}{first} {case.text(first)} {second} {case.text(second)}"
    return f"{begin}{rng.choice(('I would rather talk about this.', 'Good question!', 'Hm.'))}"


def _rated_rows(folder: Path, categories: Sequence[str]) -> dict[str, list[Rated]]:
    """Return the items of each category that have a stereotyped option."""
    if not folder.is_dir():
        raise InputError(
            f"data.feedback.bbq: there is no folder {folder}; `selfcorrect data fetch bbq` gets it"
        )
    rows = read_rows(folder)
    known = sorted({row.category for row in rows})
    for category in categories:
        if category not in known:
            raise InputError(
                f"data.feedback.bbq: {folder} has no category {category}; it has {', '.join(known)}"
            )
    rows = [row for row in rows if row.category in categories]
    rated = defaultdict(list)
    for row, decision in zip(rows, decide(rows, folder), strict=True):
        if decision.stereotyped is not None:
            rated[row.category].append((row, decision.stereotyped))
    if num_left_out := len(rows) - sum(map(len, rated.values())):
        logger.info(
            "data.feedback: %d of %d items are not used: no option, or both, agree with the "
            "stereotype", num_left_out, len(rows),
        )  # fmt: skip
    return rated


def _halves(rng: random.Random, rated: Sequence[Rated]) -> tuple[Items, Items]:
    """Return two halves of a category's items; those about the same people are in the same half."""
    members: dict[tuple[tuple[str, str], tuple[str, ...]], list[Rated]] = defaultdict(list)
    for row, stereotyped in rated:
        people = tuple(sorted(row.answers[i] for i in row.people))
        members[row.template, people].append((row, stereotyped))
    if len(members) < 2:
        raise InputError(
            "data.feedback.bbq: pairs and prompts need different items: a category needs two "
            "templates, or two pairs of people"
        )
    keys = list(members)
    rng.shuffle(keys)
    keys.sort(key=lambda key: key[0])
    halves: tuple[Items, Items] = {}, {}
    for number, key in enumerate(keys):
        halves[number % 2].setdefault(key[0], []).append(members[key])
    return halves
