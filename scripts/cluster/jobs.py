"""The jobs of a run on a cluster: what is left to do, what it needs, and one job's command."""

import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from selfcorrect.evaluate.run_folder import CheckpointKey, find_checkpoints, planned_checkpoints
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.series import Measured, Series
from selfcorrect.recipes.slurm import Resources, Slurm

if TYPE_CHECKING:
    from selfcorrect.train.planning.feedback import FeedbackFacts

# Bytes of a Python process with torch and transformers (docs/results/planning-accuracy.md).
LIBRARIES = 0.6e9
SPARE = 1.5  # times the estimate: the allocator keeps freed memory, most of all with LoRA
UTILISATION = 0.3


@dataclass(frozen=True)
class Needs:
    """The estimate of `selfcorrect plan` for a job: a sentence, and the memory of a CPU job."""

    sentence: str
    memory: str | None = None


@dataclass(frozen=True)
class ClusterJob:
    """A job of the cluster: its commands, and the names of the jobs that end before it begins.

    An evaluation is an array with a command for each checkpoint; other jobs have one command. A
    training job has finished once the file `record` exists.
    """

    kind: Literal["train", "evaluate", "report"]
    name: str
    commands: list[list[str]]
    after: list[str] = field(default_factory=list)
    model: str | None = None
    record: Path | None = None
    needs: Needs | None = None


def resources_of(recipe: Measured, job: ClusterJob) -> Resources:
    """Return the resources that the recipe requests for this job."""
    from selfcorrect.train.planning.settings import evaluation_devices

    slurm = recipe.launch.slurm or Slurm()
    resources = slurm.of(job.kind, job.model)
    gpus = recipe.launch.processes
    if job.kind == "evaluate":
        gpus = evaluation_devices(recipe.evaluate, recipe.launch.processes)
        if resources.gpus == 1 and slurm.evaluation.gpus is None:
            resources.gpus = gpus
    if resources.gpus is None:
        resources.gpus = gpus
    options = {name.replace("_", "-") for name in resources.options}
    if resources.mem is None and job.needs is not None and not options & {"mem", "mem-per-cpu"}:
        resources.mem = job.needs.memory
    return resources


def jobs_left(recipe: Measured, run: Path) -> list[ClusterJob]:
    """Return the jobs that the run still needs, in a possible order; [] if all is done.

    Each model and seed is trained in one job, which measures its checkpoints if evaluation is
    inline; otherwise they are measured after it, even if it fails. The report comes last and shows
    whatever exists.
    """
    from selfcorrect.evaluate.report.page import is_report_current
    from selfcorrect.train.run import last_record, unfinished

    training = [] if isinstance(recipe, Series) else unfinished(recipe, run)
    unmeasured = planned_checkpoints(recipe) - _measured(recipe, run)
    jobs = []
    for model in reversed([model.name for model in recipe.models]):
        for seed in recipe.seeds:
            name, after = f"{recipe.name}.{model}.{seed}", []
            if not isinstance(recipe, Series) and (model, seed) in training:
                options = ["--model", model, "--seed", seed, "--runs-dir", run.parent]
                command = _command("train", run / "recipe.yaml", *options)
                record = last_record(recipe, run, (model, seed))
                after = [f"{name}.train"]
                jobs.append(ClusterJob("train", after[0], [command], [], model, record))
                if recipe.evaluate.attach == "inline":
                    continue
            commands = [
                _command("evaluate", run, "--checkpoint", key)
                for key in sorted(unmeasured)
                if (key.model, key.seed) == (model, seed)
            ]
            if commands:
                jobs.append(ClusterJob("evaluate", f"{name}.evaluate", commands, after, model))
    if jobs or not is_report_current(run):
        awaited = {name for job in jobs for name in job.after}
        after = [job.name for job in jobs if job.name not in awaited]
        jobs.append(ClusterJob("report", f"{recipe.name}.report", [_command("report", run)], after))
    return jobs


def _command(*words: object) -> list[str]:
    return [sys.executable, "-m", "selfcorrect.scripts.commands", *map(str, words)]


def _measured(recipe: Measured, run: Path) -> set[CheckpointKey]:
    from selfcorrect.evaluate.measuring.run import is_measured, recipe_plan

    if not (run / "recipe.yaml").is_file():
        return set()
    plan, engine = recipe_plan(recipe, run), recipe.evaluate.engine
    dtype = recipe.evaluate.dtype
    return {c.key for c in find_checkpoints(run, {}) if is_measured(c, plan, engine, dtype)}


def with_needs(recipe: Measured, jobs: list[ClusterJob]) -> list[ClusterJob]:
    """Return the jobs with the estimate of their needs; the report's are unknown."""
    from selfcorrect.train.planning.feedback import feedback_facts

    needs: list[Needs | None] = []
    try:
        facts = None if isinstance(recipe, Series) else feedback_facts(recipe.data)
        needs = [_needs(recipe, job, facts) for job in jobs]
    except InputError as error:
        needs = [Needs(f"not planned: {error}") for _ in jobs]
    return [
        job if job.model is None else replace(job, needs=need)
        for job, need in zip(jobs, needs, strict=True)
    ]


def _needs(recipe: Measured, job: ClusterJob, facts: "FeedbackFacts | None") -> Needs | None:
    from selfcorrect.train.planning.devices import GPUS
    from selfcorrect.train.planning.estimate import estimate_named, parallelism_of
    from selfcorrect.train.planning.memory import Parallelism
    from selfcorrect.train.planning.series import estimate_series

    if job.model is None:
        return None
    gpus = resources_of(recipe, job).gpus or 0
    processes = (gpus or recipe.launch.processes) if job.kind == "train" else 1
    try:
        fast = "bfloat16" if gpus else "float32"  # what a node's CPU computes fast is not known
        if isinstance(recipe, Series):
            parallelism = Parallelism(1, 0, gpus > 0, fast)
            (estimate,), counts, _ = estimate_series(recipe, parallelism, job.model)
            checkpoints = max(1, counts[job.model])
        else:
            assert facts is not None
            parallelism = parallelism_of(recipe, processes, None, gpus > 0, fast)
            estimate = estimate_named(recipe, job.model, facts, parallelism)
            checkpoints = len(recipe.policy.checkpoints)
    except InputError as error:
        return Needs(f"not planned: {error}")
    is_evaluation = job.kind == "evaluate"
    stages = [s for s in estimate.footprints if (s.stage == "evaluation") == is_evaluation]
    peak = max((stage.total for stage in stages or estimate.footprints), default=0.0)
    if gpus:
        hours = estimate.hours(GPUS["h100"], UTILISATION)
        spent = sum(hours[s] for s in hours if (s == "evaluation") == is_evaluation)
        spent /= checkpoints if is_evaluation else 1
        count = gpus if is_evaluation else processes
        return Needs(
            f"planned: {peak / 1e9:.1f} GB at most on each of {count} GPUs, "
            f"{spent:.1f} h at {UTILISATION:.0%} of an H100's peak"
        )
    total = processes * (peak + LIBRARIES)
    memory = f"{1 + math.ceil(SPARE * total / 2**30)}G"
    return Needs(f"planned: {total / 1e9:.1f} GB at most", memory)


class Command:
    """A selfcorrect command, which submitit pickles and calls in the job.

    On the signal before the job's time ends, the command saves its state and ends. The job is
    queued again, and the same command resumes.
    """

    def __init__(self, arguments: list[str], record: Path | None, devices: str | None) -> None:
        self.arguments = arguments
        self.record = record
        self.devices = devices  # CUDA_VISIBLE_DEVICES of the launcher, for jobs on this machine
        self.child: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        """Run the command; SystemExit with its code if it fails or has not finished its work."""
        environment = dict(os.environ)
        if environment.get("SUBMITIT_EXECUTOR") == "local":
            # submitit hides the devices from jobs that ask for none, and gives all jobs the first.
            environment.pop("CUDA_VISIBLE_DEVICES", None)
            if self.devices is not None:
                environment["CUDA_VISIBLE_DEVICES"] = self.devices
        self.child = subprocess.Popen(
            self.arguments, env=environment, preexec_fn=_ignore_time_signal
        )
        signal.signal(signal.SIGTERM, self._end)
        try:
            while (code := self.child.poll()) is None:
                time.sleep(0.1)
        finally:
            self._end()
        if code == 0 and self.record is not None and not self.record.is_file():
            code = 128 + signal.SIGTERM  # it was asked to end, and has saved its state
        if code:
            sys.exit(code if code > 0 else 128 - code)

    def checkpoint(self) -> Any:
        """Have the command save and end; return the submission that resumes it.

        submitit calls this on the signal before the job's time ends. Popen.wait must not be used
        here: the interrupted call may hold its lock.
        """
        from submitit.helpers import DelayedSubmission

        if self.child is not None:
            self._end()
            with suppress(ChildProcessError):
                os.waitid(os.P_PID, self.child.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(Command(self.arguments, self.record, self.devices))

    def _end(self, *_: Any) -> None:
        if self.child is not None:
            self.child.terminate()  # no effect once it has ended


def _ignore_time_signal() -> None:
    """Ignore SLURM's signal before the time limit, which only submitit's process handles."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
