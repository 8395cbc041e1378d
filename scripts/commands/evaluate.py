"""`selfcorrect evaluate`: measure a run's checkpoints, or any Hugging Face models side by side."""

import datetime
import gc
import json
import logging
import math
import re
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selfcorrect.recipes.foundation.errors import (
    InputError,
    RunFailure,
    explain_machine_faults,
)
from selfcorrect.recipes.foundation.progress import Progress, no_progress
from selfcorrect.recipes.foundation.yaml_text import parse_yaml
from selfcorrect.recipes.load import load_measured
from selfcorrect.scripts.commands.data_folder import DataDir, existing_data_dir
from selfcorrect.scripts.commands.progress import Bars
from selfcorrect.scripts.commands.run import RUNS
from selfcorrect.scripts.commands.series import open_run, series_of
from selfcorrect.scripts.commands.tables import table_console

if TYPE_CHECKING:
    from selfcorrect.evaluate.measuring.plan import EvaluationPlan
    from selfcorrect.recipes.foundation.ranks import Ranks
    from selfcorrect.recipes.series import Measured, Series

EXPERIMENTS = "bbq,winogender,law_school"
EVALUATIONS = Path("evaluations")
logger = logging.getLogger(__name__)

HUB_SECONDS = 60.0  # between two looks for new revisions on the hub
DTYPES = ("auto", "float32", "bfloat16", "float16")
Targets = Annotated[
    list[str],
    typer.Argument(
        help="Run folders, or models: folders, hub names, GGUF files; or a series: its YAML, "
        "PATH_{step}, HUB/NAME@step_{step}, or the output folder of a trainer."
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
TemplateArguments = Annotated[
    list[str] | None,
    typer.Option(
        "--template-arg", help="Argument of the chat template, such as enable_thinking=false."
    ),
]
TemplateDate = Annotated[
    str | None,
    typer.Option(
        "--date",
        help="Day for chat templates that write today's date, YYYY-MM-DD "
        "[default: that of the results in --out, else today].",
    ),
]
ResultsFolder = Annotated[Path, typer.Option(help="Folder for the results of models.")]


def evaluate(
    targets: Targets,
    data_dir: DataDir = None,
    experiments: Annotated[str, typer.Option(help="Comma-separated names.")] = EXPERIMENTS,
    conditions: Annotated[
        str | None, typer.Option(help="Comma-separated, for example Q,Q+IF [default: all].")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Items per experiment, sampled by template.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampled items and the reasoning.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reasoning, in tokens.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Temperature of the reasoning; 0 is greedy.")
    ] = 1.0,
    samples: Annotated[int, typer.Option(min=1, help="Reasoning samples per question.")] = 1,
    permutations: Annotated[
        int, typer.Option(help="Orders of the options: 1, 3 (rotations) or 6 (all of three).")
    ] = 1,
    style: Annotated[
        str, typer.Option(help="auto, chat, plain (Human/Assistant), or a chat template *.jinja.")
    ] = "auto",
    template_arg: TemplateArguments = None,
    date: TemplateDate = None,
    revision: Revision = None,
    engine: Annotated[
        str | None,
        typer.Option(help="packed (built in), vllm, or lm-eval:hf [default: the recipe's]."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Weights: float32, bfloat16, float16, or auto: what the machine computes fast; "
            "for a run, as it trained them [default: auto; a run's recipe]."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of a forward pass.")
    ] = None,
    engine_arg: Annotated[
        list[str] | None,
        typer.Option(
            help="Setting of the engine, such as device_map=auto (packed), tensor_parallel_size=4 "
            "(vllm) or batch_size=8 (lm-eval:hf)."
        ),
    ] = None,
    stimuli: Annotated[
        Path | None, typer.Option(help="YAML with your own conditions, added to the paper's.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the results of models [default: evaluations], or the run folder of a "
            "series [default: runs/<its name>]."
        ),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(help="Of a series, comma-separated [default: all that exist]."),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="Measure only this checkpoint of a run, MODEL/SEED/STEP; no report."),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Follow a live run until its last checkpoint.")
    ] = False,
) -> None:
    """Measure the checkpoints of a run or of a series, or models, and print the table.

    Checkpoints and models that are measured already are skipped.

    A series (checkpoints that were trained elsewhere) becomes a run folder, --out.
    A run, or the YAML of a series, is measured as its recipe says; only --engine, --dtype,
    --device, --batch-tokens, --checkpoint and --watch apply to it.
    Several of these commands can share the work, on machines that share the folder: no checkpoint
    is measured twice. Under `accelerate launch -m selfcorrect.scripts.commands evaluate ...` the
    processes share the items of each checkpoint.
    """
    runs = run_folders(targets)
    hardware = _hardware(device, dtype, engine, batch_tokens, engine_arg)
    if runs and checkpoint is not None:
        _evaluate_checkpoint(runs, checkpoint, engine, hardware)
        return
    if runs:
        _evaluate_runs(runs, engine, watch, hardware)
        return
    given = series_of(
        targets,
        steps,
        lambda: {
            "data": {"benchmarks": existing_data_dir(data_dir), "stimuli": stimuli},
            "chat_template_kwargs": template_arguments(template_arg),
            "chat_template_date": date,
            "evaluate": {
                "experiments": split_names(experiments),
                "conditions": None if conditions is None else split_names(conditions),
                "limit": limit,
                "seed": seed,
                "max_new_tokens": max_new_tokens,
                "temperature": temperature,
                "samples": samples,
                "permutations": permutations,
                "style": style,
            },
        },
    )
    if given is not None:
        if revision is not None:
            raise InputError("--revision: write it into the target, as HUB/NAME@REVISION")
        if checkpoint is not None:
            raise InputError("--checkpoint needs a run folder")
        _evaluate_series(given, out or RUNS / given.name, engine, watch, hardware)
        return
    out = out or EVALUATIONS
    if steps is not None:
        raise InputError("--steps needs a series: a target with {step} in it")
    if checkpoint is not None or watch:
        raise InputError(f"--{'watch' if checkpoint is None else 'checkpoint'} needs a run folder")
    gc.disable()  # the modules loaded now stay; collecting among them is a seventh of the start
    from selfcorrect.evaluate.data.catalogue import warn_if_unpublished
    from selfcorrect.evaluate.experiments.wording import load_stimuli
    from selfcorrect.evaluate.measuring.plan import plan_evaluation
    from selfcorrect.evaluate.measuring.run import as_trained

    if permutations not in (1, 3, 6):
        raise InputError(f"--permutations {permutations}: give 1, 3 or 6")
    folder = existing_data_dir(data_dir)
    warn_if_unpublished(folder, split_names(experiments))
    cells = plan_evaluation(
        folder,
        load_stimuli(stimuli),
        split_names(experiments),
        None if conditions is None else split_names(conditions),
        limit=limit,
        seed=seed,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        samples=samples,
        permutations=permutations,
        style=style,
        chat_template_kwargs=template_arguments(template_arg),
        date=template_date(date, out),
    )
    plans = [
        as_trained(cells, Path(target), arguments=template_arg is None, date=date is None)
        for target in targets
    ]
    _evaluate_models(targets, plans, revision, engine or "packed", out, hardware)


@dataclass(frozen=True)
class Hardware:
    """The options --device (None: chosen by the machine), --dtype, --batch-tokens, --engine-arg."""

    device: str | None
    dtype: str | None
    batch_tokens: int | None
    engine_args: dict[str, Any]


def _hardware(
    device: str,
    dtype: str | None,
    engine: str | None,
    batch_tokens: int | None,
    engine_arg: Sequence[str] | None,
) -> Hardware:
    """Return checked options; InputError for what this machine or the engine lacks."""
    arguments = named_values(engine_arg, "--engine-arg")
    given = {"--batch-tokens": batch_tokens, "--device": None if device == "auto" else device}
    for name, value in given.items():
        if engine not in (None, "packed") and value is not None:
            raise InputError(f"{name} {value}: --engine {engine} chooses its own; remove one")
    if dtype not in (None, *DTYPES):
        raise InputError(f"--dtype {dtype}: unknown; choose from {', '.join(DTYPES)}")
    if device == "auto" and dtype in (None, "auto"):
        return Hardware(None, dtype, batch_tokens, arguments)  # and torch is not imported yet
    from selfcorrect.evaluate.scoring.precision import check_device, check_dtype

    checked = check_device(device)
    check_dtype(dtype or "auto", checked, f"--dtype {dtype}")
    return Hardware(None if device == "auto" else checked, dtype, batch_tokens, arguments)


def run_folders(targets: Sequence[str]) -> list[Path]:
    """Return the targets if they are run folders, [] if they are models."""
    runs = [Path(target) for target in targets if (Path(target) / "recipe.yaml").is_file()]
    if runs and len(runs) < len(targets):
        raise InputError("give run folders or models, not both")
    return runs


def template_arguments(given: Sequence[str] | None) -> dict[str, Any]:
    """Return the arguments NAME=VALUE of a chat template; values are YAML."""
    return named_values(given, "--template-arg")


def named_values(given: Sequence[str] | None, option: str) -> dict[str, Any]:
    """Return the values NAME=VALUE of an option that may be given several times, read as YAML."""
    content: dict[str, Any] = {}
    for argument in given or ():
        name, equals, value = argument.partition("=")
        if not equals or not name:
            raise InputError(f"{option} {argument}: write NAME=VALUE")
        content[name] = parse_yaml(value, f"{option} {argument}")
    return content


def template_date(given: str | None, out: Path) -> str | None:
    """Return the date for chat templates: the one given, or that of earlier results in `out`."""
    from selfcorrect.evaluate.measuring.cell_files import recorded_date

    if given is None:
        return recorded_date(out)
    try:
        return datetime.date.fromisoformat(given).isoformat()
    except ValueError:
        raise InputError(f"--date {given}: write YYYY-MM-DD") from None


def split_names(text: str) -> list[str]:
    """Return the parts of a comma-separated option."""
    return [name.strip() for name in text.split(",") if name.strip()]


def model_label(target: str, revision: str | None) -> str:
    """Return a model's short name, safe as a file name: a path's last part, or the hub name."""
    name = Path(target).absolute().name if Path(target).exists() else target
    name = f"{name}@{revision}" if revision else name
    return re.sub(r"[^A-Za-z0-9.@_-]+", "_", name).strip("._") or "model"


def _evaluate_series(
    series: "Series", run: Path, engine: str | None, watch: bool, hardware: Hardware
) -> None:
    def open_() -> None:
        open_run(series, run, wait=watch)

    looked = [time.monotonic()]
    look_again = partial(_look_again, series, run, looked) if watch else None
    _evaluate_runs([run], engine, watch, hardware, open_, look_again)


def _look_again(series: "Series", run: Path, looked: list[float]) -> bool:
    """Look for checkpoints that have appeared; return whether more may come that nobody lists."""
    from selfcorrect.evaluate.measuring.sources import is_on_hub

    pause = HUB_SECONDS if any(is_on_hub(given.path) for given in series.checkpoints) else 0.0
    if time.monotonic() - looked[-1] >= pause:
        looked[:] = [time.monotonic()]
        try:
            open_run(series, run, wait=True)
        except RunFailure as error:  # the hub does not answer: no reason to end the watch
            logger.warning("%s", error)
    return series.is_discovered


def _evaluate_runs(
    runs: list[Path],
    engine: str | None,
    watch: bool,
    hardware: Hardware,
    begin: Callable[[], None] = lambda: None,
    look_for_more: Callable[[], bool] | None = None,
) -> None:
    from selfcorrect.evaluate.headlines import log_checkpoint
    from selfcorrect.evaluate.measuring.run import evaluate_run
    from selfcorrect.recipes.foundation.ranks import distributed_ranks
    from selfcorrect.scripts.commands.report import show

    _hide_loading_bars()
    with distributed_ranks() as (ranks, device), Bars() as bars:
        ranks.from_rank0(begin)
        recipes = [_recipe_of(run, engine, hardware) for run in runs]
        for run, recipe in zip(runs, recipes, strict=True):
            progress = _on_rank0(bars.of(run.name), ranks)
            with explain_machine_faults(run):
                evaluate_run(
                    recipe, run, progress, watch=watch, ranks=ranks,
                    device=device or hardware.device, on_measured=log_checkpoint,
                    batch_tokens=hardware.batch_tokens,
                    look_for_more=look_for_more or (lambda: False),
                )  # fmt: skip
    if ranks.rank == 0:
        show(runs)


def _recipe_of(run: Path, engine: str | None, hardware: Hardware) -> "Measured":
    arguments: dict[str, Any] | None = hardware.engine_args or None
    if engine is not None and arguments is None:
        # The recipe's settings are those of the recipe's engine.
        is_another = load_measured(str(run / "recipe.yaml")).evaluate.engine != engine
        arguments = {} if is_another else None
    given = {"engine": engine, "dtype": hardware.dtype, "engine_args": arguments}
    overrides = [
        f"evaluate.{key}={json.dumps(value)}" for key, value in given.items() if value is not None
    ]
    overrides += ["evaluate.attach=off"] if overrides else []
    return load_measured(str(run / "recipe.yaml"), overrides)


def _on_rank0(progress: Progress, ranks: "Ranks") -> Progress:
    return progress if ranks.rank == 0 else no_progress


def _evaluate_checkpoint(
    runs: list[Path], name: str, engine: str | None, hardware: Hardware
) -> None:
    from selfcorrect.evaluate.headlines import log_checkpoint
    from selfcorrect.evaluate.measuring.run import evaluate_run
    from selfcorrect.evaluate.run_folder import RECORD, checkpoint_folder, planned_checkpoints
    from selfcorrect.recipes.foundation.ranks import distributed_ranks

    if len(runs) > 1:
        raise InputError("--checkpoint needs a single run folder")
    run, recipe = runs[0], _recipe_of(runs[0], engine, hardware)
    key = next((key for key in planned_checkpoints(recipe) if name == str(key)), None)
    if key is None:
        raise InputError(
            f"--checkpoint {name}: not a checkpoint of {run / 'recipe.yaml'}; give MODEL/SEED/STEP"
        )
    folder = checkpoint_folder(recipe, run, key)
    if not (folder / RECORD).is_file():
        raise RunFailure(f"{folder}: this checkpoint is not there yet")
    _hide_loading_bars()
    with distributed_ranks() as (ranks, device), Bars() as bars:
        progress = _on_rank0(bars.of(name), ranks)
        evaluate_run(
            recipe, run, progress, ranks=ranks, device=device or hardware.device, only={key},
            on_measured=log_checkpoint, batch_tokens=hardware.batch_tokens,
        )  # fmt: skip


def _evaluate_models(
    targets: list[str],
    plans: list["EvaluationPlan"],
    revision: str | None,
    engine: str,
    out: Path,
    hardware: Hardware,
) -> None:
    """Measure each model into out/<label>/<digest of its weights>, so that no answer is stale."""
    from selfcorrect.evaluate.headlines import headlines, log_headlines
    from selfcorrect.evaluate.measuring.cell_files import Origin
    from selfcorrect.evaluate.measuring.measure import longest_dialogue, measure_with
    from selfcorrect.evaluate.scoring.engine import Engine
    from selfcorrect.evaluate.scoring.lm_eval import engine_loader, engine_version
    from selfcorrect.evaluate.scoring.load_model import load_model
    from selfcorrect.evaluate.scoring.packed import PackedEngine
    from selfcorrect.evaluate.scoring.precision import held_in
    from selfcorrect.evaluate.scoring.token_trie import PackingCache
    from selfcorrect.evaluate.scoring.weights import files_digest, weights_digest
    from selfcorrect.recipes.foundation.locks import hold_lock
    from selfcorrect.recipes.foundation.ranks import distributed_ranks

    _check_engine(engine, hardware)
    _hide_loading_bars()
    folders, packings = dict[str, Path](), PackingCache()
    loader = None if engine == "packed" else engine_loader(engine, hardware.engine_args)
    with (
        distributed_ranks() as (ranks, device),
        Bars() as bars,
        nullcontext() if loader is None else closing(loader),
    ):
        if ranks.size > 1 and (loader is not None or hardware.engine_args):
            raise InputError(
                f"--engine {engine} distributes its own work: run it without accelerate"
            )
        for target, plan in zip(targets, plans, strict=True):
            name = model_label(target, revision)
            if loader is None:
                wanted = "fast" if hardware.dtype in (None, "auto") else hardware.dtype
                model, tokenizer = load_model(
                    target, revision=revision, dtype=wanted, device=device or hardware.device,
                    placement=hardware.engine_args,
                )  # fmt: skip
                origin = Origin(weights_digest(model), dtype=held_in(model))
                scorer: Engine = PackedEngine(
                    model, tokenizer, packings=packings, batch_tokens=hardware.batch_tokens
                )
                folder = out / name / origin.weights[:12]
            else:
                dtype = None if hardware.dtype == "auto" else hardware.dtype
                scorer = loader.load(target, revision, dtype, partial(longest_dialogue, plan))
                digest, version = files_digest(target, revision), engine_version(engine)
                origin = Origin(digest, engine, dtype=scorer.dtype, version=version)
                # Engines and types round differently, so each has its own folder.
                parts = [digest[:12], engine.replace(":", "-"), scorer.dtype]
                folder = out / name / "-".join(part for part in parts if part)
            if name in folders:  # two model folders with the same last part
                name = f"{name} {folder.name}"
            folders[name] = folder
            gc.freeze()
            gc.enable()
            # Wait for a process that measures the same model into the same folder.
            with hold_lock(folder, math.inf) if ranks.rank == 0 else nullcontext():
                paths = measure_with(plan, scorer, folder, origin, bars.of(name), ranks)
            if ranks.rank == 0 and target != targets[-1]:  # the table follows the last one
                log_headlines(name, headlines(paths), {})
    if ranks.rank == 0:
        _show_models(folders, out)


def _check_engine(engine: str, hardware: Hardware) -> None:
    """Raise InputError for options that do not suit the engine, as a recipe would."""
    from pydantic import ValidationError

    from selfcorrect.recipes.schema import Evaluate

    given = {"engine": engine, "dtype": hardware.dtype or "auto", "attach": "off"}
    try:
        Evaluate.model_validate({**given, "engine_args": hardware.engine_args})
    except ValidationError as error:
        message = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise InputError(f"--engine {engine}: {message}") from None


def _hide_loading_bars() -> None:
    """Switch off transformers' bars, which would break the lines of the command's own."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def _show_models(folders: dict[str, Path], out: Path) -> None:
    import pandas as pd

    from selfcorrect.evaluate.report.terminal import closing_table
    from selfcorrect.evaluate.results import summarise

    tables = [summarise(folder, name) for name, folder in folders.items()]
    console = table_console(110)
    console.print(closing_table(pd.concat(tables, ignore_index=True)))
    console.print(
        f"Item by item: {out}; as a page: selfcorrect report {out}", soft_wrap=True, markup=False
    )
