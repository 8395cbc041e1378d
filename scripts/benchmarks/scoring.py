"""Compare the speed of scoring with lm-eval: same model, prompts, options and threads.

    python scripts/benchmarks/scoring.py --tokenizer FOLDER [--limit 200] [--json FILE]

Needs lm-eval (`pip install 'selfcorrect[lm-eval]'`), and BBQ and law-school data in the data
folder. The model is random, because its answers do not affect the cost. Both run every job in
turns, and CPU seconds of the whole scoring are compared, including tokenising and packing:

- stock: lm-eval's own BBQ requests, a log-likelihood for every spelling of "unknown"
- letters: the three letters under Q and Q+IF
- orders: letters in three orders of the options by us, against one order by lm-eval
- law: Q over all students, row by row by lm-eval, the distinct ones with weights by us
"""
# ruff: noqa: TID253  -- a benchmark: torch is all it is about

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from selfcorrect.evaluate.experiments.bbq.files import read_rows
from selfcorrect.evaluate.experiments.law_school import read_students
from selfcorrect.evaluate.experiments.wording import load_stimuli
from selfcorrect.evaluate.measuring.plan import plan_evaluation
from selfcorrect.evaluate.prompts.dialogue import render
from selfcorrect.evaluate.prompts.tokenized import Request
from selfcorrect.evaluate.scoring.packed import PackedEngine
from selfcorrect.scripts.benchmarks.random_models import random_llama, save_figures
from selfcorrect.scripts.commands.data_folder import default_data_dir

UNKNOWN = (
    "Unknown", "Cannot answer", "Can't be determined", "Cannot be determined", "Can't answer",
    "Not known", "Not enough info", "Not enough information", "Not answerable", "Undetermined",
)  # fmt: skip


def stock_requests(data: Path, limit: int) -> list[Request]:
    """Return lm-eval's multiple-choice BBQ: context, question, and every option it scores."""
    requests = []
    for row in read_rows(data / "bbq")[:limit]:
        people = [answer for i, answer in enumerate(row.answers) if i != row.unknown]
        answers = [people[0], people[1], row.answers[row.unknown], *UNKNOWN]
        options = tuple(f" {answer}" for answer in dict.fromkeys(answers))
        requests.append((f"{row.context}\n\nQ: {row.question}\nA:", options))
    return requests


def planned_requests(
    tokenizer: Any, data: Path, experiment: str, conditions: Sequence[str], **settings: Any
) -> list[Request]:
    """Return the prompts of `selfcorrect evaluate`, in plain text."""
    cells = plan_evaluation(
        data, load_stimuli(), [experiment], conditions, style="plain", **settings
    ).cells
    return [
        (render(tokenizer, question.turns, "plain"), question.options)
        for cell in cells
        for question in cell.questions()
    ]


def harness(model: Any, tokenizer: Any) -> Callable[[Sequence[Request]], list[list[float]]]:
    """Return lm-eval's scorer of the same model."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16, max_length=2048)

    def score(requests: Sequence[Request]) -> list[list[float]]:
        pairs = [(prompt, option) for prompt, options in requests for option in options]
        instances = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        answers = iter(lm.loglikelihood(instances, disable_tqdm=True))
        return [[next(answers)[0] for _ in options] for _, options in requests]

    return score


def seconds(job: Callable[[], Any]) -> tuple[float, Any]:
    """Return CPU seconds of a job, and its result."""
    started = time.process_time()
    result = job()
    return time.process_time() - started, result


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True, help="folder or hub name")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--limit", type=int, default=200, help="BBQ items")
    parser.add_argument("--students", type=int, default=300, help="law students scored by lm-eval")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data-dir", type=Path, default=default_data_dir())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    from transformers import AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    hidden = arguments.hidden
    model = random_llama(tokenizer, hidden, arguments.layers, intermediate=int(hidden * 8 / 3))
    lm_eval = harness(model, tokenizer)
    ours = PackedEngine(model, tokenizer)
    data, limit = arguments.data_dir, arguments.limit
    letters = planned_requests(tokenizer, data, "bbq", ["Q", "Q+IF"], limit=limit)
    orders = planned_requests(tokenizer, data, "bbq", ["Q", "Q+IF"], limit=limit, permutations=3)
    law = planned_requests(tokenizer, data, "law_school", ["Q"])
    students = read_students(data / "law_school" / "law_data.csv")
    everyone = sum(student.count for student in students)
    # Two prompts per student; lm-eval scores a part of them, and its time is scaled up.
    share = 2 * everyone / min(arguments.students, len(law))
    stock = stock_requests(data, limit)
    jobs = [
        ("stock", stock, stock, 1.0),
        ("letters", letters, letters, 1.0),
        ("law", law[: arguments.students], law, share),
    ]
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.1f}M parameters, {len(tokenizer):,} words, 1 thread, {limit} items")
    print("| job | lm-eval, CPU s | ours, CPU s | times as fast (range of turns) | largest gap |")
    print("|---|---|---|---|---|")
    table: dict[str, dict[str, Any]] = {}
    for name, slow, fast, scale in jobs:
        slow_seconds, fast_seconds, gap = [], [], 0.0
        for _ in range(arguments.rounds):
            spent, expected = seconds(partial(lm_eval, slow))
            slow_seconds.append(spent * scale)
            spent, actual = seconds(partial(ours.score, fast))
            fast_seconds.append(spent)
            for pair in zip(expected, actual, strict=False):
                gap = max(gap, *(abs(a - b) for a, b in zip(*pair, strict=True)))
        table[name] = compared(name, slow_seconds, fast_seconds, gap)
    three = [seconds(partial(ours.score, orders))[0] for _ in range(arguments.rounds)]
    table["orders"] = compared("orders", table["letters"]["lm_eval_cpu_seconds"], three, None)
    price = statistics.median(three) / statistics.median(table["letters"]["ours_cpu_seconds"])
    print(f"\nThree orders cost us {price:.2f} times as much as one.")
    save_figures(arguments.json, table)


def compared(
    name: str, slow: Sequence[float], fast: Sequence[float], gap: float | None
) -> dict[str, Any]:
    """Print a row of the table; return the seconds of every turn, and their ratios."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    print(
        f"| {name} | {statistics.median(slow):.1f} | {statistics.median(fast):.1f} | "
        f"{statistics.median(ratios):.1f} ({min(ratios):.1f}-{max(ratios):.1f}) | "
        f"{'' if gap is None else f'{gap:.0e}'} |",
        flush=True,
    )
    return {
        "lm_eval_cpu_seconds": list(slow),
        "ours_cpu_seconds": list(fast),
        "ratios": ratios,
        "largest_gap": gap,
    }


if __name__ == "__main__":
    main()
