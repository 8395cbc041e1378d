"""Evaluation of the checkpoints of a run on disk, after training or beside it."""

import logging
import shutil
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

from selfcorrect.evaluate.data.catalogue import warn_if_unpublished
from selfcorrect.evaluate.experiments.wording import load_stimuli
from selfcorrect.evaluate.measuring.cell_files import Origin, is_cell_measured
from selfcorrect.evaluate.measuring.held_out import check_wordings, log_notes, warn_of_feedback
from selfcorrect.evaluate.measuring.inputs import check_inputs
from selfcorrect.evaluate.measuring.measure import (
    longest_dialogue,
    measure,
    measure_with,
    share_of_plan,
)
from selfcorrect.evaluate.measuring.plan import EvaluationPlan, plan_evaluation
from selfcorrect.evaluate.measuring.sources import WEIGHTS, source_state, weights_of
from selfcorrect.evaluate.prompts.dialogue import Style, read_style
from selfcorrect.evaluate.prompts.tokenized import tokenizer_digest
from selfcorrect.evaluate.run_folder import (
    RECORD,
    Checkpoint,
    CheckpointKey,
    check_saved,
    checkpoint_folder,
    find_checkpoints,
    planned_checkpoints,
    read_checkpoint,
)
from selfcorrect.evaluate.scoring.engine import Engine, EngineLoader
from selfcorrect.evaluate.scoring.lm_eval import engine_loader, engine_version
from selfcorrect.recipes.foundation.checksums import read_record
from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from selfcorrect.recipes.foundation.locks import hold_lock, lock_holder
from selfcorrect.recipes.foundation.progress import Progress, no_progress
from selfcorrect.recipes.foundation.ranks import SINGLE, Ranks
from selfcorrect.recipes.load import load_measured
from selfcorrect.recipes.schema import Recipe
from selfcorrect.recipes.series import SIZE_TOLERANCE, Measured, Series
from selfcorrect.recipes.society.benchmarks import ensure_benchmarks

logger = logging.getLogger(__name__)

POLL_SECONDS = 2.0  # between two looks for new checkpoints, or for locks that were released


def run_date(recipe: Measured, run: Path, stages_from: Path | None = None) -> str:
    """Return the day (ISO) that chat templates get for today, the same in all parts of a run.

    It is the recipe's, else that of run.json, which keeps the day of the start (of `stages_from`,
    whose models were trained with it), else today's.
    """
    if recipe.chat_template_date is not None:
        return recipe.chat_template_date.isoformat()
    for folder in (run, *([stages_from] if stages_from else [])):
        with suppress(FileNotFoundError):
            record = read_record(folder / "run.json", "restore it or move it away")
            if known := record.get("chat_template_date"):
                return str(known)
    return date.today().isoformat()


def run_style(recipe: Recipe, run: Path) -> Style:
    """Return how the dialogues of training are written."""
    return read_style("auto", recipe.chat_template_kwargs, run_date(recipe, run))


def recipe_plan(recipe: Measured, run: Path, date: str | None = None) -> EvaluationPlan:
    """Load the benchmarks and return the plan of the recipe's `evaluate` section.

    `date` is the run's (`run_date`), if it is not recorded yet. A society's benchmarks are written
    to the run's folder. What feedback from a benchmark spoke of is left out. Raises InputError for
    benchmarks, stimuli or conditions that cannot be used.
    """
    if recipe.data.society is not None:
        data = run / "benchmarks"
        ensure_benchmarks(recipe.data.society, data)
        stimuli = load_stimuli(recipe.data.stimuli, base=data / "stimuli.yaml")
    else:
        if recipe.data.benchmarks is None:
            raise InputError("data.benchmarks: name the folder with bbq/, winogender/, law_school/")
        data, stimuli = recipe.data.benchmarks, load_stimuli(recipe.data.stimuli)
        warn_if_unpublished(data, recipe.evaluate.experiments)
    settings = recipe.evaluate.model_dump(exclude={"attach", "engine", "dtype", "engine_args"})
    settings["chat_template_kwargs"] = recipe.chat_template_kwargs
    day = date or run_date(recipe, run)
    feedback = None if isinstance(recipe, Series) else recipe.data.feedback
    if feedback is None:
        return plan_evaluation(data, stimuli, **settings, date=day)
    plan = plan_evaluation(data, stimuli, **settings, date=day, spoken_of=feedback.bbq)
    check_wordings(feedback, plan.cells)
    log_notes(feedback, recipe.evaluate.experiments)
    return plan


def as_trained(
    plan: EvaluationPlan, folder: Path, *, arguments: bool = True, date: bool = True
) -> EvaluationPlan:
    """Return the plan with what the chat template got in training, if a checkpoint records that.

    `arguments` and `date` say whether each is taken from the record.
    """
    try:
        record = read_checkpoint(folder).record
    except InputError:
        return plan  # not a checkpoint, or a damaged one, which is reported on loading
    warn_of_feedback(folder, [cell.experiment for cell in plan.cells])
    changes: dict[str, Any] = {}
    if arguments and record.chat_template_kwargs is not None:
        changes["arguments"] = record.chat_template_kwargs
    if date and record.chat_template_date is not None:
        changes["date"] = record.chat_template_date
    return EvaluationPlan(
        [replace(cell, style=replace(cell.style, **changes)) for cell in plan.cells]
    )


def is_measured(
    checkpoint: Checkpoint, plan: EvaluationPlan, engine: str | None = None, dtype: str = "auto"
) -> bool:
    """Return whether an intact file exists for every cell of the plan.

    With `engine`, the files must also have been scored by it, from the checkpoint's weights, held
    in the type that the recipe's `evaluate.dtype` means for them.
    """
    digest = checkpoint.record.weights_digest
    if engine is not None and digest is None and checkpoint.record.source is not None:
        return False  # its weights have never been loaded, or may have changed
    origin = None
    if engine is not None and digest is not None:
        held, version = _held_in(checkpoint, dtype), engine_version(engine)
        origin = Origin(digest, engine, dtype=held, version=version)
    folder = checkpoint.evaluation
    return all(is_cell_measured(folder / cell.file_name, cell, origin) for cell in plan.cells)


def _held_in(checkpoint: Checkpoint, dtype: str) -> str | None:
    """Return the type in which a checkpoint is measured; None: that of its files."""
    return checkpoint.dtype if dtype == "auto" else dtype


def unmeasured(
    run: Path,
    plan: EvaluationPlan,
    engine: str = "packed",
    malformed: dict[Path, str] | None = None,
    dtype: str = "auto",
) -> list[Checkpoint]:
    """Return the run's checkpoints that lack a cell; `malformed`: see `find_checkpoints`."""
    return [c for c in find_checkpoints(run, malformed) if not is_measured(c, plan, engine, dtype)]


def evaluate_run(
    recipe: Measured,
    run: Path,
    progress: Progress = no_progress,
    *,
    plan: EvaluationPlan | None = None,
    watch: bool = False,
    ranks: Ranks = SINGLE,
    device: str | None = None,
    threads: int | None = None,
    only: Collection[CheckpointKey] | None = None,
    on_measured: Callable[[Checkpoint], None] = lambda _: None,
    batch_tokens: int | None = None,
    look_for_more: Callable[[], bool] = lambda: False,
) -> int:
    """Measure every checkpoint that lacks a cell; return how many this process measured.

    Several processes, on machines that share the folder, may call this at the same time: each
    checkpoint is measured by one of them, and all return when everything is measured. `plan` is the
    recipe's, if it is loaded already. With `watch`, wait for new checkpoints until all that the
    recipe keeps exist. `ranks` share the items of each checkpoint. `threads` are torch's, on a CPU.
    `only` restricts the work to these checkpoints. `on_measured` is called on rank 0 after each.
    `batch_tokens` bounds the tokens of a forward pass. With `watch`, `look_for_more` is called on
    rank 0 between two looks; it returns whether checkpoints may come that nobody knows of yet.

    A checkpoint that cannot be loaded, or whose logits are NaN, does not stop the others: a
    RunFailure at the end names it. It is tried again once its files change. One that has vanished
    is skipped.
    """
    if ranks.size > 1 and (recipe.evaluate.engine != "packed" or recipe.evaluate.engine_args):
        raise InputError(
            f"evaluate.engine: {recipe.evaluate.engine} distributes its work itself; start it "
            "without accelerate launch"
        )
    ranks.from_rank0(lambda: _check_files(recipe, run))  # rank 0 alone repairs the benchmarks
    evaluation = _Evaluation(
        recipe, run, plan or recipe_plan(recipe, run), ranks, device, threads, only, on_measured,
        batch_tokens, look_for_more,
    )  # fmt: skip
    with closing(evaluation):
        while True:
            waiting = ranks.from_rank0(evaluation.waiting)
            measured_before = evaluation.num_measured
            for checkpoint in waiting:
                total = measured_before + len(waiting)
                progress("evaluate", evaluation.num_measured, total)

                def report(share: float, total: int = total) -> None:
                    progress("evaluate", evaluation.num_measured + share, total)

                evaluation.measure_if_free(checkpoint, share_of_plan(evaluation.plan, report))
            # Asked before the last look for checkpoints, which may have been written in between.
            is_over = not watch or ranks.from_rank0(evaluation.is_over)
            waiting = ranks.from_rank0(evaluation.waiting)
            if not waiting and is_over:
                break
            if evaluation.num_measured == measured_before:
                evaluation.report_lock_holder(waiting)
                time.sleep(POLL_SECONDS)
    if evaluation.num_measured:
        progress("evaluate", evaluation.num_measured, evaluation.num_measured)
    if ranks.rank == 0:
        evaluation.remove_leftovers()
    evaluation.raise_failures()
    return evaluation.num_measured


def _check_files(recipe: Measured, run: Path) -> None:
    check_inputs(recipe, run, training=False)
    if recipe.data.society is not None:
        ensure_benchmarks(recipe.data.society, run / "benchmarks")


@dataclass
class _Evaluation:
    """One process's part in the evaluation of a run."""

    recipe: Measured
    run: Path
    plan: EvaluationPlan
    ranks: Ranks
    device: str | None
    threads: int | None
    only: Collection[CheckpointKey] | None
    on_measured: Callable[[Checkpoint], None]
    batch_tokens: int | None
    look_for_more: Callable[[], bool]
    num_measured: int = 0
    lock_reported: bool = False
    failures: dict[Path, tuple[object, str]] = field(default_factory=dict)
    """The state of the files and the error, by checkpoint folder."""
    malformed: dict[Path, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from selfcorrect.evaluate.scoring.token_trie import PackingCache
        from selfcorrect.evaluate.scoring.weights import CheckpointLoader

        self.loader = CheckpointLoader(self.device, self.recipe.evaluate.engine_args)
        self.engines: EngineLoader | None = None  # of another engine than the packed one
        self.num_tokens: dict[str, int] = {}  # of the plan's longest dialogue, by tokenizer
        self.packings = PackingCache()
        self.trusted = {m.name for m in self.recipe.models if m.trust_remote_code}
        self.keep_weights = not isinstance(self.recipe, Series) or self.recipe.keep_weights

    def close(self) -> None:
        """End the processes of the engine."""
        if self.engines is not None:
            self.engines.close()

    def waiting(self) -> list[Checkpoint]:
        """Return the checkpoints to measure; failed ones only once their files have changed."""
        self.malformed = {}
        engine, dtype = self.recipe.evaluate.engine, self.recipe.evaluate.dtype
        return [
            checkpoint
            for checkpoint in unmeasured(self.run, self.plan, engine, self.malformed, dtype)
            if self.failures.get(checkpoint.folder, (None,))[0] != _file_state(checkpoint)
            and (self.only is None or checkpoint.key in self.only)
        ]

    def is_over(self) -> bool:
        """Return whether all planned checkpoints exist; the recipe on disk may have grown."""
        if self.look_for_more():
            return False
        kept = {checkpoint.key for checkpoint in find_checkpoints(self.run, {})}
        return planned_checkpoints(load_measured(str(self.run / "recipe.yaml"))) <= kept

    def measure_if_free(self, checkpoint: Checkpoint, progress: Progress) -> None:
        """Measure the checkpoint, unless another process holds it or has measured it."""
        folder = checkpoint.folder
        writes = self.ranks.rank == 0
        if not self.ranks.from_rank0(lambda: (folder / RECORD).is_file()):
            return  # vanished
        engine, dtype = self.recipe.evaluate.engine, self.recipe.evaluate.dtype
        with hold_lock(checkpoint.evaluation) if writes else nullcontext(True) as is_free:
            if not self.ranks.from_rank0(
                lambda: is_free and not is_measured(checkpoint, self.plan, engine, dtype)
            ):
                return
            state = _file_state(checkpoint)
            try:
                self._measure(checkpoint, progress)
            except (RunFailure, FileNotFoundError) as error:
                message = str(error)
                prefix = "" if message.startswith(str(folder)) else f"{folder}: "
                self.failures[folder] = state, prefix + message
            else:
                self.failures.pop(folder, None)
                self.num_measured += 1
                if writes:
                    self.on_measured(checkpoint)
        if writes and [path.name for path in folder.glob("*")] == ["evaluation"]:
            shutil.rmtree(folder, ignore_errors=True)  # the checkpoint vanished in the meantime

    def _measure(self, checkpoint: Checkpoint, progress: Progress) -> None:
        with ExitStack() as stack:  # weights from elsewhere are rank 0's to fetch and to drop
            weights = weights_of(checkpoint, self.keep_weights)
            location = self.ranks.from_rank0(lambda: stack.enter_context(weights))
            self._measure_weights(checkpoint, location, progress)

    def _measure_weights(self, checkpoint: Checkpoint, location: Path, progress: Progress) -> None:
        engine = self.recipe.evaluate.engine
        digest = self.ranks.from_rank0(lambda: _verified_digest(checkpoint, location))
        origin = Origin(digest, engine)
        if engine != "packed":
            scorer = self._load_engine(checkpoint, location)
            origin = replace(origin, dtype=scorer.dtype, version=engine_version(engine))
            measure_with(self.plan, scorer, checkpoint.evaluation, origin, progress)
            return
        if self.threads is not None:
            import torch

            torch.set_num_threads(self.threads)
        trust = checkpoint.record.model in self.trusted
        dtype = _held_in(checkpoint, self.recipe.evaluate.dtype)
        if dtype is None:
            dtype = "auto" if checkpoint.record.source is None else "fast"
        loaded_parts: list[Any] = []
        try:
            # `gather` raises one rank's error on all, so that all go on to the next checkpoint.
            self.ranks.gather(
                lambda: loaded_parts.extend(
                    self.loader.load(location, trust_remote_code=trust, dtype=dtype)
                )
            )
        except InputError as error:
            raise RunFailure(str(error)) from None
        model, tokenizer = loaded_parts
        _check_size(checkpoint, model)
        measure(
            self.plan,
            model,
            tokenizer,
            checkpoint.evaluation,
            progress,
            packings=self.packings,
            origin=origin,
            ranks=self.ranks,
            batch_tokens=self.batch_tokens,
        )

    def _load_engine(self, checkpoint: Checkpoint, location: Path) -> Engine:
        """Load a checkpoint into another engine than the packed one.

        An engine that cannot start is an InputError; a checkpoint that it cannot load after others
        a RunFailure.
        """
        evaluate, is_first = self.recipe.evaluate, self.engines is None
        if self.engines is None:
            self.engines = engine_loader(evaluate.engine, evaluate.engine_args)
        dtype = _held_in(checkpoint, evaluate.dtype)
        try:
            return self.engines.load(str(location), dtype=dtype, room=self._room)
        except InputError as error:
            if is_first:
                raise
            raise RunFailure(str(error)) from None

    def _room(self, tokenizer: Any) -> int:
        digest = tokenizer_digest(tokenizer)
        if digest not in self.num_tokens:
            self.num_tokens[digest] = longest_dialogue(self.plan, tokenizer)
        return self.num_tokens[digest]

    def report_lock_holder(self, waiting: list[Checkpoint]) -> None:
        """Log, once, which process measures the checkpoints that are left."""
        if waiting and not self.lock_reported and self.ranks.rank == 0:
            self.lock_reported = True
            folder = waiting[0].evaluation
            logger.warning("waiting for %s, working in %s", lock_holder(folder), folder)

    def remove_leftovers(self) -> None:
        """Remove temporary files that killed processes left beside complete evaluations."""
        for checkpoint in find_checkpoints(self.run, {}):
            folder = checkpoint.evaluation
            is_dropped = not self.keep_weights and (checkpoint.folder / WEIGHTS).is_dir()
            leftovers = [checkpoint.folder / WEIGHTS] if is_dropped else []
            leftovers += [*folder.glob(".*.parts"), *folder.glob(".*.part")]
            evaluate = self.recipe.evaluate
            if leftovers and is_measured(checkpoint, self.plan, evaluate.engine, evaluate.dtype):
                with hold_lock(folder) as is_free:
                    for path in leftovers if is_free else ():
                        shutil.rmtree(path, ignore_errors=True)

    def raise_failures(self) -> None:
        """Raise RunFailure if an existing checkpoint could not be measured."""
        messages = [
            message for folder, (_, message) in self.failures.items() if (folder / RECORD).is_file()
        ]
        has_others = len(find_checkpoints(self.run, {})) > len(messages)
        only = {checkpoint_folder(self.recipe, self.run, key) for key in self.only or ()}
        messages += [
            message
            for folder, message in self.malformed.items()
            if self.only is None or folder in only
        ]
        if messages:
            more = f" (and {len(messages) - 1} more)" if len(messages) > 1 else ""
            is_rest_done = self.only is None and has_others
            others = "; the other checkpoints are measured" if is_rest_done else ""
            raise RunFailure(f"{messages[0]}{more}{others}")


def _verified_digest(checkpoint: Checkpoint, location: Path) -> str:
    """Return the digest of the checkpoint's weights; RunFailure if they changed since saving.

    That of weights from elsewhere is written to the checkpoint's record.
    """
    from selfcorrect.evaluate.scoring.weights import files_digest

    try:
        check_saved(checkpoint.folder)  # names the damaged file, if the record lists the files
        digest = files_digest(location)
    except InputError as error:
        raise RunFailure(str(error)) from None
    if checkpoint.record.source is not None:
        if checkpoint.record.weights_digest != digest:
            record = checkpoint.record.model_copy(update={"weights_digest": digest})
            record.write(checkpoint.folder)
        return digest
    if checkpoint.record.weights_digest not in (None, digest):
        raise RunFailure(
            f"{checkpoint.folder}: the weights are not those that were saved here (half-copied, "
            "damaged or replaced); copy them again, or delete the folder and train again"
        )
    return digest


def _check_size(checkpoint: Checkpoint, model: Any) -> None:
    """Raise RunFailure if weights from elsewhere are of another size than the model's others."""
    source, size = checkpoint.record.source, checkpoint.record.parameters
    if source is not None and abs(model.num_parameters() - size) > SIZE_TOLERANCE * size:
        revision = f"@{source.revision}" if source.revision else ""
        raise RunFailure(
            f"{source.path}{revision} has {model.num_parameters():,} parameters, other checkpoints "
            f"of {checkpoint.record.model} have {size:,}"
        )


def _file_state(checkpoint: Checkpoint) -> object:
    """Return names, times and sizes of the checkpoint's files, to see whether they change."""
    folder = checkpoint.folder
    if checkpoint.record.source is not None:
        return source_state(checkpoint.record.source)
    try:
        return sorted((p.name, p.stat().st_mtime_ns, p.stat().st_size) for p in folder.glob("*.*"))
    except FileNotFoundError:
        return None
