"""`selfcorrect plan`: memory, disk, tokens, FLOPs, hours and price of a recipe before it runs."""

import math
from dataclasses import replace
from typing import Annotated

import typer
from rich.table import Table

from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.load import load_measured
from selfcorrect.recipes.schema import Recipe
from selfcorrect.recipes.series import Series
from selfcorrect.scripts.commands.run import Overrides, RecipeName
from selfcorrect.scripts.commands.tables import table_console
from selfcorrect.train.planning.devices import GPUS, Device, device_named
from selfcorrect.train.planning.estimate import (
    USABLE,
    ModelEstimate,
    devices_for_evaluation,
    disk_of_ladder,
    estimate_ladder,
    oversized_stages,
    parallelism_of,
    suggest_settings,
)
from selfcorrect.train.planning.feedback import FeedbackFacts, feedback_facts
from selfcorrect.train.planning.memory import Footprint, Parallelism
from selfcorrect.train.planning.settings import held_by
from selfcorrect.train.provenance import threads_per_job

PARTS = (
    "weights", "gradients", "optimizer", "activations", "logits", "KV cache", "critic", "reference",
    "reward model",
)  # fmt: skip
TABLE_WIDTH = 150
LARGE_EVALUATION = (
    "evaluation fits on no 16 devices; evaluate with evaluate.dtype: bfloat16, or with "
    "evaluate.engine_args={device_map: auto}, which leaves on the CPU what the GPUs cannot hold"
)
NOTHING_FITS = (
    "does not fit with any batch size, nor with ZeRO-3 on up to 128 devices; use LoRA "
    "(policy.lora, reward.lora) or a device with more memory"
)


def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    device: Annotated[
        str, typer.Option(help="a100, h100, h200 (80, 80, 141 GB), or cpu for this machine.")
    ] = "h100",
    processes: Annotated[
        int | None, typer.Option(help="Devices that train one model [default: the recipe's].")
    ] = None,
    zero: Annotated[
        int | None,
        typer.Option(help="DeepSpeed ZeRO stage, 0 for none [default: the recipe's]."),
    ] = None,
    utilisation: Annotated[
        float, typer.Option(help="Share of the device's peak that is reached.")
    ] = 0.3,
    price_per_hour: Annotated[
        float | None, typer.Option(help="Price of one device-hour, in any currency.")
    ] = None,
) -> None:
    """Estimate memory, time and disk of a recipe, or of a series of checkpoints.

    Only the models' configurations are read, no weights.
    """
    checked = load_measured(recipe, overrides or [])
    if not 0 < utilisation <= 1:
        raise InputError(f"--utilisation {utilisation}: give a share above 0 and at most 1")
    if price_per_hour is not None and not (0 <= price_per_hour < math.inf):
        raise InputError(f"--price-per-hour {price_per_hour}: give a number of at least 0")
    machine, fast = device_named(device, threads_per_job(checked)), "bfloat16"
    if not machine.gpu:
        from selfcorrect.evaluate.scoring.precision import cpu_speed_of_bf16, fast_dtype

        fast = fast_dtype("cpu")
        machine = replace(machine, bf16_speed=cpu_speed_of_bf16())
    if isinstance(checked, Series):
        if processes is not None or zero is not None:
            raise InputError("--processes and --zero are for training: a series has none")
        _plan_series(checked, machine, fast, utilisation, price_per_hour)
        return
    facts = feedback_facts(checked.data)
    parallelism = parallelism_of(checked, processes, zero, machine.gpu, fast)
    ladder = estimate_ladder(checked, facts, parallelism)
    console = table_console(TABLE_WIDTH)
    console.print(_memory_table(ladder, machine))
    console.print(_work_table(ladder))
    seeds, threads = len(checked.seeds), threads_per_job(checked)
    console.print(_hours_table(ladder, seeds, threads, machine, utilisation, price_per_hour))
    console.print(_disk_table(checked, ladder))
    for line in notes(checked, ladder, facts, machine):
        typer.echo(line)


def _plan_series(
    series: Series, machine: Device, fast: str, utilisation: float, price: float | None
) -> None:
    """Print what measuring a series needs; by the engine and devices that it names."""
    from selfcorrect.train.planning.series import PUBLISHED_BYTES, estimate_series

    estimates, counts, unknown = estimate_series(series, Parallelism(1, 0, machine.gpu, fast))
    console = table_console(TABLE_WIDTH)
    console.print(_memory_table(estimates, machine))
    threads = threads_per_job(series)
    table = _hours_table(estimates, 1, threads, machine, utilisation, price)
    table.title = f"Time of all checkpoints at {utilisation:.0%} of the peak"
    console.print(table)
    disk = _table(
        "Disk for weights from the hub, GB", "model", "checkpoints", "one", "kept", "at a time"
    )
    for model in estimates:
        one = PUBLISHED_BYTES * model.shape.parameters
        use = model.disk
        disk.add_row(
            model.name, str(counts[model.name] or "?"), gigabytes(one), gigabytes(use.kept),
            gigabytes(use.working),
        )  # fmt: skip
    console.print(disk)
    for line in ["", *unknown, *_engines(estimates), *_oversized(estimates, machine)]:
        typer.echo(line)
    if not all(counts.values()):
        typer.echo("Where the number of checkpoints is not known, numbers are those of one.")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < 2 else "right")
    return table


def _memory_table(ladder: list[ModelEstimate], device: Device) -> Table:
    parallelism = ladder[0].parallelism
    zero = f", ZeRO-{parallelism.zero}" if parallelism.zero else ""
    devices = f"{parallelism.processes} x {device.name}{zero}"
    title = f"Memory on one device, GB, of {device.memory / 1e9:.0f} ({devices})"
    footprints = [stage for model in ladder for stage in model.footprints]
    names = [part for part in PARTS if any(stage.parts.get(part) for stage in footprints)]
    table = _table(title, "model", "stage: worst moment", "total", *names)
    for model in ladder:
        for stage in model.footprints:
            fits = stage.total <= USABLE * device.memory
            cells = [gigabytes(stage.parts.get(name, 0.0)) for name in names]
            total = gigabytes(stage.total) + ("" if fits else " !")
            table.add_row(model.name, f"{stage.stage}: {stage.moment}", total, *cells)
    return table


def _work_table(ladder: list[ModelEstimate]) -> Table:
    stages = [work.stage for work in ladder[0].work]
    table = _table(
        "Work of one seed: tokens, and EFLOPs (1e18)", "model", "parameters",
        *(column for stage in stages for column in (f"{stage}: tokens", "EFLOPs")),
    )  # fmt: skip
    for model in ladder:
        cells = []
        for work in model.work:
            cells += [count(work.tokens), f"{work.flops / 1e18:.3g}"]
        table.add_row(model.name, count(model.shape.parameters), *cells)
    return table


def _hours_table(
    ladder: list[ModelEstimate],
    seeds: int,
    threads: int,
    device: Device,
    utilisation: float,
    price: float | None,
) -> Table:
    cpu = device_named("cpu", threads) if device.gpu else device
    devices = [*GPUS.values(), cpu]
    stages = [work.stage for work in ladder[0].work]
    columns = [f"{stage} ({device.name})" for stage in stages]
    columns += [f"all ({other.name})" for other in devices]
    columns += [] if price is None else ["price"]
    of_seeds = f" of {seeds} seeds" if seeds > 1 else ""
    title = f"Time{of_seeds} at {utilisation:.0%} of the peak"
    table = _table(title, "model", "devices", *columns)
    sums = [0.0] * (len(devices) + 1)
    for model in ladder:
        by_stage = model.hours(device, utilisation)
        totals = [seeds * sum(model.hours(other, utilisation).values()) for other in devices]
        device_hours = seeds * model.device_hours(device, utilisation)
        sums = [a + b for a, b in zip(sums, [*totals, device_hours], strict=True)]
        cells = [hours(seeds * by_stage[stage]) for stage in stages]
        cells += [hours(total) for total in totals]
        cells += [] if price is None else [f"{price * device_hours:,.2f}"]
        table.add_row(model.name, str(model.parallelism.processes), *cells)
    last = [hours(total) for total in sums[:-1]]
    last += [] if price is None else [f"{price * sums[-1]:,.2f}"]
    table.add_row("all models", "", *[""] * len(stages), *last)
    return table


def _disk_table(recipe: Recipe, ladder: list[ModelEstimate]) -> Table:
    seeds, kept = len(recipe.seeds), len(recipe.policy.checkpoints)
    table = _table(
        f"Disk, GB: {seeds} seed{'s' * (seeds > 1)}, {kept} checkpoints", "model", "", "base",
        "reward", "checkpoints", "total kept", "more while training",
    )  # fmt: skip
    for model in ladder:
        use = model.disk
        parts = [use.base, use.reward, use.checkpoints, use.kept]
        cells = [gigabytes(seeds * part) for part in parts]
        table.add_row(model.name, "", *cells, gigabytes(use.working))
    stays, working = disk_of_ladder(recipe, ladder)
    table.add_row("all models", "", "", "", "", gigabytes(stays), gigabytes(working))
    return table


def notes(
    recipe: Recipe, ladder: list[ModelEstimate], facts: FeedbackFacts, device: Device
) -> list[str]:
    """Return lines on stages that do not fit, with remedies, and on the estimate's assumptions."""
    lines = ["", *_engines(ladder), *_oversized(ladder, device)]
    for model in ladder:
        oversized = oversized_stages(model, device)
        if any(stage.stage != "evaluation" for stage in oversized):
            settings = suggest_settings(recipe, model, facts, device)
            lines.append(f"{model.name}: {f'fits with {settings}' if settings else NOTHING_FITS}")
    for model in ladder:
        held = held_by(
            recipe.of(model.name), model.shape, model.parallelism, recipe.policy.lora is not None
        )
        computed = "bfloat16" if model.bf16 else "float32"
        if model.parallelism.zero == 0:
            lines.append(
                f"{model.name}: frozen weights in {held.frozen}, trained ones in {held.trained}; "
                f"the policy computes in {computed}"
            )
    if recipe.data.feedback is not None:
        from selfcorrect.evaluate.measuring.held_out import notes as notes_on_feedback

        lines += notes_on_feedback(recipe.data.feedback, recipe.evaluate.experiments)
    lengths = facts.lengths
    lines.append(
        f"Feedback: {facts.pairs:,} pairs, {facts.prompts:,} prompts; prompts have "
        f"{lengths.prompt:.0f} tokens on average and {lengths.longest_prompt} at most "
        f"({facts.source}). Pairs that a stage will leave out (equal sides, too long) are counted "
        "too. Completions are assumed to reach their maximum length."
    )
    return lines


def _oversized(ladder: list[ModelEstimate], device: Device) -> list[str]:
    lines = []
    for model in ladder:
        oversized = oversized_stages(model, device)
        usable = f"{USABLE * device.memory / 1e9:.0f} GB of a {device.name} are usable"
        for stage in oversized:
            lines.append(
                f"{model.name}: {stage.stage} needs {gigabytes(stage.total)} GB, but {usable}"
            )
        for stage in oversized:
            if stage.stage == "evaluation":
                lines.append(f"{model.name}: {_where_evaluation_fits(stage, device)}")
    return lines


def _where_evaluation_fits(stage: Footprint, device: Device) -> str:
    count = devices_for_evaluation(stage, device)
    if not device.gpu or count is None:
        return LARGE_EVALUATION
    return (
        f"evaluation fits on {count} x {device.name}: evaluate.engine=vllm "
        f"evaluate.engine_args.tensor_parallel_size={count} (all compute at once), or "
        "evaluate.engine_args.device_map=auto with the packed engine (one after another)"
    )


def _engines(ladder: list[ModelEstimate]) -> list[str]:
    """Return a line for each model that more than one device holds while it is measured."""
    return [
        f"{model.name}: measured by {model.engine}, {gigabytes(stage.parts['weights'])} GB of "
        f"weights on each of {model.measured_on} devices"
        for model in ladder
        for stage in model.footprints
        if stage.stage == "evaluation" and model.measured_on > 1
    ]


def gigabytes(size: float) -> str:
    """Format bytes as GB, with at most two decimals from 0.1 GB on."""
    number = size / 1e9
    if number == 0:
        return "-"
    decimals = 3 if number < 0.1 else 2 if number < 10 else 1 if number < 100 else 0
    return f"{number:,.{decimals}f}"


def count(number: float) -> str:
    """Format a count with k, M, B or T."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def hours(number: float) -> str:
    """Format hours, or minutes below one hour."""
    return f"{number:,.1f} h" if number >= 1 else f"{60 * number:.1f} min"
