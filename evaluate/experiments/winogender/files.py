"""Winogender's two files: templates, and the share of women in each occupation."""

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
    """A sentence with its words filled in and `BLANK` for the pronoun.

    `prefix` is what stands before the blank, without a space at its end. `number_leak` says
    whether the word after the blank tells singular from plural.
    """

    occupation: str
    participant: str
    about_occupation: bool
    sentence: str
    prefix: str
    case: str
    number_leak: bool


def read_templates(path: Path) -> list[tuple[str, Template]]:
    """Every template with its place in the file; InputError for one that stands twice."""
    places: dict[Template, str] = {}
    for record in read_records(path, _TEMPLATE_COLUMNS, "\t"):
        template = _template(record)
        if template in places:
            raise InputError(
                f"{record.where}: this template stands twice, first in {places[template]}"
            )
        places[template] = record.where
    return [(where, template) for template, where in places.items()]


def _template(record: Record) -> Template:
    occupation, participant, answer, text = (record.values[name] for name in _TEMPLATE_COLUMNS)
    if answer not in ("0", "1"):
        raise InputError(f"{record.where}: answer is 0 or 1, not {reprlib.repr(answer)}")
    text = text.replace("$OCCUPATION", occupation).replace("$PARTICIPANT", participant)
    found = list(_PRONOUN.finditer(text))
    if len(found) != 1:
        raise InputError(
            f"{record.where}: a sentence needs exactly one $NOM_, $POSS_ or $ACC_PRONOUN"
        )
    before, after = text[: found[0].start()], text[found[0].end() :]
    return Template(
        occupation=occupation,
        participant=participant,
        about_occupation=answer == "0",
        sentence=before + BLANK + after,
        prefix=before.rstrip(),
        case=CASES[found[0][1]],
        number_leak=_LEAK.match(after) is not None,
    )


def read_shares(path: Path) -> dict[str, float]:
    """Percent women by occupation, from US labour statistics; InputError for one given twice."""
    shares: dict[str, float] = {}
    for record in read_records(path, _SHARE_COLUMNS, "\t"):
        where = record.where
        occupation, percent = (record.values[name] for name in _SHARE_COLUMNS)
        if occupation in shares:
            raise InputError(f"{where}: {reprlib.repr(occupation)} stands twice")
        try:
            shares[occupation] = float(percent)
        except ValueError:
            shares[occupation] = float("nan")
        if not 0 <= shares[occupation] <= 100:
            raise InputError(
                f"{where}: bls_pct_female is a number from 0 to 100, not {reprlib.repr(percent)}"
            )
    return shares
