"""How evaluating grows with the number of items, and how long it takes to begin.

    python scripts/benchmarks/scoring_scale.py scale [--items 1000 10000 58492] [--tokenizer FOLDER]
    python scripts/benchmarks/scoring_scale.py start --tokenizer FOLDER

Both need BBQ in the data folder and score random models: what it costs does not depend on what a
model says.

`scale`: CPU seconds and peak memory of the whole pipeline, from the benchmark's files to result
files, under three conditions and for two checkpoints; every size in a process of its own.
`start`: the command itself, from its start to its first scored items.
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

from selfcorrect.scripts.benchmarks.scoring_peak import random_llama
from selfcorrect.scripts.commands.evaluate import default_data_dir

CONDITIONS = ["Q", "Q+IF", "Q+neutral"]


# --- start -------------------------------------------------------------------------------------

_UNTIL_FIRST_SLICE = """
import os, sys, time
from selfcorrect.scripts.commands import progress

def stop(self, name, stage, done, total):
    print(time.time(), time.process_time(), flush=True)
    if done:
        os._exit(0)

progress.Bars.__call__ = stop
from selfcorrect.scripts.commands.__main__ import main
main()
"""


def measure_start(asked: argparse.Namespace) -> None:
    """From the start of `selfcorrect evaluate` on full BBQ to its first scored items."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(asked.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        random_llama(tokenizer, asked.hidden, asked.layers, "float32").save_pretrained(model)
        tokenizer.save_pretrained(model)
        command = [sys.executable, "-c", _UNTIL_FIRST_SLICE, "evaluate", str(model)]
        command += ["--conditions", "Q,Q+IF", "--experiments", "bbq", "--out", f"{folder}/out"]
        command += ["--data-dir", str(asked.data_dir)]
        rounds = []
        for _ in range(asked.rounds):
            started = time.time()
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=one_thread())
            ready, scored = (map(float, line.split()) for line in done.stdout.split(b"\n")[:2])
            rounds.append([(clock - started, cpu) for clock, cpu in (ready, scored)])
            print(
                "ready to score after {:.2f} s ({:.2f} s CPU), first items scored after {:.2f} s "
                "({:.2f} s CPU)".format(*(number for pair in rounds[-1] for number in pair)),
                flush=True,
            )
    if asked.json:
        asked.json.write_text(json.dumps(rounds) + "\n")


def one_thread() -> dict[str, str]:
    """This environment, with one thread for every library."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


# --- scale -------------------------------------------------------------------------------------


def measure_scale(asked: argparse.Namespace) -> None:
    """One process a size; each prints its line."""
    print(
        "| items | prompts | plan s | first 256 items s | checkpoint 1 s | checkpoint 2 s |", end=""
    )
    print(" ms an item (2nd) | peak MB above the model | kept packs MB |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    rows = []
    for items in asked.items:
        command = [sys.executable, __file__, "one-size", "--items", str(items)]
        command += ["--data-dir", str(asked.data_dir)]
        command += ["--tokenizer", asked.tokenizer] if asked.tokenizer else []
        command += ["--hidden", str(asked.hidden), "--layers", str(asked.layers)]
        row = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, env=one_thread()).stdout
        )
        rows.append(row)
        print(
            f"| {row['items']:,} | {row['prompts']:,} | {row['plan_seconds']:.1f} | "
            f"{row['first_slice_seconds']:.1f} | {row['checkpoint_seconds'][0]:.1f} | "
            f"{row['checkpoint_seconds'][1]:.1f} | "
            f"{1000 * row['checkpoint_seconds'][1] / row['items']:.2f} | "
            f"{row['peak_bytes'] / 1e6:.0f} | {row['kept_bytes'] / 1e6:.0f} |",
            flush=True,
        )
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure_one_size(asked: argparse.Namespace) -> None:
    """The whole pipeline once for each of two models; CPU seconds, and memory above a model."""
    from transformers import AutoTokenizer

    from selfcorrect.evaluate.experiments.wording import load_stimuli
    from selfcorrect.evaluate.measuring.measure import measure
    from selfcorrect.evaluate.measuring.plan import plan_evaluation
    from selfcorrect.evaluate.scoring.token_trie import PackingCache

    torch.set_num_threads(1)
    if asked.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(asked.tokenizer)
    else:
        tokenizer = small_tokenizer(asked.data_dir / "bbq")
    models = [random_llama(tokenizer, asked.hidden, asked.layers, "float32") for _ in range(2)]
    with torch.no_grad():  # the second checkpoint is another one
        models[1].lm_head.weight.mul_(1.1)
    before = resident_bytes()
    started = time.process_time()
    [items] = asked.items
    cells = plan_evaluation(
        asked.data_dir, load_stimuli(), ["bbq"], CONDITIONS, limit=items, style="plain"
    )
    planned = time.process_time() - started
    prepared = PackingCache()
    spent: list[float] = []
    first: list[float] = []

    def progress(name: str, done: int, total: int) -> None:
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
    """What this process has in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def kept_bytes(prepared: Any) -> int:
    """Bytes of the arrays of all packs that are kept for the next checkpoint."""
    packs = [one for packing in prepared._kept.values() for one in packing.packs]
    return sum(getattr(one, name).nbytes for one in packs for name in one.__slots__)


def small_tokenizer(folder: Path) -> Any:
    """Byte-level BPE of at most 4,096 words, learnt from every 50th row of BBQ's *.jsonl.gz.

    A large vocabulary's output head would hide what grows. No row stays in memory.
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
    """Measure one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    modes = parser.add_subparsers(dest="mode", required=True)
    scale = modes.add_parser("scale")
    scale.add_argument("--items", type=int, nargs="+", default=[1000, 10000, 58492])
    scale.set_defaults(run=measure_scale)
    one = modes.add_parser("one-size")
    one.add_argument("--items", type=int, nargs=1)
    one.set_defaults(run=measure_one_size)
    start = modes.add_parser("start")
    start.add_argument("--rounds", type=int, default=3)
    start.set_defaults(run=measure_start)
    for mode in (scale, one, start):
        mode.add_argument("--tokenizer", required=mode is start, help="folder or hub name")
        mode.add_argument("--hidden", type=int, default=32)
        mode.add_argument("--layers", type=int, default=1)
        mode.add_argument("--data-dir", type=Path, default=default_data_dir())
        mode.add_argument("--json", type=Path)
    asked = parser.parse_args()
    asked.run(asked)


if __name__ == "__main__":
    main()
