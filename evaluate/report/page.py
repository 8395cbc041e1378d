"""Write the report of one run or several: one self-contained HTML file."""

import base64
import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from selfcorrect.evaluate.figures.training_log import training_log
from selfcorrect.evaluate.measuring.cell_files import read_settings
from selfcorrect.evaluate.measuring.held_out import notes
from selfcorrect.evaluate.measuring.progress import estimate_progress, report_inputs
from selfcorrect.evaluate.report.chunks import Chunks
from selfcorrect.evaluate.report.comparison import (
    differences,
    group_runs,
    grouping_notes,
    measure_groups,
    merge_statistics,
    name_runs,
    read_json,
)
from selfcorrect.evaluate.report.experiment_tables import experiment_tables
from selfcorrect.evaluate.report.figure_data import figure_data, looks, training_data
from selfcorrect.evaluate.report.tables import difference_table, left_out_table
from selfcorrect.evaluate.report.transcripts import transcripts
from selfcorrect.evaluate.report.vega import vega_script
from selfcorrect.evaluate.report.verdict import cautions, series_of, summary_table, verdict
from selfcorrect.evaluate.results import write_results
from selfcorrect.evaluate.run_folder import (
    POLICY_METHODS,
    RLHF_STEPS,
    check_inside,
    find_checkpoints,
    model_folders,
    step_words,
)
from selfcorrect.evaluate.statistics.bootstrap import NUM_RESAMPLES
from selfcorrect.evaluate.statistics.files import read_results, write_table
from selfcorrect.evaluate.statistics.summary import LISTS
from selfcorrect.recipes.foundation.atomic_files import remove_leftovers, write_text
from selfcorrect.recipes.foundation.checksums import flatten, write_record
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.foundation.locks import hold_lock
from selfcorrect.recipes.foundation.printable import escape_controls
from selfcorrect.recipes.load import load_measured
from selfcorrect.recipes.schema import Recipe

if TYPE_CHECKING:
    from selfcorrect.evaluate.figures.gallery import Drawing

TEMPLATE = Path(__file__).with_name("page.html.j2")

logger = logging.getLogger(__name__)


def write_report(
    run: Path, num_resamples: int = NUM_RESAMPLES, seed: int = 0, paper: bool = False
) -> Path:
    """Write results.parquet, statistics.json, figures/ and report.html into `run`.

    `run` may be a folder of stand-alone models: then the page has a sentence for each, and no
    training. With `paper`, figures show the values of Ganguli et al. too. Returns the report's
    path. Raises InputError for a folder that is not a run, a damaged evaluation file, or a run
    without evaluations.
    """
    models = model_folders(run)
    if not models and not (run / "recipe.yaml").is_file():
        raise InputError(
            f"{run}: not a run folder (no recipe.yaml), nor a folder of evaluations as "
            "`selfcorrect evaluate MODEL` writes it"
        )
    with hold_lock(run, math.inf):  # otherwise a report begun earlier could overwrite a later one
        remove_leftovers(run / "figures")
        if models:
            return _write_report_of_models(run, models, num_resamples, seed)
        return _write_report(run, num_resamples, seed, paper)


def is_report_current(run: Path) -> bool:
    """Return whether a run has a report that is newer than every file it is made from."""
    report, results = run / "report.html", run / "results.parquet"
    if not (report.is_file() and results.is_file()):
        return False
    try:
        read_results(results)
    except InputError as error:
        logger.warning("%s; the report is written again", str(error).partition(";")[0])
        return False
    written = report.stat().st_mtime_ns
    return all(changed <= written for changed, _ in report_inputs(run).values())


def _write_report(run: Path, num_resamples: int, seed: int, paper: bool) -> Path:
    from selfcorrect.evaluate.figures.gallery import draw_run

    for name in ("recipe.yaml", "run.json", "figures"):
        check_inside(run, run / name)
    frame, statistics = write_results(run, num_resamples, seed)
    drawn = draw_run(frame, statistics, run, run / "figures", paper)
    return _write_page(
        run,
        {run.resolve().name: run},
        [(None, [run.resolve().name], statistics)],
        frame,
        statistics,
        drawn,
        title=run.resolve().name,
        paper=paper,
        notes=[],
        differing=[],
    )


def _write_report_of_models(
    folder: Path, models: Mapping[str, Path], num_resamples: int, seed: int
) -> Path:
    from selfcorrect.evaluate.figures.gallery import draw_models

    check_inside(folder, folder / "figures")
    frame, statistics = write_results(folder, num_resamples, seed)
    return _write_page(
        folder,
        models,
        [
            (
                None if len(models) == 1 else escape_controls(model),
                [],
                {
                    name: [row for row in rows if row["model"] == model]
                    if name in ("cells", *LISTS.values())
                    else rows
                    for name, rows in statistics.items()
                },
            )
            for model in models
        ],
        frame,
        statistics,
        draw_models(frame, folder / "figures"),
        title=folder.resolve().name,
        paper=False,
        notes=[],
        differing=[],
    )


def write_comparison(
    runs: Sequence[Path], out: Path, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Path:
    """Write results.parquet, statistics.json, figures/ and report.html of several runs into `out`.

    Runs whose recipes agree in all but the seeds count as seeds of one recipe; the column `run`
    tells the others apart. The runs' folders are not changed. Returns the report's path. Raises
    InputError as `write_report`, and if `out` is a run.
    """
    from selfcorrect.evaluate.figures.gallery import draw_runs

    if (out / "recipe.yaml").exists():
        raise InputError(f"{out}: is a run; choose another folder for the comparison with --out")
    named = name_runs(runs)
    for run in named.values():
        for name in ("recipe.yaml", "run.json"):
            check_inside(run, run / name)
    groups = group_runs(named)
    parts = measure_groups(groups, num_resamples, seed)
    frame = pd.concat([table for table, _ in parts], ignore_index=True)
    statistics = merge_statistics(groups, [part for _, part in parts])
    write_table(out / "results.parquet", frame, {})
    write_record(out / "statistics.json", statistics)
    return _write_page(
        out,
        named,
        [
            (group.label, list(group.runs), part)
            for group, (_, part) in zip(groups, parts, strict=True)
        ],
        frame,
        statistics,
        draw_runs(frame, statistics, out / "figures"),
        title=", ".join(named),
        paper=False,
        notes=grouping_notes(groups),
        differing=[
            difference_table(name, title, list(named), differences(named, file))
            for name, title, file in (
                ("recipes-differ", "Keys in which the recipes differ", "recipe.yaml"),
                ("facts-differ", "Keys in which run.json differs", "run.json"),
            )
        ],
    )


def _write_page(
    out: Path,
    named: Mapping[str, Path],
    parts: Sequence[tuple[str | None, Sequence[str], Mapping[str, Any]]],
    frame: pd.DataFrame,
    statistics: Mapping[str, Any],
    drawn: tuple[list["Drawing"], list[str]],
    **content: Any,
) -> Path:
    """Write the page; `named` maps labels to run folders, or models to their evaluation files.

    A part has a heading, the labels of its runs, and their statistics.
    """
    drawings, not_drawn = drawn
    unfinished = _unfinished(named)
    series = series_of(statistics)
    steps = step_words(named.values())
    figures = figure_data(frame, statistics["effects"])
    training = training_data({label: training_log(run) for label, run in named.items()})
    chunks = Chunks()
    index = {
        "experiments": [{"title": entry["title"], "chunk": chunks.add(entry)} for entry in figures],
        "looks": looks([name for entry in figures for name in entry["conditions"]]),
        "training": chunks.add(training),
        "steps": steps,
    }
    texts = transcripts(named, chunks)
    vega = vega_script()
    page = render(
        groups=[
            _first_screen(
                heading,
                part,
                [unfinished[run] for run in runs if run in unfinished] + _spoken_of(named, runs),
                steps,
            )
            for heading, runs, part in parts
        ],
        experiments=[
            {
                "name": entry["name"],
                "title": entry["title"],
                "tables": experiment_tables(
                    statistics, entry["name"], [s for s in series if s.experiment == entry["name"]]
                ),
            }
            for entry in figures
        ],
        is_training_logged=bool(training),
        main=next(
            (
                {"alt": drawing.alt, "source": _embedded(out / "figures" / f"{drawing.name}.svg")}
                for drawing in drawings
            ),
            None,
        ),
        drawings=drawings,
        not_drawn=not_drawn,
        left_out=left_out_table(
            statistics, [job for run in named.values() for job in _left_out_of_feedback(run)]
        ),
        interval=statistics["about"]["interval"],
        transcripts=texts,
        index=htmlsafe_json_dumps({**index, "transcripts": texts.runs}),
        chunks=chunks.texts,
        vega=None if vega is None else Markup(vega),
        about=statistics["about"],
        runs=[
            {
                "label": label,
                "recipe": _recipe_text(run / "recipe.yaml"),
                "facts": list(flatten(read_json(run / "run.json"))) or _origin(run),
            }
            for label, run in named.items()
        ],
        **content,
    )
    path = out / "report.html"
    write_text(path, page)
    return path


def _first_screen(
    label: str | None, statistics: Mapping[str, Any], unfinished: Sequence[str], steps: str
) -> dict[str, Any]:
    """Return the verdict, the table and the cautions of one run."""
    series = series_of(statistics)
    return {
        "label": label,
        "verdict": verdict(series).replace(RLHF_STEPS, steps),
        "table": summary_table(series),
        "cautions": cautions(
            series, statistics["missing"], [*unfinished, *mixed_precision(statistics["cells"])]
        ),
    }


def _unfinished(named: Mapping[str, Path]) -> dict[str, str]:
    """Return a sentence for each run with checkpoints that are planned but not measured."""
    sentences = {}
    for label, run in named.items():
        try:
            progress = estimate_progress(run)
            models = {model.name for model in load_measured(str(run / "recipe.yaml")).models}
        except InputError:
            continue  # the transcripts' notes report a recipe that cannot be read
        if not progress.complete:
            measured = {c.record.model for c in find_checkpoints(run)}
            none_of = ", ".join(sorted(models - measured))
            rest = f", none of {none_of}" if none_of else ""
            sentences[label] = f"{label} is not finished: {progress} so far{rest}."
    return sentences


def _spoken_of(named: Mapping[str, Path], runs: Sequence[str]) -> list[str]:
    """Return sentences on what the runs' own feedback spoke of, so that it is not measured."""
    sentences: dict[str, None] = {}
    for run in runs:
        with suppress(InputError):  # the transcripts' notes report a recipe that cannot be read
            recipe = load_measured(str(named[run] / "recipe.yaml"))
            if isinstance(recipe, Recipe) and recipe.data.feedback is not None:
                found = notes(recipe.data.feedback, recipe.evaluate.experiments)
                sentences |= dict.fromkeys(found)
    return list(sentences)


def mixed_precision(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence if cells were measured with weights of several types, else nothing."""
    models: dict[str, set[str]] = {}
    for cell in cells:
        models.setdefault(cell["dtype"] or "the engine's type", set()).add(cell["model"])
    if len(models) < 2:
        return []
    parts = [f"{dtype} ({', '.join(sorted(names))})" for dtype, names in sorted(models.items())]
    return [f"Weights were measured in {' and '.join(parts)}."]


def _left_out_of_feedback(run: Path) -> list[dict[str, int]]:
    """Return the pairs and prompts left out, by reason, from the stage.json of all stages."""
    paths = [
        path
        for stage in ("base", "reward", *POLICY_METHODS)
        for path in run.glob(f"*/seed-*/{stage}/stage.json")
    ]
    records = [read_json(path) for path in sorted(paths)]
    return [record.get("left_out") or {} for record in records]


def render(**content: Any) -> str:
    """Fill the template with `content`; HTML and control characters are escaped."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = escape_controls
    environment.filters["sha256"] = _sha256
    return environment.get_template(TEMPLATE.name).render(**content)


# --- recipe and facts of the run --------------------------------------------------------------


def _recipe_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _origin(folder: Path) -> list[tuple[str, str]]:
    """Return how a stand-alone model was measured, from the first of its evaluation files."""
    settings = [read_settings(path) for path in sorted(folder.glob("*.*.parquet"))[:1]]
    kept = ("origin", "chat_template_kwargs", "chat_template_date")
    return list(flatten({key: s[key] for s in settings for key in kept if key in s}))


def _embedded(path: Path) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
