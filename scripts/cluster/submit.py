"""Submit jobs to SLURM through submitit, and record them in launch.json."""

import importlib.util
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
from selfcorrect.recipes.series import Measured
from selfcorrect.recipes.slurm import Slurm, minutes
from selfcorrect.scripts.cluster.jobs import ClusterJob, Command, resources_of

LOGS = "launch"  # submitit's folder below the run's: scripts, logs, pickles
RECORD = "launch.json"


def check_cluster(recipe: Measured, cluster: str, dry_run: bool) -> None:
    """Raise InputError if the recipe's jobs cannot be submitted from this machine."""
    if importlib.util.find_spec("submitit") is None:
        raise InputError("launch: submitit is not installed: pip install 'selfcorrect[slurm]'")
    if cluster == "local":
        return
    if not dry_run and (not shutil.which("sbatch") or not shutil.which("srun")):
        raise InputError(
            "--cluster slurm: sbatch is not on PATH; launch from a login node, or use --dry-run or "
            "--cluster local"
        )
    slurm = recipe.launch.slurm or Slurm()
    requests = [slurm.of("train", model.name) for model in recipe.models]
    requests += [slurm.of("evaluate", None), slurm.of("report", None)]
    for request in requests:
        if request.time is None:
            raise InputError(
                "launch.slurm.time: give the time limit of a job, such as 4:00:00; a job that "
                "needs longer is queued again and resumes"
            )
        if 60 * minutes(request.time) <= slurm.save_seconds:
            raise InputError(
                f"launch.slurm.time: {request.time} is not longer than launch.slurm.save_seconds "
                f"({slurm.save_seconds}), the time kept for saving; give a longer time limit"
            )
    processes = recipe.launch.processes
    for model in recipe.models:
        gpus = slurm.of("train", model.name).gpus
        if gpus not in (None, 0, processes):
            raise InputError(
                f"launch.slurm.gpus: {gpus} for {model.name}, but launch.processes: {processes} "
                "trains it on as many GPUs as processes; give both the same number, or gpus: 0 for "
                "a CPU job"
            )
    known = set(_output_of("sinfo", "--noheader", "--format=%R").split())  # empty: no answer
    for partition in sorted({request.partition for request in requests if request.partition}):
        # A job may name several partitions, and takes the first that is free.
        if known and not known.issuperset(partition.split(",")):
            raise InputError(
                f"launch.slurm.partition: this cluster has no partition {partition}; it has "
                f"{', '.join(sorted(known))}"
            )


def _output_of(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def check_not_queued(run: Path) -> None:
    """Raise InputError if jobs of an earlier launch still wait or run."""
    path = run / RECORD
    if not path.is_file():
        return
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        ids = [job["id"] for job in record["jobs"] if record["cluster"] == "slurm"]
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{path}: not a record of a launch; delete it if no job is waiting"
        ) from None
    if not ids:
        return
    queue = _output_of("squeue", "--noheader", "--format=%F", f"--user={os.getuid()}").split()
    queued = [job for job in ids if job in set(queue)]
    if queued:
        raise InputError(
            f"{run}: {len(queued)} of its jobs still wait or run; wait for them, or cancel them "
            f"with: scancel {' '.join(queued)}"
        )


def sbatch_parameters(recipe: Measured, job: ClusterJob, after: list[str]) -> dict[str, Any]:
    """Return submitit's parameters for a job; `after` holds the ids of the jobs it waits for."""
    slurm, resources = recipe.launch.slurm or Slurm(), resources_of(recipe, job)
    assert resources.time is not None  # check_cluster
    options = {name.replace("-", "_"): value for name, value in resources.options.items()}
    # Since SLURM 22.05 a step does not inherit the number of cores per task from its job.
    cores = ["--cpus-per-task", str(resources.cpus)] if resources.cpus else []
    parameters = {
        "job_name": job.name,
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "time": minutes(resources.time),
        "gpus_per_node": resources.gpus or None,
        "cpus_per_task": resources.cpus,
        "mem": resources.mem,
        "setup": resources.setup or None,
        "signal_delay_s": slurm.save_seconds,
        "dependency": f"afterany:{':'.join(after)}" if after else None,
        "array_parallelism": slurm.parallel,
        "srun_args": cores or None,
        "wckey": None,
        "additional_parameters": {"requeue": True, **options},
    }
    return {
        name: value for name, value in parameters.items() if value is not None or name == "wckey"
    }


def script(recipe: Measured, job: ClusterJob, run: Path) -> str:
    """Return the sbatch script; the jobs that it waits for are names in braces."""
    from submitit.slurm import slurm

    folder = run / LOGS
    after = [f"{{{name}}}" for name in job.after]
    parameters = sbatch_parameters(recipe, job, after)
    if len(job.commands) > 1:
        parameters["map_count"] = len(job.commands)
    command = (
        f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    )
    return slurm._make_sbatch_string(command, folder=folder, **parameters)


def submit(recipe: Measured, jobs: list[ClusterJob], run: Path) -> dict[str, str]:
    """Submit all jobs to SLURM; return their ids by name. If one is refused, cancel all.

    launch.json is written after each job, so that it lists every submitted job. Raises RunFailure
    with sbatch's message.
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
                    executor.submit(Command(words, job.record, None)) for words in job.commands
                ]
        except (FailedJobError, FailedSubmissionError, subprocess.SubprocessError, OSError) as why:
            cancelled = f"; the {len(ids)} jobs before it were cancelled" if ids else ""
            if ids:
                _output_of("scancel", *ids.values())
            (run / RECORD).unlink(missing_ok=True)
            errors = re.findall(r"sbatch: error: (.*)", str(why))
            message = " ".join(errors) or " ".join(str(why).split())[:300]
            raise RunFailure(f"{job.name}: SLURM refused the job: {message}{cancelled}") from None
        ids[job.name] = handles[0].job_id.partition("_")[0]
        write_record(run, "slurm", jobs, ids)
    return ids


def write_record(run: Path, cluster: str, jobs: list[ClusterJob], ids: dict[str, str]) -> None:
    """Write launch.json: the jobs submitted so far, with their ids."""
    submitted = [
        {"id": ids[job.name], "name": job.name, "kind": job.kind, "after": job.after,
         "commands": job.commands}
        for job in jobs if job.name in ids
    ]  # fmt: skip
    moment = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    write_json(run / RECORD, {"cluster": cluster, "submitted": moment, "jobs": submitted})
