"""`selfcorrect evaluate`: a run's checkpoints, or any Hugging Face models side by side."""

import gc
import math
import os
import re
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from selfcorrect.recipes.load import load_recipe
from selfcorrect.scripts.commands.progress import Bars

if TYPE_CHECKING:
    from selfcorrect.evaluate.measuring.plan import EvaluationPlan
    from selfcorrect.recipes.schema import Recipe

EXPERIMENTS = "bbq,winogender,law_school"


def default_data_dir() -> Path:
    """SELFCORRECT_DATA_DIR, or the user's cache folder."""
    named = os.environ.get("SELFCORRECT_DATA_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else cache / "selfcorrect" / "data"


def evaluate(
    targets: Annotated[
        list[str], typer.Argument(help="A run folder, or models: folders, hub names, GGUF files.")
    ],
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder with bbq/, winogender/, ... (models only)."),
    ] = None,
    experiments: Annotated[str, typer.Option(help="Comma-separated.")] = EXPERIMENTS,
    conditions: Annotated[
        str | None, typer.Option(help="Comma-separated, for example Q,Q+IF; default: all.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Items an experiment, sampled by template.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sampled items and of the reasoning.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the reasoning.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the reasoning; 0: greedy.")] = 1.0,
    samples: Annotated[int, typer.Option(min=1, help="Reasonings drawn per question.")] = 1,
    permutations: Annotated[
        int, typer.Option(help="Orders of the options: 1, 3 (rotations) or 6 (all of three).")
    ] = 1,
    style: Annotated[
        str, typer.Option(help="auto, chat, plain (Human/Assistant), or a chat template *.jinja.")
    ] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="packed (our own), vllm, or lm-eval:hf; default: the recipe's, packed."),
    ] = None,
    stimuli: Annotated[
        Path | None, typer.Option(help="YAML with conditions of your own, on top of the paper's.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where models' results go.")] = Path("evaluations"),
    checkpoint: Annotated[
        str | None,
        typer.Option(help="Of a run only this one, MODEL/SEED/STEP, and no report afterwards."),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Follow a live run until its last checkpoint.")
    ] = False,
) -> None:
    """Measure what is not measured yet, and print the table.

    For a run, its own recipe says what is measured; the other options are for models. Several of
    these commands may run at the same time, on machines that share the folder: no checkpoint is
    measured twice. Under `accelerate launch -m selfcorrect.scripts.commands evaluate ...` the
    processes share the items of each checkpoint.
    """
    runs = [target for target in targets if (Path(target) / "recipe.yaml").is_file()]
    if runs and len(runs) < len(targets):
        raise InputError("give run folders or models, not both")
    if runs and checkpoint is not None:
        _evaluate_checkpoint([Path(run) for run in runs], checkpoint, engine)
        return
    if runs:
        _evaluate_runs([Path(run) for run in runs], engine, watch)
        return
    if checkpoint is not None:
        raise InputError("--checkpoint names one of a run's: give a run folder")
    if watch:
        raise InputError("--watch follows runs: give a run folder")
    gc.disable()  # what loads now stays: looking for garbage in it takes a seventh of the start
    from selfcorrect.evaluate.data.catalogue import say_unpublished
    from selfcorrect.evaluate.experiments.wording import load_stimuli
    from selfcorrect.evaluate.measuring.plan import plan

    if permutations not in (1, 3, 6):
        raise InputError(f"--permutations {permutations}: give 1, 3 or 6")
    folder = data_dir or default_data_dir()
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such data folder; give --data-dir, or `selfcorrect data fetch bbq`"
        )
    say_unpublished(folder, names(experiments))
    cells = plan(
        folder,
        load_stimuli(stimuli),
        names(experiments),
        None if conditions is None else names(conditions),
        limit=limit,
        seed=seed,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        samples=samples,
        permutations=permutations,
        style=style,
    )
    _evaluate_models(targets, cells, revision, engine or "packed", out)


def names(text: str) -> list[str]:
    """The parts of a comma-separated option."""
    return [name.strip() for name in text.split(",") if name.strip()]


def label(target: str, revision: str | None) -> str:
    """A model's short name, safe as a file's: the last part of a path, or the hub name."""
    name = Path(target).absolute().name if Path(target).exists() else target
    name = f"{name}@{revision}" if revision else name
    return re.sub(r"[^A-Za-z0-9.@_-]+", "_", name).strip("._") or "model"


def _evaluate_runs(runs: list[Path], engine: str | None, watch: bool) -> None:
    from selfcorrect.evaluate.measuring.run import evaluate_run
    from selfcorrect.recipes.foundation.ranks import distributed_ranks
    from selfcorrect.scripts.commands.report import show

    _no_loading_bars()
    recipes = [_recipe_of(run, engine) for run in runs]
    with distributed_ranks() as (processes, device), Bars() as bars:
        for run, recipe in zip(runs, recipes, strict=True):

            def notify(*args: Any, name: str = run.name) -> None:
                if processes.rank == 0:
                    bars(name, *args)

            evaluate_run(recipe, run, notify, watch=watch, processes=processes, device=device)
    if processes.rank == 0:
        show(runs)


def _recipe_of(run: Path, engine: str | None) -> "Recipe":
    given = [] if engine is None else [f"evaluate.engine={engine}", "evaluate.attach=off"]
    return load_recipe(str(run / "recipe.yaml"), given)


def _evaluate_checkpoint(runs: list[Path], named: str, engine: str | None) -> None:
    from selfcorrect.evaluate.measuring.run import evaluate_run, folder_of, planned
    from selfcorrect.evaluate.run_folder import RECORD
    from selfcorrect.recipes.foundation.ranks import distributed_ranks

    if len(runs) > 1:
        raise InputError("--checkpoint names one of a run's: give one run folder")
    run, recipe = runs[0], _recipe_of(runs[0], engine)
    at = next((at for at in planned(recipe) if named == "/".join(map(str, at))), None)
    if at is None:
        raise InputError(f"--checkpoint {named}: the recipe of {run} keeps no such MODEL/SEED/STEP")
    if not (folder_of(run, at) / RECORD).is_file():
        raise RunFailure(f"{folder_of(run, at)}: training has not come to this checkpoint yet")
    _no_loading_bars()
    with distributed_ranks() as (processes, device), Bars() as bars:

        def notify(*args: Any) -> None:
            if processes.rank == 0:
                bars(named, *args)

        evaluate_run(recipe, run, notify, processes=processes, device=device, only={at})


def _evaluate_models(
    targets: list[str], cells: "EvaluationPlan", revision: str | None, engine: str, out: Path
) -> None:
    """Measure each model into out/<its name>/<digest of its weights>: no answer can be stale."""
    from selfcorrect.evaluate.measuring.cell_files import Origin
    from selfcorrect.evaluate.measuring.measure import measure_with
    from selfcorrect.evaluate.scoring.engine import Engine
    from selfcorrect.evaluate.scoring.lm_eval import load_engine
    from selfcorrect.evaluate.scoring.load_model import load_model
    from selfcorrect.evaluate.scoring.packed import Scorer
    from selfcorrect.evaluate.scoring.token_trie import Prepared
    from selfcorrect.evaluate.scoring.weights import files_digest, weights_digest
    from selfcorrect.recipes.foundation.locks import claimed
    from selfcorrect.recipes.foundation.ranks import distributed_ranks

    _no_loading_bars()
    measured, used, prepared = dict[str, Path](), set[str](), Prepared()
    with distributed_ranks() as (processes, device), Bars() as bars:
        first = processes.rank == 0
        if processes.size > 1 and engine != "packed":
            raise InputError(f"--engine {engine} shares its work itself: run it without a launcher")
        for target in targets:
            name = label(target, revision)
            if engine == "packed":
                model, tokenizer = load_model(target, revision=revision, device=device)
                origin = Origin(weights_digest(model))
                runs_it: Engine = Scorer(model, tokenizer, prepared=prepared)
                folder = out / name / origin.weights[:12]
            else:
                runs_it = load_engine(engine, target, revision)
                # Engines round differently: one never takes another's answers for its own.
                origin = Origin(files_digest(target, revision), engine)
                folder = out / name / f"{origin.weights[:12]}-{engine.replace(':', '-')}"
            if name in used:  # two folders of the same name
                name = f"{name} {folder.name}"
            used.add(name)
            gc.freeze()
            gc.enable()
            # Another process may be measuring this model for the same folder: then wait for it.
            with claimed(folder, math.inf) if first else nullcontext():
                measure_with(cells, runs_it, folder, origin, partial(bars, name), processes)
            measured[name] = folder
    if first:
        _show_models(measured, out)


def _no_loading_bars() -> None:
    """The command shows its own progress; transformers' bars would break its lines."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def _show_models(measured: dict[str, Path], out: Path) -> None:
    import pandas as pd
    from rich.console import Console

    from selfcorrect.evaluate.report.terminal import closing_table
    from selfcorrect.evaluate.results import summarise

    tables = [summarise(folder, name) for name, folder in measured.items()]
    console = Console() if sys.stdout.isatty() else Console(width=110)
    console.print(closing_table(pd.concat(tables, ignore_index=True)))
    console.print(f"Item by item: {out}", soft_wrap=True, markup=False)
