"""Every kind of file that is read back, with its reader, for damage.py.

A reader is what a command calls on the file, and returns a value to compare: a damaged file must
give the value of the undamaged one, or be named.
"""

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from selfcorrect.evaluate.measuring.cell_files import CellWriter, Origin, read_cell
from selfcorrect.evaluate.measuring.run import evaluate_run, recipe_plan
from selfcorrect.evaluate.probe.probe import is_probed, read_probe, settings_digest
from selfcorrect.evaluate.report.comparison import differences
from selfcorrect.evaluate.results import load, write_results
from selfcorrect.evaluate.statistics.files import read_results, read_statistics, write_table
from selfcorrect.recipes.foundation.checksums import digests
from selfcorrect.recipes.load import load_recipe, save_recipe
from tests.drills.damage_inputs import outside_kinds, run_of_files
from tests.drills.damage_run import Kind, load_folder


def all_kinds(run: Path, adapter: Path, work: Path, room: Path) -> Iterator[Kind]:
    """Yield the kinds of a run, of one with an adapter, of training states, and of other files."""
    yield from _models(run, adapter)
    yield from _records(run)
    yield from _states(work)
    yield from _measurements(run, room)
    yield from run_of_files(run, room)
    yield from outside_kinds(run, room)


def _models(run: Path, adapter: Path) -> Iterator[Kind]:
    job = run / "tiny" / "seed-0"
    folders = [("checkpoint", job / "ppo" / "checkpoint-2", job / "ppo" / "checkpoint-3")]
    lora = adapter / "tiny" / "seed-0"
    folders.append(("adapter", lora / "ppo" / "checkpoint-1", lora / "ppo" / "checkpoint-0"))
    for title, folder, other in folders:
        for path in sorted(p for p in folder.iterdir() if p.is_file()):
            yield Kind(
                f"{title}: {path.name}", path, other / path.name, partial(load_folder, folder)
            )
    yield Kind(
        "base of an adapter: model.safetensors",
        lora / "base" / "model.safetensors",
        lora / "reward" / "model.safetensors",
        lambda: load_folder(lora / "ppo" / "checkpoint-1"),
    )
    for stage, other_stage in (("base", "reward"), ("reward", "base")):
        for name in ("model.safetensors", "config.json", "tokenizer.json", "stage.json"):
            yield Kind(
                f"{stage} model: {name}", job / stage / name, job / other_stage / name,
                partial(read_stage_record, job / stage),
            )  # fmt: skip


def read_stage_record(folder: Path) -> Any:
    """Return a stage's record, as training reads it before it builds on the stage."""
    from selfcorrect.train.trainers.state import stage_record

    return stage_record(folder)


def _records(run: Path) -> Iterator[Kind]:
    job = run / "tiny" / "seed-0"
    two, three = (job / "ppo" / f"checkpoint-{step}" / "checkpoint.json" for step in (2, 3))
    yield Kind("checkpoint.json, by the report", two, three, lambda: table(run))
    yield Kind(
        "PPO's stage.json", job / "ppo" / "stage.json", job / "base" / "stage.json",
        lambda: read_stage_record(job / "ppo"),
    )  # fmt: skip
    other = shutil.copytree(run, run.with_name("other"))
    facts = json.loads((run / "run.json").read_text())
    (other / "run.json").write_text(json.dumps({**facts, "cores": 9999}))
    save_recipe(load_recipe(str(run / "recipe.yaml"), ["policy.steps=9"]), other / "recipe.yaml")
    for at in other.rglob("checkpoint.json"):
        record = json.loads(at.read_text())
        at.write_text(json.dumps({**record, "checksum": None, "episodes": 7}))
    write_results(other, num_resamples=20)
    write_results(run, num_resamples=20)
    clean = shutil.copytree(run, run.with_name("clean"))
    named = {"here": run, "there": clean}
    yield Kind(
        "run.json", run / "run.json", other / "run.json", lambda: differences(named, "run.json")
    )
    yield Kind(
        "recipe.yaml of a run", run / "recipe.yaml", other / "recipe.yaml", lambda: opened(run)
    )
    yield Kind(
        "results.parquet", run / "results.parquet", other / "results.parquet",
        lambda: read_results(run / "results.parquet").to_json(),
    )  # fmt: skip
    yield Kind(
        "statistics.json", run / "statistics.json", other / "statistics.json",
        lambda: read_statistics(run / "statistics.json"),
    )  # fmt: skip


def opened(run: Path) -> Any:
    """Return the recipe after the check that a second start makes."""
    from selfcorrect.train.run import prepare_run

    recipe = load_recipe(str(run / "recipe.yaml"))
    prepare_run(load_recipe(str(run.with_name("clean") / "recipe.yaml")), run)
    return recipe


def table(run: Path) -> str:
    """Return the results, as the report computes them from the evaluation files."""
    return load(run, num_resamples=20).to_json()


def _states(work: Path) -> Iterator[Kind]:
    newest, older = work / "checkpoint-8", work / "checkpoint-4"
    expected = {path.name: digests(path) for path in (newest, older)}

    def resumes() -> str:
        from selfcorrect.train.trainers.state import newest_state

        state = Path(newest_state(work) or "")
        return "intact" if expected.get(state.name) == digests(state) else f"damaged {state}"

    for path in sorted(p for p in newest.rglob("*") if p.is_file()):
        name = path.relative_to(newest)
        yield Kind(f"training state: {name}", path, older / name, resumes, derived=True)


def _measurements(run: Path, room: Path) -> Iterator[Kind]:
    checkpoints = [run / "tiny" / "seed-0" / "ppo" / f"checkpoint-{step}" for step in (2, 3)]
    here, there = (folder / "evaluation" / "bbq.Q.parquet" for folder in checkpoints)
    beside = here.with_name("bbq.Q+IF.parquet")

    def measured() -> Any:
        recipe = load_recipe(str(run / "recipe.yaml"))
        evaluate_run(recipe, run, lambda *_: None)
        return here.read_bytes()

    yield Kind("evaluation cell, by evaluate", here, there, measured, derived=True)
    yield Kind("evaluation cell, by the report", here, there, lambda: table(run))
    yield Kind("evaluation cell, another condition's", here, beside, lambda: table(run))
    yield from _parts(run, here, there, room)
    yield _probe(run, room)
    benchmarks = run / "benchmarks"
    names = sorted(path for path in benchmarks.rglob("*") if path.is_file())
    for path, other in zip(names, [*names[1:], names[0]], strict=True):
        yield Kind(
            f"the society's {path.name}", path, other,
            lambda: recipe_plan(load_recipe(str(run / "recipe.yaml")), run).settings_digest,
            derived=True,
        )  # fmt: skip


def _parts(run: Path, here: Path, there: Path, room: Path) -> Iterator[Kind]:
    """Yield the part of an interrupted cell, whose first half is on disk for the next writer."""
    cell = next(
        cell
        for cell in recipe_plan(load_recipe(str(run / "recipe.yaml")), run).cells
        if cell.file_name == here.name
    )
    folders = []
    for path in (here, there):
        frame, settings = read_cell(path)
        rows = [{str(k): _plain(v) for k, v in row.items()} for row in frame.to_dict("records")]
        target = room / path.parent.parent.name / path.name
        writer = CellWriter(target, cell, Origin(**settings["origin"]), settings["prompts"])
        half = len(rows) // 2
        writer.write(rows[:half], half)
        writer.flush()
        folders.append((target, Origin(**settings["origin"]), rows, settings["prompts"]))
    target, origin, rows, prompts = folders[0]
    part, other = (
        next(cell_path.with_name(f".{cell_path.name}.parts").iterdir()) for cell_path, *_ in folders
    )

    def resumed() -> str:
        writer = CellWriter(target, cell, origin, prompts)
        rest = rows[writer.num_items :]
        writer.write(rest, len(rest))
        writer.write_cell(target)
        return read_cell(target)[0].to_json()

    yield Kind("part of an evaluation cell", part, other, resumed, derived=True)


def _probe(run: Path, room: Path) -> Kind:
    """Return a file of probes, which are fitted again if it is damaged or of other weights."""
    plan = recipe_plan(load_recipe(str(run / "recipe.yaml")), run)
    rows = pd.DataFrame({"layer": [0, 1], "accuracy": [0.5, 0.75]})
    path, other = room / "probes" / "bbq.parquet", room / "probes" / "other.parquet"

    def write(path: Path, weights: str) -> None:
        digest = settings_digest(plan, 2, 0)
        write_table(path, rows, {"settings_digest": digest, "weights": weights})

    def probes() -> str:
        if not is_probed(path, plan, 2, 0, "a"):
            write(path, "a")  # instead of fitting them
        return read_probe(path)[0].to_json()

    write(path, "a")
    write(other, "b")
    return Kind("probes", path, other, probes, derived=True)


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    return None if isinstance(value, float) and value != value else value
