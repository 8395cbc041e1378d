"""Measure where a run's CPU seconds go: its stages, and evaluation and answers within them.

    python scripts/benchmarks/phases.py RECIPE [key=value ...]

Carries the recipe out in a temporary folder, all in this process, and prints CPU seconds (user and
system) of each phase, without the phases inside it, and the share of attached evaluation in PPO.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STARTED = time.process_time()

from selfcorrect.evaluate.measuring import measure  # noqa: E402
from selfcorrect.scripts.commands import run as command  # noqa: E402
from selfcorrect.train import job, run  # noqa: E402
from selfcorrect.train.stages import policy  # noqa: E402
from selfcorrect.train.stages.checkpoints import KeepCheckpoints  # noqa: E402

PHASES = {
    "base model": (job, "train_base"),
    "reward model": (job, "train_reward"),
    "preparing PPO": (job, "train_policy"),
    "PPO": (policy, "train_or_resume"),
    "answers for the gold score": (KeepCheckpoints, "_judge_answers"),
    "attached evaluation": (job, "measure_during_training"),
    "attached evaluation: scoring": (measure, "_score_slice"),
    "attached evaluation: sampling": (measure, "_sample_slice"),
    "line per checkpoint": (job, "log_checkpoint"),
    "measuring what is left": (run, "evaluate_run"),
    "statistics and report": (command, "show"),
}

seconds = {"imports": time.process_time() - STARTED}
inner: list[float] = []


def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, which then adds its own CPU seconds to its phase."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        started = time.process_time()
        inner.append(0.0)
        try:
            return function(*arguments, **keywords)
        finally:
            spent = time.process_time() - started
            seconds[name] = seconds.get(name, 0.0) + spent - inner.pop()
            if inner:
                inner[-1] += spent

    return call


def main() -> None:
    """Run the recipe and print the table."""
    recipe, *overrides = sys.argv[1:]
    for name, (owner, attribute) in PHASES.items():
        setattr(owner, attribute, timed(name, getattr(owner, attribute)))
    with tempfile.TemporaryDirectory() as folder:
        carry_out = timed("the rest", command.run)
        carry_out(recipe, [*overrides, "launch.jobs=1"], Path(folder), None)
    total = time.process_time()
    for name, spent in seconds.items():
        print(f"| {name} | {spent:.1f} | {spent / total:.1%} |")
    attached = sum(spent for name, spent in seconds.items() if name.startswith("attached"))
    print(f"total {total:.1f} s; attached evaluation {attached / seconds['PPO']:.0%} of PPO")


if __name__ == "__main__":
    main()
