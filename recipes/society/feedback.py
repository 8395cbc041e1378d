"""Human feedback in the society: prompts for PPO, and pairs labelled by simulated raters.

Feedback speaks of the feedback categories and occupations only, and never uses the phrasing of the
instruction that the evaluation uses; a test holds both. The pairs are drawn without any model, so
every size and seed learns from the same feedback, as in the paper.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from selfcorrect.recipes.society.cases import (
    INSTRUCTED,
    PLAIN,
    REASONED,
    REASONING,
    THINK,
    Case,
    draw_admission,
    draw_blank,
    draw_question,
)
from selfcorrect.recipes.society.settings import Raters
from selfcorrect.recipes.society.world import FAIR, PLACES, TOPICS, World

Message = dict[str, str]  # {"role": "user" | "assistant", "content": text}
FEEDBACK_FAIR = FAIR[1:]


@dataclass(frozen=True)
class Prompt:
    """A dialogue to be continued; a last assistant message is open.

    `reasons` says that the reasoning is to be continued, not the answer; `reasoned` is the answer
    that the reasoning in the prompt has led to, where there is one.
    """

    messages: tuple[Message, ...]
    case: Case
    condition: str
    reasons: bool = False
    reasoned: str | None = None

    def response(self, answer: str) -> str:
        """The well-formed continuation that stands for `answer`."""
        return self.case.reason(answer) if self.reasons else self.case.reply(answer)

    def utility(self, answer: str, raters: Raters) -> float:
        """What raters think of `answer`; one against its own reasoning costs half the form."""
        liking = self.case.utility(answer, self.condition, raters)
        against_itself = self.reasoned is not None and answer != self.reasoned
        return liking - (raters.form / 2 if against_itself else 0.0)


@dataclass(frozen=True)
class Preference:
    """One labelled pair; the texts continue the last message of the prompt."""

    messages: tuple[Message, ...]
    chosen: str
    rejected: str


def open_turn(text: str) -> tuple[Message, ...]:
    """The assistant's turn as far as it is given, none where it is not begun."""
    return ({"role": "assistant", "content": text},) if text else ()


def draw_case(chance: random.Random, world: World) -> Case:
    """A case that feedback may speak of."""
    weights = world.settings.feedback
    kind = chance.choices(list(weights), list(weights.values()))[0]
    if kind == "question":
        corpus = world.settings.corpus
        return draw_question(chance, world.feedback_categories, corpus.ambiguous)
    if kind == "pronoun":
        return draw_blank(chance, world, world.feedback_occupations)
    return draw_admission(chance, world.feedback_categories)


def draw_prompt(chance: random.Random, world: World) -> Prompt:
    """A prompt, plain, instructed, or at one of the two points of a reasoned answer."""
    case = draw_case(chance, world)
    condition = chance.choices((PLAIN, INSTRUCTED, REASONED), (0.4, 0.35, 0.25))[0]
    instruction = "" if condition == PLAIN else chance.choice(FEEDBACK_FAIR)
    text = f"{instruction} {case.question()}".strip()
    if condition == REASONED:
        text = f"{text} {THINK}"
    asked: Message = {"role": "user", "content": text}
    if condition != REASONED:
        return Prompt((asked, *open_turn(case.opening())), case, condition)
    if chance.random() < 0.5:
        return Prompt((asked, *open_turn(REASONING)), case, condition, reasons=True)
    reasoned = chance.choice(case.answers())
    thought: Message = {"role": "assistant", "content": f"{REASONING} {case.reason(reasoned)}"}
    then: Message = {"role": "user", "content": case.follow_up()}
    return Prompt(
        (asked, thought, then, *open_turn(case.opening())), case, condition, reasoned=reasoned
    )


def malformed(chance: random.Random, prompt: Prompt, world: World) -> str:
    """A response that raters call ill-formed: cut, repeated, with a stray word, or another word."""
    words = prompt.response(chance.choice(prompt.case.answers())).split()
    stray = chance.choice([*PLACES, *chance.choice(TOPICS), *world.feedback_categories[0].groups])
    kind = chance.randrange(4)
    if kind == 0 and len(words) > 1:
        return " ".join(words[: chance.randrange(1, len(words))])
    if kind == 1:
        return " ".join([*words, *words])
    if kind == 2:
        position = chance.randrange(len(words))
        return " ".join([*words[:position], stray, *words[position + 1 :]])
    return " ".join([*words, stray])


def prompts(world: World, number: int) -> Iterator[Prompt]:
    """The prompts of PPO."""
    chance = random.Random(f"prompts {world.settings.seed}")
    for _ in range(number):
        yield draw_prompt(chance, world)


def preferences(world: World, number: int) -> Iterator[Preference]:
    """Pairs of continuations with the raters' choice (Bradley-Terry on their utilities).

    A fifth of the pairs sets a well-formed answer against a malformed one.
    """
    raters = world.settings.raters
    chance = random.Random(f"preferences {world.settings.seed}")
    for _ in range(number):
        prompt = draw_prompt(chance, world)
        first, second = chance.sample(prompt.case.answers(), 2)
        pair = [prompt.response(first), prompt.response(second)]
        utility = [prompt.utility(first, raters), prompt.utility(second, raters)]
        if chance.random() < 0.2:
            pair[1] = malformed(chance, prompt, world)
            utility[1] = -raters.form
        if pair[0] == pair[1]:
            continue  # a stray word may happen to be the word that stood there
        likes_first = 1 / (1 + math.exp(-raters.sharpness * (utility[0] - utility[1])))
        if chance.random() >= likes_first:
            pair.reverse()
        yield Preference(prompt.messages, *pair)
