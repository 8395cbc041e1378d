"""Evaluation after the fact, or beside a live run: every checkpoint of a run on disk."""

import logging
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfcorrect.evaluate.data.catalogue import warn_if_unpublished
from selfcorrect.evaluate.experiments.wording import load_stimuli
from selfcorrect.evaluate.measuring.cell_files import Origin, is_measured
from selfcorrect.evaluate.measuring.inputs import check_inputs
from selfcorrect.evaluate.measuring.measure import measure, measure_with
from selfcorrect.evaluate.measuring.plan import EvaluationPlan, plan_evaluation
from selfcorrect.evaluate.run_folder import RECORD, Checkpoint, check_saved, find_checkpoints
from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from selfcorrect.recipes.foundation.locks import hold_lock, lock_holder
from selfcorrect.recipes.foundation.ranks import SINGLE, Ranks
from selfcorrect.recipes.load import load_recipe
from selfcorrect.recipes.schema import Recipe
from selfcorrect.recipes.society.benchmarks import whole_benchmarks

logger = logging.getLogger(__name__)

Notify = Callable[[str, int, int], None]  # what, done, in all
Place = tuple[str, int, int]  # model, seed, step

POLL_SECONDS = 2.0  # between two looks for new checkpoints, or at what other processes hold


def recipe_plan(recipe: Recipe, run: Path) -> EvaluationPlan:
    """What a recipe's `evaluate` section asks for; a society's benchmarks lie in the run folder."""
    if recipe.data.society is not None:
        data = run / "benchmarks"
        whole_benchmarks(recipe.data.society, data)
        stimuli = load_stimuli(recipe.data.stimuli, base=data / "stimuli.yaml")
    else:
        if recipe.data.benchmarks is None:
            raise InputError("data.benchmarks: name the folder with bbq/, winogender/, law_school/")
        data, stimuli = recipe.data.benchmarks, load_stimuli(recipe.data.stimuli)
        warn_if_unpublished(data, recipe.evaluate.experiments)
    asked = recipe.evaluate
    return plan_evaluation(
        data,
        stimuli,
        asked.experiments,
        asked.conditions,
        limit=asked.limit,
        seed=asked.seed,
        max_new_tokens=asked.max_new_tokens,
        temperature=asked.temperature,
        samples=asked.samples,
        permutations=asked.permutations,
        style=asked.style,
    )


def unmeasured(
    run: Path,
    cells: EvaluationPlan,
    engine: str = "packed",
    malformed: dict[Path, str] | None = None,
) -> list[Checkpoint]:
    """Checkpoints of the run that lack a cell of the plan; `malformed`: see `find_checkpoints`."""
    return [c for c in find_checkpoints(run, malformed) if not _is_whole(c, cells, engine)]


def place(checkpoint: Checkpoint) -> Place:
    """Where a checkpoint stands in its run."""
    record = checkpoint.record
    return record.model, record.seed, record.step


def folder_of(run: Path, method: str, at: Place) -> Path:
    """The folder of a checkpoint that training writes."""
    return run / at[0] / f"seed-{at[1]}" / method / f"checkpoint-{at[2]}"


def planned(recipe: Recipe) -> set[Place]:
    """Every checkpoint that the recipe keeps."""
    return {
        (model.name, seed, step)
        for model in recipe.models
        for seed in recipe.seeds
        for step in recipe.policy.checkpoints
    }


def _is_whole(checkpoint: Checkpoint, cells: EvaluationPlan, engine: str) -> bool:
    digest = checkpoint.record.weights_digest
    origin = None if digest is None else Origin(digest, engine)
    folder = checkpoint.evaluation
    return all(is_measured(folder / cell.file_name, cell, origin) for cell in cells.cells)


def evaluate_run(
    recipe: Recipe,
    run: Path,
    notify: Notify,
    *,
    watch: bool = False,
    processes: Ranks = SINGLE,
    device: str | None = None,
    threads: int | None = None,
    only: set[Place] | None = None,
) -> int:
    """Measure every checkpoint that lacks a cell; returns how many this process measured.

    Any number of processes, on machines that share the folder, may do so at the same time: each
    checkpoint is measured by one of them, and all return when all is done. With `watch`, new
    checkpoints are waited for until the run has all that its recipe asks for. `processes` are those
    of one launch, which share the items of each checkpoint. `threads` are torch's, on a CPU. `only`
    names the checkpoints that are this process's affair.

    A checkpoint that cannot be loaded, or whose logits are NaN, does not keep the others from being
    measured: RunFailure names it when they are done. It is tried again once its files change; one
    that has vanished is passed over.
    """
    if processes.size > 1 and recipe.evaluate.engine != "packed":
        raise InputError(f"evaluate.engine: {recipe.evaluate.engine} shares its work by itself")
    processes.from_rank0(lambda: _check_files(recipe, run))  # one of them mends what is damaged
    work = _Work(recipe, run, recipe_plan(recipe, run), processes, device, threads, only)
    while True:
        waiting = processes.from_rank0(work.waiting)
        done_before = work.num_measured
        for checkpoint in waiting:
            notify("evaluate", work.num_measured, done_before + len(waiting))
            work.measure_if_free(checkpoint)
        is_over = not watch or processes.from_rank0(work.is_over)  # looked at before the last round
        waiting = processes.from_rank0(work.waiting)
        if not waiting and is_over:
            break
        if work.num_measured == done_before:
            work.say_who_is_waited_for(waiting)
            time.sleep(POLL_SECONDS)
    if work.num_measured:
        notify("evaluate", work.num_measured, work.num_measured)
    if processes.rank == 0:
        work.tidy()
    work.raise_broken()
    return work.num_measured


def _check_files(recipe: Recipe, run: Path) -> None:
    check_inputs(recipe, run, training=False)
    if recipe.data.society is not None:
        whole_benchmarks(recipe.data.society, run / "benchmarks")


@dataclass
class _Work:
    """One process's part in evaluating a run."""

    recipe: Recipe
    run: Path
    cells: EvaluationPlan
    processes: Ranks
    device: str | None
    threads: int | None
    only: set[Place] | None
    num_measured: int = 0
    said: bool = False
    broken: dict[Path, tuple[object, str]] = field(default_factory=dict)  # its files, what is wrong
    malformed: dict[Path, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from selfcorrect.evaluate.scoring.token_trie import PackingCache
        from selfcorrect.evaluate.scoring.weights import CheckpointLoader

        self.loader = CheckpointLoader(self.device)
        self.packings = PackingCache()
        self.trusted = {m.name for m in self.recipe.models if m.trust_remote_code}

    def waiting(self) -> list[Checkpoint]:
        """What is to be measured, by anyone; broken checkpoints only once their files change."""
        self.malformed = {}  # looked at anew every time
        engine = self.recipe.evaluate.engine
        return [
            checkpoint
            for checkpoint in unmeasured(self.run, self.cells, engine, self.malformed)
            if self.broken.get(checkpoint.folder, (None,))[0] != _state(checkpoint.folder)
            and (self.only is None or place(checkpoint) in self.only)
        ]

    def is_over(self) -> bool:
        """Whether nothing more is to come; the recipe on disk may have grown."""
        kept = {place(checkpoint) for checkpoint in find_checkpoints(self.run, {})}
        return planned(load_recipe(str(self.run / "recipe.yaml"))) <= kept

    def measure_if_free(self, checkpoint: Checkpoint) -> None:
        """Measure it, unless another process does so or has done so."""
        folder = checkpoint.folder
        first = self.processes.rank == 0
        if not self.processes.from_rank0(lambda: (folder / RECORD).is_file()):
            return  # vanished
        with hold_lock(checkpoint.evaluation) if first else nullcontext(True) as free:
            if not self.processes.from_rank0(
                lambda: free and not _is_whole(checkpoint, self.cells, self.recipe.evaluate.engine)
            ):
                return
            state = _state(folder)
            try:
                self._measure(checkpoint)
            except (RunFailure, FileNotFoundError) as error:
                said = str(error)
                where = "" if said.startswith(str(folder)) else f"{folder}: "
                self.broken[folder] = state, where + said
            else:
                self.broken.pop(folder, None)
                self.num_measured += 1
        if first and [path.name for path in folder.glob("*")] == ["evaluation"]:
            shutil.rmtree(folder, ignore_errors=True)  # vanished meanwhile: only ours is left

    def _measure(self, checkpoint: Checkpoint) -> None:
        engine = self.recipe.evaluate.engine
        digest = self.processes.from_rank0(lambda: _checked_digest(checkpoint))
        origin = Origin(digest, engine)
        if engine != "packed":
            from selfcorrect.evaluate.scoring.lm_eval import load_engine

            loaded = load_engine(engine, str(checkpoint.folder))  # InputError: not installed
            measure_with(self.cells, loaded, checkpoint.evaluation, origin)
            return
        if self.threads is not None:
            import torch

            torch.set_num_threads(self.threads)
        trust = checkpoint.record.model in self.trusted
        pair: list[Any] = []
        try:
            # An error of one process is one of all: they go on to the next checkpoint together.
            self.processes.gather(
                lambda: pair.extend(self.loader.load(checkpoint.folder, trust_remote_code=trust))
            )
        except InputError as error:
            raise RunFailure(str(error)) from None
        model, tokenizer = pair
        measure(
            self.cells,
            model,
            tokenizer,
            checkpoint.evaluation,
            packings=self.packings,
            origin=origin,
            processes=self.processes,
        )

    def say_who_is_waited_for(self, waiting: list[Checkpoint]) -> None:
        """One line, once: what is left is being measured by another process."""
        if waiting and not self.said and self.processes.rank == 0:
            self.said = True
            folder = waiting[0].evaluation
            logger.warning("waiting for %s, working in %s", lock_holder(folder), folder)

    def tidy(self) -> None:
        """Remove what killed processes left beside evaluations that are whole by now."""
        for checkpoint in find_checkpoints(self.run, {}):
            folder = checkpoint.evaluation
            left = [*folder.glob(".*.parts"), *folder.glob(".*.part")]
            if left and _is_whole(checkpoint, self.cells, self.recipe.evaluate.engine):
                with hold_lock(folder) as free:
                    for path in left if free else ():
                        shutil.rmtree(path, ignore_errors=True)

    def raise_broken(self) -> None:
        """RunFailure for the checkpoints that are still there and could not be measured."""
        said = [line for folder, (_, line) in self.broken.items() if (folder / RECORD).is_file()]
        ours = (
            None
            if self.only is None
            else {folder_of(self.run, self.recipe.policy.method, at) for at in self.only}
        )
        said += [line for at, line in self.malformed.items() if ours is None or at in ours]
        if said:
            more = f" (and {len(said) - 1} more)" if len(said) > 1 else ""
            raise RunFailure(f"{said[0]}{more}; the other checkpoints are measured")


def _checked_digest(checkpoint: Checkpoint) -> str:
    """The digest of the checkpoint's weights; RunFailure where they are not those once saved."""
    from selfcorrect.evaluate.scoring.weights import files_digest

    try:
        check_saved(checkpoint.folder)  # names the file, where the record knows them
        digest = files_digest(checkpoint.folder)
    except InputError as error:
        raise RunFailure(str(error)) from None
    if checkpoint.record.weights_digest not in (None, digest):
        raise RunFailure(
            f"{checkpoint.folder}: the weights are not those that were saved here (half-copied, "
            "damaged or replaced); copy them again, or delete the folder and train again"
        )
    return digest


def _state(folder: Path) -> object:
    """Tells whether a checkpoint's files have changed since."""
    try:
        return sorted((p.name, p.stat().st_mtime_ns, p.stat().st_size) for p in folder.glob("*.*"))
    except FileNotFoundError:
        return None
