"""Compare CPU seconds of a PPO step with TRL's GRPO, and with the PPO that TRL removed.

    python scripts/benchmarks/ppo.py --rounds 3 --json ppo-speed.json
    python scripts/benchmarks/ppo.py --trl18 PYTHON   # PYTHON: of a venv with torch and trl==1.8.*
    python scripts/benchmarks/ppo.py --shapes smollm2 --rounds 1 --steps 1   # float32 and bfloat16

Every arm runs in its own process, on one thread, and the arms take turns (A B C A B C ...), so that
a slow minute of the machine affects all of them. CPU seconds are the process's own; phases are
wall-clock seconds. All arms share random Llama models, one random reward model, the prompts, and
the numbers of completions, of tokens per completion and of optimizer updates per step. Completions
are ragged: the policy samples the end token with the same probability at each position, and the
learning rate is too small to change that. Arms that end in -bf16 hold frozen weights and multiply
in bfloat16; their share of peak is that of a product in bfloat16.

Model FLOPs count work on real tokens only: 2 N for a token's forward pass and 6 N for its training
(4 N if only adapters are trained). N is the number of parameters in matrix products: all but the
input embeddings, and without the LM head for critic and reward model.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from selfcorrect.scripts.benchmarks.random_models import save_figures

WORKER = Path(__file__).with_name("ppo_worker.py")
BOTH_PRECISIONS = ["grpo-lora", "ppo-lora", "grpo-lora-bf16", "ppo-lora-bf16"]
IN_FLOAT32 = ["grpo", "ppo-shared", "ppo-separate", "grpo-lora", "ppo-lora"]
SHAPES = {
    "quickstart": IN_FLOAT32, "larger": IN_FLOAT32,
    "smollm2": BOTH_PRECISIONS, "smollm2-third": BOTH_PRECISIONS,  # a third of its layers
}  # fmt: skip
# Each arm, and the arm that its CPU time is divided by
ARMS = {
    "grpo": "grpo", "ppo-shared": "grpo", "ppo-separate": "grpo",
    "grpo-lora": "grpo-lora", "ppo-lora": "grpo-lora", "trl18-ppo": "grpo",
    "grpo-lora-bf16": "grpo-lora-bf16", "ppo-lora-bf16": "grpo-lora-bf16",
}  # fmt: skip
TARGETS = {
    ("ppo-shared", "grpo"): 1.0, ("ppo-separate", "grpo"): 1.3, ("ppo-lora", "grpo-lora"): 1.3,
    ("ppo-separate", "trl18-ppo"): 0.6, ("ppo-lora-bf16", "grpo-lora-bf16"): 1.3,
    ("ppo-lora-bf16", "ppo-lora"): 0.33,
}  # fmt: skip
WARMUP = 1  # PPO steps before the measured steps


def run_worker(python: str, job: str, **options: Any) -> dict[str, Any]:
    """Run the worker in its own process and return the JSON of its last line."""
    quiet = {"HF_HUB_OFFLINE": "1", "CI": "1", "TOKENIZERS_PARALLELISM": "false",
             "TRL_EXPERIMENTAL_SILENCE": "1"}  # fmt: skip
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [python, str(WORKER), job, *words], env={**os.environ, **quiet, **threads},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"ppo: {job} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(shape: str, pythons: dict[str, str], rounds: int, steps: int) -> dict[str, Any]:
    """Run all arms in turn, `rounds` times; return a summary of each."""
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in pythons}
    dtypes = {arm: "bfloat16" if arm.endswith("-bf16") else "float32" for arm in pythons}
    peaks: dict[str, list[float]] = {dtype: [] for dtype in sorted(set(dtypes.values()))}
    with tempfile.TemporaryDirectory() as folder:
        run_worker(sys.executable, "prepare", shape=shape, folder=folder)
        for turn in range(rounds):
            for dtype, rates in peaks.items():
                rates.append(run_worker(sys.executable, "peak", dtype=dtype)["flops_per_second"])
            for arm, python in pythons.items():
                job = {"shape": shape, "folder": folder, "steps": steps, "warmup": WARMUP}
                runs[arm].append(run_worker(python, arm, **job))
                spent = statistics.median(runs[arm][-1]["cpu_seconds"])
                print(f"{shape} {turn + 1}/{rounds} {arm}: {spent:.2f} s", file=sys.stderr)
    peak = {dtype: statistics.median(rates) for dtype, rates in peaks.items()}
    arms = {arm: summary(of_arm, peak[dtypes[arm]]) for arm, of_arm in runs.items()}
    for arm, figures in arms.items():
        base = runs.get(ARMS[arm])
        if base is not None:
            turns = [_cpu(a) / _cpu(b) for a, b in zip(runs[arm], base, strict=True)]
            figures["ratio"] = statistics.median(turns)
            figures["ratio_range"] = [min(turns), max(turns)]
    return {"peak_gflops": {d: rate / 1e9 for d, rate in peak.items()}, "arms": arms}


def summary(runs: list[dict[str, Any]], peak: float) -> dict[str, Any]:
    """Return one arm's figures: medians over its runs, and the range of all measured steps."""
    steps = [seconds for run in runs for seconds in run["cpu_seconds"]]
    tokens = statistics.mean(run["tokens_per_step"] for run in runs)
    cpu = statistics.median(steps)
    phases = [run["phases"] for run in runs if run["phases"]]
    return {
        "cpu_seconds": cpu,
        "cpu_seconds_range": [min(steps), max(steps)],
        "phases": {p: statistics.median(run[p] for run in phases) for p in phases[0]},
        "tokens_per_step": tokens,
        "tokens_per_cpu_second": tokens / cpu,
        "peak_rss_mb": statistics.median(run["peak_rss_mb"] for run in runs),
        "share_of_peak": runs[0]["flops_per_token"] * tokens / cpu / peak,
    }


def _cpu(run: dict[str, Any]) -> float:
    return statistics.median(run["cpu_seconds"])


def table(shape: str, result: dict[str, Any]) -> str:
    """Return one shape's figures as a Markdown table; "-" for a phase that is not measured."""
    lines = [
        f"{shape}: matrix-multiply peak "
        + ", ".join(f"{rate:.0f} GFLOP/s in {d}" for d, rate in result["peak_gflops"].items()),
        "",
        "| arm | CPU s a step (range) | over | ratio (range of turns) "
        "| generate / score / train, s | tokens/s | peak RSS, MB | share of peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, figures in result["arms"].items():
        low, high = figures["cpu_seconds_range"]
        ratio = ""
        if "ratio" in figures:
            ratio = "{:.2f} ({:.2f}-{:.2f})".format(figures["ratio"], *figures["ratio_range"])
        phases = " / ".join(f"{s:.2f}" if s else "-" for s in figures["phases"].values())
        lines.append(
            f"| {arm} | {figures['cpu_seconds']:.2f} ({low:.2f}-{high:.2f}) | {ARMS[arm]} | {ratio}"
            f" | {phases} | {figures['tokens_per_cpu_second']:.0f}"
            f" | {figures['peak_rss_mb']:.0f} | {figures['share_of_peak']:.0%} |"
        )
    return "\n".join(lines)


def verdicts(result: dict[str, Any]) -> list[str]:
    """Return a line for each target ratio: whether it was reached."""
    arms, lines = result["arms"], []
    for (arm, base), target in TARGETS.items():
        if not arms.keys() >= {arm, base}:
            continue
        ratio = arms[arm]["cpu_seconds"] / arms[base]["cpu_seconds"]
        if ARMS[arm] == base:
            ratio = arms[arm]["ratio"]  # of turns side by side
        reached = "reached" if ratio <= target else "MISSED"
        lines.append(f"{arm} over {base}: {ratio:.2f}, target {target}: {reached}")
    return lines


def main() -> None:
    """Measure, and print the tables and whether the targets are reached."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2, help="turns of all arms")
    parser.add_argument("--steps", type=int, default=4, help="measured PPO steps per run")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["quickstart", "larger"])
    of_any = [arm for arm in ARMS if arm != "trl18-ppo"]
    parser.add_argument("--arms", nargs="+", choices=of_any, help="by default, those of the shape")
    parser.add_argument("--trl18", metavar="PYTHON", help="python of a venv with trl==1.8.*")
    parser.add_argument("--json", type=Path, help="save the figures here")
    arguments = parser.parse_args()
    report: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread used",
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
        "shapes": {},
    }
    for shape in arguments.shapes:
        pythons = dict.fromkeys(arguments.arms or SHAPES[shape], sys.executable)
        if arguments.trl18:
            pythons["trl18-ppo"] = arguments.trl18
        result = measure(shape, pythons, arguments.rounds, arguments.steps)
        report["shapes"][shape] = result
        print("\n".join([table(shape, result), "", *verdicts(result), ""]), flush=True)
    save_figures(arguments.json, report)


if __name__ == "__main__":
    main()
