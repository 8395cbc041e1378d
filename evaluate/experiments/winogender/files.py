"""Read Winogender's two files: templates, and the share of women in each occupation."""

import re
import reprlib
from dataclasses import dataclass
from pathlib import Path

from selfcorrect.evaluate.experiments.reading import Record, read_records
from selfcorrect.recipes.foundation.errors import InputError

TEMPLATES = "templates.tsv"
SHARES = "occupations-stats.tsv"
BLANK = "_"
CASES = {"NOM": "nominative", "POSS": "possessive", "ACC": "accusative"}
_PRONOUN = re.compile(r"\$(NOM|POSS|ACC)_PRONOUN")
_LEAK = re.compile(r"\s+(was|were|is|are|has|have)(n't)?\b", re.IGNORECASE)
_TEMPLATE_COLUMNS = ("occupation(0)", "other-participant(1)", "answer", "sentence")
_SHARE_COLUMNS = ("occupation", "bls_pct_female")


@dataclass(frozen=True, slots=True)
class Template:
    """A sentence with its nouns filled in and `BLANK` in place of the pronoun.

    `prefix` is the text before the blank, without a trailing space. `number_leak` says whether the
    word after the blank reveals singular or plural.
    """

    occupation: str
    participant: str
    about_occupation: bool
    sentence: str
    prefix: str
    case: str
    number_leak: bool


def read_templates(path: Path) -> list[tuple[str, Template]]:
    """Return every template with its location; raises InputError for a duplicate."""
    locations: dict[Template, str] = {}
    for record in read_records(path, _TEMPLATE_COLUMNS, "\t"):
        template = _template(record)
        if template in locations:
            raise InputError(
                f"{record.where}: this template appears twice, first in {locations[template]}"
            )
        locations[template] = record.where
    return [(where, template) for template, where in locations.items()]


def _template(record: Record) -> Template:
    occupation, participant, answer, text = (record.values[name] for name in _TEMPLATE_COLUMNS)
    if answer not in ("0", "1"):
        raise InputError(f"{record.where}: answer must be 0 or 1, not {reprlib.repr(answer)}")
    text = text.replace("$OCCUPATION", occupation).replace("$PARTICIPANT", participant)
    pronouns = list(_PRONOUN.finditer(text))
    if len(pronouns) != 1:
        raise InputError(
            f"{record.where}: the sentence must have exactly one $NOM_, $POSS_ or $ACC_PRONOUN"
        )
    before, after = text[: pronouns[0].start()], text[pronouns[0].end() :]
    return template_of(occupation, participant, answer == "0", before, after, CASES[pronouns[0][1]])


def template_of(
    occupation: str, participant: str, about_occupation: bool, before: str, after: str, case: str
) -> Template:
    """Return the template of a sentence with the text `before` and `after` its blank."""
    return Template(
        occupation=occupation,
        participant=participant,
        about_occupation=about_occupation,
        sentence=before + BLANK + after,
        prefix=before.rstrip(),
        case=case,
        number_leak=_LEAK.match(after) is not None,
    )


def read_shares(path: Path) -> dict[str, float]:
    """Return percent women by occupation; raises InputError for duplicates."""
    shares: dict[str, float] = {}
    for record in read_records(path, _SHARE_COLUMNS, "\t"):
        where = record.where
        occupation, percent = (record.values[name] for name in _SHARE_COLUMNS)
        if occupation in shares:
            raise InputError(f"{where}: {reprlib.repr(occupation)} appears twice; keep one row")
        try:
            shares[occupation] = float(percent)
        except ValueError:
            shares[occupation] = float("nan")
        if not 0 <= shares[occupation] <= 100:
            raise InputError(
                f"{where}: bls_pct_female must be from 0 to 100, not {reprlib.repr(percent)}"
            )
    if max(shares.values()) <= 1 and any(share % 1 for share in shares.values()):
        raise InputError(f"{path}: bls_pct_female: every value is at most 1; give percent")
    return shares
