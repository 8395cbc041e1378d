"""Number and lengths of a recipe's feedback, without loading a data library."""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from statistics import fmean
from typing import Any

from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.schema import Data, Source
from selfcorrect.recipes.society import feedback as society_feedback
from selfcorrect.recipes.society.documents import mixed_documents
from selfcorrect.recipes.society.tokenizer import vocabulary
from selfcorrect.recipes.society.world import World, make_world
from selfcorrect.train.planning.settings import Lengths

# Tokens of HH-RLHF harmless-base (test split, 2,312 pairs) by SmolLM2's tokenizer, measured on
# 2026-11-23: prompts 149 on average and 880 at most, whole dialogues 195 and 1024. Used for data
# that are not on this machine.
HH_RLHF = Lengths(149.0, 880, 46.0, 144)
# Tokens of 4,000 pairs of data.feedback from Age, Religion, Nationality, SES and Sexual_orientation
# by the same tokenizer with its chat template, measured on 2026-11-27.
BBQ = Lengths(122.0, 196, 9.0, 24)
BBQ_SOURCE = "lengths as in five categories of BBQ by SmolLM2's tokenizer"
LETTERS_PER_TOKEN = 4.5  # of the same texts and tokenizer
MEASURED_ROWS = 1000  # rows whose lengths are taken


@dataclass(frozen=True)
class FeedbackFacts:
    """Rows of the feedback, their lengths in tokens, and the source of those lengths.

    `corpus` is the number of tokens of the pretraining corpus, 0 where there is none; `vocabulary`
    the number of words of the society's tokenizer, None for other data.
    """

    pairs: int
    prompts: int
    lengths: Lengths
    source: str
    corpus: int = 0
    vocabulary: int | None = None


def feedback_facts(data: Data) -> FeedbackFacts:
    """Return the facts of the society, a benchmark, local JSON lines, or a set with a `limit`.

    Raises InputError where the number of rows is unknown.
    """
    if data.society is not None:
        return _society_facts(make_world(data.society))
    if data.feedback is not None:
        return FeedbackFacts(data.feedback.pairs, data.feedback.prompts, BBQ, BBQ_SOURCE)
    assert data.preferences is not None
    rows = _local_rows(data.preferences)
    if rows is None:
        pairs = _limit(data.preferences, "preferences")
        lengths, source = HH_RLHF, "rows by limit, lengths as in HH-RLHF's test split"
    else:
        letters = [_pair_letters(row) for row in islice(rows, MEASURED_ROWS)]
        pairs = len(letters) + sum(1 for _ in rows)
        pairs = min(pairs, data.preferences.limit or pairs)
        lengths, source = _lengths(letters), f"at {LETTERS_PER_TOKEN} letters per token"
    prompts = pairs
    if data.prompts is not None:
        rows = _local_rows(data.prompts)
        count = sum(1 for _ in rows) if rows else _limit(data.prompts, "prompts")
        prompts = min(count, data.prompts.limit or count)
    return FeedbackFacts(pairs, prompts, lengths, source)


def _limit(source: Source, key: str) -> int:
    if source.limit is None:
        raise InputError(
            f"data.{key}: {source.path} is not on this machine, so its rows cannot be counted; "
            f"set data.{key}.limit, or give a .jsonl or .jsonl.gz file"
        )
    return source.limit


def _local_rows(source: Source) -> Iterator[dict[str, Any]] | None:
    path = Path(source.path).expanduser()
    return _json_lines(path) if path.is_file() and ".jsonl" in path.suffixes else None


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise InputError(f"{path}: line {number}: a row must be an object")
                yield row
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: cannot be read as JSON lines ({error})") from None


def _pair_letters(row: dict[str, Any]) -> tuple[int, int]:
    """Return the letters of a pair's prompt, and of its longer answer."""
    texts = [_text(row.get(side)) for side in ("chosen", "rejected")]
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False)))
    prompt = len(_text(row.get("prompt")))
    return max(prompt, shared), max(max(map(len, texts)) - shared, 1)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "\n\n".join(str(m.get("content", "")) for m in value if isinstance(m, dict))
    return value if isinstance(value, str) else ""


def _lengths(letters: list[tuple[int, int]]) -> Lengths:
    if not letters:
        raise InputError("data.preferences: the file has no rows")
    prompts, answers = (
        [n / LETTERS_PER_TOKEN for n in side] for side in zip(*letters, strict=True)
    )
    return Lengths(fmean(prompts), round(max(prompts)), fmean(answers), round(max(answers)))


def _society_facts(world: World) -> FeedbackFacts:
    """Count one token per word; a speaker's name and its colon are one each."""
    settings = world.settings
    prompts, answers = [], []
    for pair in society_feedback.preferences(world, min(settings.pairs, MEASURED_ROWS)):
        prompts.append(sum(len(m["content"].split()) + 2 for m in pair.messages) + 2)
        answers.append(1 + max(len(pair.chosen.split()), len(pair.rejected.split())))
    documents = mixed_documents(world, MEASURED_ROWS)
    words = fmean(sum(len(s.text.split()) for s in document) for document in documents)
    corpus = settings.corpus.documents + settings.corpus.stereotypes_first
    return FeedbackFacts(
        settings.pairs,
        settings.prompts,
        Lengths(fmean(prompts), max(prompts), fmean(answers), max(answers)),
        "the society's own texts",
        round(corpus * words),
        len(vocabulary(world)),
    )
