"""Measure what a cell with reasoning costs: writing, the draws in it, and scoring after it.

    python scripts/benchmarks/scoring_reasoning.py --model FOLDER_OR_GGUF [--items 16] [--json FILE]

Needs BBQ in the data folder. Three tables, of one thread:

- writing: tokens that a CPU second writes, reading the prompts included, in each precision;
- draws: CPU time of one draw beside one step of the model, in each precision, with its vocabulary
  and with one that holds its words several times;
- scoring (`--lengths`): the same items in turns, in one process, scored from the cache and with
  every prompt read again. Texts must be equal, and scores equal up to rounding. The table has wall
  and CPU seconds of the whole cell, and tokens of the scoring passes.
"""
# ruff: noqa: TID253  -- a benchmark: torch is all it is about

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from selfcorrect.evaluate.experiments.wording import load_stimuli
from selfcorrect.evaluate.measuring.plan import Question, plan_evaluation
from selfcorrect.evaluate.prompts.dialogue import before_sample, render, stop_text, with_sample
from selfcorrect.evaluate.prompts.tokenized import Request, token_ids
from selfcorrect.evaluate.scoring.draws import draw, noise_keys
from selfcorrect.evaluate.scoring.engine import Engine, Sample, Sampling
from selfcorrect.evaluate.scoring.load_model import load_model
from selfcorrect.evaluate.scoring.packed import PackedEngine
from selfcorrect.scripts.benchmarks.random_models import save_figures
from selfcorrect.scripts.commands.data_folder import default_data_dir

Answers = list[tuple[Sample, list[float]]]


def cot_questions(data: Path, items: int) -> list[Question]:
    """Return questions of BBQ that are asked with reasoning."""
    cell = plan_evaluation(data, load_stimuli(), ["bbq"], ["Q+IF+CoT"], limit=items).cells[0]
    return list(cell.questions())[:items]


def cot_prompts(scorer: PackedEngine, data: Path, items: int) -> list[str]:
    """Return their prompts, which end where the model's reasoning begins."""
    turns = [before_sample(question.turns) for question in cot_questions(data, items)]
    return [render(scorer.tokenizer, shown) for shown in turns]


def job(scorer: PackedEngine, data: Path, items: int, length: int) -> Callable[[bool], Answers]:
    """Return a function that measures the cell with reasoning, with the cache or without."""
    questions = cot_questions(data, items)
    tokenizer = scorer.tokenizer
    prompts = cot_prompts(scorer, data, items)

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

    def counted(
        keep: torch.Tensor, use_cache: bool = False, in_float32: bool = True, **inputs: Any
    ) -> Any:
        if not in_float32:  # a forward that writes
            return logits(keep, use_cache, in_float32, **inputs)
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


def cpu_ms(function: Callable[[], Any], rounds: int = 10) -> float:
    """Return the CPU milliseconds of a call, after one that is not counted."""
    function()
    started = time.process_time()
    for _ in range(rounds):
        function()
    return 1000 * (time.process_time() - started) / rounds


def writing(
    model: Any, tokenizer: Any, questions: Sequence[str], rows: int, rounds: int
) -> dict[str, Any]:
    """Write after each prompt, at most 256 tokens, `rows` at a time; return tokens and seconds."""
    sampling = Sampling(256, temperature=1.0, seed=0)
    longest = max(map(len, token_ids(tokenizer, questions))) + sampling.max_new_tokens
    scorer = PackedEngine(model, tokenizer, batch_tokens=rows * longest)
    seconds = []
    for _ in range(rounds):  # the first one compares texts with those written alone
        started = time.process_time()
        samples = scorer.sample(questions, questions, sampling, stop_text(tokenizer))
        seconds.append(time.process_time() - started)
    num_tokens = sum(sample.num_tokens for sample in samples)
    return {"tokens": num_tokens, "mean": num_tokens / len(questions), "seconds": seconds}


@torch.no_grad()
def draws(model: Any, tokenizer: Any, questions: Sequence[str], rows: int) -> dict[str, float]:
    """Return CPU milliseconds of a step after the prompts, and of the draw from its logits."""
    prompts = token_ids(tokenizer, questions)[:rows]
    width = min(map(len, prompts))
    tokens = torch.tensor([prompt[-width:] for prompt in prompts])
    cache = model(tokens[:, :-1], use_cache=True, logits_to_keep=1).past_key_values

    def step() -> torch.Tensor:
        logits: torch.Tensor = model(tokens[:, -1:], past_key_values=cache).logits[:, -1]
        cache.crop(-1)
        return logits

    logits, keys = step(), noise_keys(questions[:rows], seed=0)
    steps = iter(range(10**9))
    return {
        "step": cpu_ms(step),
        "draw": cpu_ms(lambda: draw(logits, keys, torch.full_like(keys, next(steps)), 1.0), 50),
    }


def with_words(model: Any, num_words: int) -> Any:
    """Return the model with a vocabulary that repeats its words."""
    table = model.get_input_embeddings().weight.detach()
    model.resize_token_embeddings(num_words, mean_resizing=False)
    for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
        embeddings.weight.data = table[torch.arange(num_words) % len(table)].clone()
    return model


def print_writing(arguments: argparse.Namespace, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """Measure writing and draws in each precision; print and return both tables."""
    table, lines = [], []
    print(
        "| precision | rows | tokens (mean of a text) | CPU s, each round | tokens a CPU second |"
    )
    print("|---|---|---|---|---|")
    for precision in ("float32", "bfloat16"):
        model, tokenizer = load_model(arguments.model, device="cpu")
        model = model.to(getattr(torch, precision))
        row = writing(model, tokenizer, prompts, arguments.rows, arguments.rounds)
        seconds = ", ".join(f"{value:.1f}" for value in row["seconds"])
        print(
            f"| {precision} | {arguments.rows} | {row['tokens']:,} ({row['mean']:.0f}) | {seconds} "
            f"| {row['tokens'] / min(row['seconds']):.0f} |",
            flush=True,
        )
        table.append({"precision": precision, **row})
        for num_words in (model.get_input_embeddings().weight.shape[0], arguments.words):
            cost = draws(with_words(model, num_words), tokenizer, prompts, arguments.rows)
            lines.append(
                f"| {precision} | {num_words:,} | {cost['step']:.1f} | {cost['draw']:.2f} | "
                f"{cost['draw'] / cost['step']:.1%} |"
            )
            table.append({"precision": precision, "words": num_words, **cost})
    print("\n| precision | words | step of the model, ms | draw, ms | draw / step |")
    print("|---|---|---|---|---|")
    print("\n".join(lines), flush=True)
    return table


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder, hub name or GGUF file")
    parser.add_argument("--items", type=int, default=16)
    parser.add_argument("--lengths", type=int, nargs="*", default=[48, 256], help="new tokens")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16, help="texts that are written together")
    parser.add_argument("--words", type=int, default=151_936, help="of the larger vocabulary")
    parser.add_argument("--data-dir", type=Path, default=default_data_dir())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    scorer = PackedEngine(*load_model(arguments.model, device="cpu"))
    table = print_writing(arguments, cot_prompts(scorer, arguments.data_dir, arguments.items))
    if arguments.lengths:
        job(scorer, arguments.data_dir, 4, 4)(True)  # chooses how to compute logits
    print("\n| new tokens | way | wall s | CPU s | scoring s | tokens scored with | largest gap |")
    print("|---|---|---|---|---|---|---|")
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
