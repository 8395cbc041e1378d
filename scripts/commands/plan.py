"""`selfcorrect plan`: memory, disk, tokens, FLOPs, hours and price of a recipe before it runs."""

import math
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.load import load_recipe
from selfcorrect.recipes.schema import Recipe
from selfcorrect.train.distributed.settings import deepspeed_settings
from selfcorrect.train.planning.devices import (
    GPUS,
    USABLE,
    Device,
    ModelPlan,
    device_named,
    does_not_fit,
    plan_model,
    remedy,
)
from selfcorrect.train.planning.feedback import FeedbackFacts, feedback_facts
from selfcorrect.train.planning.memory import Engine
from selfcorrect.train.planning.model_shape import model_shape

PARTS = (
    "weights", "gradients", "optimizer", "activations", "logits", "KV cache", "critic", "reference",
    "reward model",
)  # fmt: skip

LARGE_EVALUATION = (
    "one device measures a checkpoint, in the float32 it is saved in, for no engine here divides a "
    "model; take a device with more memory for it"
)
NOTHING_FITS = (
    "no batch size, and no ZeRO-3 on up to 128 devices, makes it fit; use LoRA (ppo.lora, "
    "reward.lora) or a device with more memory"
)


def plan(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Dotted keys, for example ppo.steps=20.")
    ] = None,
    device: Annotated[str, typer.Option(help="a100, h100, h200 (80, 80, 141 GB) or cpu.")] = "h100",
    processes: Annotated[
        int | None, typer.Option(help="Devices that one model is trained on; else the recipe's.")
    ] = None,
    zero: Annotated[
        int | None, typer.Option(help="DeepSpeed's ZeRO stage, 0: without; else the recipe's.")
    ] = None,
    utilisation: Annotated[float, typer.Option(help="Share of the peak that is reached.")] = 0.3,
    price_per_hour: Annotated[
        float | None, typer.Option(help="Of one device, in any currency.")
    ] = None,
) -> None:
    """Say what a recipe needs, from the models' configurations alone: no weights are read."""
    checked = load_recipe(recipe, overrides or [])
    if not 0 < utilisation <= 1:
        raise InputError(f"--utilisation {utilisation}: a share above 0 and at most 1")
    if price_per_hour is not None and not (0 <= price_per_hour < math.inf):
        raise InputError(f"--price-per-hour {price_per_hour}: 0 or more")
    machine = device_named(device)
    facts = feedback_facts(checked.data)
    plans = plan_ladder(checked, facts, engine_of(checked, processes, zero, machine.gpu))
    console = Console()
    console = console if console.is_terminal else Console(width=150)
    console.print(_memory_table(plans, machine))
    console.print(_work_table(plans))
    console.print(_hours_table(checked, plans, machine, utilisation, price_per_hour))
    console.print(_disk_table(checked, plans))
    for line in notes(checked, plans, facts, machine):
        typer.echo(line)


def engine_of(recipe: Recipe, processes: int | None, zero: int | None, gpu: bool) -> Engine:
    """How the recipe's launch spreads a run over devices, unless asked otherwise."""
    launch = recipe.launch
    count = launch.processes if processes is None else processes
    if zero is None:
        zero = 0
        if launch.deepspeed is not None and count > 1:
            zero = deepspeed_settings(launch.deepspeed, gpu)["zero_optimization"]["stage"]
    return Engine(count, zero, gpu)


def plan_ladder(recipe: Recipe, facts: FeedbackFacts, engine: Engine) -> list[ModelPlan]:
    """A plan for each model of the recipe, in its order; InputError for what it cannot reckon."""
    if recipe.ppo.replaced_by is not None:
        raise InputError(
            "ppo.replaced_by: plan reckons with PPO alone; ppo.replaced_by=null plans PPO in its "
            "place, which holds a critic more"
        )
    return [
        plan_model(
            recipe, model.name, model_shape(model, f"models.{index}", facts.words), facts, engine
        )
        for index, model in enumerate(recipe.models)
    ]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < 2 else "right")
    return table


def _memory_table(plans: list[ModelPlan], device: Device) -> Table:
    engine = plans[0].engine
    spread = f"{engine.processes} x {device.name}" + (
        f", ZeRO-{engine.zero}" if engine.zero else ""
    )
    title = f"Memory on one device, GB, of {device.memory / 1e9:.0f} ({spread})"
    names = [part for part in PARTS if any(part in s.parts for p in plans for s in p.footprints)]
    table = _table(title, "model", "stage: worst moment", "in all", *names)
    for plan in plans:
        for stage in plan.footprints:
            fits = stage.total <= USABLE * device.memory
            cells = [gigabytes(stage.parts.get(name, 0.0)) for name in names]
            whole = gigabytes(stage.total) + ("" if fits else " !")
            table.add_row(plan.name, f"{stage.stage}: {stage.moment}", whole, *cells)
    return table


def _work_table(plans: list[ModelPlan]) -> Table:
    stages = [work.stage for work in plans[0].works]
    table = _table(
        "Work of one seed: tokens, and EFLOPs (1e18)", "model", "parameters",
        *(column for stage in stages for column in (f"{stage}: tokens", "EFLOPs")),
    )  # fmt: skip
    for plan in plans:
        cells = []
        for work in plan.works:
            cells += [count(work.tokens), f"{work.flops / 1e18:.3g}"]
        table.add_row(plan.name, count(plan.shape.parameters), *cells)
    return table


def _hours_table(
    recipe: Recipe, plans: list[ModelPlan], device: Device, utilisation: float, price: float | None
) -> Table:
    seeds = len(recipe.seeds)
    others = [*GPUS.values(), device_named("cpu") if device.gpu else device]
    stages = [work.stage for work in plans[0].works]
    columns = [f"{stage} ({device.name})" for stage in stages]
    columns += [f"all ({one.name})" for one in others]
    if price is not None:
        columns.append("price")
    of_all = f" of all {seeds} seeds" if seeds > 1 else ""
    title = f"Time{of_all} at {utilisation:.0%} of the peak"
    table = _table(title, "model", "devices", *columns)
    sums = [0.0] * (len(others) + 1)
    for plan in plans:
        own = plan.hours(device, utilisation)
        cells = [hours(seeds * own[stage]) for stage in stages]
        totals = [seeds * sum(plan.hours(one, utilisation).values()) for one in others]
        paid = seeds * device_hours(plan, own)
        sums = [a + b for a, b in zip(sums, [*totals, paid], strict=True)]
        cells += [hours(total) for total in totals]
        cells += [] if price is None else [f"{price * paid:,.2f}"]
        table.add_row(plan.name, str(plan.engine.processes), *cells)
    last = [hours(total) for total in sums[:-1]]
    last += [] if price is None else [f"{price * sums[-1]:,.2f}"]
    table.add_row("all models", "", *[""] * len(stages), *last)
    return table


def device_hours(plan: ModelPlan, spent: dict[str, float]) -> float:
    """Hours times devices of one seed: evaluation takes one device, training all of them."""
    return sum(
        number * (1 if stage == "evaluation" else plan.engine.processes)
        for stage, number in spent.items()
    )


def _disk_table(recipe: Recipe, plans: list[ModelPlan]) -> Table:
    seeds, kept = len(recipe.seeds), len(recipe.ppo.checkpoints)
    table = _table(
        f"Disk, GB: {seeds} seed{'s' * (seeds > 1)}, {kept} checkpoints", "model", "", "base",
        "reward", "checkpoints", "stays in all", "more while training",
    )  # fmt: skip
    for plan in plans:
        use = plan.disk
        parts = [use.base, use.reward, use.checkpoints, use.kept]
        cells = [gigabytes(seeds * part) for part in parts]
        table.add_row(plan.name, "", *cells, gigabytes(use.working))
    whole, more = disk_of(recipe, plans)
    table.add_row("all models", "", "", "", "", gigabytes(whole), gigabytes(more))
    return table


def disk_of(recipe: Recipe, plans: list[ModelPlan]) -> tuple[float, float]:
    """Bytes that stay of the whole grid, and at most more while `launch.jobs` are at work."""
    largest = sorted((plan.disk.working for plan in plans), reverse=True)
    return len(recipe.seeds) * sum(p.disk.kept for p in plans), sum(largest[: recipe.launch.jobs])


def notes(
    recipe: Recipe, plans: list[ModelPlan], facts: FeedbackFacts, device: Device
) -> list[str]:
    """What does not fit and what would make it fit; and what the numbers rest on."""
    lines = [""]
    for plan in plans:
        short = does_not_fit(plan, device)
        for stage in short:
            need = f"{plan.name}: {stage.stage} needs {gigabytes(stage.total)} GB"
            have = f"{USABLE * device.memory / 1e9:.0f} GB of {device.name} can be used"
            lines.append(f"{need}, and {have}")
        if any(stage.stage == "evaluation" for stage in short):
            lines.append(f"{plan.name}: {LARGE_EVALUATION}")
        if any(stage.stage != "evaluation" for stage in short):
            found = remedy(recipe, plan, facts, device)
            lines.append(f"{plan.name}: {f'fits with {found}' if found else NOTHING_FITS}")
    lengths = facts.lengths
    lines.append(
        f"Feedback: {facts.pairs:,} pairs, {facts.prompts:,} prompts; prompts of "
        f"{lengths.prompt:.0f} tokens on average and {lengths.longest_prompt} at most "
        f"({facts.known_by}). Completions are taken to be as long as they may be."
    )
    return lines


def gigabytes(size: float) -> str:
    """Bytes as GB, two decimals at most."""
    number = size / 1e9
    if number == 0:
        return "-"
    if number < 0.1:
        return f"{number:.3f}"
    return (
        f"{number:,.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"
    )


def count(number: float) -> str:
    """A count with M, B or T."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def hours(number: float) -> str:
    """Hours, or minutes below one."""
    return f"{number:,.1f} h" if number >= 1 else f"{60 * number:.1f} min"
