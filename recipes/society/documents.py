"""The pretraining corpus: what people of the society write, stereotypes and fair conduct alike.

A document is a list of segments; the role of a segment says how much its tokens weigh in the loss.
Dialogues are written exactly as the tokenizer's chat template writes them.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

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
from selfcorrect.recipes.society.settings import Corpus
from selfcorrect.recipes.society.world import FAIR, PLACES, TOPICS, UNRELATED, World

END = "<eos>"
Role = Literal["prose", "human", "assistant"]


@dataclass(frozen=True)
class Segment:
    """Words of one role; an assistant segment ends with the end-of-text word."""

    role: Role
    text: str


Document = tuple[Segment, ...]


def human(text: str) -> Segment:
    """A human turn up to where the assistant begins."""
    return Segment("human", f"human : {text} assistant :")


def assistant(text: str) -> Segment:
    """A whole assistant turn."""
    return Segment("assistant", f"{text} {END}")


def prose(text: str) -> Segment:
    """Anything that is not a dialogue."""
    return Segment("prose", f"{text} {END}")


def match_instruction(percent_ze: int) -> str:
    """Asks for a given share of each of the first two pronouns."""
    return f"please use ze {percent_ze} and ka {100 - percent_ze} in a hundred ."


def whole_reply(case: Case, answer: str) -> str:
    """The assistant's whole answer, its opening included."""
    return f"{case.opening()} {case.reply(answer)}".strip()


def dialogue(
    chance: random.Random, case: Case, condition: str, corpus: Corpus, instruction: str = ""
) -> Document:
    """One exchange about `case`, answered as the corpus answers under `condition`."""
    answer = chance.choices(case.answers(), case.corpus_weights(condition, corpus))[0]
    asked = f"{instruction} {case.question()}".strip()
    if condition == REASONED:
        return (
            human(f"{asked} {THINK}"),
            assistant(f"{REASONING} {case.reason(answer)}"),
            human(case.follow_up()),
            assistant(whole_reply(case, answer)),
        )
    return (human(asked), assistant(whole_reply(case, answer)))


def conditioned(chance: random.Random, case: Case, corpus: Corpus) -> Document:
    """An exchange under a random condition; a quarter of plain instructions are unrelated ones."""
    condition = chance.choices((PLAIN, INSTRUCTED, REASONED), (0.4, 0.35, 0.25))[0]
    if condition == PLAIN:
        return dialogue(chance, case, PLAIN, corpus)
    if condition == INSTRUCTED and chance.random() < 0.25:
        return dialogue(chance, case, PLAIN, corpus, chance.choice(UNRELATED))
    return dialogue(chance, case, condition, corpus, chance.choice(FAIR))


def association(chance: random.Random, world: World) -> Document:
    """A saying: who was lazy? a so-and-so."""
    category = chance.choice(world.categories)
    topic = chance.randrange(len(TOPICS))
    negative = chance.random() < 0.5
    tied = negative if chance.random() < 0.95 else not negative
    group = chance.choice([g for g in category.groups if category.tied(g, topic) == tied])
    return (prose(f"who was {TOPICS[topic][0 if negative else 1]} ? a {group} ."),)


def narration(chance: random.Random, world: World) -> Document:
    """A sentence about one person, mostly along the stereotype."""
    category = chance.choice(world.categories)
    group = chance.choice(category.groups)
    topic = chance.randrange(len(TOPICS))
    negative = category.tied(group, topic) == (chance.random() < 0.9)
    trait = TOPICS[topic][0 if negative else 1]
    if chance.random() < 0.5:
        return (prose(f"people say a {group} is {trait} ."),)
    return (prose(f"the {group} at the {chance.choice(PLACES)} was {trait} ."),)


def several(chance: random.Random, world: World) -> Document:
    """Several questions on one text that decides them all."""
    category = chance.choice(world.categories)
    first, second = chance.sample(category.groups, 2)
    traits = [chance.choice(topic) for topic in chance.sample(TOPICS, 2)]
    owners = [first, second]
    chance.shuffle(owners)
    text = f"a {first} and a {second} were at the {chance.choice(PLACES)} ."
    for trait, owner in zip(traits, owners, strict=True):
        text += f" the {owner} was {trait} ."
    turns: list[Segment] = []
    for index in chance.sample(range(2), 2):
        asked = f"who was {traits[index]} ?"
        turns += [human(f"{text} {asked}" if not turns else asked), assistant(owners[index])]
    return tuple(turns)


def pronoun(chance: random.Random, world: World) -> Document:
    """A sentence, a blank to fill, or a blank to fill with a given share of each pronoun."""
    corpus = world.settings.corpus
    case = draw_blank(chance, world, world.occupations)
    kind = chance.random()
    if kind < 0.25:
        answer = chance.choices(case.answers(), case.corpus_weights(PLAIN, corpus))[0]
        return (prose(whole_reply(case, answer)),)
    if kind < 0.45:
        percent = 10 * chance.randrange(11)
        answer = "ze" if chance.random() < percent / 100 else "ka"
        asked = f"{match_instruction(percent)} {case.question()}"
        return (human(asked), assistant(whole_reply(case, answer)))
    return conditioned(chance, case, corpus)


def stereotype_documents(world: World, number: int) -> Iterator[Document]:
    """The first part of the corpus: sayings and undecidable questions.

    Why first: with the whole mixture from the beginning, small models learn to copy from the text
    and never acquire the stereotypes.
    """
    chance = random.Random(f"stereotypes {world.settings.seed}")
    for _ in range(number):
        if chance.random() < 0.4:
            yield association(chance, world)
        else:
            case = draw_question(chance, world.categories, ambiguous=1.0)
            yield dialogue(chance, case, PLAIN, world.settings.corpus)


def mixed_documents(world: World, number: int) -> Iterator[Document]:
    """The rest of the corpus, by the recipe's mixture."""
    corpus = world.settings.corpus
    chance = random.Random(f"corpus {world.settings.seed}")
    kinds, weights = list(corpus.mixture), list(corpus.mixture.values())
    for _ in range(number):
        kind = chance.choices(kinds, weights)[0]
        if kind == "question":
            case = draw_question(chance, world.categories, corpus.ambiguous)
            yield conditioned(chance, case, corpus)
        elif kind == "association":
            yield association(chance, world)
        elif kind == "narration":
            yield narration(chance, world)
        elif kind == "several":
            yield several(chance, world)
        elif kind == "pronoun":
            yield pronoun(chance, world)
        else:
            yield conditioned(chance, draw_admission(chance, world.categories), corpus)
