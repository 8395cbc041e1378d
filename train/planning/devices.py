"""Devices, and whether, how long and at what price a recipe's stages run on them."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.load import apply_override, check_recipe
from selfcorrect.recipes.schema import Recipe
from selfcorrect.train.planning.feedback import FeedbackFacts
from selfcorrect.train.planning.flops import Disk, Work, disk, stage_works
from selfcorrect.train.planning.memory import Engine, Footprint
from selfcorrect.train.planning.model_shape import ModelShape
from selfcorrect.train.planning.settings import ppo_settings, rollout_of, stage_footprints

USABLE = 0.95  # of a device's memory: the rest is the driver's and lost between blocks
NODE, BETWEEN_NODES = 8, 50e9  # GPUs of one machine; bytes/s a GPU beyond it (400 Gb/s InfiniBand)
# However fast the device, Python has to ask for its work. Seconds of one core for a layer of a tiny
# Llama, where nothing else counts, measured 2026-11-23, machine of docs/results/ppo-speed.md: a
# token's forward pass, what `generate` adds for every token, a forward and backward pass.
DECODE_SECONDS, TOKEN_SECONDS, PASS_SECONDS = 0.24e-3, 1.3e-3, 0.87e-3
ADAPTER_CALLS = 2  # a layer with LoRA asks for about twice as much: docs/results/ppo-speed.md


@dataclass(frozen=True)
class Device:
    """A device's memory (bytes), peak (dense FLOP/s), memory and link bandwidth (bytes/s)."""

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    gpu: bool = True


# bfloat16 without sparsity, and one direction of NVLink: NVIDIA's data sheets of the A100 80GB SXM,
# H100 SXM and H200 SXM.
GPUS = {
    "a100": Device("a100", 80e9, 312e12, 2.039e12, 300e9),
    "h100": Device("h100", 80e9, 989e12, 3.35e12, 450e9),
    "h200": Device("h200", 141e9, 989e12, 4.8e12, 450e9),
}
# One core of the machine of docs/results/ppo-speed.md: its matrix-multiply peak is measured there.
CPU_CORE = Device("cpu", 24e9, 87e9, 10e9, 10e9, gpu=False)


def this_cpu() -> Device:
    """This machine: its memory, and what a float32 product of 1024 x 1024 reaches on its cores."""
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    square = np.ones((1024, 1024), dtype=np.float32)
    seconds = []
    for _ in range(4):  # the first one wakes the threads up
        started = time.perf_counter()
        square @ square
        seconds.append(time.perf_counter() - started)
    return replace(CPU_CORE, memory=memory, flops=2 * 1024**3 / min(seconds))


def device_named(name: str) -> Device:
    """A GPU by name, or this machine's CPU; InputError for another name."""
    if name == "cpu":
        return this_cpu()
    if name not in GPUS:
        raise InputError(f"--device {name}: there are {', '.join(GPUS)} and cpu")
    return GPUS[name]


@dataclass(frozen=True)
class ModelPlan:
    """One model of a ladder on one engine: memory by stage, work by stage, disk of one seed."""

    name: str
    shape: ModelShape
    engine: Engine
    footprints: list[Footprint]
    works: list[Work]
    disk: Disk
    bf16: bool
    gathers: bool
    adapter: bool

    def hours(self, device: Device, utilisation: float) -> dict[str, float]:
        """Hours of each stage of one seed, at this share of the device's FLOPs and bandwidth."""
        return {work.stage: self._seconds(work, device, utilisation) / 3600 for work in self.works}

    def _seconds(self, work: Work, device: Device, utilisation: float) -> float:
        alone = 1 if work.stage == "evaluation" else self.engine.processes
        rate = alone * device.flops * utilisation
        layers = self.shape.layers * (ADAPTER_CALLS if self.adapter else 1)
        seconds = (work.flops - work.sampling_flops) / rate
        seconds = max(seconds, work.passes * layers * PASS_SECONDS)
        if not work.draws:
            return seconds
        # Sampling reads all weights, and half of the full cache, for every new token of a batch.
        size = 2 if self.bf16 and device.gpu else 4
        drawn = work.sampled / (work.rows * alone)
        length = drawn / work.draws
        cache = work.rows * length * self.shape.keys * self.shape.layers * size
        read = (self.shape.parameters * size + cache) / (device.bandwidth * utilisation)
        if self.engine.zero == 3 and not self.gathers and work.stage == "ppo":
            others = (alone - 1) / alone  # of every weight, for every token
            link = device.link if alone <= NODE else min(device.link, BETWEEN_NODES)
            read += self.shape.parameters * size * others / (link * utilisation)
        host = layers * DECODE_SECONDS + TOKEN_SECONDS
        return seconds + max(work.sampling_flops / rate, drawn * max(read, host))


def plan_model(
    recipe: Recipe, name: str, shape: ModelShape, facts: FeedbackFacts, engine: Engine
) -> ModelPlan:
    """Everything about one model; InputError for settings that do not fit each other."""
    recipe = recipe.of(name)
    check_engine(recipe, engine)
    rollout = rollout_of(recipe, shape, facts.lengths, engine)
    return ModelPlan(
        name,
        shape,
        engine,
        stage_footprints(recipe, shape, facts.lengths, engine),
        stage_works(recipe, shape, facts, engine),
        disk(recipe, shape, rollout, engine),
        rollout.batch.bf16,
        rollout.gathers,
        rollout.adapter is not None,
    )


def check_engine(recipe: Recipe, engine: Engine) -> None:
    """InputError where a ZeRO stage and the rest of the plan exclude each other."""
    if engine.processes < 1:
        raise InputError(f"--processes {engine.processes}: there must be at least 1")
    if engine.zero not in (0, 1, 2, 3):
        raise InputError(f"--zero {engine.zero}: DeepSpeed has the stages 1, 2 and 3; 0 is none")
    if engine.zero and engine.processes == 1:
        raise InputError(
            f"--zero {engine.zero}: divides a model among processes; give --processes 2 or more"
        )
    if engine.zero == 3 and recipe.evaluate.attach == "inline":
        raise InputError(
            "--zero 3: measured inline, every device gathers the whole model, which plan does "
            "not reckon; set evaluate.attach=off and run `selfcorrect evaluate RUN` afterwards"
        )


def does_not_fit(plan: ModelPlan, device: Device) -> list[Footprint]:
    """The stages that need more than the device has."""
    return [stage for stage in plan.footprints if stage.total > USABLE * device.memory]


def remedy(recipe: Recipe, plan: ModelPlan, facts: FeedbackFacts, device: Device) -> str | None:
    """The first change of settings that makes all training fit, in words; None where none does."""
    short = [s.stage for s in does_not_fit(plan, device) if s.stage != "evaluation"]
    for words, changed, engine in _changes(recipe, plan.engine, short):
        other = plan_model(changed, plan.name, plan.shape, facts, engine)
        if all(stage.stage == "evaluation" for stage in does_not_fit(other, device)):
            return words
    return None


def _changes(
    recipe: Recipe, engine: Engine, stages: list[str]
) -> Iterator[tuple[str, Recipe, Engine]]:
    """Changes from the cheapest to the dearest: recomputing, smaller passes, more devices."""
    saving = [f"{stage}.trainer.gradient_checkpointing=true" for stage in stages]
    yield _changed(recipe, engine, saving)
    rows = ppo_settings(recipe).number("per_device_train_batch_size")
    least = saving
    while rows > 1:
        rows //= 2
        smaller = [f"{stage}.trainer.per_device_train_batch_size={rows}" for stage in stages]
        least = [*saving, *smaller]
        yield _changed(recipe, engine, least)
    if not engine.gpu:
        return
    for processes in (2, 4, 8, 16, 32, 64, 128):
        if processes >= engine.processes:
            apart = replace(engine, processes=processes, zero=3)
            yield _changed(recipe, apart, least)
            yield _changed(recipe, apart, [*least, "ppo.trainer.ds3_gather_for_generation=false"])


def _changed(recipe: Recipe, engine: Engine, settings: list[str]) -> tuple[str, Recipe, Engine]:
    content: dict[str, Any] = recipe.model_dump(mode="json")
    for setting in settings:
        apply_override(content, setting)
    words = list(settings)
    if engine.zero == 3:
        content["evaluate"]["attach"] = "off"
        words += ["evaluate.attach=off", f"--zero 3 --processes {engine.processes}"]
    if content["ppo"]["trainer"].pop("generation_batch_size", None):
        content["ppo"]["trainer"].setdefault("steps_per_generation", 1)
    return " ".join(words), check_recipe(content, recipe.name), engine
