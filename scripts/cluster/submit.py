"""Jobs handed to SLURM, or run on this machine, through submitit; and launch.json, what was."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from selfcorrect.recipes.foundation.atomic_files import write_json
from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from selfcorrect.recipes.schema import Recipe
from selfcorrect.recipes.slurm import Slurm, minutes
from selfcorrect.scripts.cluster.jobs import ClusterJob, Command, asked_of

LOGS = "launch"  # submitit's folder in the run's: scripts, logs, pickles
RECORD = "launch.json"


def check_cluster(recipe: Recipe, cluster: str, dry_run: bool) -> None:
    """InputError for whatever keeps this recipe from being launched from here."""
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise InputError(
            "launch: submitit is not installed: pip install 'selfcorrect[slurm]'"
        ) from None
    if cluster == "local":
        return
    if not dry_run and (not shutil.which("sbatch") or not shutil.which("srun")):
        raise InputError(
            "--cluster slurm: there is no sbatch here; run this where jobs are submitted from, "
            "or with --dry-run, or with --cluster local"
        )
    asked = recipe.launch.slurm or Slurm()
    of_jobs = [asked.of("train", model.name) for model in recipe.models]
    of_jobs += [asked.of("evaluate", None), asked.of("report", None)]
    for one in of_jobs:
        if one.time is None:
            raise InputError(
                "launch.slurm.time: say how long one turn of a job may take, such as 4:00:00; "
                "a job that needs longer goes on in another turn"
            )
        if 60 * minutes(one.time) <= asked.save_seconds:
            raise InputError(
                f"launch.slurm.time: {one.time} leaves nothing before save_seconds "
                f"{asked.save_seconds}, when a job is told to save; give it longer turns"
            )
    number = recipe.launch.processes
    for model in recipe.models:
        gpus = asked.of("train", model.name).gpus
        if gpus not in (None, 0, number):
            raise InputError(
                f"launch.slurm.gpus: {gpus} for {model.name}, which launch.processes: {number} "
                "trains on as many; give both the same number, or gpus: 0 for a CPU job"
            )
    known = _partitions()
    for partition in sorted({one.partition for one in of_jobs if one.partition}):
        # A job may name several, and takes the first that is free.
        if known and not known.issuperset(partition.split(",")):
            raise InputError(
                f"launch.slurm.partition: {partition} is none of this cluster's, which are "
                f"{', '.join(sorted(known))}"
            )


def _partitions() -> set[str]:
    """Names of the cluster's partitions; empty where no cluster answers."""
    return set(_asked("sinfo", "--noheader", "--format=%R").split())


def _asked(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def check_not_queued(run: Path) -> None:
    """InputError where jobs of an earlier launch still wait or run."""
    path = run / RECORD
    if not path.is_file():
        return
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        ids = [job["id"] for job in record["jobs"] if record["cluster"] == "slurm"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: is no record of a launch; delete it if no job waits") from None
    if not ids:
        return
    queued = set(_asked("squeue", "--noheader", "--format=%F", f"--user={os.getuid()}").split())
    ours = [number for number in ids if number in queued]
    if ours:
        raise InputError(
            f"{run}: {len(ours)} of its jobs still wait or run; wait for them, or give them up "
            f"with: scancel {' '.join(ours)}"
        )


def sbatch_parameters(recipe: Recipe, job: ClusterJob, after: list[str]) -> dict[str, Any]:
    """What submitit is told of a job; `after` holds the ids of the jobs it waits for."""
    own, asked = recipe.launch.slurm or Slurm(), asked_of(recipe, job)
    assert asked.time is not None  # check_cluster
    options = {name.replace("-", "_"): value for name, value in asked.options.items()}
    # Since SLURM 22.05 a step does not take over how many cores its job has for a task.
    cores = ["--cpus-per-task", str(asked.cpus)] if asked.cpus else []
    found = {
        "job_name": job.name,
        "partition": asked.partition,
        "account": asked.account,
        "qos": asked.qos,
        "time": minutes(asked.time),
        "gpus_per_node": asked.gpus or None,
        "cpus_per_task": asked.cpus,
        "mem": asked.mem,
        "setup": asked.setup or None,
        "signal_delay_s": own.save_seconds,
        "dependency": f"afterany:{':'.join(after)}" if after else None,
        "array_parallelism": own.parallel,
        "srun_args": cores or None,
        "wckey": None,
        "additional_parameters": {"requeue": True, **options},
    }
    return {name: value for name, value in found.items() if value is not None or name == "wckey"}


def script(recipe: Recipe, job: ClusterJob, run: Path) -> str:
    """The sbatch script as it would be submitted; jobs that it waits for by name in braces."""
    from submitit.slurm import slurm

    folder = run / LOGS
    after = [f"{{{name}}}" for name in job.after]
    parameters = sbatch_parameters(recipe, job, after)
    if len(job.commands) > 1:
        parameters["map_count"] = len(job.commands)
    python, place = shlex.quote(sys.executable), shlex.quote(str(folder))
    command = f"{python} -u -m submitit.core._submit {place}"
    return slurm._make_sbatch_string(command, folder=folder, **parameters)


def submit(recipe: Recipe, jobs: list[ClusterJob], run: Path) -> dict[str, str]:
    """Hand all jobs to SLURM; their ids by name. Where one is refused, none stays.

    launch.json is written after each, so that no job is unknown to it. Raises RunFailure with what
    sbatch says.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError
    from submitit.slurm.slurm import SlurmExecutor

    ids: dict[str, str] = {}
    for job in jobs:
        executor = SlurmExecutor(run / LOGS, (recipe.launch.slurm or Slurm()).requeues)
        executor.update_parameters(
            **sbatch_parameters(recipe, job, [ids[name] for name in job.after])
        )
        try:
            with executor.batch():
                handles = [
                    executor.submit(Command(words, job.leaves, None)) for words in job.commands
                ]
        except (FailedJobError, FailedSubmissionError, subprocess.SubprocessError, OSError) as why:
            given_up = f"; the {len(ids)} jobs before it are cancelled" if ids else ""
            if ids:
                _asked("scancel", *ids.values())
            (run / RECORD).unlink(missing_ok=True)
            said = _sbatch_said(str(why))
            raise RunFailure(f"{job.name}: SLURM refuses it: {said}{given_up}") from None
        ids[job.name] = handles[0].job_id.partition("_")[0]
        write_record(run, "slurm", jobs, ids)
    return ids


def _sbatch_said(text: str) -> str:
    lines = re.findall(r"sbatch: error: (.*)", text)
    return " ".join(lines) or " ".join(text.split())[:300]


def write_record(run: Path, cluster: str, jobs: list[ClusterJob], ids: dict[str, str]) -> None:
    """Write launch.json: the jobs submitted so far, with their ids."""
    submitted = [
        {"id": ids[job.name], "name": job.name, "kind": job.kind, "after": job.after,
         "commands": job.commands}
        for job in jobs if job.name in ids
    ]  # fmt: skip
    moment = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    write_json(run / RECORD, {"cluster": cluster, "submitted": moment, "jobs": submitted})
