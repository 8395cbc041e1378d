"""Decide which option of a BBQ question agrees with the stereotype, and whether names are proxies.

The authors' additional_metadata.csv decides where it is present. Without it, both are derived from
the questions: group tags are normalised and compared as a whole ("old" is inside "nonOld",
"African" inside "African American"), and intersectional items must match on both dimensions.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import takewhile
from pathlib import Path

from selfcorrect.evaluate.experiments.bbq.files import METADATA, Decision, Key, Row, read_metadata
from selfcorrect.recipes.foundation.errors import InputError

INTERSECTION = "_x_"

# The files use several words for a group, and tags and lists of groups use different ones.
_SYNONYMS = {
    **dict.fromkeys(("woman", "women", "girl", "girls"), "f"),
    **dict.fromkeys(("man", "men", "boy", "boys"), "m"),
    **dict.fromkeys(("transgenderwomen", "transgendermen", "trans_f", "trans_m"), "trans"),
    **dict.fromkeys(("nontrans_f", "nontrans_m"), "nontrans"),
    "latina": "latino",
}
_ARTICLES = ("the", "a", "an")


def decide(rows: Sequence[Row], folder: Path) -> list[Decision]:
    """Return a decision per row: the authors' if `folder` holds their table, else by groups.

    Rows that the table does not list are decided by groups. Raises InputError for a table that
    cannot be read or contradicts the rows.
    """
    official = read_metadata(folder)
    if all(row.key in official for row in rows):
        return [_check(official[row.key], row, folder) for row in rows]
    derived = decide_by_groups(rows)
    return [
        _check(official[row.key], row, folder) if row.key in official else decision
        for row, decision in zip(rows, derived, strict=True)
    ]


def decide_by_groups(rows: Sequence[Row]) -> list[Decision]:
    """Return the decisions derived from the rows alone.

    In a negative question the option of the stereotyped group agrees with the stereotype, in a
    non-negative question the option of the other person. A row is undecided if neither or both of
    the two people match.
    """
    targets = _targets(rows)
    named = _name_templates(rows)
    decisions = []
    for row, target in zip(rows, targets, strict=True):
        if target is not None and not row.negative:
            target = next(i for i in row.people if i != target)
        decisions.append(Decision(target, row.template in named))
    return decisions


def _check(decision: Decision, row: Row, folder: Path) -> Decision:
    if decision.stereotyped == row.unknown:
        raise InputError(
            f"{folder / METADATA}: target_loc of {row.category} {row.example_id} is its unknown "
            "option; the table belongs to other files, fetch both again"
        )
    return decision


# --- decisions by grou --------------------------------------------------------------------


@cache
def normalise(group: str) -> str:
    """Return a tag or group in lower case, without blanks, braces, and the prefix M- or F-."""
    text = re.sub(r"[\s{}]", "", group.lower())
    text = text.removeprefix("m-").removeprefix("f-")
    return _SYNONYMS.get(text, text)


def _targets(rows: Sequence[Row]) -> list[int | None]:
    """Return each row's option of the stereotyped group, before polarity is considered."""
    normalised = {
        groups: {normalise(group) for group in groups} for groups in {r.groups for r in rows}
    }
    crossed = [row for row in rows if INTERSECTION in row.category]
    people = _crossed_people(crossed)
    second = _stereotyped_second(crossed, people, normalised)
    targets: list[int | None] = []
    for row in rows:
        groups = normalised[row.groups]
        if row.key in people:
            attribute = second.get(row.template)
            matches = [
                i
                for i, (race, other) in zip(row.people, people[row.key], strict=True)
                if race in groups and other == attribute
            ]
        else:
            matches = [i for i in row.people if normalise(row.tags[i]) in groups]
            if not matches:  # in Nationality the tag is a region, and the group is in the text
                matches = [i for i in row.people if normalise(row.names[i]) in groups]
        targets.append(matches[0] if len(matches) == 1 else None)
    return targets


Person = tuple[str, str]  # race, and the second dimension: gender or socioeconomic status


def _crossed_people(rows: Iterable[Row]) -> dict[Key, tuple[Person, Person]]:
    """Return both people of each intersectional row, from tags such as F-Black or lowSES-M-Asian.

    The published Race_x_gender has 344 rows with an empty tag, for which the option text is read.
    """
    rows = list(rows)
    races: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        for i in row.people:
            if row.tags[i]:
                races[row.category].add(normalise(row.tags[i].split("-")[-1]))
    people: dict[Key, tuple[Person, Person]] = {}
    for row in rows:
        first, second = (
            _tagged_person(row.tags[i])
            if row.tags[i]
            else _described_person(row.answers[i], races[row.category])
            for i in row.people
        )
        people[row.key] = first, second
    return people


def _tagged_person(tag: str) -> Person:
    parts = tag.split("-")
    return normalise(parts[-1]), normalise(parts[0])


def _described_person(text: str, races: set[str]) -> Person:
    words = {normalise(word) for word in text.split()}
    race, gender = words & races, words & {"f", "m"}
    return (race.pop() if len(race) == 1 else "", gender.pop() if len(gender) == 1 else "")


def _stereotyped_second(
    rows: Iterable[Row],
    people: Mapping[Key, tuple[Person, Person]],
    groups: Mapping[tuple[str, ...], set[str]],
) -> dict[tuple[str, str], str]:
    """Return the stereotyped gender or socioeconomic status of each intersectional template.

    The files name only the stereotyped race. But each template has rows in which exactly one person
    is of that race, and the authors always gave that person the stereotyped second attribute. So
    it is the attribute on which all these rows agree; templates whose rows disagree have none.
    """
    seen: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row in rows:
        of_race = [other for race, other in people[row.key] if race in groups[row.groups]]
        if len(of_race) == 1:
            seen[row.template].add(of_race[0])
    return {template: next(iter(kinds)) for template, kinds in seen.items() if len(kinds) == 1}


def _name_templates(rows: Sequence[Row]) -> set[tuple[str, str]]:
    """Return the templates in which a proper name is the only sign of the group.

    A person is named if the description in answer_info starts with capitalised words that are not
    in the tag, and the option has them without an article. The name stands for a group if all its
    uses in the category share a part of the tag: in SES, Donna is poor in one row and rich in the
    next, so there the context decides.
    """
    shared: dict[tuple[str, str], set[str]] = {}
    votes: dict[tuple[str, str], list[str | None]] = defaultdict(list)
    for row in rows:
        for i in row.people:
            parts = {part.lower() for part in re.split(r"[-_\s]", row.tags[i]) if part}
            name = _proper_name(row.names[i], row.answers[i], parts)
            votes[row.template].append(name)
            if name is not None:
                key = row.category, name
                shared[key] = shared[key] & parts if key in shared else parts
    return {
        template
        for template, names in votes.items()
        if all(name is not None and shared[template[0], name] for name in names)
    }


def _proper_name(description: str, option: str, parts: set[str]) -> str | None:
    """Return the proper name that a description starts with, None if there is none."""
    words = list(takewhile(lambda word: word[:1].isupper(), description.split()))
    while words and " ".join(words) not in option:  # "Ayanna Dorsey CEO" is described, not named
        words.pop()
    if not words or parts & {word.lower() for word in words}:
        return None
    name = " ".join(words)
    before = option.partition(name)[0].lower().split()
    return None if before and before[-1] in _ARTICLES else name
