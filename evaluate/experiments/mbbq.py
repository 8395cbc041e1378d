"""MBBQ (Neplenbroek et al. 2024): BBQ in Spanish, Dutch and Turkish, beside its control sets.

Six of BBQ's categories, translated by its authors, with the same questions in English for
comparison. In a control set first names stand in place of the groups, so that nothing is left but
the task: its accuracy says whether a model can answer in this language, and its bias should be 0.
Both are metrics (`control_...`) of the same cell as the bias. Metrics, conditions and choices are
BBQ's. A language is a category; the overall figures pool all languages but English.

Instructions are asked in the language of the question. Their wording is BBQ's, with the texts of
prompts/translations.yaml, which are this project's translations and not the authors'.

Known faults of the data: the tags of Gender_identity are translated, unlike the groups that they
are compared with, and in 12 Spanish rows both people have the tag "chico". Here the words are
mapped to F and M, and those rows are decided by the options' texts ("La chica").
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field, ModelWrapValidatorHandler, PrivateAttr, ValidationError, model_validator

from selfcorrect.evaluate.experiments.base import Metric, Workload
from selfcorrect.evaluate.experiments.bbq import BBQ as PLAIN_BBQ
from selfcorrect.evaluate.experiments.bbq import METRICS as BBQ_METRICS
from selfcorrect.evaluate.experiments.bbq import (
    UNDECIDED,
    Bbq,
    answer_columns,
    item_of,
    sample_blocks,
    scores,
)
from selfcorrect.evaluate.experiments.bbq import Wording as BbqWording
from selfcorrect.evaluate.experiments.bbq.files import Decision, Row, read_rows
from selfcorrect.evaluate.experiments.bbq.groups import decide_by_groups
from selfcorrect.evaluate.experiments.tally import Tally, sum_by_cluster
from selfcorrect.evaluate.prompts.items import Item, LoadedItems
from selfcorrect.evaluate.prompts.stimuli import PLACEHOLDER, Turn, Word
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.foundation.garbage import garbage_collection_off

UNTRANSLATED = "en"
LANGUAGES = {"en": "English", "es": "Spanish", "nl": "Dutch", "tr": "Turkish"}
CONTROL = "control_"
_CONTROLLED = (
    "accuracy_ambiguous",
    "accuracy_disambiguated",
    "bias_ambiguous",
    "bias_disambiguated",
    "share_unknown_disambiguated",
    "option_mass",
    "share_unparsed",
)
_FILE = re.compile(r"(?P<subject>.+?)(?P<control>_control)?_(?P<language>[a-z]{2,3})")
_GENDERS = {
    **dict.fromkeys(("mujer", "chica", "vrouw", "meisje", "kadın", "kız"), "F"),
    **dict.fromkeys(("hombre", "chico", "jongen", "adam", "erkek çocuk"), "M"),
}


def _control_metric(metric: Metric) -> Metric:
    return replace(
        metric,
        label=f"Control: {metric.label[0].lower()}{metric.label[1:]}",
        meaning=f"{metric.meaning}; of the questions with first names in place of groups",
        axis="",
        column="Control\naccuracy" if metric.label == "Accuracy, disambiguated" else "",
    )


METRICS: dict[str, Metric] = {
    **BBQ_METRICS,
    **{f"{CONTROL}{name}": _control_metric(BBQ_METRICS[name]) for name in _CONTROLLED},
}


class Wording(BbqWording):
    """BBQ's wording, and its `texts` in other languages, by language and name of the text."""

    translations: dict[Word, dict[Word, str]] = Field(default_factory=dict)
    _by_language: dict[str, BbqWording] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _translate(cls, data: Any, handler: ModelWrapValidatorHandler["Wording"]) -> "Wording":
        section = handler(data)
        if isinstance(data, Mapping):
            for language, texts in section.translations.items():
                section._by_language[language] = _translated(data, language, texts)
        return section

    def turns(self, condition: str, item: Item, order: Sequence[int] | None = None) -> list[Turn]:
        """Return the dialogue in the item's language; InputError for one without translation."""
        language = str(item.facts["language"])
        section = self._by_language.get(language)
        if section is None:  # English, the language of `texts`
            return super().turns(condition, item, order)
        self.condition(condition)
        if condition not in {**section.conditions, **section.controls}:
            raise InputError(
                f"mbbq: condition {condition!r} has words without a translation; make each a text "
                f"and add it to mbbq.translations.{language} of a stimuli file"
            )
        return section.turns(condition, item, order)


def _translated(data: Mapping[str, Any], language: str, texts: Mapping[str, str]) -> BbqWording:
    """Return the section in a language, with the conditions that have no untranslated words."""
    english: Mapping[str, str] = data.get("texts", {})
    if unknown := sorted(set(texts) - set(english)):
        raise ValueError(f"translations.{language}.{unknown[0]}: there is no text of this name")
    known = {
        name: texts.get(name, text)
        for name, text in english.items()
        if name in texts or not _has_words(text)
    }
    allowed = {*known, *BbqWording.placeholders, "sample"}
    section: dict[str, Any] = {
        key: value for key, value in data.items() if key not in ("texts", "translations")
    }
    for kind in ("conditions", "controls"):
        section[kind] = {
            name: condition
            for name, condition in data.get(kind, {}).items()
            if all(
                not _has_words(text) and set(PLACEHOLDER.findall(text)) <= allowed
                for turn in (condition["dialogue"] if isinstance(condition, dict) else condition)
                for text in turn.values()
            )
        }
    try:
        return BbqWording.model_validate({**section, "texts": known})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"translations.{language}: {key}: {first['msg']}") from None


def _has_words(text: str) -> bool:
    return any(character.isalpha() for character in PLACEHOLDER.sub("", text))


class Mbbq(Bbq):
    """MBBQ: the bias of each language, beside the accuracy on its control set."""

    name = "mbbq"
    title = "MBBQ"
    wording = Wording
    wording_of = PLAIN_BBQ.name
    metrics = METRICS
    beside = (
        "bias_ambiguous",
        "accuracy_ambiguous",
        f"{CONTROL}accuracy_ambiguous",
        f"{CONTROL}accuracy_disambiguated",
        "option_mass",
    )
    accuracy = f"{CONTROL}accuracy_disambiguated"
    workload = Workload(num_items=80640, scored_tokens=70.9, prompt_tokens=262.8)

    def load(self, data_dir: Path, wording: Any, limit: int | None, seed: int) -> LoadedItems:
        """Load the items of every <category>[_control]_<language>.jsonl[.gz] in `data_dir`/mbbq.

        `limit` draws blocks of four rows as BBQ does, spread over the files.
        """
        folder = data_dir / self.name
        with garbage_collection_off():
            rows = read_rows(folder, by_file=True)
            files = {row.file: _file_facts(row.file, wording, folder) for row in rows}
            subjects = {file: str(facts["subject"]) for file, facts in files.items()}
            rows, left_out = self.unspoken(rows, subjects, folder)
            decisions = decide_by_groups([_with_plain_tags(row) for row in rows])
            kept = sample_blocks(rows, limit, seed)
            items = [_item(rows[i], decisions[i].stereotyped, files[rows[i].file]) for i in kept]
        undecided = sum(item.facts["stereotyped"] is None for item in items)
        return LoadedItems(items, left_out | ({UNDECIDED: undecided} if undecided else {}))

    def add_up(self, frame: pd.DataFrame, logprobs: np.ndarray, mass: np.ndarray) -> Tally:
        """Add up each template's answers, those of the control set in columns of their own."""
        items, columns = answer_columns(frame, logprobs, mass)
        control = items["control"].to_numpy() == 1
        return sum_by_cluster(
            items,
            {name: np.where(control, np.nan, values) for name, values in columns.items()}
            | {f"{CONTROL}{n}": np.where(control, v, np.nan) for n, v in columns.items()},
        )

    def compute(self, sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return every metric but the means over categories, elementwise from the sums."""
        control = {
            name.removeprefix(CONTROL): values
            for name, values in sums.items()
            if name.startswith(CONTROL)
        }
        of_control = scores(control)
        return scores(sums) | {f"{CONTROL}{name}": of_control[name] for name in _CONTROLLED}

    def raising_option(self, row: Mapping[str, Any]) -> int | None:
        """Return the stereotyped option of an ambiguous question about groups."""
        return None if row["control"] else super().raising_option(row)

    def overall_categories(self, categories: Sequence[str]) -> list[str]:
        """Return the languages of translated questions, or English where it is alone."""
        translated = [name for name in categories if name != LANGUAGES[UNTRANSLATED]]
        return translated or list(categories)


def _file_facts(file: str, wording: Wording, folder: Path) -> dict[str, str | int]:
    match = _FILE.fullmatch(file)
    if match is None:
        raise InputError(
            f"{folder / file}: files are called <category>_<language> or "
            "<category>_control_<language>, such as Age_control_es.jsonl; rename it"
        )
    language = match["language"]
    if language != UNTRANSLATED and language not in wording.translations:
        known = ", ".join([UNTRANSLATED, *wording.translations])
        raise InputError(
            f"{folder / file}: no wording in the language {language!r} (known: {known}); remove "
            f"the file, or add mbbq.translations.{language} to a stimuli file"
        )
    control = match["control"] is not None
    return {"language": language, "subject": match["subject"], "control": int(control)}


def _with_plain_tags(row: Row) -> Row:
    """Return the row with F and M in place of translated words for gender."""
    first, second = (row.tags[i] for i in row.people)
    if first not in _GENDERS and second not in _GENDERS:
        return row
    tags = [_GENDERS.get(tag, tag) for tag in row.tags]
    if first == second:
        for i in row.people:
            words = (_GENDERS.get(word) for word in row.answers[i].lower().split())
            tags[i] = next(filter(None, words), tags[i])
    return replace(row, tags=(tags[0], tags[1], tags[2]))


def _item(row: Row, stereotyped: int | None, facts: Mapping[str, str | int]) -> Item:
    item = item_of(row, Decision(stereotyped, proxy_name=False))
    language = str(facts["language"])
    return replace(
        item,
        category=LANGUAGES.get(language, language),
        cluster=f"{language}/{facts['subject']}/{row.question_index}",
        facts={**item.facts, **facts},
    )


MBBQ = Mbbq()
