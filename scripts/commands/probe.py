"""`selfcorrect probe`: read the stereotyped option from hidden states, layer by layer."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from selfcorrect.recipes.load import load_measured
from selfcorrect.scripts.commands.data_folder import DataDir, existing_data_dir
from selfcorrect.scripts.commands.evaluate import (
    EVALUATIONS,
    ResultsFolder,
    Revision,
    Targets,
    TemplateArguments,
    TemplateDate,
    model_label,
    run_folders,
    split_names,
    template_arguments,
    template_date,
)
from selfcorrect.scripts.commands.progress import Bars
from selfcorrect.scripts.commands.tables import table_console

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from selfcorrect.evaluate.measuring.plan import EvaluationPlan


def probe(
    targets: Targets,
    conditions: Annotated[
        str, typer.Option(help="Comma-separated names of conditions without reasoning.")
    ] = "Q,Q+IF",
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="BBQ items, half of them ambiguous [default: as evaluated]."),
    ] = None,
    data_dir: DataDir = None,
    folds: Annotated[int, typer.Option(min=2, help="Parts of the items, held out in turn.")] = 5,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of sampled items and of control labels [default: as evaluated]."),
    ] = None,
    template_arg: TemplateArguments = None,
    date: TemplateDate = None,
    revision: Revision = None,
    stimuli: Annotated[
        Path | None, typer.Option(help="YAML with your own conditions (models only).")
    ] = None,
    out: ResultsFolder = EVALUATIONS,
) -> None:
    """Fit linear probes to hidden states, layer by layer.

    The probes predict BBQ's stereotyped option on ambiguous questions; their held-out accuracy is
    printed and drawn.

    A checkpoint that is probed with the same settings already is not probed again.
    """
    names = split_names(conditions)
    if runs := run_folders(targets):
        for run in runs:
            _probe_run(run, names, limit, seed, folds)
        return
    from selfcorrect.evaluate.experiments.wording import load_stimuli
    from selfcorrect.evaluate.measuring.plan import plan_evaluation
    from selfcorrect.evaluate.measuring.run import as_trained
    from selfcorrect.evaluate.probe.probe import check_plan

    cells = plan_evaluation(
        existing_data_dir(data_dir),
        load_stimuli(stimuli),
        ["bbq"],
        names,
        limit=limit,
        seed=seed or 0,
        chat_template_kwargs=template_arguments(template_arg),
        date=template_date(date, out),
    )
    check_plan(cells, folds)
    for target in targets:
        plan = as_trained(cells, Path(target), arguments=template_arg is None, date=date is None)
        _probe_model(target, plan, folds, seed or 0, revision, out)


def _probe_run(
    run: Path, conditions: list[str], limit: int | None, seed: int | None, folds: int
) -> None:
    from selfcorrect.evaluate.probe.probe import RUN_FILE, probe_run, run_plan

    recipe = load_measured(str(run / "recipe.yaml"))
    cells = run_plan(recipe, run, conditions, limit, seed)
    seed = recipe.evaluate.seed if seed is None else seed
    with Bars() as bars:
        frame = probe_run(recipe, run, cells, folds=folds, seed=seed, progress=bars.of(run.name))
    _show(frame, run / "figures", run / RUN_FILE)


def _probe_model(
    target: str, cells: "EvaluationPlan", folds: int, seed: int, revision: str | None, out: Path
) -> None:
    """Probe a model into out/<label>/<digest of its weights>, so that no result is stale."""
    from selfcorrect.evaluate.probe.probe import (
        CHECKPOINT_FILE,
        is_probed,
        probe_checkpoint,
        read_probe,
    )
    from selfcorrect.evaluate.scoring.load_model import load_model
    from selfcorrect.evaluate.scoring.weights import weights_digest

    model, tokenizer = load_model(target, revision=revision)
    name = model_label(target, revision)
    folder = out / name / weights_digest(model)[:12]
    path = folder / CHECKPOINT_FILE
    if not is_probed(path, cells, folds, seed):
        with Bars() as bars:
            probe_checkpoint(
                cells, model, tokenizer, path, folds=folds, seed=seed, progress=bars.of(name)
            )
    frame = read_probe(path)[0].assign(model=name, parameters=None, seed=0, step=None)
    _show(frame, folder / "figures", path)


def _show(frame: "pd.DataFrame", figures: Path, path: Path) -> None:
    """Draw each model of the frame, print its table, and print the paths of both."""
    from selfcorrect.evaluate.figures.curves import save
    from selfcorrect.evaluate.probe.figure import accuracy_by_layer

    for model in dict.fromkeys(frame["model"]):
        save(accuracy_by_layer(frame, model), figures, re.sub(r"[^\w.+-]", "_", f"probe-{model}"))
    console = table_console(110)
    console.print(_table(frame))
    console.print(f"Every layer and category: {path}\nFigures: {figures}", soft_wrap=True)


def _table(frame: "pd.DataFrame") -> "Table":
    """Return a table of five fixed layers of each model, at its first and last step."""
    from rich.markup import escape

    from selfcorrect.evaluate.report.terminal import results_table

    several_seeds = frame["seed"].nunique() > 1
    table = results_table(
        "Which option agrees with the stereotype: held-out accuracy of linear probes",
        "Chance is .50; accuracies are followed by their 95 % interval over templates",
    )
    table.add_column("Model, step", overflow="fold")
    for name in ("Condition", "Held out"):
        table.add_column(name, no_wrap=True)
    for name in ("Embeddings", "1/4 of layers", "1/2", "3/4", "Last"):
        table.add_column(name, justify="right", no_wrap=True)
    rows = frame[(frame["category"] == "overall") & (frame["trained_on"] == frame["condition"])]
    for (model, seed), of_model in rows.groupby(["model", "seed"], sort=False):
        has_steps = of_model["step"].notna().all()
        steps = sorted({of_model["step"].min(), of_model["step"].max()}) if has_steps else [None]
        for step in steps:
            of_step = of_model if step is None else of_model[of_model["step"] == step]
            name = escape(str(model)) + (f", seed {seed}" if several_seeds else "")
            name += "" if step is None else f", {step}"
            for (condition, held_out), cell in of_step.groupby(
                ["condition", "held_out"], sort=False
            ):
                last = int(cell["layer"].max())
                layers = [cell[cell["layer"] == round(last * part / 4)] for part in range(5)]
                values = [_accuracy(layer) for layer in layers]
                table.add_row(name, str(condition), str(held_out), *values)
                name = ""
            table.add_section()
    return table


def _accuracy(row: "pd.DataFrame") -> str:
    accuracy, low, high = (float(row[name].iloc[0]) for name in ("accuracy", "low", "high"))
    interval = "" if low != low else f" {low:.2f}-{high:.2f}"  # NaN: no interval
    return f"{accuracy:.2f}{interval}".replace("0.", ".")
