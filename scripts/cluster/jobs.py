"""The jobs of a run on a cluster: what is left to do, in which order, and one job at work."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from selfcorrect.recipes.schema import Recipe
from selfcorrect.recipes.slurm import Resources, Slurm
from selfcorrect.scripts.commands.report import is_current


@dataclass(frozen=True)
class Needs:
    """What `selfcorrect plan` says of a job: a sentence, and the memory that a CPU job asks for."""

    sentence: str
    memory: str | None = None


@dataclass(frozen=True)
class ClusterJob:
    """One job: what it does, for whom, and the jobs (by name) that end before it begins.

    An evaluation is an array of one command a checkpoint; other jobs are one command. `leaves` is
    the file without which a training job has not done its work.
    """

    kind: Literal["train", "evaluate", "report"]
    name: str
    commands: list[list[str]]
    after: list[str] = field(default_factory=list)
    model: str | None = None
    leaves: Path | None = None
    needs: Needs | None = None


def asked_of(recipe: Recipe, job: ClusterJob) -> Resources:
    """What the recipe asks the cluster for, for this job."""
    asked = (recipe.launch.slurm or Slurm()).of(job.kind, job.model)
    if asked.gpus is None:
        asked.gpus = recipe.launch.processes if job.kind == "train" else 1
    named = {name.replace("_", "-") for name in asked.options}
    if asked.mem is None and job.needs is not None and not named & {"mem", "mem-per-cpu"}:
        asked.mem = job.needs.memory
    return asked


def jobs_left(recipe: Recipe, run: Path) -> list[ClusterJob]:
    """What is not done yet of the run, in an order in which it can be done; [] where all is.

    Each model and seed is trained in one job, which measures its checkpoints where evaluation is
    inline; otherwise the checkpoints are measured after it, whether or not it came to its end. The
    report comes last, of whatever there is.
    """
    from selfcorrect.evaluate.run_folder import planned_checkpoints
    from selfcorrect.train.run import last_record, unfinished

    training = unfinished(recipe, run)
    measured = _measured(recipe, run)
    jobs = []
    for model in reversed(recipe.models):
        for seed in recipe.seeds:
            name, after = f"{recipe.name}.{model.name}.{seed}", []
            if (model.name, seed) in training:
                one = ["--model", model.name, "--seed", seed, "--runs-dir", run.parent]
                command = _command("train", run / "recipe.yaml", *one)
                leaves = last_record(recipe, run, (model.name, seed))
                after = [f"{name}.train"]
                jobs.append(ClusterJob("train", after[0], [command], [], model.name, leaves))
                if recipe.evaluate.attach == "inline":
                    continue
            left = sorted(
                at for at in planned_checkpoints(recipe) - measured if at[:2] == (model.name, seed)
            )
            if left:
                measuring = [_command("evaluate", run, "--checkpoint", at) for at in left]
                jobs.append(
                    ClusterJob("evaluate", f"{name}.evaluate", measuring, after, model.name)
                )
    if jobs or not is_current(run / "report.html"):
        before = {name for job in jobs for name in job.after}
        after = [job.name for job in jobs if job.name not in before]
        jobs.append(ClusterJob("report", f"{recipe.name}.report", [_command("report", run)], after))
    return jobs


def _command(*words: object) -> list[str]:
    return [sys.executable, "-m", "selfcorrect.scripts.commands", *map(str, words)]


def _measured(recipe: Recipe, run: Path) -> set[tuple[str, int, int]]:
    from selfcorrect.evaluate.measuring.run import recipe_plan, unmeasured
    from selfcorrect.evaluate.run_folder import find_checkpoints

    if not (run / "recipe.yaml").is_file():
        return set()
    lacking = unmeasured(run, recipe_plan(recipe, run), recipe.evaluate.engine, {})
    return {c.key for c in find_checkpoints(run, {})} - {c.key for c in lacking}


class Command:
    """A command of ours at work in a job, which submitit pickles and calls there.

    On the warning before the job's time ends it has the command save its state, and the job is
    queued again; the same command then goes on from there.
    """

    def __init__(self, arguments: list[str], leaves: Path | None, devices: str | None) -> None:
        self.arguments = arguments
        self.leaves = leaves
        self.devices = devices  # CUDA_VISIBLE_DEVICES of the launcher, where jobs are its children
        self.child: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        """Run the command; SystemExit with its code where it fails, or has not come to its end."""
        environment = dict(os.environ)
        if environment.get("SUBMITIT_EXECUTOR") == "local":
            # submitit hides all devices from jobs that ask for none, and gives all jobs the first.
            environment.pop("CUDA_VISIBLE_DEVICES", None)
            if self.devices is not None:
                environment["CUDA_VISIBLE_DEVICES"] = self.devices
        self.child = subprocess.Popen(
            self.arguments, env=environment, preexec_fn=_ignore_the_warning
        )
        signal.signal(signal.SIGTERM, self._end)
        try:
            while (code := self.child.poll()) is None:
                time.sleep(0.1)
        finally:
            self._end()
        if code == 0 and self.leaves is not None and not self.leaves.is_file():
            code = 128 + signal.SIGTERM  # asked to end, it has saved its state and ended in peace
        if code:
            sys.exit(code if code > 0 else 128 - code)

    def checkpoint(self) -> Any:
        """Called on the warning: have the command save and end, and say what is to be called then.

        Popen.wait may not be used here: the call that was interrupted may hold its lock.
        """
        from submitit.helpers import DelayedSubmission

        if self.child is not None:
            self._end()
            with suppress(ChildProcessError):
                os.waitid(os.P_PID, self.child.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(Command(self.arguments, self.leaves, self.devices))

    def _end(self, *_: Any) -> None:
        if self.child is not None:
            self.child.terminate()  # nothing happens where it has ended


def _ignore_the_warning() -> None:
    """SLURM warns every process of a job; only submitit's is to hear it."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
