"""The people of the synthetic society: groups, occupations, and the stereotypes about them.

Everything is invented and derived from one seed. A category has four groups. Every group has one of
the four codes of two dimensions (warmth, competence), as in the stereotype content model; every
topic (a negative and a positive adjective) loads on one of the two. A stereotype ties the negative
adjective of a topic to the groups that rank low on its dimension. Beliefs about some categories are
voiced much more often than those about others, by a power law.
"""

import random
from dataclasses import dataclass

from selfcorrect.recipes.society.settings import SocietySettings

# fmt: off
SYLLABLES = ("ba", "do", "ki", "lu", "me", "no", "pa", "ri", "su", "ta", "ve", "zo",
             "gra", "sli", "tro", "fen", "mur", "qua", "del", "hix")
# fmt: on
TOPICS = (
    ("lazy", "diligent"),
    ("rude", "polite"),
    ("greedy", "generous"),
    ("clumsy", "deft"),
    ("loud", "quiet"),
    ("sly", "honest"),
    ("timid", "brave"),
    ("messy", "tidy"),
)
PLACES = ("market", "harbor", "mill", "temple", "school", "inn", "bridge", "garden")
HAPPENINGS = ("would be late", "was at the mill", "had the key", "would come back")
PRONOUNS = ("ka", "ze", "thon")  # two gendered ones and the neutral one
SCORES = range(1, 10)
GRADES = range(1, 5)  # written as the law school's: 3.0
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Category:
    """Four groups, each with its (warmth, competence) code; True means low.

    `frequency` is how often beliefs about it are voiced, relative to the most frequent categories.
    """

    name: str
    groups: tuple[str, ...]
    codes: tuple[tuple[bool, bool], ...]
    frequency: float

    def tied(self, group: str, topic: int) -> bool:
        """Return whether society ties the negative adjective of `topic` to `group`."""
        return self.codes[self.groups.index(group)][topic % 2]

    def doubted(self, group: str) -> bool:
        """Return whether society doubts the group's competence, which costs it admissions."""
        return self.codes[self.groups.index(group)][1]


@dataclass(frozen=True)
class World:
    """The society of one seed.

    Feedback mentions the evaluation's categories and occupations only if `settings.held_out` is
    false.
    """

    settings: SocietySettings
    categories: tuple[Category, ...]
    occupations: tuple[str, ...]
    percent_ze: dict[str, int]

    @property
    def feedback_categories(self) -> tuple[Category, ...]:
        """Return the categories that human feedback may mention."""
        held_out = self.settings.held_out
        return self.categories[: self.settings.feedback_categories] if held_out else self.categories

    @property
    def evaluated_categories(self) -> tuple[Category, ...]:
        """Return the categories that the evaluation mentions."""
        return self.categories[self.settings.feedback_categories :]

    @property
    def feedback_occupations(self) -> tuple[str, ...]:
        """Return every second occupation, so that both halves span the same pronoun shares."""
        return self.occupations[0::2] if self.settings.held_out else self.occupations

    @property
    def evaluated_occupations(self) -> tuple[str, ...]:
        """Return the other half, for the evaluation."""
        return self.occupations[1::2]


def draw_category(rng: random.Random, categories: tuple[Category, ...]) -> Category:
    """Draw one of the categories by their frequencies."""
    return rng.choices(categories, [category.frequency for category in categories])[0]


def make_world(settings: SocietySettings) -> World:
    """Build the society of `settings.seed`."""
    rng = random.Random(f"world {settings.seed}")
    used: set[str] = set()

    def word(syllables: int, ending: str) -> str:
        while True:
            name = "".join(rng.choice(SYLLABLES) for _ in range(syllables)) + ending
            if name not in used:
                used.add(name)
                return name

    codes = [(False, False), (False, True), (True, False), (True, True)]
    categories = []
    for index in range(settings.categories):
        # Ranks count within the half, so that feedback's and evaluation's are equally well known.
        is_held_out = index >= settings.feedback_categories
        rank = 1 + index - settings.feedback_categories * is_held_out
        groups = tuple(word(2, "n") for _ in range(4))
        frequency = rank**-settings.rarity
        category = Category(word(2, "ity"), groups, tuple(rng.sample(codes, 4)), frequency)
        categories.append(category)
    occupations = tuple(word(2, "er") for _ in range(settings.occupations))
    # Shares in tens of percent, spread evenly and equally over both halves.
    pairs = settings.occupations // 2
    shares = {
        name: round(10 * (index // 2 + 0.5) / pairs) * 10 for index, name in enumerate(occupations)
    }
    return World(settings, tuple(categories), occupations, shares)
