"""What the report's browser of transcripts shows: some items, each at every checkpoint.

A fixed number of items per experiment, spread over its categories, each whole: all checkpoints,
conditions, orders of the options and draws. Texts are cut at a stated length and have their control
and direction marks spelt out. The data goes into the page as JSON, and from there as text alone.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from selfcorrect.evaluate.experiments import EXPERIMENTS, get_experiment
from selfcorrect.evaluate.experiments.base import condition_rank
from selfcorrect.evaluate.measuring.cell_files import read_settings, read_table
from selfcorrect.evaluate.measuring.plan import PlannedCell
from selfcorrect.evaluate.measuring.run import recipe_plan
from selfcorrect.evaluate.prompts.stimuli import SAMPLE
from selfcorrect.evaluate.run_folder import CheckpointRecord, find_checkpoints
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.foundation.printable import escape_controls
from selfcorrect.recipes.load import load_recipe

NUM_ITEMS = 40  # per experiment
TEXT_LENGTH = 2000  # characters shown of a text
BUDGET = 8_000_000  # characters of JSON in the page; with more, fewer items are shown

# What every experiment's rows have; the other columns are facts of the item.
_ANSWER = frozenset(
    "item cluster category weight order options logprobs probabilities mass draw samples truncated"
    .split()
)  # fmt: skip
# Facts that name one of the file's options, in the words that stand beside that option.
_NAMED_OPTIONS = {"label": "right", "unknown": "unknown", "stereotyped": "stereotyped"}
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Transcripts:
    """Sentences on what is shown and what is not, and the data (None: nothing to show).

    `data` is JSON in which no character can end a script element.
    """

    notes: list[str]
    data: Markup | None


@dataclass(frozen=True)
class _File:
    """One evaluation file and the checkpoint that it measures."""

    path: Path
    settings: Mapping[str, Any]
    record: CheckpointRecord

    @property
    def cell(self) -> tuple[str, str]:
        return self.settings["experiment"], self.settings["condition"]


@dataclass
class _Texts:
    """Every text once, in order; rows and items say which by its place."""

    places: dict[str, int] = field(default_factory=dict)

    def place(self, text: object) -> int:
        return self.places.setdefault(escape_controls(str(text)[:TEXT_LENGTH]), len(self.places))

    def cut(self, text: str) -> list[int]:
        """The place of the text's start, and the full length where it is cut."""
        return [self.place(text), *([len(text)] if len(text) > TEXT_LENGTH else [])]


def transcripts(
    named: Mapping[str, Path], num_items: int = NUM_ITEMS, budget: int = BUDGET
) -> Transcripts:
    """The transcripts of some runs; `num_items` per experiment, fewer above the budget.

    `named` says what a run is called. Runs may have been asked different things, so each brings
    its own items; they share the budget. Raises InputError for a folder that is no run, and for a
    damaged file.
    """
    notes: dict[str, list[str]] = {}
    shown: list[Markup] = []
    for label, run in named.items():
        mine, data = _of_run(run, num_items, budget // len(named))
        for note in mine:
            notes.setdefault(note, []).append(label)
        if data is not None:
            name = htmlsafe_json_dumps(escape_controls(label))
            shown.append(Markup('{"run": %s, "data": %s}') % (Markup(name), data))
    said = [f"{', '.join(of)}: {note}" if len(named) > 1 else note for note, of in notes.items()]
    return Transcripts(said, Markup("[%s]") % Markup(", ").join(shown) if shown else None)


def _of_run(run: Path, num_items: int, budget: int) -> tuple[list[str], Markup | None]:
    files = [
        _File(path, read_settings(path), checkpoint.record)
        for checkpoint in find_checkpoints(run)
        for path in sorted(checkpoint.evaluation.glob("*.parquet"))
    ]
    chosen = {
        name: _choose([file.path for file in files if file.cell[0] == name], num_items)
        for name in EXPERIMENTS
        if any(file.cell[0] == name for file in files)
    }
    if not chosen:
        return ["Nothing has been evaluated."], None
    asked, problems = _asked(run, files, chosen)
    rows = {file.path: _rows(file.path, chosen[file.cell[0]]) for file in files}
    while True:
        data = htmlsafe_json_dumps(_data(files, rows, chosen, asked))
        if len(data) <= budget:
            break
        if max(map(len, chosen.values())) == 1:
            note = "There are too many checkpoints and conditions to show transcripts in this page"
            return [f"{note}; all answers are in the evaluation files."], None
        chosen = {name: items[: max(1, len(items) // 2)] for name, items in chosen.items()}
    return [_what_is_shown(files, chosen), *problems], data


def _what_is_shown(files: Sequence[_File], chosen: Mapping[str, Sequence[str]]) -> str:
    parts = []
    for name, items in chosen.items():
        in_all = max(file.settings.get("num_items", 0) for file in files if file.cell[0] == name)
        parts.append(f"{get_experiment(name).title}: {len(items)} of {in_all:,} items")
    return (
        f"{'; '.join(parts)}. They are spread over the categories, chosen without a look at the "
        f"answers. Of a text the first {TEXT_LENGTH:,} characters are shown; all items and all "
        "texts are in the evaluation files (results.load_items)."
    )


# --- which items ------------------------------------------------------------------------------


def _choose(paths: Iterable[Path], number: int) -> list[str]:
    """`number` items among those that most files hold: category by category in turn.

    Within a category they are spread evenly over its items (a golden-ratio sequence, which no
    block structure falls in step with); the first n of them are spread as evenly for every n.
    """
    tables: list[tuple[pa.Table, int]] = []  # most files hold the same items, in the same rows
    for path in paths:
        table = read_table(path, ["item", "category"]).replace_schema_metadata(None)
        for index, (other, number_of_files) in enumerate(tables):
            if table.equals(other):
                tables[index] = other, number_of_files + 1
                break
        else:
            tables.append((table, 1))
    categories: dict[str, str] = {}
    held: Counter[str] = Counter()
    for table, number_of_files in tables:
        found = dict(zip(table["item"].to_pylist(), table["category"].to_pylist(), strict=True))
        categories |= found
        held.update(dict.fromkeys(found, number_of_files))
    most = max(held.values(), default=0)
    by_category: dict[str, list[str]] = {}
    for item, category in categories.items():
        if held[item] == most:
            by_category.setdefault(category, []).append(item)
    spread = [
        [items[i] for i in sorted(range(len(items)), key=lambda i: i * _GOLDEN % 1)]
        for items in by_category.values()
    ]
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*spread))
    return [item for item in in_turn if item is not None][:number]


# --- what was asked ---------------------------------------------------------------------------

_Asked = dict[tuple[str, str], dict[str, dict[str, list[tuple[str, str]]]]]


def _asked(
    run: Path, files: Sequence[_File], chosen: Mapping[str, Sequence[str]]
) -> tuple[_Asked, list[str]]:
    """Turns by cell, item and order, only where the file's own digest vouches for the wording."""
    try:
        cells = recipe_plan(load_recipe(str(run / "recipe.yaml")), run).cells
    except InputError as reason:
        said = str(reason).replace(f"{run}/", "")  # a report travels, its folder does not
        return {}, [f"What was asked cannot be shown: {said}."]
    planned = {(cell.experiment, cell.condition): cell for cell in cells}
    asked: _Asked = {}
    changed = set()
    for file in files:
        cell = planned.get(file.cell)
        if cell is None or cell.settings_digest != file.settings.get("settings_digest"):
            changed.add(" ".join(file.cell))
        elif file.cell not in asked:
            asked[file.cell] = _turns(cell, set(chosen[cell.experiment]))
    if not changed:
        return asked, []
    note = "measured with other items, wording or settings than the run's recipe has now"
    return asked, [f"What was asked is not shown for {', '.join(sorted(changed))}: {note}."]


def _turns(cell: PlannedCell, wanted: set[str]) -> dict[str, dict[str, list[tuple[str, str]]]]:
    turns: dict[str, dict[str, list[tuple[str, str]]]] = {}
    for index, item in enumerate(cell.items):
        if item.id in wanted:
            for question in cell.questions(slice(index, index + 1)):
                said = [(str(turn.role), turn.text) for turn in question.turns]
                turns.setdefault(item.id, {})[question.order] = said
    return turns


# --- what was answered ------------------------------------------------------------------------


def _rows(path: Path, items: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The file's rows of some items, by item."""
    table = read_table(path, None)
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in table.filter(pc.is_in(table["item"], value_set=pa.array(items))).to_pylist():
        samples = row.get("samples")
        # Only what is shown stays in memory: the start of a text and its length.
        row["samples"] = samples and [(text[:TEXT_LENGTH], len(text)) for text in samples]
        rows.setdefault(row["item"], []).append(row)
    return rows


def _data(
    files: Sequence[_File],
    rows: Mapping[Path, Mapping[str, list[dict[str, Any]]]],
    chosen: Mapping[str, Sequence[str]],
    asked: _Asked,
) -> dict[str, Any]:
    """The JSON of the page; page.js reads it."""
    texts = _Texts()
    models = list(dict.fromkeys((f.record.model, f.record.seed) for f in files))
    experiments = []
    for name, items in chosen.items():
        mine = [file for file in files if file.cell[0] == name]
        conditions = sorted({file.cell[1] for file in mine}, key=condition_rank)
        shown = []
        in_file = {item: place for place, item in enumerate(rows[mine[0].path])}
        for item in sorted(items, key=lambda item: in_file.get(item, len(in_file))):
            found = [
                (models.index((file.record.model, file.record.seed)), file, row)
                for file in mine
                for row in rows[file.path].get(item, [])
            ]
            first = found[0][2]
            shown.append(
                {
                    "id": texts.place(item),
                    "category": texts.place(first["category"]),
                    "facts": _facts(first, texts),
                    "tags": _tags(first),
                    "asked": [
                        _dialogues(asked.get((name, condition), {}).get(item, {}), texts)
                        for condition in conditions
                    ],
                    "answers": [
                        [
                            model,
                            file.record.step,
                            conditions.index(file.cell[1]),
                            *_answer(row, texts),
                        ]
                        for model, file, row in found
                    ],
                }
            )
        experiments.append(
            {
                "title": texts.place(get_experiment(name).title),
                "conditions": [texts.place(condition) for condition in conditions],
                "items": shown,
            }
        )
    labels = [f"{model}, seed {seed}" for model, seed in models]
    return {
        "sample": SAMPLE,
        "models": [texts.place(label) for label in labels],
        "experiments": experiments,
        "texts": list(texts.places),
    }


def _dialogues(turns: Mapping[str, Sequence[tuple[str, str]]], texts: _Texts) -> list[Any]:
    """[order, its turns] for every order of the options; a turn is [role, place, length if cut]."""
    return [
        [order, [[role, *texts.cut(text)] for role, text in dialogue]]
        for order, dialogue in turns.items()
    ]


def _answer(row: Mapping[str, Any], texts: _Texts) -> list[Any]:
    """Order, draw, options, probabilities, chosen, mass, samples, whether one was cut off.

    Options and samples are [place, full length if cut]; chosen is None where two share the top.
    """
    top = max(row["logprobs"])
    first = row["logprobs"].index(top)
    return [
        row["order"],
        row.get("draw"),
        [texts.cut(option) for option in row["options"]],
        row["probabilities"] and [_rounded(value) for value in row["probabilities"]],
        first if row["probabilities"] and row["logprobs"].count(top) == 1 else None,
        _rounded(row["mass"]),
        row["samples"]
        and [
            [texts.place(start), *([length] if length > len(start) else [])]
            for start, length in row["samples"]
        ],
        row.get("truncated"),
    ]


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 4)


def _facts(row: Mapping[str, Any], texts: _Texts) -> list[list[int]]:
    facts = []
    for name, value in row.items():
        if name in _ANSWER or value is None or (name in _NAMED_OPTIONS and isinstance(value, int)):
            continue
        shown = f"{value:g}" if isinstance(value, float) else value
        facts.append([texts.place(name.replace("_", " ")), texts.place(shown)])
    return facts


def _tags(row: Mapping[str, Any]) -> dict[str, list[str]]:
    """What is known of the file's options, by their number in the file."""
    tags: dict[str, list[str]] = {}
    for name, tag in _NAMED_OPTIONS.items():
        if isinstance(row.get(name), int):
            tags.setdefault(str(row[name]), []).append(tag)
    return tags
