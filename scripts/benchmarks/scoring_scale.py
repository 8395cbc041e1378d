"""Measure how evaluation scales with the number of items, and how long it takes to start.

    python scripts/benchmarks/scoring_scale.py scale [--items 1000 10000 58492] [--tokenizer FOLDER]
    python scripts/benchmarks/scoring_scale.py start --tokenizer FOLDER

Both need BBQ in the data folder and score random models, whose answers do not affect the cost.

`scale`: CPU seconds and peak memory from the benchmark's files to result files, under three
conditions and for two checkpoints; every size runs in its own process.
`start`: seconds from the start of `selfcorrect evaluate` to its first scored items.
"""
# ruff: noqa: TID253  -- a benchmark: torch is all it is about

import argparse
import gzip
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from selfcorrect.scripts.benchmarks.random_models import random_llama, save_figures
from selfcorrect.scripts.commands.data_folder import default_data_dir

CONDITIONS = ["Q", "Q+IF", "Q+neutral"]


# --- start -------------------------------------------------------------------------------------

_UNTIL_FIRST_SLICE = """
import os, sys, time
from selfcorrect.scripts.commands import progress

def stop(self, stage, done, total):
    print(time.time(), time.process_time(), flush=True)
    if done:
        os._exit(0)

progress.Bars.__call__ = stop
from selfcorrect.scripts.commands.__main__ import main
main()
"""


def measure_start(arguments: argparse.Namespace) -> None:
    """Time `selfcorrect evaluate` on full BBQ up to its first scored items."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        random_llama(tokenizer, arguments.hidden, arguments.layers).save_pretrained(model)
        tokenizer.save_pretrained(model)
        command = [sys.executable, "-c", _UNTIL_FIRST_SLICE, "evaluate", str(model)]
        command += ["--conditions", "Q,Q+IF", "--experiments", "bbq", "--out", f"{folder}/out"]
        command += ["--data-dir", str(arguments.data_dir)]
        rounds = []
        for _ in range(arguments.rounds):
            started = time.time()
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=one_thread())
            ready, scored = (map(float, line.split()) for line in done.stdout.split(b"\n")[:2])
            rounds.append([(clock - started, cpu) for clock, cpu in (ready, scored)])
            times = [f"{seconds:.2f} s ({cpu:.2f} s CPU)" for seconds, cpu in rounds[-1]]
            print("ready to score after {}, first items scored after {}".format(*times), flush=True)
    save_figures(arguments.json, rounds)


def one_thread() -> dict[str, str]:
    """Return this environment, with one thread for every library."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


# --- scale -------------------------------------------------------------------------------------


def measure_scale(arguments: argparse.Namespace) -> None:
    """Measure every size in its own process, and print the table."""
    print(
        "| items | prompts | plan s | first 256 items s | checkpoint 1 s | checkpoint 2 s "
        "| ms an item (2nd) | peak MB above the model | kept packs MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    rows = []
    for items in arguments.items:
        command = [sys.executable, __file__, "one-size", "--items", str(items)]
        command += ["--data-dir", str(arguments.data_dir)]
        command += ["--tokenizer", arguments.tokenizer] if arguments.tokenizer else []
        command += ["--hidden", str(arguments.hidden), "--layers", str(arguments.layers)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=one_thread())
        row = json.loads(done.stdout)
        rows.append(row)
        first, second = row["checkpoint_seconds"]
        seconds = [row["plan_seconds"], row["first_slice_seconds"], first, second]
        print(
            f"| {row['items']:,} | {row['prompts']:,} "
            f"| {' | '.join(f'{number:.1f}' for number in seconds)} "
            f"| {1000 * second / row['items']:.2f} "
            f"| {row['peak_bytes'] / 1e6:.0f} | {row['kept_bytes'] / 1e6:.0f} |",
            flush=True,
        )
    save_figures(arguments.json, rows)


def measure_one_size(arguments: argparse.Namespace) -> None:
    """Run the pipeline for two models; print CPU seconds, and memory above that of the models."""
    from transformers import AutoTokenizer

    from selfcorrect.evaluate.experiments.wording import load_stimuli
    from selfcorrect.evaluate.measuring.measure import measure
    from selfcorrect.evaluate.measuring.plan import plan_evaluation
    from selfcorrect.evaluate.scoring.token_trie import PackingCache

    torch.set_num_threads(1)
    if arguments.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    else:
        tokenizer = small_tokenizer(arguments.data_dir / "bbq")
    models = [random_llama(tokenizer, arguments.hidden, arguments.layers) for _ in range(2)]
    with torch.no_grad():  # the second checkpoint differs
        models[1].lm_head.weight.mul_(1.1)
    before = resident_bytes()
    started = time.process_time()
    [items] = arguments.items
    cells = plan_evaluation(
        arguments.data_dir, load_stimuli(), ["bbq"], CONDITIONS, limit=items, style="plain"
    )
    planned = time.process_time() - started
    prepared = PackingCache()
    spent: list[float] = []
    first: list[float] = []

    def progress(name: str, done: float, total: int) -> None:
        if done and not first:
            first.append(time.process_time() - started)

    with tempfile.TemporaryDirectory() as folder:
        for index, model in enumerate(models):
            started = time.process_time()
            measure(cells, model, tokenizer, Path(folder) / str(index), progress, prepared)
            spent.append(time.process_time() - started)
    number = len(cells.cells[0].items)
    row = {
        "items": number,
        "prompts": number * len(cells.cells),
        "plan_seconds": planned,
        "first_slice_seconds": first[0],
        "checkpoint_seconds": spent,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
        "kept_bytes": kept_bytes(prepared),
    }
    print(json.dumps(row))


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def kept_bytes(prepared: Any) -> int:
    """Return bytes of all packs that are kept for the next checkpoint."""
    packs = [pack for packing in prepared._kept.values() for pack in packing.packs]
    return sum(getattr(pack, name).nbytes for pack in packs for name in pack.__slots__)


def small_tokenizer(folder: Path) -> Any:
    """Return a byte-level BPE of at most 4,096 words, trained on every 50th row of BBQ.

    The output head of a large vocabulary would dominate the cost.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts: list[str] = []
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    for path in sorted(folder.glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            texts += [json.loads(line)["context"] for line in itertools.islice(lines, 0, None, 50)]
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


def main() -> None:
    """Measure the chosen mode."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    modes = parser.add_subparsers(dest="mode", required=True)
    scale = modes.add_parser("scale")
    scale.add_argument("--items", type=int, nargs="+", default=[1000, 10000, 58492])
    scale.set_defaults(run=measure_scale)
    one_size = modes.add_parser("one-size")
    one_size.add_argument("--items", type=int, nargs=1)
    one_size.set_defaults(run=measure_one_size)
    start = modes.add_parser("start")
    start.add_argument("--rounds", type=int, default=3)
    start.set_defaults(run=measure_start)
    for mode in (scale, one_size, start):
        mode.add_argument("--tokenizer", required=mode is start, help="folder or hub name")
        mode.add_argument("--hidden", type=int, default=32)
        mode.add_argument("--layers", type=int, default=1)
        mode.add_argument("--data-dir", type=Path, default=default_data_dir())
        mode.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
