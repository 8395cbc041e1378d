"""`selfcorrect launch`: a run as jobs of a SLURM cluster, or of this machine."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from selfcorrect.recipes.foundation.locks import hold_lock
from selfcorrect.recipes.load import load_measured
from selfcorrect.recipes.series import Measured, Series
from selfcorrect.scripts.cluster.jobs import ClusterJob, jobs_left, resources_of, with_needs
from selfcorrect.scripts.cluster.local import run_here
from selfcorrect.scripts.cluster.submit import LOGS, check_cluster, check_not_queued, script, submit
from selfcorrect.scripts.commands.run import RUNS, RecipeName
from selfcorrect.scripts.commands.series import open_run


class Cluster(StrEnum):
    """Where jobs run."""

    slurm = "slurm"
    local = "local"


def launch(
    recipe: RecipeName,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Dotted keys, for example launch.slurm.time=4:00:00.")
    ] = None,
    cluster: Annotated[
        Cluster, typer.Option(help="slurm, or local: the same jobs on this machine.")
    ] = Cluster.slurm,
    runs_dir: Annotated[
        Path, typer.Option(help="The folder of all run folders, visible to all nodes.")
    ] = RUNS,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the jobs and submit nothing.")
    ] = False,
) -> None:
    """Submit the jobs that a run or a series needs: training, evaluation, a report.

    On SLURM a job that reaches its time limit is queued again and resumes. After a failure, launch
    again: finished work is not submitted again.
    """
    from selfcorrect.train.run import check_run

    checked = load_measured(recipe, overrides or [])
    run = (runs_dir / checked.name).resolve()
    check_cluster(checked, cluster, dry_run)
    if not isinstance(checked, Series):
        check_run(checked, run)
    elif dry_run:
        from selfcorrect.evaluate.measuring.series import find_numbers

        checked, notes = find_numbers(checked)
        for note in notes:
            typer.echo(f"# {note}")
    if dry_run:
        for job in with_needs(checked, jobs_left(checked, run)):
            typer.echo(_describe(checked, job, run, cluster))
        return
    check_not_queued(run)
    checked = _prepare(checked, run)
    with hold_lock(run / LOGS) as is_free:
        if not is_free:
            raise InputError(f"{run}: another launch of this run is at work; wait for it")
        check_not_queued(run)
        jobs = jobs_left(checked, run)
        if not jobs:
            typer.echo(f"{run}: nothing is left to do; see {run / 'report.html'}")
        elif cluster is Cluster.local:
            _run_here(checked, jobs, run)
        else:
            _queue(checked, with_needs(checked, jobs), run)


def _prepare(recipe: Measured, run: Path) -> Measured:
    """Make the run's folder, and return the recipe in it that the jobs read."""
    from selfcorrect.train.run import prepare_run

    try:
        run.mkdir(parents=True, exist_ok=True)
        is_writable = os.access(run, os.W_OK)
    except OSError:
        is_writable = False
    if not is_writable:
        raise InputError(
            f"{run}: not writable; give --runs-dir a folder that you and all nodes can write to"
        )
    if isinstance(recipe, Series):
        open_run(recipe, run)
        return load_measured(str(run / "recipe.yaml"))
    prepare_run(recipe, run, here=False)
    return recipe


def _describe(recipe: Measured, job: ClusterJob, run: Path, cluster: Cluster) -> str:
    """Return a job as a dry run shows it: a comment, and its sbatch script or its commands."""
    tasks = f", {len(job.commands)} tasks" if len(job.commands) > 1 else ""
    lines = [f"# ---- {job.name}{tasks}"]
    if job.needs is not None:
        lines.append(f"# {job.needs.sentence}")
    lines += [f"# runs: {' '.join(words[1:])}" for words in job.commands]
    if cluster is Cluster.local:
        return "\n".join([*lines, f"# after: {', '.join(job.after) or 'nothing'}", ""])
    return "\n".join([*lines, script(recipe, job, run)])


def _run_here(recipe: Measured, jobs: list[ClusterJob], run: Path) -> None:
    errors = run_here(recipe, jobs, run)
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise RunFailure(f"{errors[0]}{more}; run the same command to resume")
    typer.echo(f"Report: {run / 'report.html'}")


def _queue(recipe: Measured, jobs: list[ClusterJob], run: Path) -> None:
    ids = submit(recipe, jobs, run)
    for job in jobs:
        resources = resources_of(recipe, job)
        words = [f"{ids[job.name]:>8}  {job.name}"]
        words += [f"{len(job.commands)} tasks"] if len(job.commands) > 1 else []
        words += [f"{resources.gpus} GPU{'s' * (resources.gpus > 1)}"] if resources.gpus else []
        words += [f"after {', '.join(ids[name] for name in job.after)}"] if job.after else []
        typer.echo(", ".join(words))
    typer.echo(f"Logs: {run / LOGS}; progress: selfcorrect report {run} --watch")
    typer.echo(f"To cancel: scancel {' '.join(ids.values())}")
