"""`selfcorrect launch`: a run as jobs of a SLURM cluster, or of this machine."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from selfcorrect.recipes.foundation.locks import hold_lock
from selfcorrect.recipes.load import load_recipe
from selfcorrect.recipes.schema import Recipe
from selfcorrect.scripts.cluster.jobs import ClusterJob, asked_of, jobs_left
from selfcorrect.scripts.cluster.local import run_here
from selfcorrect.scripts.cluster.needs import with_needs
from selfcorrect.scripts.cluster.submit import (
    LOGS,
    check_cluster,
    check_not_queued,
    script,
    submit,
)
from selfcorrect.scripts.commands.train import RUNS


class Cluster(StrEnum):
    """Where jobs run."""

    slurm = "slurm"
    local = "local"


def launch(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Dotted keys, for example launch.slurm.time=4:00:00.")
    ] = None,
    cluster: Annotated[
        Cluster, typer.Option(help="slurm, or local: the same jobs on this machine.")
    ] = Cluster.slurm,
    runs_dir: Annotated[Path, typer.Option(help="Where run folders lie; all nodes see it.")] = RUNS,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the jobs and submit nothing.")
    ] = False,
) -> None:
    """Submit what is not done yet of a run: a job for each model and seed, evaluation, a report.

    On SLURM a job whose time is up is queued again and goes on where it stopped. Launch again after
    a failure: what is finished is not submitted again.
    """
    checked = load_recipe(recipe, overrides or [])
    run = (runs_dir / checked.name).resolve()
    check_cluster(checked, cluster, dry_run)
    _check_training(checked, run)
    if dry_run:
        for job in with_needs(checked, jobs_left(checked, run)):
            typer.echo(_described(checked, job, run, cluster))
        return
    check_not_queued(run)
    _open(checked, run)
    with hold_lock(run / LOGS) as free:
        if not free:
            raise InputError(f"{run}: another launch of this run is at work; wait for it")
        check_not_queued(run)
        jobs = jobs_left(checked, run)
        if not jobs:
            typer.echo(f"{run}: nothing is left to do; see {run / 'report.html'}")
        elif cluster is Cluster.local:
            _here(checked, jobs, run)
        else:
            _queue(checked, with_needs(checked, jobs), run)


def _check_training(recipe: Recipe, run: Path) -> None:
    """InputError for whatever a job would trip over, before there is one."""
    from selfcorrect.train.check import check_training
    from selfcorrect.train.run import check_folder, unfinished

    check_folder(recipe, run)
    if unfinished(recipe, run):
        check_training(recipe)


def _open(recipe: Recipe, run: Path) -> None:
    """Make the run's folder, with the recipe that the jobs read."""
    from selfcorrect.train.run import open_run

    try:
        run.mkdir(parents=True, exist_ok=True)
        writable = os.access(run, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise InputError(
            f"{run}: cannot be written to; give --runs-dir a folder that you, and all nodes, can"
        )
    open_run(recipe, run)


def _described(recipe: Recipe, job: ClusterJob, run: Path, cluster: Cluster) -> str:
    """A job in a dry run: a comment, and its sbatch script or its commands."""
    tasks = f", {len(job.commands)} tasks" if len(job.commands) > 1 else ""
    lines = [f"# ---- {job.name}{tasks}"]
    if job.needs is not None:
        lines.append(f"# {job.needs.sentence}")
    lines += [f"# runs: {' '.join(words[1:])}" for words in job.commands]
    if cluster is Cluster.local:
        return "\n".join([*lines, f"# after: {', '.join(job.after) or 'nothing'}", ""])
    return "\n".join([*lines, script(recipe, job, run)])


def _here(recipe: Recipe, jobs: list[ClusterJob], run: Path) -> None:
    wrong = run_here(recipe, jobs, run)
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise RunFailure(f"{wrong[0]}{more}; the same command goes on from here")
    typer.echo(f"Report: {run / 'report.html'}")


def _queue(recipe: Recipe, jobs: list[ClusterJob], run: Path) -> None:
    ids = submit(recipe, jobs, run)
    for job in jobs:
        asked = asked_of(recipe, job)
        words = [f"{ids[job.name]:>8}  {job.name}"]
        words += [f"{len(job.commands)} tasks"] if len(job.commands) > 1 else []
        words += [f"{asked.gpus} GPU{'s' * (asked.gpus > 1)}"] if asked.gpus else []
        words += [f"after {', '.join(ids[name] for name in job.after)}"] if job.after else []
        typer.echo(", ".join(words))
    typer.echo(f"Logs: {run / LOGS}; how far it is: selfcorrect report {run} --watch")
    typer.echo(f"To give it up: scancel {' '.join(ids.values())}")
