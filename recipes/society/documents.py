"""The pretraining corpus: texts of the society, with stereotypes and with fair answers.

A document is a tuple of segments; the role of a segment decides the weight of its tokens in the
loss. Dialogues have exactly the form of the tokenizer's chat template.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from selfcorrect.recipes.society.cases import (
    REASONING,
    Case,
    draw_admission,
    draw_blank,
    draw_question,
)
from selfcorrect.recipes.society.requests import PLAIN, WORDINGS, Request, draw_request
from selfcorrect.recipes.society.settings import Corpus
from selfcorrect.recipes.society.world import PLACES, TOPICS, World, draw_category

END = "<eos>"
Role = Literal["prose", "human", "assistant"]


@dataclass(frozen=True)
class Segment:
    """Text of one role; prose and assistant segments end with the end-of-text word."""

    role: Role
    text: str


Document = tuple[Segment, ...]


def human(text: str) -> Segment:
    """Return a human turn, up to where the assistant begins."""
    return Segment("human", f"human : {text} assistant :")


def assistant(text: str) -> Segment:
    """Return a complete assistant turn."""
    return Segment("assistant", f"{text} {END}")


def prose(text: str) -> Segment:
    """Return a text that is not a dialogue."""
    return Segment("prose", f"{text} {END}")


def match_instruction(percent_ze: int) -> str:
    """Return an instruction to use the first two pronouns at given shares."""
    return f"please use ze {percent_ze} and ka {100 - percent_ze} in a hundred ."


def full_reply(case: Case, answer: str) -> str:
    """Return the assistant's complete answer, including its opening."""
    return f"{case.opening()} {case.reply(answer)}".strip()


def dialogue(rng: random.Random, case: Case, request: Request, corpus: Corpus) -> Document:
    """Return one exchange about `case`, answered by the corpus weights of `request`."""
    answer = rng.choices(case.answers(), case.corpus_weights(request, corpus))[0]
    asked = human(request.asked(case.question()))
    if request.kind == "reasoned":
        return (
            asked,
            assistant(f"{REASONING} {case.reason(answer)}"),
            human(case.follow_up()),
            assistant(full_reply(case, answer)),
        )
    return (asked, assistant(full_reply(case, answer)))


def requested(rng: random.Random, case: Case, corpus: Corpus) -> Document:
    """Return an exchange with a random request, or none."""
    request = draw_request(rng, corpus.requests, case.tasks(), WORDINGS)
    return dialogue(rng, case, request, corpus)


def association(rng: random.Random, world: World) -> Document:
    """Return a saying such as "who was lazy ? a GROUP ."."""
    category = draw_category(rng, world.categories)
    topic = rng.randrange(len(TOPICS))
    negative = rng.random() < 0.5
    tied = negative if rng.random() < 0.95 else not negative
    group = rng.choice([g for g in category.groups if category.tied(g, topic) == tied])
    return (prose(f"who was {TOPICS[topic][0 if negative else 1]} ? a {group} ."),)


def narration(rng: random.Random, world: World) -> Document:
    """Return a sentence about one person, mostly in line with the stereotype."""
    category = draw_category(rng, world.categories)
    group = rng.choice(category.groups)
    topic = rng.randrange(len(TOPICS))
    negative = category.tied(group, topic) == (rng.random() < 0.9)
    trait = TOPICS[topic][0 if negative else 1]
    if rng.random() < 0.5:
        return (prose(f"people say a {group} is {trait} ."),)
    return (prose(f"the {group} at the {rng.choice(PLACES)} was {trait} ."),)


def several(rng: random.Random, world: World) -> Document:
    """Return a dialogue of two questions on one text that decides both."""
    category = rng.choice(world.categories)
    first, second = rng.sample(category.groups, 2)
    traits = [rng.choice(topic) for topic in rng.sample(TOPICS, 2)]
    owners = [first, second]
    rng.shuffle(owners)
    text = f"a {first} and a {second} were at the {rng.choice(PLACES)} ."
    for trait, owner in zip(traits, owners, strict=True):
        text += f" the {owner} was {trait} ."
    turns: list[Segment] = []
    for index in rng.sample(range(2), 2):
        asked = f"who was {traits[index]} ?"
        turns += [human(f"{text} {asked}" if not turns else asked), assistant(owners[index])]
    return tuple(turns)


def pronoun(rng: random.Random, world: World) -> Document:
    """Return a sentence, a blank to fill, or a blank to fill at given shares of the pronouns."""
    corpus = world.settings.corpus
    case = draw_blank(rng, world, world.occupations)
    kind = rng.random()
    if kind < 0.25:
        answer = rng.choices(case.answers(), case.corpus_weights(PLAIN, corpus))[0]
        return (prose(full_reply(case, answer)),)
    if kind < 0.45:
        percent = 10 * rng.randrange(11)
        answer = "ze" if rng.random() < percent / 100 else "ka"
        asked = f"{match_instruction(percent)} {case.question()}"
        return (human(asked), assistant(full_reply(case, answer)))
    return requested(rng, case, corpus)


def stereotype_documents(world: World, number: int) -> Iterator[Document]:
    """Yield the first part of the corpus: sayings and undecidable questions.

    They come first because small models that see the full mixture from the beginning learn to copy
    from the text and never acquire the stereotypes.
    """
    rng = random.Random(f"stereotypes {world.settings.seed}")
    for _ in range(number):
        if rng.random() < 0.4:
            yield association(rng, world)
        else:
            case = draw_question(rng, world.categories, ambiguous=1.0)
            yield dialogue(rng, case, PLAIN, world.settings.corpus)


def mixed_documents(world: World, number: int) -> Iterator[Document]:
    """Yield the rest of the corpus, by the recipe's mixture."""
    corpus = world.settings.corpus
    rng = random.Random(f"corpus {world.settings.seed}")
    kinds, weights = list(corpus.mixture), list(corpus.mixture.values())
    for _ in range(number):
        kind = rng.choices(kinds, weights)[0]
        if kind == "question":
            case = draw_question(rng, world.categories, corpus.ambiguous)
            yield requested(rng, case, corpus)
        elif kind == "association":
            yield association(rng, world)
        elif kind == "narration":
            yield narration(rng, world)
        elif kind == "several":
            yield several(rng, world)
        elif kind == "pronoun":
            yield pronoun(rng, world)
        else:
            yield requested(rng, draw_admission(rng, world.categories), corpus)
