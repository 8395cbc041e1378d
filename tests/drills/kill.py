"""Kills a run at random moments, goes on with the same command, and compares the bytes.

    python -m tests.drills.kill [--kills 30] [--terms 6] [--jobs 1] [--seed 0]

A small run of all stages goes through once undisturbed. Then others are killed at moments spread
over its time, with SIGKILL to all their processes, and gone on with, five times each. Every second
moment is one at which the undisturbed run was seen writing something that was not whole yet (a
state, a checkpoint, an evaluation file, a figure). `--terms` more get SIGTERM: they must end with
exit 0 and a message. In the end weights, records, evaluation files, results, statistics and figures
must be those of the undisturbed run, to the byte, with nothing left half-written. Where they are
not, the folder is kept and the exit is 1.
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

from tests.support.small_runs import command

NAME = "small"
COMPARED = ("*.safetensors", "*.parquet", "checkpoint.json", "statistics.json", "*.png", "*.svg")
PART = re.compile(r"\.(.+)\.\d+-[0-9a-f]+\.part")
LISTENING_SECONDS = 2.0  # from when on a started Python hears SIGTERM, at the latest
GRACE_SECONDS = 30.0  # clusters commonly leave as much between SIGTERM and SIGKILL
POLL_SECONDS = 0.002


@dataclass(frozen=True)
class Moment:
    """When to strike: so many seconds after this was first seen half-written, or the start."""

    after: str | None = None
    seconds: float = 0.0

    def __str__(self) -> str:
        if self.after is None:
            return f"{self.seconds:.1f} s after the start"
        return f"{self.seconds:.1f} s after {self.after}" if self.seconds else f"at {self.after}"


def half_written(run: Path) -> Iterator[str]:
    """What is not whole at this moment, by its path in the run, without what makes it unique."""
    for place, folders, files in os.walk(run):
        here = os.path.relpath(place, run)
        for name in [*folders, *files]:
            if part := PART.fullmatch(name):
                yield os.path.normpath(f"{here}/{part[1]}")
        if here.endswith(".work"):  # transformers' states have no temporary name
            for name in folders:
                if not (Path(place) / name / "complete").exists():
                    yield f"{here}/{name}"
        folders[:] = [n for n in folders if n != "benchmarks" and not PART.fullmatch(n)]


def left_behind(run: Path) -> list[str]:
    """Working files and folders, which a run that has ended does not have."""
    ends = (".part", ".parts", ".work")
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.name.endswith(ends))


def stage_of(run: Path) -> str:
    """Which stage a killed run was at, job by job, from what it left on disk."""
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
    """Whether a process held the folder when it was killed: its lock still says so."""
    lock = folder / ".lock"
    return lock.exists() and lock.stat().st_size > 0


def contents(run: Path) -> dict[str, str]:
    """Digest of every file that is to be the same, by its path in the run."""
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for pattern in COMPARED
        for path in run.rglob(pattern)
    }


def differences(run: Path, undisturbed: Path) -> list[str]:
    """The files that only one of two ended runs has, or that differ; and what is left behind."""
    one, other = contents(run), contents(undisturbed)
    differing = [path for path in {**one, **other} if one.get(path) != other.get(path)]
    return sorted(differing) + left_behind(run)


class Started:
    """A run in a process group of its own; its output goes beside its folder."""

    def __init__(self, runs: Path, *more: str) -> None:
        runs.mkdir(parents=True, exist_ok=True)
        self.said = runs.with_name(f"{runs.name}.txt")
        with self.said.open("w") as output:
            self.process = subprocess.Popen(
                command(runs, *more),
                cwd=runs.parent,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def each_poll(self) -> Iterator[None]:
        """Once every little while, until the run has ended."""
        while self.process.poll() is None:
            yield
            time.sleep(POLL_SECONDS)

    def strike(self, number: signal.Signals) -> None:
        """Send a signal to all processes of the run, and wait for the first one's end."""
        os.killpg(self.process.pid, number)
        try:
            self.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise SystemExit(f"{number.name}: not ended after {GRACE_SECONDS:.0f} s") from None


def watch(runs: Path, *more: str) -> tuple[float, dict[str, float]]:
    """Go through undisturbed: seconds, and when what was first seen half-written, in that order."""
    one = Started(runs, *more)
    seen: dict[str, float] = {}
    for _ in one.each_poll():
        for name in half_written(runs / NAME):
            seen.setdefault(name, one.seconds)
    if one.process.returncode:
        raise SystemExit(f"the undisturbed run failed: {one.said.read_text()}")
    return one.seconds, seen


def strike(runs: Path, moment: Moment, number: signal.Signals, *more: str) -> str | None:
    """Start the run and strike; what it was doing, or None where it ended before the moment."""
    place = runs / NAME / (moment.after or "")
    there = place.exists()  # from the run before; else it may be written between two looks
    one, since = Started(runs, *more), 0.0 if moment.after is None else math.inf
    for _ in one.each_poll():
        if math.isinf(since):
            seen = str(moment.after) in half_written(runs / NAME) or (not there and place.exists())
            since = one.seconds if seen else since
        late_enough = number != signal.SIGTERM or one.seconds >= LISTENING_SECONDS
        if late_enough and one.seconds >= since + moment.seconds:
            break
    else:
        return None
    one.strike(number)
    if number == signal.SIGTERM:
        said = one.said.read_text()
        if "Report:" in said:
            return None
        if one.process.returncode or "stopped by SIGTERM" not in said:
            raise SystemExit(f"SIGTERM: exit {one.process.returncode}: {said}")
    return stage_of(runs / NAME)


def go_on(runs: Path, *more: str) -> None:
    """The same command again, to its end."""
    one = Started(runs, *more)
    one.process.wait()
    if one.process.returncode:
        raise SystemExit(f"the run does not go on: {one.said.read_text()}")


def moments(
    num: int, seconds: float, seen: dict[str, float], chance: random.Random
) -> list[Moment]:
    """Spread evenly over the run: in turn at some time, and just as something is being written."""
    found = []
    for index in range(num):
        time_ = (index + chance.random()) / num * seconds
        before = [name for name, first in seen.items() if first <= time_]
        if index % 2 and seen:
            found.append(Moment((before or list(seen))[-1]))
        elif before:
            found.append(Moment(before[-1], time_ - seen[before[-1]]))
        else:
            found.append(Moment(None, time_))
    return found


def drill(
    runs: Path, undisturbed: Path, plan: list[Moment], number: signal.Signals, *more: str
) -> tuple[list[list[str]], list[str]]:
    """One run, struck at each moment and gone on with each time; then what differs at its end.

    Each strike is told as [signal, when, stage, left half-written]. Where a run had ended before,
    another one is struck.
    """
    told: list[list[str]] = []
    for moment in plan:
        while (stage := strike(runs, moment, number, *more)) is None:
            if differing := differences(runs / NAME, undisturbed):
                return told, differing
            shutil.rmtree(runs)
            moment = Moment(moment.after, moment.seconds / 2)  # the machine has become faster
        left = list(dict.fromkeys(half_written(runs / NAME)))
        more_left = f" and {len(left) - 1} more" if len(left) > 1 else ""
        told.append([number.name, str(moment), stage, f"{left[0]}{more_left}" if left else "–"])
    go_on(runs, *more)
    return told, differences(runs / NAME, undisturbed)


def main() -> None:
    """Run the drill and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=30, help="moments of SIGKILL")
    parser.add_argument("--terms", type=int, default=6, help="moments of SIGTERM, besides")
    parser.add_argument("--a-run", type=int, default=5, help="strikes that each run has to take")
    parser.add_argument("--jobs", type=int, default=1, help="seeds trained side by side")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args()
    more = [f"launch.jobs={given.jobs}", f"seeds={list(range(given.jobs))}"]
    work, chance = Path(tempfile.mkdtemp(prefix="drill-")), random.Random(given.seed)
    seconds, seen = watch(work / "undisturbed", *more)
    print(f"undisturbed: {seconds:.0f} s, {len(seen)} names seen half-written\n")
    print("| run | signal | when | stage | left half-written | in the end |")
    print("|---|---|---|---|---|---|", flush=True)
    summary, failed = [], False
    for number, num in ((signal.SIGTERM, given.terms), (signal.SIGKILL, given.kills)):
        planned = moments(num, seconds, seen, chance)
        num_runs, good = math.ceil(num / given.a_run), 0
        for index in range(num_runs):
            plan = planned[index::num_runs]
            runs = work / f"{number.name}-{index}"
            told, differing = drill(runs, work / "undisturbed" / NAME, plan, number, *more)
            same = f"{runs}: {', '.join(differing)}" if differing else "same"
            for row in told:
                print(f"| {index + 1} | {' | '.join(row)} | {same} |")
            sys.stdout.flush()
            if differing:
                failed = True
            else:
                good += len(told)
                shutil.rmtree(runs)
        summary.append(f"{number.name}: {good} of {num} end in the bytes of the undisturbed run")
    print("\n" + "\n".join(summary))
    if not failed:
        shutil.rmtree(work)
    sys.exit(failed)


if __name__ == "__main__":
    main()
