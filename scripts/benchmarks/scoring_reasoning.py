"""Measure how much the key-value cache saves when a cell has reasoning before the answer.

    python scripts/benchmarks/scoring_reasoning.py --model FOLDER_OR_GGUF [--items 16] [--json FILE]

Needs BBQ in the data folder. The same items are measured with reasoning in turns, in one process:
scored from the cache, and with every prompt read again. Texts must be equal, and scores equal up to
rounding. The table has wall and CPU seconds of the whole cell, and tokens of the scoring passes.
"""
# ruff: noqa: TID253  -- a benchmark: torch is all it is about

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from selfcorrect.evaluate.experiments.wording import load_stimuli
from selfcorrect.evaluate.measuring.plan import plan_evaluation
from selfcorrect.evaluate.prompts.dialogue import before_sample, render, stop_text, with_sample
from selfcorrect.evaluate.prompts.tokenized import Request
from selfcorrect.evaluate.scoring.engine import Engine, Sample, Sampling
from selfcorrect.evaluate.scoring.load_model import load_model
from selfcorrect.evaluate.scoring.packed import PackedEngine
from selfcorrect.scripts.benchmarks.random_models import save_figures
from selfcorrect.scripts.commands.data_folder import default_data_dir

Answers = list[tuple[Sample, list[float]]]


def job(scorer: PackedEngine, data: Path, items: int, length: int) -> Callable[[bool], Answers]:
    """Return a function that measures the cell with reasoning, with the cache or without."""
    cell = plan_evaluation(data, load_stimuli(), ["bbq"], ["Q+IF+CoT"], limit=items).cells[0]
    questions = list(cell.questions())[:items]
    tokenizer = scorer.tokenizer
    prompts = [render(tokenizer, before_sample(question.turns)) for question in questions]

    def then(index: int, sample: Sample) -> Request:
        turns = with_sample(tokenizer, questions[index].turns, sample.text)
        return render(tokenizer, turns), questions[index].options

    sampling = Sampling(length, temperature=1.0, seed=0)
    stop = stop_text(tokenizer)
    keys = [question.item.id for question in questions]

    def run(live: bool) -> Answers:
        if live:
            return scorer.sample_then_score(prompts, keys, then, sampling, stop)
        return Engine.sample_then_score(scorer, prompts, keys, then, sampling, stop)

    return run


@contextmanager
def counting(scorer: PackedEngine) -> Iterator[dict[str, float]]:
    """Count tokens, padding included, and seconds of the scoring passes."""
    spent = {"tokens": 0.0, "seconds": 0.0}
    logits = scorer._forwards.logits

    def counted(keep: torch.Tensor, use_cache: bool = False, **inputs: Any) -> Any:
        started = time.perf_counter()
        output = logits(keep, use_cache, **inputs)
        spent["seconds"] += time.perf_counter() - started
        spent["tokens"] += inputs["input_ids"].numel()
        return output

    scorer._forwards.logits = counted  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        scorer._forwards.logits = logits  # type: ignore[method-assign]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder, hub name or GGUF file")
    parser.add_argument("--items", type=int, default=16)
    parser.add_argument("--lengths", type=int, nargs="+", default=[48, 256], help="new tokens")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--data-dir", type=Path, default=default_data_dir())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    scorer = PackedEngine(*load_model(arguments.model))
    job(scorer, arguments.data_dir, 4, 4)(True)  # chooses how to compute logits
    print("| new tokens | way | wall s | CPU s | scoring s | tokens scored with | largest gap |")
    print("|---|---|---|---|---|---|---|")
    table = []
    for length in arguments.lengths:
        run = job(scorer, arguments.data_dir, arguments.items, length)
        rounds: dict[bool, list[dict[str, float]]] = {False: [], True: []}
        answers: dict[bool, Answers] = {}
        for _ in range(arguments.rounds):
            for live in (False, True):
                with counting(scorer) as spent:
                    wall, cpu = time.perf_counter(), time.process_time()
                    answers[live] = run(live)
                    spent["cpu"] = time.process_time() - cpu
                    spent["wall"] = time.perf_counter() - wall
                rounds[live].append(spent)
        assert [text for text, _ in answers[True]] == [text for text, _ in answers[False]]
        pairs = zip(answers[True], answers[False], strict=True)
        gap = max(abs(a - b) for (_, p), (_, q) in pairs for a, b in zip(p, q, strict=True))
        mean = statistics.mean(text.num_tokens for text, _ in answers[True])
        for live, name in ((False, "read again"), (True, "from the cache")):
            medians = pd.DataFrame(rounds[live]).median()
            print(
                f"| {length} (mean {mean:.0f}) | {name} | {medians['wall']:.1f} | "
                f"{medians['cpu']:.1f} | {medians['seconds']:.1f} | {medians['tokens']:,.0f} | "
                f"{gap:.0e} |",
                flush=True,
            )
            table.append({"new_tokens": length, "way": name, "gap": gap, "rounds": rounds[live]})
    save_figures(arguments.json, table)


if __name__ == "__main__":
    main()
