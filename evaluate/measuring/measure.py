"""From a model and its tokenizer to evaluation files: one parquet per experiment and condition.

    cells = plan(data_dir, load_stimuli(), ["bbq"], ["Q", "Q+IF"], limit=200)
    measure(cells, model, tokenizer, folder)

A cell whose file is there already, with the same settings, is not measured again.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfcorrect.evaluate.measuring.cell_files import CellWriter, Origin, Row, is_measured, writing
from selfcorrect.evaluate.measuring.plan import EvaluationPlan, PlannedCell, Question
from selfcorrect.evaluate.prompts.dialogue import (
    before_sample,
    render,
    stop_text,
    with_sample,
)
from selfcorrect.evaluate.prompts.items import Item
from selfcorrect.evaluate.prompts.stimuli import SAMPLE, Turn
from selfcorrect.evaluate.prompts.tokenized import PromptTooLong, Request
from selfcorrect.evaluate.scoring.engine import Engine, Sample
from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from selfcorrect.recipes.foundation.ranks import SINGLE, Ranks

if TYPE_CHECKING:
    from selfcorrect.evaluate.scoring.token_trie import Prepared

Progress = Callable[[str, int, int], None]
"""Called with (cell's name, items done, items in the cell) after every slice."""

_SLICE = 256  # items between two calls of the progress function

# What is measured goes to disk after so many items or seconds: a killed evaluation loses no more.
_PART_ITEMS = 2048
_PART_SECONDS = 120.0


def measure(
    plan: EvaluationPlan,
    model: Any,
    tokenizer: Any,
    folder: Path,
    progress: Progress | None = None,
    prepared: "Prepared | None" = None,
    origin: Origin | None = None,
    processes: Ranks = SINGLE,
) -> list[Path]:
    """`measure_with` a model in memory, scored in packs.

    `prepared` keeps what depends on the tokenizer alone for the next model; hand the same one over
    for all checkpoints. `origin` names the weights where a digest of their files is known; else one
    of the values in memory is made. `model` must be in eval mode (`callback.measure_undisturbed`
    sees to that for a model in training).
    """
    from selfcorrect.evaluate.scoring.packed import Scorer
    from selfcorrect.evaluate.scoring.weights import weights_digest

    if model.training:
        raise ValueError("measure a model in eval mode, or call measure_undisturbed")
    origin = origin or Origin(weights_digest(model))
    scorer = Scorer(model, tokenizer, prepared=prepared)
    return measure_with(plan, scorer, folder, origin, progress, processes)


def measure_with(
    plan: EvaluationPlan,
    engine: Engine,
    folder: Path,
    origin: Origin,
    progress: Progress | None = None,
    processes: Ranks = SINGLE,
) -> list[Path]:
    """Measure every cell that `folder` does not hold yet; returns the files of all cells.

    Each file appears whole. Interrupted and called again, the work goes on with the items that are
    not on disk yet. `processes` share the items; all of them call this.

    Raises InputError for prompts that do not fit the model, RunFailure for NaN logits.
    """
    work = _Work(engine, folder, origin, (progress if processes.rank == 0 else None) or _silent)
    waiting = processes.from_rank0(
        lambda: {
            cell.name
            for cell in plan.cells
            if not is_measured(folder / cell.file_name, cell, origin)
        }
    )
    missing = [cell for cell in plan.cells if cell.name in waiting]
    # Cells of one experiment share most of their prompts: those without samples go together.
    for experiment in dict.fromkeys(cell.experiment for cell in missing):
        cells = [cell for cell in missing if cell.experiment == experiment]
        together = [cell for cell in cells if cell.sampling is None]
        if together:
            _measure_together(together, work, processes, _score_part)
        for cell in cells:
            if cell.sampling is not None:
                _check_room(cell, engine)
                _measure_together([cell], work, processes, _sample_part)
    return [folder / cell.file_name for cell in plan.cells]


def cost(seconds: float, training_seconds: float, of: str = "training") -> str:
    """What attached evaluation has cost, in a line; both in seconds, apart from each other."""
    share = f"{seconds / training_seconds:.0%} of " if training_seconds > 0 else "beside "
    return f"Attached evaluation took {seconds:.1f} s, {share}the {training_seconds:.1f} s of {of}"


@dataclass(frozen=True)
class _Work:
    """What measures, where the files go, whose answers they are, and who is told."""

    engine: Engine
    folder: Path
    origin: Origin
    progress: Progress


Rows = list[list[Row]]  # of each cell
MeasurePart = Callable[[Sequence[PlannedCell], Engine, slice], Rows]


def _measure_together(
    cells: Sequence[PlannedCell], work: _Work, processes: Ranks, measure_part: MeasurePart
) -> None:
    """Measure cells of one experiment, which have the same items, slice by slice.

    In every round each process takes one slice, and the first process writes them in order.
    """
    name = f"{cells[0].experiment} {', '.join(cell.condition for cell in cells)}"
    num_items = len(cells[0].items)
    paths = [work.folder / cell.file_name for cell in cells]
    writes = processes.rank == 0
    files = writing(paths, cells, work.origin) if writes else nullcontext(list[CellWriter]())
    with files as writers:
        done = kept = processes.from_rank0(lambda: writers[0].num_items)
        kept_at = time.monotonic()
        processes.from_rank0(
            partial(work.progress, name, done, num_items)
        )  # it may raise: all hear
        for first in range(done, num_items, _SLICE * processes.size):
            start = first + _SLICE * processes.rank
            own = slice(start, min(start + _SLICE, num_items))
            for part, rows in zip(
                _slices(num_items, first),
                processes.gather(partial(measure_part, cells, work.engine, own)),
                strict=False,  # the last round may have less to do than processes
            ):
                for writer, ones in zip(writers, rows, strict=False):
                    writer.write(ones, part.stop - part.start)
                done = part.stop
            late = time.monotonic() - kept_at > _PART_SECONDS
            if done < num_items and (late or done - kept >= _PART_ITEMS):
                for writer in writers:
                    writer.keep()
                kept, kept_at = done, time.monotonic()
            processes.from_rank0(partial(work.progress, name, done, num_items))


@dataclass
class _Asked:
    """One draw of a question, and what the model has written for it so far."""

    question: Question
    draw: int
    turns: list[Turn]
    samples: list[Sample] = field(default_factory=list)

    def take(self, engine: Engine, sample: Sample) -> None:
        """Put what the model has written into the dialogue."""
        self.turns = with_sample(engine.tokenizer, self.turns, sample.text)
        self.samples.append(sample)


def _score_part(cells: Sequence[PlannedCell], engine: Engine, part: slice) -> Rows:
    """Score the options of some items under several conditions at once."""
    asked = [[_Asked(q, 0, q.turns) for q in cell.questions(part)] for cell in cells]
    owners = [
        (cell, one.question.item) for cell, ones in zip(cells, asked, strict=True) for one in ones
    ]
    if not owners:
        return [[] for _ in cells]
    with _Naming(owners):
        key = "|".join([str(part), *(cell.settings_digest for cell in cells)])
        scores = iter(engine.score_kept(key, partial(_requests, cells, asked, engine)))
    return [[_row(one, next(scores)) for one in ones] for ones in asked]


def _requests(
    cells: Sequence[PlannedCell], asked: Sequence[Sequence[_Asked]], engine: Engine
) -> list[Request]:
    return [
        (_prompt(cell, engine, one.turns), one.question.options)
        for cell, ones in zip(cells, asked, strict=True)
        for one in ones
    ]


def _sample_part(cells: Sequence[PlannedCell], engine: Engine, part: slice) -> Rows:
    """Have the model write its own text, and score the final question after it; for one cell."""
    (cell,) = cells
    assert cell.sampling is not None
    asked = [
        _Asked(question, draw, question.turns)
        for question in cell.questions(part)
        for draw in range(cell.sampling.draws)
    ]
    if not asked:
        return [[]]
    with _Naming([(cell, one.question.item) for one in asked]):
        *rounds, last = range(cell.section.num_samples(cell.condition))
        for round_ in rounds:
            samples = engine.sample(**_turn_to_write(cell, asked, engine, round_))
            for one, sample in zip(asked, samples, strict=True):
                one.take(engine, sample)

        def final_question(index: int, sample: Sample) -> Request:
            asked[index].take(engine, sample)
            return _prompt(cell, engine, asked[index].turns), asked[index].question.options

        answers = engine.sample_then_score(
            then=final_question, **_turn_to_write(cell, asked, engine, last)
        )
    return [[_row(one, scores) for one, (_, scores) in zip(asked, answers, strict=True)]]


def _turn_to_write(
    cell: PlannedCell, asked: Sequence[_Asked], engine: Engine, round_: int
) -> dict[str, Any]:
    """What `Engine.sample` needs for the next turn of each dialogue that is the model's own."""
    assert cell.sampling is not None
    return {
        "prompts": [_prompt(cell, engine, before_sample(one.turns)) for one in asked],
        # The same noise for an item at every checkpoint and in every condition: differences are
        # the model's own, and one more round of review goes on from the very same answer.
        "keys": [
            f"{cell.experiment}|{one.question.item.id}|{one.question.order}|{one.draw}|{round_}"
            for one in asked
        ],
        "max_new_tokens": cell.sampling.max_new_tokens,
        "temperature": cell.sampling.temperature,
        "seed": cell.sampling.seed,
        "stop": stop_text(engine.tokenizer, cell.style),
    }


def _prompt(cell: PlannedCell, engine: Engine, turns: Sequence[Turn]) -> str:
    return render(engine.tokenizer, turns, cell.style)


def _check_room(cell: PlannedCell, engine: Engine) -> None:
    """Refuse a plan whose final questions can outgrow the context, before anything is sampled."""
    assert cell.sampling is not None
    room = cell.sampling.max_new_tokens * cell.section.num_samples(cell.condition)
    for part in _slices(len(cell.items)):
        questions = list(cell.questions(part))
        with _Naming([(cell, question.item) for question in questions]):
            finals = [_with_nothing_written(question.turns) for question in questions]
            engine.check_room([_prompt(cell, engine, turns) for turns in finals], room)


def _with_nothing_written(turns: Sequence[Turn]) -> list[Turn]:
    return [Turn(turn.role, turn.text.removesuffix(SAMPLE)) for turn in turns]


def _row(asked: _Asked, logprobs: list[float]) -> dict[str, Any]:
    item, samples = asked.question.item, asked.samples
    mass = math.fsum(math.exp(value) for value in logprobs)
    top = max(logprobs)
    shares = [math.exp(value - top) for value in logprobs] if top > -math.inf else None
    return {
        "item": item.id,
        "cluster": item.cluster,
        "category": item.category,
        "weight": item.weight,
        "order": asked.question.order,
        "options": list(asked.question.options),
        "logprobs": logprobs,
        # Undefined, hence null, when the model gives no option any probability.
        "probabilities": shares and [share / math.fsum(shares) for share in shares],
        "mass": mass,
        "draw": asked.draw,
        "samples": [sample.text for sample in samples] if samples else None,
        "truncated": any(sample.truncated for sample in samples) if samples else None,
        **item.facts,
    }


class _Naming:
    """Puts the cell, and the item where one is to blame, into the scorer's errors."""

    def __init__(self, owners: Sequence[tuple[PlannedCell, Item]]) -> None:
        self.owners = owners  # of each prompt

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, PromptTooLong):
            cell, item = self.owners[error.index]
            remedy = "use a model with a longer context"
            if cell.sampling is not None:
                remedy += f", or lower max_new_tokens ({cell.sampling.max_new_tokens})"
            raise InputError(f"{cell.name}, item {item.id}: {error}; {remedy}") from None
        where = ", ".join(dict.fromkeys(cell.name for cell, _ in self.owners))
        if isinstance(error, InputError):
            raise InputError(f"{where}: {error}") from None
        if isinstance(error, RunFailure):
            raise RunFailure(f"{where}: {error}") from None


def _slices(number: int, start: int = 0) -> Iterator[slice]:
    return (slice(at, min(at + _SLICE, number)) for at in range(start, number, _SLICE))


def _silent(name: str, done: int, total: int) -> None:
    """No progress shown."""
