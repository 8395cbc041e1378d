"""Feeds odd input to everything that reads what people write, and counts what comes of it.

    python -m tests.drills.fuzz [--examples 300] [--only TEXT] [--random] [--json FILE]

The promise: whatever is read ends in success, or in an InputError or RunFailure of one line. Any
other error is a traceback for the user, and is printed with the input that makes it. Hypothesis
draws the examples, the same ones every time, unless --random is given; exit 1 where one fails.
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
    """How many examples were read, and how many refused in one line; raises what else happens."""
    name, strategy, take = target
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
                take(example)
        except (InputError, RunFailure) as error:
            if "\n" in str(error) or not str(error).strip():
                raise AssertionError(f"{name}: not one line: {str(error)[:300]!r}") from None
            counted["refused"] += 1
        else:
            counted["read"] += 1

    promise()
    return counted


def all_targets(folder: Path) -> list[Target]:
    """Every target, on a small run made on the spot."""
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
    """Print a line a target; exit 1 where one of them breaks the promise."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--examples", type=int, default=300, help="a target")
    parser.add_argument("--only", default="", help="targets whose name holds this text")
    parser.add_argument("--random", action="store_true", help="other examples every time")
    parser.add_argument("--json", type=Path, help="write the counts there too")
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    table: dict[str, Counter[str]] = {}
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        print(
            "| input | examples | read | refused in one line | traceback |\n|---|---|---|---|---|"
        )
        for target in all_targets(Path(folder)):
            if asked.only not in target[0]:
                continue
            try:
                counted = run_target(target, asked.examples, not asked.random)
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
    if asked.json is not None:
        asked.json.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
