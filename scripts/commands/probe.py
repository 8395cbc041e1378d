"""`selfcorrect probe`: can the stereotype be read from hidden states, layer by layer?"""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.load import load_recipe
from selfcorrect.scripts.commands.evaluate import default_data_dir, label, names
from selfcorrect.scripts.commands.progress import Bars

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from selfcorrect.evaluate.measuring.plan import EvaluationPlan


def probe(
    targets: Annotated[
        list[str], typer.Argument(help="Run folders, or models: folders, hub names, GGUF files.")
    ],
    conditions: Annotated[
        str, typer.Option(help="Comma-separated; none that lets the model write first.")
    ] = "Q,Q+IF",
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="BBQ items; half of them are ambiguous. Runs: as evaluated."),
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder with bbq/ (models only).")] = None,
    folds: Annotated[int, typer.Option(min=2, help="Parts that are held out in turn.")] = 5,
    seed: Annotated[
        int | None,
        typer.Option(help="Of the sampled items and exchanged labels. Runs: as evaluated."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    stimuli: Annotated[
        Path | None, typer.Option(help="YAML with conditions of your own (models only).")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where models' results go.")] = Path("evaluations"),
) -> None:
    """Fit linear probes on BBQ's ambiguous questions; print held-out accuracy, draw it by layer.

    What is probed already with the same settings is not probed again.
    """
    runs = [target for target in targets if (Path(target) / "recipe.yaml").is_file()]
    if runs and len(runs) < len(targets):
        raise InputError("give run folders or models, not both")
    wanted = names(conditions)
    if runs:
        for run in runs:
            _probe_run(Path(run), wanted, limit, seed, folds)
        return
    from selfcorrect.evaluate.experiments.wording import load_stimuli
    from selfcorrect.evaluate.measuring.plan import plan_evaluation
    from selfcorrect.evaluate.probe.probe import check_plan

    folder = data_dir or default_data_dir()
    if not folder.is_dir():
        raise InputError(f"{folder}: no such data folder; give --data-dir or SELFCORRECT_DATA_DIR")
    cells = plan_evaluation(
        folder, load_stimuli(stimuli), ["bbq"], wanted, limit=limit, seed=seed or 0
    )
    check_plan(cells, folds)
    for target in targets:
        _probe_model(target, cells, folds, seed or 0, revision, out)


def _probe_run(
    run: Path, conditions: list[str], limit: int | None, seed: int | None, folds: int
) -> None:
    from selfcorrect.evaluate.probe.probe import RUN_FILE, probe_run, run_plan

    recipe = load_recipe(str(run / "recipe.yaml"))
    cells = run_plan(recipe, run, conditions, limit, seed)
    seed = recipe.evaluate.seed if seed is None else seed
    with Bars() as bars:
        frame = probe_run(
            recipe,
            run,
            cells,
            folds=folds,
            seed=seed,
            progress=lambda *args: bars(run.name, *args),
        )
    _show(frame, run / "figures", run / RUN_FILE)


def _probe_model(
    target: str, cells: "EvaluationPlan", folds: int, seed: int, revision: str | None, out: Path
) -> None:
    """Probe a model into out/<its name>/<digest of its weights>: no answer can be stale."""
    from selfcorrect.evaluate.probe.probe import PLACE, is_probed, probe_checkpoint, read_probe
    from selfcorrect.evaluate.scoring.load_model import load_model
    from selfcorrect.evaluate.scoring.weights import weights_digest

    model, tokenizer = load_model(target, revision=revision)
    name = label(target, revision)
    folder = out / name / weights_digest(model)[:12]
    path = folder / PLACE
    if not is_probed(path, cells, folds, seed):
        with Bars() as bars:
            probe_checkpoint(
                cells,
                model,
                tokenizer,
                path,
                folds=folds,
                seed=seed,
                progress=lambda *args: bars(name, *args),
            )
    frame = read_probe(path)[0].assign(model=name, parameters=None, seed=0, step=None)
    _show(frame, folder / "figures", path)


def _show(frame: "pd.DataFrame", figures: Path, path: Path) -> None:
    """Draw every model of the frame, print its table, and name the files."""
    from rich.console import Console

    from selfcorrect.evaluate.figures.curves import save
    from selfcorrect.evaluate.probe.figure import accuracy_by_layer

    for model in dict.fromkeys(frame["model"]):
        save(accuracy_by_layer(frame, model), figures, re.sub(r"[^\w.+-]", "_", f"probe-{model}"))
    console = Console() if sys.stdout.isatty() else Console(width=110)
    console.print(_table(frame))
    console.print(f"Every layer and category: {path}\nFigures: {figures}", soft_wrap=True)


def _table(frame: "pd.DataFrame") -> "Table":
    """Five layers of each model, at its first and last step: fixed places, none is picked."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    several_seeds = frame["seed"].nunique() > 1
    table = Table(
        title="Which option agrees with the stereotype: held-out accuracy of linear probes",
        caption=".50: chance; beside it the 95 % interval over templates",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("Model, step", overflow="fold")
    for name in ("Condition", "Held out"):
        table.add_column(name, no_wrap=True)
    for name in ("Embeddings", "1/4 of layers", "1/2", "3/4", "Last"):
        table.add_column(name, justify="right", no_wrap=True)
    rows = frame[(frame["category"] == "overall") & (frame["trained_on"] == frame["condition"])]
    for (model, seed), mine in rows.groupby(["model", "seed"], sort=False):
        steps = (
            sorted({mine["step"].min(), mine["step"].max()}) if mine["step"].notna().all() else []
        )
        for step in steps or [None]:
            here = mine if step is None else mine[mine["step"] == step]
            name = escape(str(model)) + (f", seed {seed}" if several_seeds else "")
            name += "" if step is None else f", {step}"
            for (condition, held_out), cell in here.groupby(["condition", "held_out"], sort=False):
                last = int(cell["layer"].max())
                places = [cell[cell["layer"] == round(last * part / 4)] for part in range(5)]
                values = [_value(place) for place in places]
                table.add_row(name, str(condition), str(held_out), *values)
                name = ""
            table.add_section()
    return table


def _value(row: "pd.DataFrame") -> str:
    from selfcorrect.evaluate.statistics.formatting import compact

    accuracy, low, high = (float(row[name].iloc[0]) for name in ("accuracy", "low", "high"))
    interval = "" if low != low else f" {compact(low)}-{compact(high)}"  # no interval: NaN
    return compact(accuracy) + interval
