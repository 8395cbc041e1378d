"""Measure a model: one parquet file per cell (experiment and condition) of an evaluation plan.

    plan = plan_evaluation(data_dir, load_stimuli(), ["bbq"], ["Q", "Q+IF"], limit=200)
    measure(plan, model, tokenizer, folder)

A cell that `folder` holds already, with the same settings and weights, is not measured again.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfcorrect.evaluate.measuring.cell_files import (
    CellWriter,
    Origin,
    Row,
    cell_writers,
    is_cell_measured,
)
from selfcorrect.evaluate.measuring.plan import EvaluationPlan, PlannedCell, Question
from selfcorrect.evaluate.measuring.prompt_files import prompts_file_name, write_prompts
from selfcorrect.evaluate.prompts.dialogue import (
    before_sample,
    is_thinking,
    reads_clock,
    render,
    stop_text,
    unsampled,
    with_sample,
)
from selfcorrect.evaluate.prompts.items import Item
from selfcorrect.evaluate.prompts.stimuli import Turn
from selfcorrect.evaluate.prompts.thinking import with_thinking
from selfcorrect.evaluate.prompts.tokenized import (
    PromptTooLong,
    Request,
    token_ids,
    tokenizer_digest,
)
from selfcorrect.evaluate.scoring.engine import Engine, Sample
from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from selfcorrect.recipes.foundation.garbage import garbage_of_new_objects
from selfcorrect.recipes.foundation.progress import Progress, no_progress
from selfcorrect.recipes.foundation.ranks import SINGLE, Ranks

if TYPE_CHECKING:
    from selfcorrect.evaluate.scoring.token_trie import PackingCache

# Finished rows go to disk after so many items or seconds; a killed evaluation loses no more than
# this and the items that were being measured.
_PART_ITEMS = 2048
_PART_SECONDS = 60.0

# An engine that measures any number of items at once gets about so many seconds' worth.
_FIRST_ITEMS = 1
_CALL_SECONDS = 30.0

_REPORT_SECONDS = 1.0  # between two reports of progress within a call
_CHARACTERS_PER_TOKEN = 3
_EXAMPLES = 32  # items from which the tokens of an item are estimated


def measure(
    plan: EvaluationPlan,
    model: Any,
    tokenizer: Any,
    folder: Path,
    progress: Progress | None = None,
    packings: "PackingCache | None" = None,
    origin: Origin | None = None,
    ranks: Ranks = SINGLE,
    batch_tokens: int | None = None,
) -> list[Path]:
    """Measure a model in memory with `PackedEngine`; see `measure_with`.

    `packings` keeps tokens and packs, which depend on the tokenizer alone, for the next model: pass
    the same object for all checkpoints. `origin` names the weights; by default it is a digest of
    the values in memory. `batch_tokens` bounds the tokens of a forward. `model` must be in eval
    mode (for a model in training: `callback.measure_during_training`).
    """
    from selfcorrect.evaluate.scoring.packed import PackedEngine
    from selfcorrect.evaluate.scoring.precision import held_in
    from selfcorrect.evaluate.scoring.weights import weights_digest

    if model.training:
        raise ValueError("measure: call model.eval() first, or use measure_during_training")
    origin = replace(origin or Origin(weights_digest(model)), dtype=held_in(model))
    engine = PackedEngine(model, tokenizer, packings=packings, batch_tokens=batch_tokens)
    return measure_with(plan, engine, folder, origin, progress, ranks)


def measure_with(
    plan: EvaluationPlan,
    engine: Engine,
    folder: Path,
    origin: Origin,
    progress: Progress | None = None,
    ranks: Ranks = SINGLE,
) -> list[Path]:
    """Measure every cell that `folder` lacks; return the files of all cells.

    Each file appears complete or not at all. After an interruption, the next call continues with
    the items that are not on disk yet. `ranks` share the items, and each of them must call this.
    `progress` is called on rank 0 with (cell, items done, items of the cell); within a call of the
    engine the items done have a fraction. The files do not depend on how long anything takes.

    Raises InputError for prompts that do not fit the model's context, RunFailure for NaN logits.
    """
    progress = (progress if ranks.rank == 0 else None) or no_progress
    cells = [for_tokenizer(cell, engine.tokenizer) for cell in plan.cells]
    origin = replace(origin, tokenizer=tokenizer_digest(engine.tokenizer))
    work = _Work(engine, folder, origin, progress, ranks)
    missing_names = ranks.from_rank0(
        lambda: {
            cell.name
            for cell in cells
            if not is_cell_measured(folder / cell.file_name, cell, origin)
        }
    )
    missing = [cell for cell in cells if cell.name in missing_names]
    # The cells of an experiment share most of their prompts: those without samples go together.
    with garbage_of_new_objects():
        for experiment in dict.fromkeys(cell.experiment for cell in missing):
            cells = [cell for cell in missing if cell.experiment == experiment]
            unsampled = [cell for cell in cells if cell.sampling is None]
            if unsampled:
                _measure_together(unsampled, work, _score_slice)
            for cell in cells:
                if cell.sampling is not None:
                    _check_room(cell, engine)
                    _measure_together([cell], work, _sample_slice)
    return [folder / cell.file_name for cell in plan.cells]


def share_of_plan(plan: EvaluationPlan, report: Callable[[float], None]) -> Progress:
    """Return a progress function for `measure` that reports the share of the plan that is done.

    Cells that are measured together count as one, by their items.
    """
    groups = {(c.experiment, c.sampling and c.condition): len(c.items) for c in plan.cells}
    total = max(1, sum(groups.values()))
    done_by_name: dict[str, float] = {}

    def progress(name: str, done: float, _: int, /) -> None:
        done_by_name[name] = done
        report(min(1.0, sum(done_by_name.values()) / total))

    return progress


def for_tokenizer(cell: PlannedCell, tokenizer: Any) -> PlannedCell:
    """Return the cell with what depends on the chat template: its date, its block for thoughts."""
    date = cell.style.date if reads_clock(tokenizer, cell.style) else None
    return replace(cell, style=with_thinking(tokenizer, replace(cell.style, date=date)))


def cost_message(seconds: float, training_seconds: float, name: str = "training") -> str:
    """Return a line on the cost of attached evaluation; `training_seconds` exclude it."""
    share = f"{seconds / training_seconds:.0%} of " if training_seconds > 0 else "beside "
    return (
        f"Attached evaluation took {seconds:.1f} s, {share}the {training_seconds:.1f} s of {name}"
    )


@dataclass(frozen=True)
class _Work:
    """The arguments that all cells of one call of `measure_with` share."""

    engine: Engine
    folder: Path
    origin: Origin
    progress: Progress
    ranks: Ranks


RowsByCell = list[list[Row]]
MeasureSlice = Callable[[Sequence[PlannedCell], Engine, slice], RowsByCell]


def _measure_together(
    cells: Sequence[PlannedCell], work: _Work, measure_slice: MeasureSlice
) -> None:
    """Measure cells of one experiment, which have the same items, slice by slice.

    In every round each rank measures one slice, and rank 0 writes them in order.
    """
    ranks = work.ranks
    name = f"{cells[0].experiment} {', '.join(cell.condition for cell in cells)}"
    num_items = len(cells[0].items)
    paths = [work.folder / cell.file_name for cell in cells]
    writes = ranks.rank == 0
    tokenizer = work.engine.tokenizer
    with _error_context([(cell, item) for cell in cells for item in cell.items[:1]]):
        prompts = {cell.name: prompts_file_name(cell, tokenizer) for cell in cells}
    files = (
        cell_writers(paths, cells, work.origin, prompts)
        if writes
        else nullcontext(list[CellWriter]())
    )
    # What is measured together may affect results by rounding. An engine that wants a fixed number
    # gets it from the first item on, wherever an earlier process has stopped.
    fixed = work.engine.items_at_once(_tokens_per_item(cells), cells[0].sampling is not None)
    size = fixed or _FIRST_ITEMS
    with files as writers:
        done = flushed = ranks.from_rank0(lambda: writers[0].num_items)
        flushed_at = time.monotonic()
        # `progress` may raise to stop the evaluation: then all ranks raise.
        ranks.from_rank0(partial(work.progress, name, done, num_items))
        while done < num_items:
            slices = _slices(done, num_items, size, ranks.size, is_aligned=fixed is not None)
            started = time.monotonic()
            with _reported(work, name, slices, num_items):
                rows = ranks.gather(partial(measure_slice, cells, work.engine, slices[ranks.rank]))
            if fixed is None:
                seconds = time.monotonic() - started
                size = ranks.from_rank0(partial(_next_size, size, seconds))
            for part, rows_by_cell in zip(slices, rows, strict=True):
                for writer, new in zip(writers, rows_by_cell, strict=False):
                    writer.write(new, part.stop - part.start)
            done = slices[-1].stop
            is_due = time.monotonic() - flushed_at >= _PART_SECONDS
            if done < num_items and (is_due or done - flushed >= _PART_ITEMS):
                for writer in writers:
                    writer.flush()
                flushed, flushed_at = done, time.monotonic()
            ranks.from_rank0(partial(work.progress, name, done, num_items))
        for cell in cells:  # before the cells that name them
            prompt = partial(_first_prompt, cell, work.engine)
            ranks.from_rank0(partial(write_prompts, work.folder, cell, tokenizer, prompt))


def _slices(start: int, num_items: int, size: int, count: int, is_aligned: bool) -> list[slice]:
    """Return the next `count` slices of `size` items; at the end they may be shorter, or empty.

    Aligned slices end at multiples of `size`, also if `start` is none.
    """
    slices = []
    for _ in range(count):
        stop = min(start + size - (start % size if is_aligned else 0), num_items)
        slices.append(slice(start, stop))
        start = stop
    return slices


def _next_size(size: int, seconds: float) -> int:
    """Return how many items to measure next, after `size` items have taken `seconds`."""
    wanted = size * _CALL_SECONDS / max(seconds, 1e-9)
    return max(1, min(int(wanted), 4 * size, _PART_ITEMS))


def _tokens_per_item(cells: Sequence[PlannedCell]) -> float:
    """Estimate the tokens that the model reads and writes for an item, without a tokenizer."""
    tokens = 0.0
    for cell in cells:
        draws = written = 0
        if cell.sampling is not None:
            draws = cell.sampling.draws
            written = cell.sampling.max_new_tokens * cell.section.num_samples(cell.condition)
        for question in cell.questions(slice(_EXAMPLES)):
            read = sum(len(turn.text) for turn in question.turns) / _CHARACTERS_PER_TOKEN
            tokens += max(1, draws) * (read + written)
    return tokens / max(1, min(len(cells[0].items), _EXAMPLES))


@contextmanager
def _reported(work: _Work, name: str, slices: Sequence[slice], num_items: int) -> Iterator[None]:
    """Report progress while the engine measures this rank's slice, as if all ranks were as fast."""
    first, last = slices[0].start, slices[-1].stop
    reported_at = time.monotonic()

    def report(share: float) -> None:
        nonlocal reported_at
        now = time.monotonic()
        if now - reported_at < _REPORT_SECONDS:
            return
        reported_at = now
        # An engine takes errors of a forward for the model's. They are raised after the slice.
        with suppress(Exception):
            work.progress(name, first + min(share, 1.0) * (last - first), num_items)

    work.engine.on_progress = report if work.ranks.rank == 0 else None
    try:
        yield
    finally:
        work.engine.on_progress = None


@dataclass
class _Draw:
    """One draw of a question, and the samples that the model has written for it so far."""

    question: Question
    number: int
    samples: list[Sample] = field(default_factory=list)
    prompt: str | None = None  # before the options, if it holds samples

    def turns(self, tokenizer: Any) -> list[Turn]:
        """Return the dialogue with the samples so far."""
        turns = self.question.turns
        for sample in self.samples:
            turns = with_sample(tokenizer, turns, sample.text)
        return turns

    def add(self, cell: PlannedCell, engine: Engine, sample: Sample) -> None:
        """Put a sample into the dialogue; thoughts without an end count as cut off."""
        if cell.style.thinking is not None and not sample.stopped:
            thinks = is_thinking(before_sample(self.turns(engine.tokenizer))[-1])
            sample = replace(sample, truncated=thinks or sample.truncated)
        self.samples.append(sample)


def _score_slice(cells: Sequence[PlannedCell], engine: Engine, part: slice) -> RowsByCell:
    """Score the options of some items under several conditions at once."""
    draws_by_cell = [[_Draw(q, 0) for q in cell.questions(part)] for cell in cells]
    asked = [(c, draw) for c, draws in zip(cells, draws_by_cell, strict=True) for draw in draws]
    if not asked:
        return [[] for _ in cells]

    def requests() -> list[Request]:
        return [(_first_prompt(cell, engine, d.question), d.question.options) for cell, d in asked]

    with _error_context([(cell, draw.question.item) for cell, draw in asked]):
        digests = (cell.settings_digest for cell in cells)
        key = "|".join([str(part), str(cells[0].style.date), *digests])
        scores = iter(engine.score_kept(key, requests))
    return [[_row(draw, next(scores)) for draw in draws] for draws in draws_by_cell]


def _sample_slice(cells: Sequence[PlannedCell], engine: Engine, part: slice) -> RowsByCell:
    """Sample the model's own turns for the items of one cell, then score the final question."""
    (cell,) = cells
    assert cell.sampling is not None
    draws = [
        _Draw(question, number)
        for question in cell.questions(part)
        for number in range(cell.sampling.draws)
    ]
    if not draws:
        return [[]]
    with _error_context([(cell, draw.question.item) for draw in draws]):
        *rounds, last = range(cell.section.num_samples(cell.condition))
        for round_ in rounds:
            samples = engine.sample(**_sample_arguments(cell, draws, engine, round_, part))
            for draw, sample in zip(draws, samples, strict=True):
                draw.add(cell, engine, sample)

        def final_question(index: int, sample: Sample) -> Request:
            draw = draws[index]
            draw.add(cell, engine, sample)
            draw.prompt = _prompt(cell, engine, draw)
            return draw.prompt, draw.question.options

        answers = engine.sample_then_score(
            then=final_question, **_sample_arguments(cell, draws, engine, last, part)
        )
    return [[_row(draw, scores) for draw, (_, scores) in zip(draws, answers, strict=True)]]


def _sample_arguments(
    cell: PlannedCell, draws: Sequence[_Draw], engine: Engine, round_: int, part: slice
) -> dict[str, Any]:
    """Return the arguments of `Engine.sample` for the next sampled turn of each dialogue."""

    def prompts() -> list[str]:
        return [_prompt(cell, engine, draw) for draw in draws]

    key = f"prompts|{part}|{cell.style.date}|{cell.settings_digest}"
    return {
        # Later prompts hold the model's own text.
        "prompts": prompts() if round_ else engine.kept(key, prompts),
        # An item has the same noise at every checkpoint and in every condition: differences come
        # from the model, and one more round of review continues from the same answer.
        "keys": [
            f"{cell.experiment}|{draw.question.item.id}|{draw.question.order}|{draw.number}|{round_}"
            for draw in draws
        ],
        "sampling": cell.sampling,
        "stop": _stop(cell, draws, engine.tokenizer),
    }


def _stop(cell: PlannedCell, draws: Sequence[_Draw], tokenizer: Any) -> str | None:
    """Return the string that ends the next sample: the end of thoughts, or of an answer."""
    if cell.style.thinking is not None and is_thinking(
        before_sample(draws[0].turns(tokenizer))[-1]
    ):
        return cell.style.thinking.end
    return stop_text(tokenizer, cell.style)


def _first_prompt(cell: PlannedCell, engine: Engine, question: Question) -> str:
    return _prompt(cell, engine, _Draw(question, 0))


def _prompt(cell: PlannedCell, engine: Engine, draw: _Draw) -> str:
    """Return the prompt of the next text that the model writes, or of the options."""
    texts = (sample.text for sample in draw.samples)
    question = cell.settings_digest, str(cell.style.date), draw.question.item.id
    key = (*question, draw.question.order, *texts)

    def make(_: list[int]) -> list[str]:
        turns = before_sample(draw.turns(engine.tokenizer))
        return [render(engine.tokenizer, turns, cell.style)]

    return engine.recent([key], make)[0]


def _check_room(cell: PlannedCell, engine: Engine) -> None:
    """Raise InputError if final questions can outgrow the context, before anything is sampled."""
    assert cell.sampling is not None
    room = cell.sampling.max_new_tokens * cell.section.num_samples(cell.condition)

    if cell.items:
        key = f"longest|{cell.style.date}|{cell.settings_digest}"
        _, item, prompt = engine.kept(key, lambda: _longest_prompt(cell, engine.tokenizer))
        with _error_context([(cell, item)]):
            engine.check_room([prompt], room)


def _longest_prompt(cell: PlannedCell, tokenizer: Any) -> tuple[int, Item, str]:
    """Return the length and item of the longest prompt, without samples, and that prompt."""
    found: list[tuple[int, Item, str]] = []
    for first in range(0, len(cell.items), _PART_ITEMS):
        questions = list(cell.questions(slice(first, first + _PART_ITEMS)))
        with _error_context([(cell, question.item) for question in questions]):
            prompts = [
                render(tokenizer, unsampled(question.turns), cell.style) for question in questions
            ]
        lengths = [len(tokens) for tokens in token_ids(tokenizer, prompts)]
        index = max(range(len(lengths)), key=lengths.__getitem__)
        found.append((lengths[index], questions[index].item, prompts[index]))
    return max(found, key=lambda row: row[0])


def longest_dialogue(plan: EvaluationPlan, tokenizer: Any) -> int:
    """Return the tokens that the plan's longest dialogue may need, with the texts it samples.

    A sampled text counts twice: read as a part of a dialogue, it may have more tokens.
    """
    longest = 0
    for planned in plan.cells:
        cell = for_tokenizer(planned, tokenizer)
        if not cell.items:
            continue
        options = {option for question in cell.questions() for option in question.options}
        tokens = _longest_prompt(cell, tokenizer)[0]
        tokens += max(map(len, token_ids(tokenizer, sorted(options))))
        if cell.sampling is not None:
            texts = cell.section.num_samples(cell.condition)
            tokens += 2 * cell.sampling.max_new_tokens * texts
        longest = max(longest, tokens)
    return longest


def _row(draw: _Draw, logprobs: list[float]) -> Row:
    item, samples = draw.question.item, draw.samples
    mass = math.fsum(math.exp(value) for value in logprobs)
    top = max(logprobs)
    shares = [math.exp(value - top) for value in logprobs] if top > -math.inf else None
    return {
        "item": item.id,
        "cluster": item.cluster,
        "category": item.category,
        "weight": item.weight,
        "order": draw.question.order,
        "options": list(draw.question.options),
        "logprobs": logprobs,
        # Undefined, hence null, if the model gives no option any probability.
        "probabilities": shares and [share / math.fsum(shares) for share in shares],
        "mass": mass,
        "draw": draw.number,
        "samples": [sample.text for sample in samples] if samples else None,
        "truncated": any(sample.truncated for sample in samples) if samples else None,
        "prompt": draw.prompt,
        **item.facts,
    }


@contextmanager
def _error_context(owners: Sequence[tuple[PlannedCell, Item]]) -> Iterator[None]:
    """Add the cell and item to the engine's errors; `owners` holds those of each prompt."""
    cell_names = ", ".join(dict.fromkeys(cell.name for cell, _ in owners))
    try:
        yield
    except PromptTooLong as error:
        cell, item = owners[error.index]
        remedy = "use a model with a longer context"
        if cell.sampling is not None:
            remedy += f", or lower max_new_tokens ({cell.sampling.max_new_tokens})"
        raise InputError(f"{cell.name}, item {item.id}: {error}; {remedy}") from None
    except (InputError, RunFailure) as error:
        raise type(error)(f"{cell_names}: {error}") from None
