"""The data of the report's transcript browser: some items, each at every checkpoint.

A fixed number of items per experiment, spread over its categories, each with all checkpoints,
conditions, orders of the options and draws. Texts are cut at a stated length, and their control and
bidi characters are escaped. The page holds the data as compressed chunks, one for the questions of
an experiment and one for the answers of each training run, which the script loads when they are
looked at and shows as text only.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from selfcorrect.evaluate.experiments import EXPERIMENTS, get_experiment
from selfcorrect.evaluate.experiments.base import condition_rank
from selfcorrect.evaluate.measuring.cell_files import (
    THINKING,
    read_items,
    read_settings,
    read_table,
)
from selfcorrect.evaluate.measuring.plan import PlannedCell
from selfcorrect.evaluate.measuring.prompt_files import read_prompts
from selfcorrect.evaluate.measuring.run import recipe_plan
from selfcorrect.evaluate.prompts.dialogue import Thinking
from selfcorrect.evaluate.prompts.stimuli import SAMPLE, ThoughtfulTurn
from selfcorrect.evaluate.report.chunks import Chunks
from selfcorrect.evaluate.run_folder import find_checkpoints
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.foundation.printable import escape_controls
from selfcorrect.recipes.load import load_measured

NUM_ITEMS = 100  # per experiment
MOST_ANSWERS = 150_000  # per run and experiment; with more files, fewer items are shown
TEXT_LENGTH = 2000  # characters shown of a text
BUDGET = 3_000_000  # characters of compressed data in the page; beyond it, fewer items are shown

# Columns of every experiment's rows; the other columns are facts of the item.
_ANSWER = frozenset(
    "item cluster category weight order options logprobs probabilities mass draw samples truncated"
    .split()
)  # fmt: skip
# Facts that are an option's index in the file, and the tag shown at that option.
_NAMED_OPTIONS = {"label": "right", "unknown": "unknown", "stereotyped": "stereotyped"}
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Transcripts:
    """Notes on which transcripts are shown, and their index: an entry per run, with its chunks."""

    notes: list[str]
    runs: list[dict[str, Any]]


@dataclass(frozen=True)
class _EvaluationFile:
    """An evaluation file, its settings, and its model, seed and step."""

    path: Path
    settings: Mapping[str, Any]
    job: tuple[str, int]
    step: int

    @property
    def cell(self) -> tuple[str, str]:
        return self.settings["experiment"], self.settings["condition"]


@dataclass
class _Texts:
    """Every distinct text of a chunk once; rows and items refer to it by its index."""

    indices: dict[str, int] = field(default_factory=dict)

    def index(self, text: object) -> int:
        return self.indices.setdefault(escape_controls(str(text)[:TEXT_LENGTH]), len(self.indices))

    def shortened(self, text: str) -> list[int]:
        """Return the index of the text's start, and the text's length if it is cut."""
        return [self.index(text), *([len(text)] if len(text) > TEXT_LENGTH else [])]


def transcripts(
    named: Mapping[str, Path], chunks: Chunks, num_items: int = NUM_ITEMS, budget: int = BUDGET
) -> Transcripts:
    """Add the transcripts of some runs to `chunks`: `num_items` per experiment, or fewer.

    `named` maps labels to run folders, or to the evaluation files of stand-alone models. Each run
    has its own items, since runs may have been asked different ones; the runs share the budget.
    Raises InputError for a folder that is not a run, and for a damaged file.
    """
    labels_by_note: dict[str, list[str]] = {}
    runs = []
    for label, run in named.items():
        files = _files(label, run)
        notes, experiments = _run_transcripts(run, files, chunks, num_items, budget // len(named))
        for note in notes:
            labels_by_note.setdefault(note, []).append(label)
        if experiments:
            runs.append({"run": escape_controls(label), "experiments": experiments})
    notes = [
        f"{', '.join(labels)}: {note}" if len(named) > 1 else note
        for note, labels in labels_by_note.items()
    ]
    return Transcripts(notes, runs)


def _files(label: str, run: Path) -> list[_EvaluationFile]:
    """Return the evaluation files of a run, or of the stand-alone model `label`, as step 0."""
    if (run / "recipe.yaml").is_file():
        folders = [
            (c.evaluation, (c.record.model, c.record.seed), c.record.step)
            for c in find_checkpoints(run)
        ]
    else:
        folders = [(run, (label, 0), 0)]
    return [
        _EvaluationFile(path, read_settings(path), job, step)
        for folder, job, step in folders
        for path in sorted(folder.glob("*.parquet"))
    ]


def _run_transcripts(
    run: Path, files: Sequence[_EvaluationFile], chunks: Chunks, num_items: int, budget: int
) -> tuple[list[str], list[dict[str, Any]]]:
    by_experiment = {
        name: [file for file in files if file.cell[0] == name]
        for name in EXPERIMENTS
        if any(file.cell[0] == name for file in files)
    }
    if not by_experiment:
        return ["Nothing has been evaluated."], []
    chosen = {
        name: _choose(
            [file.path for file in of_experiment],
            max(1, min(num_items, MOST_ANSWERS // len(of_experiment))),
        )
        for name, of_experiment in by_experiment.items()
    }
    asked, problems = _asked(run, files, chosen)
    experiments = []
    for name, of_experiment in by_experiment.items():
        before, num_chunks = chunks.size, len(chunks.texts)
        while True:
            entry = _experiment(name, of_experiment, chosen[name], asked, chunks)
            if chunks.size - before <= budget / len(by_experiment):
                experiments.append(entry)
                break
            del chunks.texts[num_chunks:]
            if len(chosen[name]) == 1:
                title = get_experiment(name).title
                problems.append(
                    f"There are too many checkpoints and conditions to show transcripts of {title} "
                    "on this page; all answers are in the evaluation files."
                )
                break
            chosen[name] = chosen[name][: len(chosen[name]) // 2]
    shown = {entry["name"]: chosen[entry["name"]] for entry in experiments}
    return [*([_selection_note(files, shown)] if shown else []), *problems], experiments


def _selection_note(files: Sequence[_EvaluationFile], chosen: Mapping[str, Sequence[str]]) -> str:
    parts = []
    for name, items in chosen.items():
        total = max(file.settings.get("num_items", 0) for file in files if file.cell[0] == name)
        parts.append(f"{get_experiment(name).title}: {len(items)} of {total:,} items")
    return (
        f"{'; '.join(parts)}. The items are spread over the categories and were chosen without "
        f"regard to the answers. Texts are shown up to {TEXT_LENGTH:,} characters. The evaluation "
        "files hold all items and full texts (results.load_items)."
    )


# --- choice of items ------------------------------------------------------------------------------


def _choose(paths: Iterable[Path], number: int) -> list[str]:
    """Choose `number` of the items that most files hold, taking one category after the other.

    Within a category they are spread evenly over its items by a golden-ratio sequence, which is out
    of step with any block structure; its first n items are evenly spread for every n.
    """
    tables: list[tuple[pa.Table, int]] = []  # most files hold the same items, in the same rows
    for path in paths:
        table = read_table(path, ["item", "category"]).replace_schema_metadata(None)
        for index, (known, num_files) in enumerate(tables):
            if table.equals(known):
                tables[index] = known, num_files + 1
                break
        else:
            tables.append((table, 1))
    categories: dict[str, str] = {}
    files_with: Counter[str] = Counter()
    for table, num_files in tables:
        items = dict(zip(table["item"].to_pylist(), table["category"].to_pylist(), strict=True))
        categories |= items
        files_with.update(dict.fromkeys(items, num_files))
    most = max(files_with.values(), default=0)
    by_category: dict[str, list[str]] = {}
    for item, category in categories.items():
        if files_with[item] == most:
            by_category.setdefault(category, []).append(item)
    spread = [
        [members[i] for i in sorted(range(len(members)), key=lambda i: i * _GOLDEN % 1)]
        for members in by_category.values()
    ]
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*spread))
    return [item for item in in_turn if item is not None][:number]


# --- questions ---------------------------------------------------------------------------

_Questions = dict[tuple[str, str], dict[str, dict[str, list[tuple[str, str]]]]]


def _asked(
    run: Path, files: Sequence[_EvaluationFile], chosen: Mapping[str, Sequence[str]]
) -> tuple[_Questions, list[str]]:
    """Return turns by cell, item and order, and notes on cells whose questions are not known.

    The recipe's questions are those of a file only if the file has their settings digest. Without
    a recipe, they are the prompts that were written beside the file.
    """
    if not (run / "recipe.yaml").is_file():
        return {file.cell: _prompts(file.path, set(chosen[file.cell[0]])) for file in files}, []
    try:
        cells = recipe_plan(load_measured(str(run / "recipe.yaml")), run).cells
    except InputError as reason:
        text = str(reason).replace(f"{run}/", "")  # the page may be read on another machine
        return {}, [f"The questions cannot be shown: {text}."]
    planned = {(cell.experiment, cell.condition): cell for cell in cells}
    asked: _Questions = {}
    changed = set()
    for file in files:
        cell = planned.get(file.cell)
        if cell is None or cell.settings_digest != file.settings.get("settings_digest"):
            changed.add(" ".join(file.cell))
        elif file.cell not in asked:
            if file.settings.get(THINKING):
                style = replace(cell.style, thinking=Thinking(**file.settings[THINKING]))
                cell = replace(cell, style=style)
            asked[file.cell] = _turns(cell, set(chosen[cell.experiment]))
    if not changed:
        return asked, []
    note = "they were measured with other items, wording or settings than the recipe has now"
    return asked, [f"The questions of {', '.join(sorted(changed))} are not shown: {note}."]


def _prompts(path: Path, items: set[str]) -> dict[str, dict[str, list[tuple[str, str]]]]:
    """Return the prompts of some items by order, each as one turn."""
    turns: dict[str, dict[str, list[tuple[str, str]]]] = {}
    for (item, order), prompt in read_prompts(path).items():
        if item in items:
            turns.setdefault(item, {})[order] = [("prompt", prompt)]
    return turns


def _turns(cell: PlannedCell, items: set[str]) -> dict[str, dict[str, list[tuple[str, str]]]]:
    turns: dict[str, dict[str, list[tuple[str, str]]]] = {}
    for index, item in enumerate(cell.items):
        if item.id in items:
            for question in cell.questions(slice(index, index + 1)):
                dialogue = []
                for turn in question.turns:
                    if isinstance(turn, ThoughtfulTurn):
                        dialogue.append(("thoughts", turn.thought))
                    dialogue.append((str(turn.role), turn.text))
                turns.setdefault(item.id, {})[question.order] = dialogue
    return turns


# --- answers ------------------------------------------------------------------------


def _experiment(
    name: str,
    files: Sequence[_EvaluationFile],
    items: Sequence[str],
    asked: _Questions,
    chunks: Chunks,
) -> dict[str, Any]:
    """Add one experiment's questions and answers to `chunks`; return its entry of the index."""
    conditions = sorted({file.cell[1] for file in files}, key=condition_rank)
    by_job: dict[tuple[str, int], list[_EvaluationFile]] = {}
    for file in files:
        by_job.setdefault(file.job, []).append(file)
    facts: dict[str, Mapping[str, Any]] = {}  # by item, in the files' order
    jobs = []
    for (model, seed), of_job in by_job.items():
        texts, answers = _Texts(), dict[str, list[Any]]()
        for file in of_job:
            coordinates = [file.step, conditions.index(file.cell[1])]
            for row in read_items(file.path, items):
                facts.setdefault(row["item"], row)
                answers.setdefault(row["item"], []).append([*coordinates, *_answer(row, texts)])
        content = {"texts": list(texts.indices), "items": list(answers.values())}
        # Items are named by their place in the questions, which is known only after all jobs.
        jobs.append((model, seed, of_job, list(answers), content))
    texts = _Texts()
    questions = [_question(name, facts[item], conditions, asked, texts) for item in facts]
    place_of = {item: place for place, item in enumerate(facts)}
    return {
        "name": name,
        "title": get_experiment(name).title,
        "conditions": [escape_controls(condition) for condition in conditions],
        "categories": sorted({escape_controls(row["category"]) for row in facts.values()}),
        "questions": chunks.add(
            {"sample": SAMPLE, "texts": list(texts.indices), "items": questions}
        ),
        "jobs": [
            {
                "model": escape_controls(model),
                "seed": seed,
                "steps": sorted({file.step for file in of_job}),
                "chunk": chunks.add({**content, "places": [place_of[item] for item in answered]}),
            }
            for model, seed, of_job, answered, content in jobs
        ],
    }


def _question(
    name: str,
    row: Mapping[str, Any],
    conditions: Sequence[str],
    asked: _Questions,
    texts: _Texts,
) -> dict[str, Any]:
    return {
        "id": texts.index(row["item"]),
        "category": texts.index(row["category"]),
        "facts": _facts(row, texts),
        "tags": _tags(row),
        "raises": get_experiment(name).raising_option(row),
        "asked": [
            _dialogues(asked.get((name, condition), {}).get(row["item"], {}), texts)
            for condition in conditions
        ],
    }


def _dialogues(turns: Mapping[str, Sequence[tuple[str, str]]], texts: _Texts) -> list[Any]:
    """Return [order, turns] for each order of the options; a turn is [role, index, length]."""
    return [
        [order, [[role, *texts.shortened(text)] for role, text in dialogue]]
        for order, dialogue in turns.items()
    ]


def _answer(row: Mapping[str, Any], texts: _Texts) -> list[Any]:
    """Return order, draw, options, probabilities, chosen, mass, samples, and if one was cut off.

    Options and samples are [index, length if cut]; chosen is None where two share the top.
    """
    top = max(row["logprobs"])
    first = row["logprobs"].index(top)
    return [
        row["order"],
        row.get("draw"),
        [texts.shortened(option) for option in row["options"]],
        row["probabilities"] and [_rounded(value) for value in row["probabilities"]],
        first if row["probabilities"] and row["logprobs"].count(top) == 1 else None,
        _rounded(row["mass"]),
        row["samples"] and [texts.shortened(text) for text in row["samples"]],
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
        facts.append([texts.index(name.replace("_", " ")), texts.index(shown)])
    return facts


def _tags(row: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the tags of options, by the option's index in the file."""
    tags: dict[str, list[str]] = {}
    for name, tag in _NAMED_OPTIONS.items():
        if isinstance(row.get(name), int):
            tags.setdefault(str(row[name]), []).append(tag)
    return tags
