"""Winogenerated (Perez et al. 2022): Winogender's question about 299 occupations, ten times each.

The sentences are written by a model. Metrics, prompts and conditions are Winogender's; every
sentence is about the occupation. Intervals resample occupations, after the mean over the sentences
of each. Some sentences give the pronoun away by content ("his portfolio"), and in a few the
occupation follows the blank: `correlation_occupation_first` is without the latter.
"""

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from selfcorrect.evaluate.experiments.base import Metric, Workload
from selfcorrect.evaluate.experiments.reading import json_lines, text
from selfcorrect.evaluate.experiments.winogender import (
    WINOGENDER,
    Winogender,
    Wording,
    along_shares,
    item_of,
)
from selfcorrect.evaluate.experiments.winogender.files import BLANK, template_of
from selfcorrect.evaluate.prompts.items import Item, LoadedItems
from selfcorrect.recipes.foundation.errors import InputError

EXAMPLES = "winogenerated_examples.jsonl"
CASES = {
    ("he", "she", "they"): "nominative",
    ("his", "her", "their"): "possessive",
    ("him", "her", "them"): "accusative",
}
_SHARE = "BLS_percent_women_2019"
_FIRST = "the same on the sentences whose occupation precedes the blank"


METRICS: dict[str, Metric] = {
    **WINOGENDER.metrics,
    "correlation_occupation_first": Metric("Correlation, occupation first", _FIRST, 0.0),
    "share_neutral_occupation_first": Metric("Mean p(neutral), occupation first", _FIRST),
}


class Winogenerated(Winogender):
    """Winogenerated, with Winogender's metrics and wording."""

    name = "winogenerated"
    title = "Winogenerated"
    wording_of = Winogender.name
    metrics = METRICS
    subsets: ClassVar[Mapping[str, tuple[str, int]]] = {
        **Winogender.subsets,
        "occupation_first": ("occupation_first", 1),
    }
    workload = Workload(num_items=2990, scored_tokens=39.4, prompt_tokens=152.6)

    def load(self, data_dir: Path, wording: Wording, limit: int | None, seed: int) -> LoadedItems:
        """Load one item per row of winogenerated_examples.jsonl, in file order.

        `limit` items are drawn evenly along the percent of women.
        """
        path = data_dir / self.name / EXAMPLES
        items: list[Item] = []
        num_uses: dict[str, int] = {}
        shares: dict[str, float] = {}
        indices: dict[Any, str] = {}
        for where, record in json_lines(path):
            index = record.get("index")
            if type(index) is not int or index in indices:
                raise InputError(
                    f"{where}: index must be a whole number that no other row has, "
                    f"not {reprlib.repr(index)}"
                )
            indices[index] = where
            occupation = text(record, "occupation", where)
            share = _share(record, where)
            if shares.setdefault(occupation, share) != share:
                raise InputError(
                    f"{where}: {_SHARE} of {reprlib.repr(occupation)} is {share:g} here and "
                    f"{shares[occupation]:g} above; keep one"
                )
            before, after = _around_blank(record, where)
            template = template_of(
                occupation, text(record, "other_person", where), True, before, after,
                _case(record, where),
            )  # fmt: skip
            num_uses[occupation] = num_uses.get(occupation, 0) + 1
            name = f"{occupation}/{num_uses[occupation]}"
            item = item_of(name, template, share, wording.pronouns, where)
            item.facts["occupation_first"] = int(occupation.lower() in before.lower())
            items.append(item)
        if not items:
            raise InputError(f"{path}: no rows in this file; is it cut short?")
        return LoadedItems(along_shares(items, limit, seed))


def _share(record: Mapping[str, Any], where: str) -> float:
    share: Any = record.get(_SHARE)
    is_number = isinstance(share, int | float) and not isinstance(share, bool)
    if not is_number or not 0 <= share <= 100:
        raise InputError(f"{where}: {_SHARE} must be from 0 to 100, not {reprlib.repr(share)}")
    return float(share)


def _around_blank(record: Mapping[str, Any], where: str) -> tuple[str, str]:
    sentence = text(record, "sentence_with_blank", where)
    if sentence.count(BLANK) != 1:
        raise InputError(f"{where}: sentence_with_blank must have exactly one {BLANK}")
    before, _, after = sentence.partition(BLANK)
    return before, after


def _case(record: Mapping[str, Any], where: str) -> str:
    words = record.get("pronoun_options")
    case = CASES.get(tuple(words)) if isinstance(words, list) and _are_strings(words) else None
    if case is None:
        known = "; ".join(", ".join(options) for options in CASES)
        raise InputError(
            f"{where}: pronoun_options must be one of {known}, not {reprlib.repr(words)}"
        )
    return case


def _are_strings(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


WINOGENERATED = Winogenerated()
