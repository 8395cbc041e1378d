"""The estimate of a recipe's models: memory, hours, disk, and settings that fit a device."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.load import apply_override, check_recipe
from selfcorrect.recipes.schema import Recipe
from selfcorrect.train.distributed.settings import deepspeed_settings
from selfcorrect.train.planning.devices import Device
from selfcorrect.train.planning.disk import Disk, disk
from selfcorrect.train.planning.feedback import FeedbackFacts
from selfcorrect.train.planning.flops import Work, stage_work
from selfcorrect.train.planning.memory import Footprint, Parallelism
from selfcorrect.train.planning.model_shape import ModelShape, model_shape
from selfcorrect.train.planning.settings import (
    evaluation_devices,
    held_by,
    policy_settings,
    stage_footprints,
)

USABLE = 0.95  # of a device's memory: the rest is the driver's, or lost between blocks
# GPUs of one machine, and bytes/s per GPU beyond it (400 Gb/s InfiniBand)
NODE, BETWEEN_NODES = 8, 50e9
# Python issues every operation, however fast the device. Seconds of one core per layer of a tiny
# Llama, where nothing else counts, measured 2026-11-23 on the machine of docs/results/ppo-speed.md:
# a token's forward pass, what `generate` adds per token, a forward and backward pass.
DECODE_SECONDS, TOKEN_SECONDS, PASS_SECONDS = 0.24e-3, 1.3e-3, 0.87e-3
ADAPTER_CALLS = 2  # a layer with LoRA issues about twice as many: docs/results/ppo-speed.md


@dataclass(frozen=True)
class ModelEstimate:
    """Memory and work of one model by stage, and the disk of one seed."""

    name: str
    shape: ModelShape
    parallelism: Parallelism
    footprints: list[Footprint]
    work: list[Work]
    disk: Disk
    bf16: bool
    gathers: bool
    has_adapter: bool
    engine: str = "packed"
    measured_on: int = 1
    """Devices that hold the model together while it is measured; vLLM's compute at once."""

    def hours(self, device: Device, utilisation: float) -> dict[str, float]:
        """Return hours by stage of one seed, at this share of the device's FLOPs and bandwidth."""
        return {work.stage: self._seconds(work, device, utilisation) / 3600 for work in self.work}

    def device_hours(self, device: Device, utilisation: float) -> float:
        """Return hours times devices of one seed."""
        return sum(
            hours * (self.measured_on if stage == "evaluation" else self.parallelism.processes)
            for stage, hours in self.hours(device, utilisation).items()
        )

    def _seconds(self, work: Work, device: Device, utilisation: float) -> float:
        devices = self.parallelism.processes
        if work.stage == "evaluation":
            devices = self.measured_on if self.engine == "vllm" else 1
        speed = device.bf16_speed if self.bf16 else 1.0
        rate = devices * device.flops * speed * utilisation
        layers = self.shape.layers * (ADAPTER_CALLS if self.has_adapter else 1)
        seconds = (work.flops - work.sampling_flops) / rate
        seconds = max(seconds, work.passes * layers * PASS_SECONDS)
        if not work.batches:
            return seconds
        # Sampling reads all weights, and half of the full cache, for each token of a batch.
        size = 2 if self.bf16 else 4
        tokens = work.sampled / (work.rows * devices)
        length = tokens / work.batches
        cache = work.rows * length * self.shape.keys * self.shape.layers * size
        read = (self.shape.parameters * size + cache) / (device.bandwidth * utilisation)
        if self.parallelism.zero == 3 and not self.gathers and work.stage == "policy":
            remote = (devices - 1) / devices  # of every weight, for each token
            link = device.link if devices <= NODE else min(device.link, BETWEEN_NODES)
            read += self.shape.parameters * size * remote / (link * utilisation)
        host = layers * DECODE_SECONDS + TOKEN_SECONDS
        return seconds + max(work.sampling_flops / rate, tokens * max(read, host))


def parallelism_of(
    recipe: Recipe, processes: int | None, zero: int | None, gpu: bool, fast: str = "bfloat16"
) -> Parallelism:
    """Return the parallelism of the recipe's `launch` section, with the options on top.

    `fast` is the type that `precision: auto` means on the device.
    """
    launch = recipe.launch
    count = launch.processes if processes is None else processes
    if zero is None:
        zero = 0
        if launch.deepspeed is not None and count > 1:
            zero = int(deepspeed_settings(launch.deepspeed, gpu)["zero_optimization"]["stage"])
    return Parallelism(count, zero, gpu, fast)


def estimate_ladder(
    recipe: Recipe, facts: FeedbackFacts, parallelism: Parallelism
) -> list[ModelEstimate]:
    """Return the estimate of each of the recipe's models, in its order."""
    return [estimate_named(recipe, model.name, facts, parallelism) for model in recipe.models]


def estimate_named(
    recipe: Recipe, name: str, facts: FeedbackFacts, parallelism: Parallelism
) -> ModelEstimate:
    """Return the estimate of the recipe's model of that name."""
    index = [model.name for model in recipe.models].index(name)
    shape = model_shape(recipe.models[index], f"models.{index}", facts.vocabulary)
    return estimate_model(recipe, name, shape, facts, parallelism)


def estimate_model(
    recipe: Recipe, name: str, shape: ModelShape, facts: FeedbackFacts, parallelism: Parallelism
) -> ModelEstimate:
    """Return the estimate of one model; raises InputError for settings that do not fit together."""
    recipe = recipe.of(name)
    check_parallelism(recipe, parallelism)
    settings = policy_settings(recipe)
    return ModelEstimate(
        name,
        shape,
        parallelism,
        stage_footprints(recipe, shape, facts.lengths, parallelism),
        stage_work(recipe, shape, facts, parallelism),
        disk(recipe, shape, parallelism),
        settings.bf16(
            parallelism,
            not recipe.policy.is_offline,
            held_by(recipe, shape, parallelism, recipe.policy.lora is not None),
        ),
        bool(settings.values["ds3_gather_for_generation"]),
        recipe.policy.lora is not None,
        recipe.evaluate.engine,
        evaluation_devices(recipe.evaluate, max(parallelism.processes, recipe.launch.processes)),
    )


def check_parallelism(recipe: Recipe, parallelism: Parallelism) -> None:
    """Raise InputError where processes, ZeRO stage and recipe exclude each other."""
    processes, zero = parallelism.processes, parallelism.zero
    if processes < 1:
        raise InputError(f"--processes {processes}: give at least 1")
    if zero not in (0, 1, 2, 3):
        raise InputError(f"--zero {zero}: give a DeepSpeed stage, 1, 2 or 3, or 0 for none")
    if zero and processes == 1:
        raise InputError(
            f"--zero {zero}: divides a model among processes; give --processes 2 or more"
        )
    if processes > 1 and recipe.policy.method != "ppo":
        raise InputError(
            f"--processes {processes}: policy.method {recipe.policy.method} trains in one process"
        )
    if zero == 3 and recipe.evaluate.attach == "inline":
        raise InputError(
            "--zero 3: inline evaluation gathers the whole model on every device, which is not "
            "estimated; set evaluate.attach=off and run `selfcorrect evaluate RUN` afterwards"
        )


def disk_of_ladder(recipe: Recipe, ladder: list[ModelEstimate]) -> tuple[float, float]:
    """Return bytes that stay of all models and seeds, and the most that `launch.jobs` add."""
    working = sorted((model.disk.working for model in ladder), reverse=True)
    kept = len(recipe.seeds) * sum(model.disk.kept for model in ladder)
    return kept, sum(working[: recipe.launch.jobs])


def oversized_stages(estimate: ModelEstimate, device: Device) -> list[Footprint]:
    """Return the stages that need more memory than the device has."""
    return [stage for stage in estimate.footprints if stage.total > USABLE * device.memory]


def devices_for_evaluation(stage: Footprint, device: Device) -> int | None:
    """Return the fewest devices, a power of two, that hold a model together; None beyond 16."""
    divided = stage.parts["weights"] + stage.parts.get("KV cache", 0.0)
    for count in (1, 2, 4, 8, 16):
        if stage.total - divided + divided / count <= USABLE * device.memory:
            return count
    return None


def suggest_settings(
    recipe: Recipe, estimate: ModelEstimate, facts: FeedbackFacts, device: Device
) -> str | None:
    """Return the first settings and options with which all training fits; None if there are none.

    They are tried from the cheapest to the dearest: recomputation, smaller passes, more devices.
    """
    oversized = [stage.stage for stage in oversized_stages(estimate, device)]
    stages = [stage for stage in oversized if stage != "evaluation"]
    for settings, parallelism in _changes(recipe, estimate.parallelism, stages):
        words, changed = _apply(recipe, parallelism, settings)
        try:
            new = estimate_model(changed, estimate.name, estimate.shape, facts, parallelism)
        except InputError:  # fewer rows than GRPO's group needs
            continue
        if all(stage.stage == "evaluation" for stage in oversized_stages(new, device)):
            return words
    return None


def _changes(
    recipe: Recipe, parallelism: Parallelism, stages: list[str]
) -> Iterator[tuple[list[str], Parallelism]]:
    settings = [f"{stage}.trainer.gradient_checkpointing=true" for stage in stages]
    checkpointing = settings
    yield settings, parallelism
    rows = policy_settings(recipe).number("per_device_train_batch_size")
    while rows > 1:
        rows //= 2
        smaller = [f"{stage}.trainer.per_device_train_batch_size={rows}" for stage in stages]
        settings = [*checkpointing, *smaller]
        yield settings, parallelism
    if not parallelism.gpu or recipe.policy.method != "ppo":
        return
    for processes in (2, 4, 8, 16, 32, 64, 128):
        if processes >= parallelism.processes:
            divided = replace(parallelism, processes=processes, zero=3)
            yield settings, divided
            yield [*settings, "policy.trainer.ds3_gather_for_generation=false"], divided


def _apply(recipe: Recipe, parallelism: Parallelism, settings: list[str]) -> tuple[str, Recipe]:
    """Return settings and options as the user types them, and the recipe with them."""
    content: dict[str, Any] = recipe.model_dump(mode="json")
    for setting in settings:
        apply_override(content, setting)
    words = list(settings)
    if parallelism.zero == 3:
        content["evaluate"]["attach"] = "off"
        words += ["evaluate.attach=off", f"--zero 3 --processes {parallelism.processes}"]
    if content["policy"]["trainer"].pop("generation_batch_size", None):
        content["policy"]["trainer"].setdefault("steps_per_generation", 1)
    return " ".join(words), check_recipe(content, recipe.name)
