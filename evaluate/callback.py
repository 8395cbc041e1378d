"""Measure a model during training without changing the training run.

    trainer.add_callback(SelfCorrectionCallback(plan, lambda step: out / f"step-{step}", {0, 100}))

Works with any `transformers.Trainer`: SFT, DPO, GRPO, this project's PPO, or your own.
"""
# ruff: noqa: TID253  -- a TrainerCallback: imported only where a trainer is

import logging
import random
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainerState

from selfcorrect.evaluate.headlines import headlines, log_headlines
from selfcorrect.evaluate.measuring.cell_files import Origin
from selfcorrect.evaluate.measuring.measure import cost_message, measure
from selfcorrect.evaluate.measuring.plan import EvaluationPlan
from selfcorrect.evaluate.scoring.token_trie import PackingCache
from selfcorrect.recipes.foundation.progress import Progress
from selfcorrect.recipes.foundation.ranks import SINGLE, Ranks, current_ranks

logger = logging.getLogger(__name__)

Schedule = Collection[int] | Callable[[TrainerState], int | None]


class SelfCorrectionCallback(TrainerCallback):
    """Measure the live model at chosen steps; its files equal those of the saved weights.

    `folder_of_step` maps a step to the folder of its files. `at` is a set of the trainer's global
    steps (optimizer updates; 0 is the model before training), or a function from the trainer's
    state to a step's label, None to skip it. With `trainer` (which can also be set later, as an
    attribute), headline metrics are logged with the trainer's own, as
    `eval_<experiment>.<condition>.<metric>`; without it they go to `state.log_history` only.

    In distributed training all ranks share the items, and rank 0 writes. Under ZeRO-3 the weights
    are gathered while measuring, so each device must hold the whole model for that time. If it
    does not fit, and under FSDP, evaluate the saved checkpoints instead.
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
        self._first: dict[str, float] = {}  # headlines of the first checkpoint measured here
        self._packings = PackingCache()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Measure step 0, or the step at which a run resumes (existing files are kept)."""
        self.started, self.seconds = time.perf_counter(), 0.0
        self._measure(state, control, **kwargs)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Measure after an optimizer update."""
        self._measure(state, control, **kwargs)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Log what measuring has cost."""
        training_seconds = time.perf_counter() - self.started - self.seconds
        if state.is_world_process_zero:
            logger.info(cost_message(self.seconds, training_seconds))

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
            raise ValueError(
                "SelfCorrectionCallback: pass tokenizer, since the trainer has no processing_class"
            )
        started = time.perf_counter()
        ranks = current_ranks()
        if getattr(self.trainer, "is_fsdp_enabled", False):
            raise ValueError(
                "SelfCorrectionCallback does not support FSDP; evaluate the saved checkpoints"
            )
        with gathered_weights(model) as gathered:
            paths = measure_during_training(
                self.plan,
                gathered,
                tokenizer,
                self.folder_of_step(step),
                self.progress,
                self._packings,
                ranks=ranks,
            )
        if ranks.rank == 0:
            values = headlines(paths)
            self._log(state, control, {f"eval_{k}": v for k, v in values.items()})
            log_headlines(f"step {step}", values, self._first)
            self._first = self._first or values
        self.seconds += time.perf_counter() - started

    def _step(self, state: TrainerState) -> int | None:
        if callable(self.at):
            return self.at(state)
        return state.global_step if state.global_step in self.at else None

    def _log(self, state: TrainerState, control: Any, metrics: dict[str, float]) -> None:
        if self.trainer is None:
            state.log_history.append({**metrics, "step": state.global_step})
            return
        # The base class's `log`: a subclass's may flush what it collects for its next entry.
        # Logging clears should_log, and the run would lose its own entry at this step.
        should_log = control.should_log
        Trainer.log(self.trainer, metrics)
        control.should_log = should_log


@contextmanager
def gathered_weights(model: Any) -> Iterator[Any]:
    """Yield the model with all of its weights on every rank, even if ZeRO-3 has split them.

    DeepSpeed's hooks gather weights before each forward, together with the other ranks, and
    release them after it. They are removed for the block, since the ranks score different items.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        yield model
        return
    deepspeed = sys.modules["deepspeed"]  # imported, since it has split the weights
    hook_tables = [
        hooks
        for module in model.modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
    ]
    originals = [dict(hooks) for hooks in hook_tables]
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        for hooks in hook_tables:
            hooks.clear()
        try:
            yield model
        finally:
            for hooks, original in zip(hook_tables, originals, strict=True):
                hooks.update(original)


def measure_during_training(
    plan: EvaluationPlan,
    model: Any,
    tokenizer: Any,
    folder: Path,
    progress: Progress | None = None,
    packings: PackingCache | None = None,
    origin: Origin | None = None,
    ranks: Ranks = SINGLE,
) -> list[Path]:
    """Measure a model in training without changing it, nor any random number drawn later.

    The scores are those of the weights as they would be saved: without dropout, and without the
    mixed-precision wrapper that a trainer may have put around the model.
    """
    with temporary_eval_mode(model):
        return measure(plan, model, tokenizer, folder, progress, packings, origin, ranks)


@contextmanager
def temporary_eval_mode(model: Any) -> Iterator[None]:
    """Run the block in eval mode, then restore modes, RNG states and configs.

    Restored: Python's, numpy's and torch's random states, each submodule's mode, `use_cache` in
    the configs, the generation settings, the forward's wrapper. Gradients do not change, since
    `measure` runs under `torch.no_grad`.
    """
    with _restored_random_states(), _restored_attributes(model):
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


@contextmanager
def _restored_random_states() -> Iterator[None]:
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
def _restored_attributes(model: Any) -> Iterator[None]:
    """Restore what generation or a forward may set on the model and its configs."""
    attributes = [vars(module) for module in model.modules()]
    settings = [(a, a["generation_config"]) for a in attributes if "generation_config" in a]
    configs = {id(a["config"]): a["config"] for a in attributes if "config" in a}
    caching = [(c, c.use_cache) for c in configs.values() if hasattr(c, "use_cache")]
    wrapped = vars(model).get("forward")
    plain = vars(model).get("_original_forward")  # set by accelerate
    if wrapped is not None and plain is not None:
        model.forward = plain
    try:
        yield
    finally:
        if wrapped is not None:
            model.forward = wrapped
        for module_attributes, generation_config in settings:
            module_attributes["generation_config"] = generation_config
        for config, use_cache in caching:
            config.use_cache = use_cache
