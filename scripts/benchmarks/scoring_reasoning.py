"""What going on from the cache saves in a cell with reasoning, beside reading every prompt again.

    python scripts/benchmarks/scoring_reasoning.py --model FOLDER_OR_GGUF [--items 16] [--json FILE]

Needs BBQ in the data folder. The same items are asked under the condition with reasoning in both
ways, in turns, in one process: the texts have to be equal and the scores the same up to rounding.
Counted are wall and CPU seconds of the whole cell, and tokens in the forwards that score.
"""
# ruff: noqa: TID253  -- a benchmark: torch is all it is about

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from selfcorrect.evaluate.experiments.wording import load_stimuli
from selfcorrect.evaluate.measuring.plan import plan_evaluation
from selfcorrect.evaluate.prompts.dialogue import before_sample, render, stop_text, with_sample
from selfcorrect.evaluate.prompts.tokenized import Request
from selfcorrect.evaluate.scoring.engine import Engine, Sample, Sampling
from selfcorrect.evaluate.scoring.load_model import load_model
from selfcorrect.evaluate.scoring.packed import PackedEngine
from selfcorrect.scripts.commands.evaluate import default_data_dir

Answers = list[tuple[Sample, list[float]]]


def job(scorer: PackedEngine, data: Path, items: int, length: int) -> Callable[[bool], Answers]:
    """The cell with reasoning, in chat or plain style as the tokenizer says."""
    cell = plan_evaluation(data, load_stimuli(), ["bbq"], ["Q+IF+CoT"], limit=items).cells[0]
    questions = list(cell.questions())[:items]
    tokenizer = scorer.tokenizer
    prompts = [render(tokenizer, before_sample(one.turns)) for one in questions]

    def then(index: int, sample: Sample) -> Request:
        turns = with_sample(tokenizer, questions[index].turns, sample.text)
        return render(tokenizer, turns), questions[index].options

    sampling = Sampling(length, temperature=1.0, seed=0)
    stop = stop_text(tokenizer)
    keys = [one.item.id for one in questions]

    def run(live: bool) -> Answers:
        if live:
            return scorer.sample_then_score(prompts, keys, then, sampling, stop)
        return Engine.sample_then_score(scorer, prompts, keys, then, sampling, stop)

    return run


@contextmanager
def counting(scorer: PackedEngine) -> Iterator[dict[str, float]]:
    """Tokens, padding included, and seconds of the forwards that score."""
    spent = {"tokens": 0.0, "seconds": 0.0}
    logits = scorer._forwards.logits

    def counted(keep: torch.Tensor, use_cache: bool = False, **inputs: Any) -> Any:
        started = time.perf_counter()
        found = logits(keep, use_cache, **inputs)
        spent["seconds"] += time.perf_counter() - started
        spent["tokens"] += inputs["input_ids"].numel()
        return found

    scorer._forwards.logits = counted  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        scorer._forwards.logits = logits  # type: ignore[method-assign]


def main() -> None:
    """Measure, print a table, and write the figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder, hub name or GGUF file")
    parser.add_argument("--items", type=int, default=16)
    parser.add_argument("--lengths", type=int, nargs="+", default=[48, 256], help="new tokens")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--data-dir", type=Path, default=default_data_dir())
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    scorer = PackedEngine(*load_model(asked.model))
    job(scorer, asked.data_dir, 4, 4)(True)  # tries the ways out
    print("| new tokens | way | wall s | CPU s | scoring s | tokens scored with | largest gap |")
    print("|---|---|---|---|---|---|---|")
    table = []
    for length in asked.lengths:
        run = job(scorer, asked.data_dir, asked.items, length)
        found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
        answers: dict[bool, Answers] = {}
        for _ in range(asked.rounds):
            for live in (False, True):
                with counting(scorer) as spent:
                    wall, cpu = time.perf_counter(), time.process_time()
                    answers[live] = run(live)
                    spent["cpu"] = time.process_time() - cpu
                    spent["wall"] = time.perf_counter() - wall
                found[live].append(spent)
        assert [one for one, _ in answers[True]] == [one for one, _ in answers[False]]
        pairs = zip(answers[True], answers[False], strict=True)
        gap = max(
            abs(a - b) for (_, one), (_, other) in pairs for a, b in zip(one, other, strict=True)
        )
        mean = statistics.mean(one.num_tokens for one, _ in answers[True])
        for live, name in ((False, "read again"), (True, "from the cache")):
            middle = {
                key: statistics.median(spent[key] for spent in found[live])
                for key in found[live][0]
            }
            print(
                f"| {length} (mean {mean:.0f}) | {name} | {middle['wall']:.1f} | "
                f"{middle['cpu']:.1f} | {middle['seconds']:.1f} | {middle['tokens']:,.0f} | "
                f"{gap:.0e} |",
                flush=True,
            )
            table.append({"new_tokens": length, "way": name, "gap": gap, "rounds": found[live]})
    if asked.json:
        asked.json.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
