"""Kills a run at random moments, goes on with the same command, and compares the bytes.

    python -m selfcorrect.scripts.drill_kill [--kills 30] [--terms 6] [--jobs 1] [--seed 0]

A small run of all stages goes through once undisturbed. Then, once for each moment, a new one is
killed there with SIGKILL to all its processes, and the same command ends it. Half of the moments
are spread over the run's time, half over the names under which it was seen writing something that
was not whole yet (a state, a checkpoint, an evaluation file, a figure). `--terms` more get SIGTERM:
they must end with exit 0 and a message. Weights, records, evaluation files, results, statistics and
figures must be those of the undisturbed run, to the byte, with nothing left half-written. Ends with
exit 1, and keeps the folder, where they are not.
"""

import argparse
import hashlib
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

NAME = "small"
RECIPE = [
    f"name={NAME}",
    "models=[{name: tiny, scratch: {model_type: llama, hidden_size: 8, intermediate_size: 16, "
    "num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2, "
    "max_position_embeddings: 128}}]",
    "data.society.corpus.documents=800",
    "data.society.corpus.stereotypes_first=200",
    "data.society.pairs=200",
    "data.society.prompts=100",
    "data.society.blocks_per_template=1",
    "base.trainer.save_steps=5",
    "reward.trainer.save_steps=3",
    "ppo.steps=4",
    "ppo.checkpoints=[0, 2, 4]",
    "ppo.resume_every=1",
    "ppo.trainer.per_device_train_batch_size=8",
    "launch.jobs=1",
    "launch.threads=1",
]
COMPARED = ("*.safetensors", "*.parquet", "checkpoint.json", "statistics.json", "*.png", "*.svg")
PART = re.compile(r"\.(.+)\.\d+-[0-9a-f]+\.part")
LISTENING_SECONDS = 1.0  # from when on a started Python hears SIGTERM, at the latest
GRACE_SECONDS = 30.0  # clusters commonly leave as much between SIGTERM and SIGKILL
POLL_SECONDS = 0.002


def command(runs: Path, *more: str) -> list[str]:
    """The whole run in `runs`, or what is left of it."""
    code = [sys.executable, "-m", "selfcorrect.scripts.cli", "run", "quickstart"]
    return [*code, *RECIPE, *more, "--runs-dir", str(runs)]


@dataclass(frozen=True)
class Moment:
    """When to strike: so many seconds after the start, or as soon as this is being written."""

    seconds: float = 0.0
    writing: str | None = None

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s" if self.writing is None else f"writing {self.writing}"


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


def watch(runs: Path, *more: str) -> tuple[float, list[str]]:
    """Go through undisturbed: seconds, and what was seen half-written, in that order."""
    one = Started(runs, *more)
    seen: dict[str, None] = {}
    for _ in one.each_poll():
        seen |= dict.fromkeys(half_written(runs / NAME))
    if one.process.returncode:
        raise SystemExit(f"the undisturbed run failed: {one.said.read_text()}")
    return one.seconds, list(seen)


def strike(runs: Path, moment: Moment, number: signal.Signals, *more: str) -> str | None:
    """Start the run and strike; what it was doing, or None where it ended before the moment."""
    one = Started(runs, *more)
    for _ in one.each_poll():
        if moment.writing is None:
            reached = one.seconds >= moment.seconds
        else:
            place = runs / NAME / moment.writing  # whole already: it was written between two looks
            reached = moment.writing in half_written(runs / NAME) or place.exists()
        if reached:
            break
    else:
        return None
    one.strike(number)
    if number == signal.SIGTERM:
        said = one.said.read_text()
        if "Report:" in said:
            return None
        if one.process.returncode or "ended as asked (SIGTERM)" not in said:
            raise SystemExit(f"SIGTERM: exit {one.process.returncode}: {said}")
    return stage_of(runs / NAME)


def go_on(runs: Path, *more: str) -> None:
    """The same command again, to its end."""
    one = Started(runs, *more)
    one.process.wait()
    if one.process.returncode:
        raise SystemExit(f"the run does not go on: {one.said.read_text()}")


def moments(num: int, seconds: float, seen: list[str], chance: random.Random) -> list[Moment]:
    """Half of them by time, half by what is written, spread evenly over both."""
    by_time = (num + 1) // 2
    times = [Moment((i + chance.random()) / by_time * seconds) for i in range(by_time)]
    by_name = num - by_time
    places = [int((i + chance.random()) / by_name * len(seen)) for i in range(by_name)]
    return times + [Moment(writing=seen[place]) for place in places]


def drill(
    runs: Path, undisturbed: Path, moment: Moment, number: signal.Signals, *more: str
) -> tuple[str, str, list[str]]:
    """One run, struck once and ended: the stage, what was half-written, and what differs."""
    started = time.monotonic()
    while (stage := strike(runs, moment, number, *more)) is None:
        shutil.rmtree(runs)  # it ended before: the machine has less other work than it had
        moment = Moment(0.9 * min(moment.seconds, time.monotonic() - started), moment.writing)
        started = time.monotonic()
    left = list(dict.fromkeys(half_written(runs / NAME)))
    go_on(runs, *more)
    more_left = f" and {len(left) - 1} more" if len(left) > 1 else ""
    return stage, f"{left[0]}{more_left}" if left else "–", differences(runs / NAME, undisturbed)


def main() -> None:
    """Run the drill and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=30, help="moments of SIGKILL")
    parser.add_argument("--terms", type=int, default=6, help="moments of SIGTERM, besides")
    parser.add_argument("--jobs", type=int, default=1, help="seeds trained side by side")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args()
    more = [f"launch.jobs={given.jobs}", f"seeds={list(range(given.jobs))}"]
    work, chance = Path(tempfile.mkdtemp(prefix="drill-")), random.Random(given.seed)
    seconds, seen = watch(work / "undisturbed", *more)
    print(f"undisturbed: {seconds:.0f} s, {len(seen)} names seen half-written\n")
    print("| | signal | when | stage | left half-written | afterwards |\n|---|---|---|---|---|---|")
    failed = 0
    counts: dict[signal.Signals, list[int]] = {}
    for number, num in ((signal.SIGKILL, given.kills), (signal.SIGTERM, given.terms)):
        first = LISTENING_SECONDS if number == signal.SIGTERM else 0.0
        counts[number] = [0, num]
        for index, moment in enumerate(moments(num, seconds, seen, chance)):
            if moment.writing is None:
                moment = Moment(max(first, moment.seconds))
            runs = work / f"{number.name}-{index}"
            found = drill(runs, work / "undisturbed" / NAME, moment, number, *more)
            stage, left, differing = found
            same = "same" if not differing else f"{runs}: {', '.join(differing)}"
            print(f"| {index + 1} | {number.name} | {moment} | {stage} | {left} | {same} |")
            sys.stdout.flush()
            if differing:
                failed += 1
            else:
                counts[number][0] += 1
                shutil.rmtree(runs)
    for number, (good, num) in reversed(counts.items()):
        print(f"{number.name}: {good} of {num} end in the bytes of the undisturbed run")
    if not failed:
        shutil.rmtree(work)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
