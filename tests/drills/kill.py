"""Kill a run at random moments, resume it with the same command, and compare all files.

    python -m tests.drills.kill [--kills 30] [--terms 6] [--jobs 1] [--seed 0]

A small run of all stages is completed without interruption. Other runs are killed at moments spread
over its duration, with SIGKILL to all their processes, and resumed, five times each. Every second
moment is one at which the uninterrupted run had a partly written file or folder (a training state,
a checkpoint, an evaluation file, a figure). `--terms` more moments are for SIGTERM, after which a
run must end with exit 0 and a message. At the end weights, records, evaluation files, results,
statistics and figures must equal those of the uninterrupted run byte for byte, with no partly
written file left. If they do not, the folder is kept and the exit is 1.
"""

import argparse
import hashlib
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.fork_server import ForkedProcess, ForkServer
from tests.support.small_runs import command

NAME = "small"
COMPARED = ("*.safetensors", "*.parquet", "checkpoint.json", "statistics.json", "*.png", "*.svg")
PART = re.compile(r"\.(.+)\.\d+-[0-9a-f]+\.part")
LISTENING_SECONDS = 2.0  # after which a started process surely handles SIGTERM
GRACE_SECONDS = 30.0  # clusters commonly wait this long between SIGTERM and SIGKILL
POLL_SECONDS = 0.002


@dataclass(frozen=True)
class Moment:
    """A moment to kill: `seconds` after the path `after` was first partly written, or the start."""

    after: str | None = None
    seconds: float = 0.0

    def __str__(self) -> str:
        if self.after is None:
            return f"{self.seconds:.1f} s after the start"
        return f"{self.seconds:.1f} s after {self.after}" if self.seconds else f"at {self.after}"


def half_written(run: Path) -> Iterator[str]:
    """Yield paths in the run that are partly written now, without the temporary part of names."""
    for folder, folders, files in os.walk(run):
        here = os.path.relpath(folder, run)
        for name in [*folders, *files]:
            if part := PART.fullmatch(name):
                yield os.path.normpath(f"{here}/{part[1]}")
        if here.endswith(".work"):  # transformers' states have no temporary name
            for name in folders:
                if not (Path(folder) / name / "complete").exists():
                    yield f"{here}/{name}"
        folders[:] = [n for n in folders if n != "benchmarks" and not PART.fullmatch(n)]


def is_half_written(path: Path) -> bool:
    """Return whether this path is partly written now, without a look at all others."""
    if path.parent.name.endswith(".work") and path.is_dir() and not (path / "complete").exists():
        return True
    return any(PART.fullmatch(part.name) for part in path.parent.glob(f".{path.name}.*.part"))


def left_behind(run: Path) -> list[str]:
    """Return working files and folders, which a finished run does not have."""
    ends = (".part", ".parts", ".work")
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.name.endswith(ends))


def stage_of(run: Path) -> str:
    """Return the stage of a killed run, job by job, from the files on disk."""
    jobs = [_stage_of_job(job) for job in sorted(run.glob("*/seed-*"))]
    if not jobs:
        return "opening" if run.exists() else "start"
    if set(jobs) == {"ended"}:
        return "report" if (run / "results.parquet").exists() or _held(run) else "closing"
    return " + ".join(jobs)


def _stage_of_job(job: Path) -> str:
    for folder in sorted(job.glob("ppo/checkpoint-*")):
        if _held(folder / "evaluation"):
            return f"evaluation, {folder.name}"
    for stage, next_one in (("ppo", "ended"), ("reward", "ppo"), ("base", "reward")):
        if (job / stage / "stage.json").exists():
            return next_one
    return "base" if (job / "base.work").exists() else "corpus"


def _held(folder: Path) -> bool:
    """Return whether a killed process held the folder, according to its lock."""
    lock = folder / ".lock"
    return lock.exists() and lock.stat().st_size > 0


def contents(run: Path) -> dict[str, str]:
    """Return digests of all files that must be the same, by path in the run."""
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for pattern in COMPARED
        for path in run.rglob(pattern)
    }


def differences(run: Path, reference: Path) -> list[str]:
    """Return files that differ between two finished runs, or are left behind in the first."""
    ours, expected = contents(run), contents(reference)
    differing = [path for path in {**ours, **expected} if ours.get(path) != expected.get(path)]
    return sorted(differing) + left_behind(run)


class Started:
    """A run in its own process group, with its output in a file beside its folder.

    It is a new interpreter, or a fork of `server`.
    """

    process: "subprocess.Popen[bytes] | ForkedProcess"

    def __init__(self, runs: Path, *more: str, server: ForkServer | None = None) -> None:
        runs.mkdir(parents=True, exist_ok=True)
        self.output = runs.with_name(f"{runs.name}.txt")
        words = command(runs, *more)
        if server is not None:
            self.process = server.start(words, runs.parent, self.output)
        else:
            with self.output.open("w") as file:
                self.process = subprocess.Popen(
                    words, cwd=runs.parent, stdout=file, stderr=file, start_new_session=True
                )
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def each_poll(self) -> Iterator[None]:
        """Yield at every poll until the run has ended."""
        while self.process.poll() is None:
            yield
            time.sleep(POLL_SECONDS)

    def strike(self, number: signal.Signals) -> None:
        """Send a signal to all processes of the run, and wait for the main process to end."""
        os.killpg(self.process.pid, number)
        try:
            self.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise SystemExit(f"{number.name}: still running after {GRACE_SECONDS:.0f} s") from None


def watch(runs: Path, *more: str) -> tuple[float, dict[str, float]]:
    """Complete a run; return its seconds, and when each path was first seen partly written."""
    started = Started(runs, *more)
    seen: dict[str, float] = {}
    for _ in started.each_poll():
        for name in half_written(runs / NAME):
            seen.setdefault(name, started.seconds)
    if started.process.returncode:
        raise SystemExit(f"the uninterrupted run failed: {started.output.read_text()}")
    return started.seconds, seen


def strike(
    runs: Path,
    moment: Moment,
    number: signal.Signals,
    *more: str,
    server: ForkServer | None = None,
) -> str | None:
    """Start the run and kill it; return its stage, or None if it ended before the moment."""
    path = runs / NAME / (moment.after or "")
    existed = path.exists()  # from an earlier start; a new one may appear between two polls
    started = Started(runs, *more, server=server)
    since = 0.0 if moment.after is None else math.inf
    for _ in started.each_poll():
        if math.isinf(since):
            seen = is_half_written(path) or (not existed and path.exists())
            since = started.seconds if seen else since
        late_enough = number != signal.SIGTERM or started.seconds >= LISTENING_SECONDS
        if late_enough and started.seconds >= since + moment.seconds:
            break
    else:
        return None
    started.strike(number)
    if number == signal.SIGTERM:
        output = started.output.read_text()
        if "Report:" in output:
            return None
        if started.process.returncode or "stopped by SIGTERM" not in output:
            raise SystemExit(f"SIGTERM: exit {started.process.returncode}: {output}")
    return stage_of(runs / NAME)


def resume(runs: Path, *more: str, server: ForkServer | None = None) -> None:
    """Run the same command again, to its end."""
    started = Started(runs, *more, server=server)
    started.process.wait()
    if started.process.returncode:
        raise SystemExit(f"the run does not resume: {started.output.read_text()}")


def moments(num: int, seconds: float, seen: dict[str, float], rng: random.Random) -> list[Moment]:
    """Return moments spread over the run, in turn at any time and at a partly written path."""
    chosen = []
    for index in range(num):
        time_ = (index + rng.random()) / num * seconds
        before = [name for name, first in seen.items() if first <= time_]
        if index % 2 and seen:
            chosen.append(Moment((before or list(seen))[-1]))
        elif before:
            chosen.append(Moment(before[-1], time_ - seen[before[-1]]))
        else:
            chosen.append(Moment(None, time_))
    return chosen


def drill(
    runs: Path,
    reference: Path,
    plan: list[Moment],
    number: signal.Signals,
    *more: str,
    server: ForkServer | None = None,
) -> tuple[list[list[str]], list[str]]:
    """Kill and resume one run at each moment; return a row per kill, and the differing files.

    A row is [signal, moment, stage, partly written]. If the run ends before a moment, a new run is
    killed.
    """
    kills: list[list[str]] = []
    for moment in plan:
        while (stage := strike(runs, moment, number, *more, server=server)) is None:
            if differing := differences(runs / NAME, reference):
                return kills, differing
            shutil.rmtree(runs)
            moment = Moment(moment.after, moment.seconds / 2)  # the machine is faster now
        left = list(dict.fromkeys(half_written(runs / NAME)))
        more_left = f" and {len(left) - 1} more" if len(left) > 1 else ""
        kills.append([number.name, str(moment), stage, f"{left[0]}{more_left}" if left else "–"])
    resume(runs, *more, server=server)
    return kills, differences(runs / NAME, reference)


def main() -> None:
    """Run the drill and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=30, help="number of SIGKILLs")
    parser.add_argument("--terms", type=int, default=6, help="number of SIGTERMs")
    parser.add_argument("--a-run", type=int, default=5, help="kills per run")
    parser.add_argument("--jobs", type=int, default=1, help="seeds trained at the same time")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    arguments = parser.parse_args()
    more = [f"launch.jobs={arguments.jobs}", f"seeds={list(range(arguments.jobs))}"]
    work, rng = Path(tempfile.mkdtemp(prefix="drill-")), random.Random(arguments.seed)
    seconds, seen = watch(work / "reference", *more)
    print(f"uninterrupted: {seconds:.0f} s, {len(seen)} paths seen partly written\n")
    print("| run | signal | moment | stage | partly written | at the end |")
    print("|---|---|---|---|---|---|", flush=True)
    summary, failed = [], False
    for number, num in ((signal.SIGTERM, arguments.terms), (signal.SIGKILL, arguments.kills)):
        planned = moments(num, seconds, seen, rng)
        num_runs, good = math.ceil(num / arguments.a_run), 0
        for index in range(num_runs):
            plan = planned[index::num_runs]
            runs = work / f"{number.name}-{index}"
            kills, differing = drill(runs, work / "reference" / NAME, plan, number, *more)
            same = f"{runs}: {', '.join(differing)}" if differing else "same"
            for row in kills:
                print(f"| {index + 1} | {' | '.join(row)} | {same} |")
            sys.stdout.flush()
            if differing:
                failed = True
            else:
                good += len(kills)
                shutil.rmtree(runs)
        summary.append(
            f"{number.name}: {good} of {num} end with the files of the uninterrupted run"
        )
    print("\n" + "\n".join(summary))
    if not failed:
        shutil.rmtree(work)
    sys.exit(failed)


if __name__ == "__main__":
    main()
