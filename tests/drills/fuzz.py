"""Feed odd input to every reader of user input, and count the outcomes.

    python -m tests.drills.fuzz [--examples 300] [--only TEXT] [--random] [--json FILE]

Every input must be accepted, or refused by an InputError or RunFailure of one line. Any other error
would be a traceback for the user, and is printed with its input. Hypothesis generates the examples,
the same ones every time unless --random is given. Exit 1 if a target fails.
"""

import argparse
import contextlib
import io
import json
import logging
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings

from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from tests.drills.damage_run import small_run
from tests.drills.fuzz_files import file_targets
from tests.drills.fuzz_targets import (
    Target,
    dialogue_targets,
    option_targets,
    recipe_targets,
)


def run_target(target: Target, examples: int, derandomize: bool = True) -> Counter[str]:
    """Return how many examples were read and how many refused; raise any other error."""
    name, strategy, read = target
    counted: Counter[str] = Counter()

    @settings(
        max_examples=examples, derandomize=derandomize, database=None, deadline=None,
        suppress_health_check=list(HealthCheck), print_blob=False,
    )  # fmt: skip
    @given(strategy)
    def promise(example: Any) -> None:
        try:
            with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(example)
        except (InputError, RunFailure) as error:
            if "\n" in str(error) or not str(error).strip():
                raise AssertionError(
                    f"{name}: error is not one line: {str(error)[:300]!r}"
                ) from None
            counted["refused"] += 1
        else:
            counted["read"] += 1

    promise()
    return counted


def all_targets(folder: Path) -> list[Target]:
    """Return all targets; those of run files use a small run that is trained first."""
    from transformers import AutoTokenizer

    run = small_run(folder / "runs")
    room = folder / "room"
    room.mkdir()
    checkpoint = run / "tiny" / "seed-0" / "ppo" / "checkpoint-2"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    plain = AutoTokenizer.from_pretrained(checkpoint)
    if not tokenizer.chat_template:
        raise AssertionError("the society's tokenizer has no chat template")
    plain.chat_template = None
    return [
        *recipe_targets(room),
        *dialogue_targets(plain, tokenizer),
        *option_targets(room),
        *file_targets(room, checkpoint, run / "benchmarks"),
    ]


def main() -> None:
    """Print a row per target; exit 1 if one of them fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--examples", type=int, default=300, help="examples per target")
    parser.add_argument("--only", default="", help="only targets whose name has this text")
    parser.add_argument("--random", action="store_true", help="different examples every time")
    parser.add_argument("--json", type=Path, help="also write the counts to this file")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    table: dict[str, Counter[str]] = {}
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        print(
            "| input | examples | read | refused in one line | traceback |\n|---|---|---|---|---|"
        )
        for target in all_targets(Path(folder)):
            if arguments.only not in target[0]:
                continue
            try:
                counted = run_target(target, arguments.examples, not arguments.random)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                failed += 1
                notes = " ".join(getattr(error, "__notes__", []))
                print(f"| {target[0]} | FAILED: {type(error).__name__}: {error} {notes} |")
                continue
            table[target[0]] = counted
            print(f"| {target[0]} | {counted.total():,} | {counted['read']:,} | "
                  f"{counted['refused']:,} | 0 |", flush=True)  # fmt: skip
    total = sum(table.values(), Counter[str]())
    print(f"| all | {total.total():,} | {total['read']:,} | {total['refused']:,} | {failed} |")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
