"""Measuring a model while it is being trained, and leaving the training run exactly as it was.

    trainer.add_callback(SelfCorrectionCallback(plan, lambda step: out / f"step-{step}", {0, 100}))

Works with any `transformers.Trainer`: SFT, DPO, GRPO, this project's PPO, or one's own.
"""
# ruff: noqa: TID253  -- a TrainerCallback: imported only where a trainer is

import random
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainerState

from selfcorrect.evaluate.measuring.cell_files import Origin, read_cell
from selfcorrect.evaluate.measuring.measure import Progress, cost, measure
from selfcorrect.evaluate.measuring.plan import EvaluationPlan
from selfcorrect.evaluate.scoring.token_trie import Prepared
from selfcorrect.recipes.foundation.ranks import SINGLE, Ranks, current_ranks

Schedule = Collection[int] | Callable[[TrainerState], int | None]


class SelfCorrectionCallback(TrainerCallback):
    """Measures the live model at chosen steps; its files equal those of the saved weights.

    `folder_of_step` says where the files of a step go. `at` is a set of the trainer's global
    steps (optimizer updates), 0 among them for the model before training, or a function from the
    trainer's state to a step's label, None for "not now". Hand over `trainer` (also later, as an
    attribute) to have the headline metrics logged with the training's own, as
    `eval_<experiment>.<condition>.<metric>`; without one they go to `state.log_history` alone.

    In a run of several processes all share the items, and the first one writes. Under ZeRO-3 the
    weights are gathered while measuring, so each device must hold the whole model for that time.
    Where it does not fit, and under FSDP, evaluate the saved checkpoints.
    """

    def __init__(
        self,
        plan: EvaluationPlan,
        folder_of_step: Callable[[int], Path],
        at: Schedule,
        *,
        trainer: Trainer | None = None,
        tokenizer: Any = None,
        progress: Progress | None = None,
    ) -> None:
        self.plan = plan
        self.folder_of_step = folder_of_step
        self.at = at
        self.trainer = trainer
        self.tokenizer = tokenizer
        self.progress = progress
        self.seconds = 0.0
        self.started = 0.0
        self._prepared = Prepared()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Step 0, or the step a run is resumed at (files that are there already stay)."""
        self.started, self.seconds = time.perf_counter(), 0.0
        self._measure(state, control, **kwargs)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """After an optimizer update."""
        self._measure(state, control, **kwargs)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Say what the measuring has cost."""
        training = time.perf_counter() - self.started - self.seconds
        if state.is_world_process_zero:
            print(cost(self.seconds, training), file=sys.stderr)

    def _measure(
        self,
        state: TrainerState,
        control: Any,
        model: Any = None,
        processing_class: Any = None,
        **_: Any,
    ) -> None:
        step = self._step(state)
        if step is None:
            return
        tokenizer = self.tokenizer if self.tokenizer is not None else processing_class
        if tokenizer is None:
            raise ValueError("SelfCorrectionCallback: the trainer has no processing_class; give it")
        started = time.perf_counter()
        processes = current_ranks()
        if getattr(self.trainer, "is_fsdp_enabled", False):
            raise ValueError("SelfCorrectionCallback: not for FSDP; evaluate the saved checkpoints")
        with whole(model) as gathered:
            paths = measure_undisturbed(
                self.plan,
                gathered,
                tokenizer,
                self.folder_of_step(step),
                self.progress,
                self._prepared,
                processes=processes,
            )
        if processes.rank == 0:
            self._log(state, control, {f"eval_{k}": v for k, v in headlines(paths).items()})
        self.seconds += time.perf_counter() - started

    def _step(self, state: TrainerState) -> int | None:
        if callable(self.at):
            return self.at(state)
        return state.global_step if state.global_step in self.at else None

    def _log(self, state: TrainerState, control: Any, metrics: dict[str, float]) -> None:
        if self.trainer is None:
            state.log_history.append({**metrics, "step": state.global_step})
            return
        # The base class's own: a subclass's `log` may flush what it collects for its next entry.
        # And logging clears should_log, which would cost the run its own entry at this step.
        due = control.should_log
        Trainer.log(self.trainer, metrics)
        control.should_log = due


def headlines(paths: Collection[Path]) -> dict[str, float]:
    """Each cell's headline metric and option mass, over all its items; undefined ones left out."""
    from selfcorrect.evaluate.experiments import EXPERIMENTS
    from selfcorrect.evaluate.statistics.bootstrap import Draws, bootstrap

    found = {}
    for path in paths:
        frame, metadata = read_cell(path)
        experiment = EXPERIMENTS[metadata["experiment"]]
        tally = experiment.tally(frame)
        pooled = experiment.overall(tally.categories)
        values = bootstrap(tally, experiment.metrics, pooled, Draws(1)).replicates.metrics
        for metric in (experiment.HEADLINE, "option_mass"):
            value = float(values[metric][0]) if metric in values else float("nan")
            if np.isfinite(value):
                found[f"{metadata['experiment']}.{metadata['condition']}.{metric}"] = value
    return found


@contextmanager
def whole(model: Any) -> Iterator[Any]:
    """The model with all of its weights on every process, also where ZeRO-3 has split them up.

    DeepSpeed's hooks let go of weights after each forward, and wait for the other processes before
    it: they are set aside meanwhile, since the processes score different items.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        yield model
        return
    deepspeed = sys.modules["deepspeed"]  # has split them, so it is there
    held = [
        hooks
        for module in model.modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
    ]
    kept = [dict(hooks) for hooks in held]
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        for hooks in held:
            hooks.clear()
        try:
            yield model
        finally:
            for hooks, own in zip(held, kept, strict=True):
                hooks.update(own)


def measure_undisturbed(
    plan: EvaluationPlan,
    model: Any,
    tokenizer: Any,
    folder: Path,
    progress: Progress | None = None,
    prepared: Prepared | None = None,
    origin: Origin | None = None,
    processes: Ranks = SINGLE,
) -> list[Path]:
    """`measure` a model in training: it, and every random number drawn later, stay as they are.

    The numbers are those of the weights as they would be saved: dropout off, and without the
    mixed-precision wrapper that a trainer may have put around the model.
    """
    with undisturbed(model):
        return measure(plan, model, tokenizer, folder, progress, prepared, origin, processes)


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Eval mode inside; outside, afterwards, everything as found.

    Kept: Python's, numpy's and torch's random states, each submodule's mode, `use_cache` in the
    configs, the generation settings, the forward's wrapper. Gradients are not touched, since all
    of `measure` runs under `torch.no_grad`.
    """
    with ExitStack() as stack:
        stack.enter_context(_random_states())
        stack.enter_context(_attributes(model))
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


@contextmanager
def _random_states() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if mps is not None:
            torch.mps.set_rng_state(mps)


@contextmanager
def _attributes(model: Any) -> Iterator[None]:
    """Put back what generating or a forward may set on the model and its configs."""
    held = [vars(module) for module in model.modules()]
    settings = [(own, own["generation_config"]) for own in held if "generation_config" in own]
    configs = {id(own["config"]): own["config"] for own in held if "config" in own}
    caching = [(c, c.use_cache) for c in configs.values() if hasattr(c, "use_cache")]
    wrapped = vars(model).get("forward")
    plain = vars(model).get("_original_forward")  # where accelerate keeps it
    if wrapped is not None and plain is not None:
        model.forward = plain
    try:
        yield
    finally:
        if wrapped is not None:
            model.forward = wrapped
        for own, generation_config in settings:
            own["generation_config"] = generation_config
        for config, use_cache in caching:
            config.use_cache = use_cache
