"""Compare the arithmetic of scoring with the machine's fastest matrix product.

    python scripts/benchmarks/scoring_peak.py --tokenizer FOLDER [--limit 200] [--threads 1]
    python scripts/benchmarks/scoring_peak.py --tokenizer FOLDER --model FOLDER --dtype bfloat16

Needs BBQ in the data folder. The model is random unless you name one: answers do not affect the
cost.
Useful operations are counted on one trie of all requests: 2 x parameters of the matrix products per
distinct node, attention to a node's true ancestors, and the output head where a probability is
needed. Everything else (padding, masked pairs, prefixes that are in two packs, norms, rotary
embeddings, softmax, tokenising, packing) adds time but no operations.
"""
# ruff: noqa: TID253  -- a benchmark: torch is all it is about

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from selfcorrect.evaluate.prompts.tokenized import Request, continuations
from selfcorrect.evaluate.scoring.limits import PACK_TOKENS
from selfcorrect.evaluate.scoring.packed import PackedEngine
from selfcorrect.evaluate.scoring.token_trie import pack
from selfcorrect.scripts.benchmarks.random_models import random_llama, save_figures
from selfcorrect.scripts.benchmarks.scoring import planned_requests
from selfcorrect.scripts.commands.data_folder import default_data_dir


def useful_operations(model: Any, tokenizer: Any, requests: Sequence[Request]) -> dict[str, float]:
    """Return the floating-point operations that the answers need, by part of the model."""
    [trie] = pack(continuations(tokenizer, requests), sys.maxsize).packs
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name
    ]
    config = model.config
    seen = int((trie.depths.astype("int64") + 1).sum())  # pairs of a node and an ancestor
    return {
        "nodes": len(trie),
        "layers": 2.0 * sum(layer.weight.numel() for layer in layers) * len(trie),
        "attention": 4.0 * seen * config.hidden_size * config.num_hidden_layers,
        "head": 2.0 * model.lm_head.weight.numel() * len(set(trie.wanted_nodes.tolist())),
    }


def best_product(model: Any, clock: Callable[[], float]) -> tuple[float, str]:
    """Return operations per second of the fastest product: square, or of the model's shapes."""
    linear = {tuple(m.weight.shape) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    shapes = [(size, size, size) for size in (512, 1024, 2048)]
    shapes += [(rows, inner, outer) for outer, inner in linear for rows in (512, 2048)]
    best = (0.0, "")
    weights = next(model.parameters())
    like = {"dtype": weights.dtype, "device": weights.device}
    for rows, inner, outer in shapes:
        left, weight = torch.randn(rows, inner, **like), torch.randn(outer, inner, **like)
        operations = 2.0 * rows * inner * outer
        repeats = max(1, int(4e9 / operations))
        for _ in range(4):
            started = clock()
            for _ in range(repeats):
                torch.nn.functional.linear(left, weight)
            speed = repeats * operations / (clock() - started)
            best = max(best, (speed, f"{rows} x {inner} x {outer}"))
    return best


def measure_peak(arguments: argparse.Namespace) -> None:
    """Print the share of the peak, and the peak in turns with it, since a shared machine varies."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(arguments.threads)
    # CPU seconds of one thread exclude other processes; several threads need wall-clock time.
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    if arguments.model:
        dtype = getattr(torch, arguments.dtype)
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval()
    else:
        model = random_llama(tokenizer, arguments.hidden, arguments.layers, arguments.dtype)
    requests = planned_requests(
        tokenizer, arguments.data_dir, "bbq", ["Q", "Q+IF"], limit=arguments.limit
    )
    useful = useful_operations(model, tokenizer, requests)
    total = useful["layers"] + useful["attention"] + useful["head"]
    scorer = PackedEngine(model, tokenizer, pack_tokens=arguments.pack_tokens)
    scorer.score(requests[:8])  # chooses how to compute logits
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{parameters / 1e6:.0f}M parameters, {arguments.dtype}, {arguments.threads} thread(s), "
        f"{len(requests)} prompts, {useful['nodes']:,} nodes, {total / 1e9:.0f} GFLOP: "
        + ", ".join(f"{useful[k] / total:.1%} {k}" for k in ("layers", "attention", "head"))
    )
    rounds = []
    for _ in range(arguments.rounds):
        peak, shape = best_product(model, clock)
        times = [clock()]
        packing = scorer.prepare(requests)
        times.append(clock())
        scorer.score_packing(packing)
        times.append(clock())
        prepared, scored = times[1] - times[0], times[2] - times[1]
        computed = sum(map(len, packing.packs))
        row = {
            "peak_gflops": peak / 1e9,
            "peak_shape": shape,
            "prepare_seconds": prepared,
            "score_seconds": scored,
            "nodes_computed": computed,
            "share_scoring": total / scored / peak,
            "share_whole": total / (scored + prepared) / peak,
        }
        rounds.append(row)
        print(
            f"peak {peak / 1e9:.0f} GFLOP/s ({shape}); prepared in {prepared:.2f} s, scored in "
            f"{scored:.2f} s ({total / scored / 1e9:.0f} GFLOP/s; {computed / useful['nodes']:.3f} "
            f"x the nodes): {row['share_scoring']:.3f} of the peak, with preparing "
            f"{row['share_whole']:.3f}",
            flush=True,
        )
    save_figures(arguments.json, {"useful": useful, "rounds": rounds})


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True, help="folder or hub name")
    parser.add_argument("--model", help="folder or hub name [default: a random model]")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=int, default=200, help="BBQ items")
    parser.add_argument("--pack-tokens", type=int, default=PACK_TOKENS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data-dir", type=Path, default=default_data_dir())
    parser.add_argument("--json", type=Path)
    measure_peak(parser.parse_args())


if __name__ == "__main__":
    main()
