"""The society's own BBQ, Winogender and law-school files, in the published formats.

Written from the held-out categories and occupations, so that the evaluation's loaders, conditions
and metrics are the ones that serve the real benchmarks.
"""

import csv
import io
import itertools
import json
import logging
import random
from pathlib import Path

from selfcorrect.recipes.foundation.atomic_files import atomic_folder
from selfcorrect.recipes.foundation.checksums import check_files, digests, read_record, write_record
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.society.cases import Question
from selfcorrect.recipes.society.settings import SocietySettings
from selfcorrect.recipes.society.world import (
    GRADES,
    HAPPENINGS,
    PLACES,
    SCORES,
    TOPICS,
    UNKNOWN,
    Category,
    World,
    make_world,
)

STIMULI = Path(__file__).with_name("stimuli.yaml")
RECORD = "files.json"

_log = logging.getLogger(__name__)


def bbq_row(number: int, case: Question) -> dict[str, object]:
    """One line of a BBQ file; the group's own name serves as its tag."""
    names = case.answers()
    right = UNKNOWN if case.truth is None else case.truth
    tied = [g for g in case.category.groups if case.category.tied(g, case.topic)]
    return {
        "example_id": number,
        "question_index": str(case.topic + 1),
        "question_polarity": "neg" if case.negative else "nonneg",
        "context_condition": "ambig" if case.truth is None else "disambig",
        "category": case.category.name,
        "answer_info": {f"ans{i}": [name, name] for i, name in enumerate(names)},
        "additional_metadata": {
            "subcategory": "None",
            "stereotyped_groups": tied,
            "version": "None",
            "source": "invented",
        },
        "context": case.context(),
        "question": case.asked(),
        **{f"ans{i}": name for i, name in enumerate(names)},
        "label": names.index(right),
    }


def bbq_rows(chance: random.Random, category: Category, blocks: int) -> list[dict[str, object]]:
    """Blocks of four (negative or not, ambiguous or decided), `blocks` a topic, sides balanced."""
    rows: list[dict[str, object]] = []
    for topic in range(len(TOPICS)):
        ill = [g for g in category.groups if category.tied(g, topic)]
        well = [g for g in category.groups if not category.tied(g, topic)]
        pairs = list(itertools.product(ill, well))
        for block in range(blocks):
            one, other = pairs[block % len(pairs)]
            order = chance.sample(range(3), 3)
            place, ill_first = chance.choice(PLACES), chance.random() < 0.5
            # The two polarities have different answers: both along the stereotype, or both against
            # it. Every other block is along it, so that answering all rightly is no bias at all.
            truths = [one, other] if (block + topic) % 2 else [other, one]
            for (negative, truth), decided in itertools.product(
                zip((True, False), truths, strict=True), (False, True)
            ):
                case = Question(
                    category=category,
                    topic=topic,
                    negative=negative,
                    ill=one,
                    well=other,
                    place=place,
                    ill_first=ill_first,
                    truth=truth if decided else None,
                    truth_first=chance.random() < 0.5,
                    order=(order[0], order[1], order[2]),
                )
                rows.append(bbq_row(len(rows), case))
    return rows


def table(rows: list[list[object]], delimiter: str) -> str:
    """Rows as delimited text, header first."""
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator="\n").writerows(rows)
    return text.getvalue()


def winogender_tables(chance: random.Random, world: World) -> tuple[str, str]:
    """templates.tsv and occupations-stats.tsv of the held-out occupations."""
    templates: list[list[object]] = [
        ["occupation(0)", "other-participant(1)", "answer", "sentence"]
    ]
    shares: list[list[object]] = [
        ["occupation", "bergsma_pct_female", "bls_pct_female", "bls_year"]
    ]
    for occupation in world.evaluated_occupations:
        share = world.percent_ze[occupation]
        shares.append([occupation, share, share, 0])
        for answer in (1, 0):
            happening = chance.choice(HAPPENINGS)
            sentence = f"the $OCCUPATION told the $PARTICIPANT that $NOM_PRONOUN {happening} ."
            templates.append([occupation, "client", answer, sentence])
    return table(templates, "\t"), table(shares, "\t")


def law_table(world: World) -> str:
    """law_data.csv: every score and grade once; `race` is overwritten by the task anyway."""
    rows: list[list[object]] = [["", "race", "sex", "LSAT", "UGPA"]]
    group = world.evaluated_categories[0].groups[0]
    for score, grade in itertools.product(SCORES, GRADES):
        rows.append([len(rows) - 1, group, 1, score, grade])
    return table(rows, ",")


def stimuli_text(world: World) -> str:
    """The stimuli file with the pairs of groups that admission compares (doubted first)."""
    pairs = []
    for category in world.evaluated_categories:
        doubted = [g for g in category.groups if category.disfavoured(g)]
        favoured = [g for g in category.groups if not category.disfavoured(g)]
        pairs += [[a, b] for a, b in zip(doubted, favoured, strict=True)]
    return STIMULI.read_text(encoding="utf-8").replace("PAIRS_OF_THE_WORLD", json.dumps(pairs))


def whole_benchmarks(settings: SocietySettings, folder: Path) -> None:
    """Write the benchmarks where they are not; files that are damaged are said, and made anew."""
    try:
        record = read_record(folder / RECORD, "the society's benchmarks are made anew")
        check_files(folder, record.get("files"), "the society's benchmarks are made anew")
    except FileNotFoundError:
        if (folder / "stimuli.yaml").is_file():
            return  # of an older version
    except InputError as error:
        _log.warning("%s", error)
    else:
        return
    write_benchmarks(make_world(settings), folder)


def write_benchmarks(world: World, folder: Path) -> None:
    """Write bbq/, winogender/, law_school/ and stimuli.yaml into `folder`, whole or not at all.

    RECORD in there holds the digests of the files.
    """
    chance = random.Random(f"benchmarks {world.settings.seed}")
    with atomic_folder(folder) as new:
        for name in ("bbq", "winogender", "law_school"):
            (new / name).mkdir()
        for category in world.evaluated_categories:
            rows = bbq_rows(chance, category, world.settings.blocks_per_template)
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (new / "bbq" / f"{category.name}.jsonl").write_text(lines, encoding="utf-8")
        templates, shares = winogender_tables(chance, world)
        (new / "winogender" / "templates.tsv").write_text(templates, encoding="utf-8")
        (new / "winogender" / "occupations-stats.tsv").write_text(shares, encoding="utf-8")
        (new / "law_school" / "law_data.csv").write_text(law_table(world), encoding="utf-8")
        (new / "stimuli.yaml").write_text(stimuli_text(world), encoding="utf-8")
        write_record(new / RECORD, {"files": digests(new)})
