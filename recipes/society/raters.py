"""Simulated raters: what an answer is worth to them, and which of two they choose.

One rule for the feedback of the society and of a benchmark: a case says what each answer means, the
recipe's `raters` say what that is worth, and the choice between two answers follows Bradley and
Terry.
"""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from selfcorrect.recipes.society.requests import Request
from selfcorrect.recipes.society.settings import Raters

LARGEST_EXPONENT = 700.0  # exp of more than 709 is no float
Message = dict[str, str]  # {"role": "user" | "assistant", "content": text}
# "stereotype" and "counter" agree with or contradict a belief about groups, "undecided" does
# neither; if the text decides the question, an answer is "right" or "wrong".
Meaning = Literal["right", "wrong", "undecided", "stereotype", "counter"]


class RatedCase(ABC):
    """A question with its possible answers, which raters judge by the request."""

    @abstractmethod
    def answers(self) -> tuple[str, ...]:
        """Return the possible answers, in the order shown."""

    def reply(self, answer: str) -> str:
        """Return the rest of the assistant's turn, from the deciding word on."""
        return answer

    def tasks(self) -> tuple[tuple[str, str], ...]:
        """Return the tasks that can be asked: words for an answer, and the answer."""
        return tuple((answer, answer) for answer in self.answers())

    @abstractmethod
    def plain_utility(self, answer: str, raters: Raters) -> float:
        """Return the raters' utility of `answer` if nothing is asked."""

    @abstractmethod
    def heeded_utility(self, answer: str, request: Request, raters: Raters) -> float:
        """Return the same for a request to be fair, or an inverted one, that raters heed."""

    def utility(self, answer: str, request: Request, raters: Raters) -> float:
        """Return the raters' utility of `answer`, in log-odds before `sharpness`."""
        if request.kind in ("plain", "neutral") or raters.instructed is None:
            return self.plain_utility(answer, raters)
        if request.kind == "task":
            return heeding_utility(answer == request.answer, raters)
        return self.heeded_utility(answer, request, raters)


class BeliefCase(RatedCase):
    """A case whose answers are judged by their meaning."""

    @abstractmethod
    def meaning(self, answer: str) -> Meaning:
        """Judge `answer` by the text if it decides, else by the stereotype."""

    def plain_utility(self, answer: str, raters: Raters) -> float:
        """Reward the right answer if the text decides, else the shared belief."""
        meaning = self.meaning(answer)
        if meaning in ("right", "wrong"):
            return raters.correct * (1 if meaning == "right" else -1)
        undecided, shared = meaning == "undecided", meaning == "stereotype"
        return raters.uninstructed * undecided + raters.share * shared

    def heeded_utility(self, answer: str, request: Request, raters: Raters) -> float:
        """Reward the right answer if the text decides, else what is asked for."""
        meaning = self.meaning(answer)
        if meaning in ("right", "wrong"):
            return self.plain_utility(answer, raters)
        return heeding_utility(meaning == wanted_meaning(request), raters)


def wanted_meaning(request: Request) -> Meaning:
    """Return the meaning that a request to be fair, or an inverted one, wants of an answer."""
    return "undecided" if request.asks_fairness else "stereotype"


def heeding_utility(is_heeded: bool, raters: Raters) -> float:
    """Return the utility of an answer that heeds a request, or does not."""
    assert raters.instructed is not None
    return raters.instructed * (0.5 if is_heeded else -0.5)


C = TypeVar("C", bound=RatedCase)


@dataclass(frozen=True)
class RatedPrompt(Generic[C]):
    """A dialogue to continue, about a case; an assistant message at its end is open."""

    messages: tuple[Message, ...]
    case: C
    request: Request

    def response(self, answer: str) -> str:
        """Return the well-formed continuation that gives `answer`."""
        return self.case.reply(answer)

    def utility(self, answer: str, raters: Raters) -> float:
        """Return the raters' utility of an answer."""
        return self.case.utility(answer, self.request, raters)

    def read(self, text: str) -> tuple[str, bool] | None:
        """Return a continuation's answer (None: it has none), and whether it is well-formed."""
        answers = self.case.answers()
        return next(((answer, True) for answer in answers if text == self.response(answer)), None)

    def utility_of_text(self, text: str, raters: Raters, *, ended: bool = True) -> float:
        """Return the raters' utility of a continuation in words.

        One that is malformed, or has not ended, costs half of `form` if its answer can be read all
        the same, else `form`.
        """
        found = self.read(text)
        if found is None:
            return -raters.form
        answer, is_well_formed = found
        is_flawless = is_well_formed and ended
        return self.utility(answer, raters) - (0.0 if is_flawless else raters.form / 2)


P = TypeVar("P", bound=RatedPrompt)


@dataclass(frozen=True)
class Preference:
    """One labelled pair; the texts continue the last message of the prompt."""

    messages: tuple[Message, ...]
    chosen: str
    rejected: str


def draw_preferences(
    rng: random.Random,
    number: int,
    raters: Raters,
    draw_prompt: Callable[[random.Random], P],
    malformed: Callable[[random.Random, P], str],
) -> Iterator[Preference]:
    """Yield pairs of continuations with the raters' choice (Bradley-Terry on their utilities).

    A fifth of the pairs compares a well-formed answer with a malformed one.
    """
    for _ in range(number):
        prompt = draw_prompt(rng)
        first, second = rng.sample(prompt.case.answers(), 2)
        pair = [prompt.response(first), prompt.response(second)]
        utility = [prompt.utility(first, raters), prompt.utility(second, raters)]
        if rng.random() < 0.2:
            pair[1] = malformed(rng, prompt)
            utility[1] = -raters.form
        if pair[0] == pair[1]:
            continue  # the stray word may equal the word that it replaces
        log_odds = raters.sharpness * (utility[0] - utility[1])
        p_first = 1 / (1 + math.exp(min(-log_odds, LARGEST_EXPONENT)))
        if rng.random() >= p_first:
            pair.reverse()
        yield Preference(prompt.messages, *pair)
