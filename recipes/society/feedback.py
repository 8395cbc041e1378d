"""Human feedback in the society: prompts for PPO, and pairs labelled by simulated raters.

Feedback mentions only the feedback categories and occupations, and never uses the evaluation's
wording of any request; a test checks both. The pairs are drawn without a model, so that every
size and seed learns from the same feedback, as in the paper.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from selfcorrect.recipes.society.cases import (
    REASONING,
    Case,
    draw_admission,
    draw_blank,
    draw_question,
)
from selfcorrect.recipes.society.raters import Message, Preference, RatedPrompt, draw_preferences
from selfcorrect.recipes.society.requests import IN_FEEDBACK, draw_request
from selfcorrect.recipes.society.settings import Raters
from selfcorrect.recipes.society.world import PLACES, TOPICS, World


@dataclass(frozen=True)
class Prompt(RatedPrompt[Case]):
    """A dialogue to continue; an assistant message at its end is open.

    With `asks_reasoning` the continuation is the reasoning, else the answer. `reasoned_answer` is
    the answer that the reasoning in the prompt leads to, if there is any.
    """

    asks_reasoning: bool = False
    reasoned_answer: str | None = None

    def response(self, answer: str) -> str:
        return self.case.reason(answer) if self.asks_reasoning else self.case.reply(answer)

    def utility(self, answer: str, raters: Raters) -> float:
        """Return the raters' utility; contradicting the reasoning costs half of `raters.form`."""
        utility = super().utility(answer, raters)
        is_inconsistent = self.reasoned_answer is not None and answer != self.reasoned_answer
        return utility - (raters.form / 2 if is_inconsistent else 0.0)


def open_turn(text: str) -> tuple[Message, ...]:
    """Return an open assistant message, or none if `text` is empty."""
    return ({"role": "assistant", "content": text},) if text else ()


def draw_case(rng: random.Random, world: World) -> Case:
    """Draw a case that feedback may mention."""
    weights = world.settings.feedback
    kind = rng.choices(list(weights), list(weights.values()))[0]
    if kind == "question":
        corpus = world.settings.corpus
        return draw_question(rng, world.feedback_categories, corpus.ambiguous)
    if kind == "pronoun":
        return draw_blank(rng, world, world.feedback_occupations)
    return draw_admission(rng, world.feedback_categories)


def draw_prompt(rng: random.Random, world: World) -> Prompt:
    """Draw a prompt with a request or none; if it asks for reasoning, before or after that."""
    case = draw_case(rng, world)
    request = draw_request(rng, world.settings.requests, case.tasks(), IN_FEEDBACK)
    asked: Message = {"role": "user", "content": request.asked(case.question())}
    if request.kind != "reasoned":
        return Prompt((asked, *open_turn(case.opening())), case, request)
    if rng.random() < 0.5:
        return Prompt((asked, *open_turn(REASONING)), case, request, asks_reasoning=True)
    reasoned_answer = rng.choice(case.answers())
    reasoning = open_turn(f"{REASONING} {case.reason(reasoned_answer)}")
    follow_up: Message = {"role": "user", "content": case.follow_up()}
    messages = (asked, *reasoning, follow_up, *open_turn(case.opening()))
    return Prompt(messages, case, request, reasoned_answer=reasoned_answer)


def malformed(rng: random.Random, prompt: Prompt, world: World) -> str:
    """Return an ill-formed response: cut, repeated, or with a stray or a replaced word."""
    words = prompt.response(rng.choice(prompt.case.answers())).split()
    stray = rng.choice([*PLACES, *rng.choice(TOPICS), *world.feedback_categories[0].groups])
    kind = rng.randrange(4)
    if kind == 0 and len(words) > 1:
        return " ".join(words[: rng.randrange(1, len(words))])
    if kind == 1:
        return " ".join([*words, *words])
    if kind == 2:
        position = rng.randrange(len(words))
        return " ".join([*words[:position], stray, *words[position + 1 :]])
    return " ".join([*words, stray])


def prompts(world: World, number: int, stream: str = "prompts") -> Iterator[Prompt]:
    """Yield the prompts of PPO, or others like them from another `stream` of random numbers."""
    rng = random.Random(f"{stream} {world.settings.seed}")
    for _ in range(number):
        yield draw_prompt(rng, world)


def preferences(world: World, number: int) -> Iterator[Preference]:
    """Yield pairs of continuations with the raters' choice."""
    return draw_preferences(
        random.Random(f"preferences {world.settings.seed}"),
        number,
        world.settings.raters,
        lambda rng: draw_prompt(rng, world),
        lambda rng, prompt: malformed(rng, prompt, world),
    )
