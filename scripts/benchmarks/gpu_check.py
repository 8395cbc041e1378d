"""Check and time this project on one GPU, against the plain ways of lm-eval and TRL.

    python scripts/benchmarks/gpu_check.py [--json FILE] [--shapes 1.1B 7B] [--minutes 8]

Needs a GPU, and neither network nor data: models have random weights, prompts come from the
synthetic society. A shape that would begin after `--minutes` is left out, and the table says so.
Parts:

- tests: those marked `gpu`, and those of weights in 4 bits where bitsandbytes is installed
- packed: log-probabilities of the packed engine against rows read alone by the model, in float32
  and bfloat16, on the smallest shape: largest and mean distance, and choices that differ
- scoring: prompts a second, against a padded row for every option (lm-eval's HFLM where lm-eval is
  installed, else the same batches by transformers), and the share of the fastest matrix product
- sampling: tokens a second, against `generate`
- PPO: seconds a step with LoRA and a frozen reward model in bfloat16, against TRL's GRPO on the
  same number of completions; peak memory, and what `selfcorrect plan` says of it
"""
# ruff: noqa: TID253  -- a benchmark: torch is all it is about

import argparse
import gc
import importlib.util
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selfcorrect.evaluate.prompts.tokenized import Continuation, Request, continuations, token_ids
from selfcorrect.evaluate.scoring.engine import Sampling
from selfcorrect.evaluate.scoring.packed import PackedEngine
from selfcorrect.recipes.foundation.atomic_files import write_json
from selfcorrect.recipes.society.benchmarks import ensure_benchmarks
from selfcorrect.recipes.society.settings import SocietySettings
from selfcorrect.recipes.society.tokenizer import make_tokenizer
from selfcorrect.recipes.society.world import make_world
from selfcorrect.scripts.benchmarks.plan_memory import make_recipe
from selfcorrect.scripts.benchmarks.scoring import harness, planned_requests
from selfcorrect.scripts.benchmarks.scoring_peak import best_product, useful_operations

WORDS = 32_000
LLAMA = {
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2},
    "1.1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
             "num_attention_heads": 32, "num_key_value_heads": 4},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 32},
}  # fmt: skip
LORA = {"r": 16, "target_modules": "all-linear"}
PROMPT, COMPLETION, ROWS, ROLLOUT = 96, 64, 8, 32  # of a PPO step

Row = tuple[str, str, str]  # what, measured, compared with


class Machine:
    """The device, and clocks that wait for it."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.is_gpu = device.startswith("cuda")
        self.name = torch.cuda.get_device_name() if self.is_gpu else platform.processor() or "CPU"

    def now(self) -> float:
        """Return wall-clock seconds at which all work so far is done."""
        if self.is_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, job: Callable[[], Any], rounds: int = 3) -> float:
        """Return the median seconds of a job, after one that is not counted."""
        spent = []
        for _ in range(1 + rounds):
            started = self.now()
            job()
            spent.append(self.now() - started)
        return statistics.median(spent[1:])

    def peak(self) -> float:
        """Return the largest memory of tensors since `free`, in bytes; NaN on a CPU."""
        return float(torch.cuda.max_memory_allocated()) if self.is_gpu else float("nan")

    def free(self) -> None:
        """Give back the memory of models that nothing refers to, and begin a new peak."""
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def llama(shape: str, dtype: str, machine: Machine, kind: str = "AutoModelForCausalLM") -> Any:
    """Return a random Llama, made on the device."""
    import transformers

    config = transformers.LlamaConfig(
        **LLAMA[shape], vocab_size=WORDS, max_position_embeddings=1024, pad_token_id=0,
        num_labels=1, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(machine.device):
        model = getattr(transformers, kind).from_config(config, dtype=getattr(torch, dtype))
    return model.eval()


def society(folder: Path, prompts: int) -> tuple[Any, list[Request]]:
    """Return the tokenizer of a synthetic society, and that many BBQ prompts with options."""
    settings = SocietySettings(seed=0)
    ensure_benchmarks(settings, folder)
    tokenizer = make_tokenizer(make_world(settings))
    tokenizer.model_max_length = 1024
    requests = planned_requests(tokenizer, folder, "bbq", ["Q", "Q+IF"], limit=prompts // 2)
    return tokenizer, requests[:prompts]


def run_tests() -> list[Row]:
    """Run the tests marked `gpu`, and those of weights in 4 bits."""
    root = Path(__file__).parents[2]
    if importlib.util.find_spec("pytest") is None or not (root / "tests").is_dir():
        return [("tests marked gpu", "not run: they need pytest and a clone", "")]
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist"]
    rows: list[Row] = []
    for name, chosen in (
        ("tests marked gpu", ["-m", "gpu", "tests"]),
        ("tests of 4 bits", ["tests/train/stages/test_four_bits.py"]),
    ):
        command = [*pytest, *chosen]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        print(done.stdout[-3000:], done.stderr[-1000:])
        rows.append((name, (done.stdout.strip().splitlines() or ["no output"])[-1], ""))
    return rows


def scored(logs: torch.Tensor, option: Continuation) -> float:
    """Return the log-probability of an option from those of its row (tokens, vocabulary)."""
    at = torch.arange(option.start, len(option.tokens), device=logs.device)
    ids = torch.tensor([int(token) for token in option.tokens[option.start :]], device=logs.device)
    return float(logs[at - 1, ids].sum())


@torch.no_grad()
def read_alone(model: Any, tokenizer: Any, requests: Sequence[Request]) -> list[list[float]]:
    """Return log-probabilities by definition: one option at a time, no padding, no mask."""

    def read(option: Continuation) -> float:
        logits = model(torch.tensor([list(option.row)], device=model.device)).logits[0]
        return scored(logits.float().log_softmax(dim=-1), option)

    return [[read(o) for o in options] for options in continuations(tokenizer, requests)]


def check_packed(
    machine: Machine, shape: str, tokenizer: Any, requests: Sequence[Request]
) -> list[Row]:
    """Compare the packed engine with rows read alone, in both precisions."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        model = llama(shape, dtype, machine)
        packed = PackedEngine(model, tokenizer).score(requests)
        alone = read_alone(model, tokenizer, requests)
        gaps = np.abs(
            np.concatenate([np.subtract(*pair) for pair in zip(packed, alone, strict=True)])
        )
        flips = sum(int(np.argmax(a) != np.argmax(b)) for a, b in zip(packed, alone, strict=True))
        distance = f"largest distance {gaps.max():.1e} nats, mean {gaps.mean():.1e}"
        rows.append(
            (f"packed, {shape}, {dtype}", distance, f"{flips} of {len(packed)} choices differ")
        )
        del model
        machine.free()
    return rows


def check_scoring(
    machine: Machine, shape: str, tokenizer: Any, requests: Sequence[Request]
) -> list[Row]:
    """Time scoring against one padded row for each option."""
    model = llama(shape, "bfloat16", machine)
    engine = PackedEngine(model, tokenizer)
    packing = engine.prepare(requests)
    ours = machine.seconds(lambda: engine.score_packing(packing))
    useful = useful_operations(model, tokenizer, requests)
    operations = useful["layers"] + useful["attention"] + useful["head"]
    peak, product = best_product(model, machine.now)
    if importlib.util.find_spec("lm_eval"):
        other, name = partial(harness(model, tokenizer), requests), "lm-eval"
    else:
        other, name = partial(padded_rows, model, tokenizer, requests), "padded rows"
    theirs = machine.seconds(other, rounds=1)
    return [
        (
            f"scoring, {shape}, bfloat16",
            f"{len(requests) / ours:.0f} prompts/s",
            f"{theirs / ours:.1f} times {name} ({len(requests) / theirs:.0f} prompts/s)",
        ),
        (
            f"scoring, {shape}, share of the peak",
            f"{operations / ours / peak:.2f}",
            f"peak {peak / 1e12:.1f} TFLOP/s ({product})",
        ),
    ]


@torch.no_grad()
def padded_rows(
    model: Any, tokenizer: Any, requests: Sequence[Request], rows_at_once: int = 32
) -> None:
    """Score as lm-eval does: a row for every option, sorted by length, padded, all logits."""
    rows = [option for options in continuations(tokenizer, requests) for option in options]
    rows.sort(key=lambda option: -len(option.row))
    for first in range(0, len(rows), rows_at_once):
        part = rows[first : first + rows_at_once]
        width = len(part[0].row)
        tokens = torch.tensor([[*o.row, *[0] * (width - len(o.row))] for o in part])
        logs = model(tokens.to(model.device)).logits.float().log_softmax(dim=-1)
        for logprobs, option in zip(logs, part, strict=True):
            scored(logprobs, option)


def check_sampling(
    machine: Machine, shape: str, tokenizer: Any, prompts: Sequence[str], num_tokens: int
) -> list[Row]:
    """Time samples of exactly `num_tokens` tokens against `generate` on the same batch."""
    model = llama(shape, "bfloat16", machine)
    model.generation_config.eos_token_id = None
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = token_ids(tokenizer, prompts)
    width = max(map(len, rows))
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=model.device)
    mask = (tokens != 0).long()
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": num_tokens, "pad_token_id": 0}

    def generate() -> None:
        model.generate(
            tokens, attention_mask=mask, min_new_tokens=num_tokens, use_cache=True, **settings
        )

    engine = PackedEngine(model, tokenizer)
    sampling = Sampling(num_tokens, temperature=1.0, seed=0)
    written = [sample.num_tokens for sample in engine.sample(prompts, prompts, sampling)]
    ours = machine.seconds(lambda: engine.sample(prompts, prompts, sampling), rounds=2)
    theirs = machine.seconds(generate, rounds=2)
    speeds = sum(written) / ours, len(prompts) * num_tokens / theirs
    return [
        (
            f"sampling, {shape}, {len(prompts)} rows, bfloat16",
            f"{speeds[0]:.0f} tokens/s",
            f"{speeds[0] / speeds[1]:.1f} times generate ({speeds[1]:.0f} tokens/s)",
        )
    ]


def check_ppo(machine: Machine, shape: str, tokenizer: Any, steps: int = 2) -> list[Row]:
    """Time steps of PPO and of TRL's GRPO, and compare PPO's peak memory with the plan's."""
    spent, peaks = {}, {}
    for algorithm in ("PPO", "GRPO"):
        machine.free()
        with tempfile.TemporaryDirectory() as folder:
            trainer, marks = make_trainer(machine, shape, tokenizer, algorithm, 1 + steps, folder)
            trainer.train()
        spent[algorithm] = (marks[-1] - marks[0]) / (len(marks) - 1)
        peaks[algorithm] = machine.peak()
        del trainer
    machine.free()
    planned = planned_memory(machine, shape).total
    return [
        (
            f"PPO step, {shape}, LoRA, {ROLLOUT} completions",
            f"{spent['PPO']:.2f} s",
            f"{spent['PPO'] / spent['GRPO']:.2f} of GRPO's {spent['GRPO']:.2f} s",
        ),
        (
            f"PPO memory, {shape}",
            f"{peaks['PPO'] / 1e9:.1f} GB",
            f"planned {planned / 1e9:.1f} GB; GRPO {peaks['GRPO'] / 1e9:.1f} GB",
        ),
    ]


def make_trainer(
    machine: Machine, shape: str, tokenizer: Any, algorithm: str, steps: int, folder: str
) -> tuple[Any, list[float]]:
    """Return a trainer with LoRA, and the list to which it adds the time of each step's end."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from selfcorrect.train.ppo import PPOConfig, PPOTrainer, RewardModelScorer

    marks: list[float] = []
    updates = ROLLOUT // ROWS

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
            if state.global_step % updates == 0:
                marks.append(machine.now())

    settings: dict[str, Any] = {
        "output_dir": folder, "max_steps": steps * updates, "per_device_train_batch_size": ROWS,
        "steps_per_generation": updates, "gradient_accumulation_steps": 1, "num_iterations": 1,
        "beta": 0.05, "max_completion_length": COMPLETION, "learning_rate": 1e-6,
        "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "bf16": True,
        "gradient_checkpointing": True, "use_cpu": not machine.is_gpu, "seed": 0,
    }  # fmt: skip
    words = [word for word in tokenizer.get_vocab() if not word.startswith("<")]
    draw = np.random.default_rng(0)
    prompts = [" ".join(draw.choice(words, PROMPT - 8)) for _ in range(4 * ROLLOUT)]
    classifier = llama(shape, "bfloat16", machine, "AutoModelForSequenceClassification")
    reward = RewardModelScorer(classifier, tokenizer)
    arguments: Any
    if algorithm == "PPO":
        arguments, trainer = PPOConfig(**settings), PPOTrainer
    else:
        arguments, trainer = GRPOConfig(**settings, num_generations=4), GRPOTrainer
    return trainer(
        llama(shape, "bfloat16", machine), reward, arguments, processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": prompts}), callbacks=[Clock()],
        peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM"),
    ), marks  # fmt: skip


def planned_memory(machine: Machine, shape: str) -> Any:
    """Return what `selfcorrect plan` says of that PPO."""
    from selfcorrect.train.planning.memory import Parallelism
    from selfcorrect.train.planning.model_shape import shape_of
    from selfcorrect.train.planning.settings import Lengths, stage_footprints

    case = {
        "stage": "ppo", "rows": ROWS, "completion": COMPLETION, "lora": LORA, "bf16": True,
        "checkpointing": True, "steps_per_generation": ROLLOUT // ROWS, "frozen": "bfloat16",
    }  # fmt: skip
    fields = {"model_type": "llama", "max_position_embeddings": 1024, **LLAMA[shape]}
    lengths = Lengths(PROMPT, PROMPT, COMPLETION, COMPLETION)
    footprints = stage_footprints(
        make_recipe(case, "."),
        shape_of(fields, "case", WORDS),
        lengths,
        Parallelism(gpu=machine.is_gpu),
    )
    return next(footprint for footprint in footprints if footprint.stage == "policy")


def main() -> None:
    """Run the parts, print the table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=LLAMA, default=["1.1B", "7B"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=8, help="nothing begins after these")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128, help="of each sample")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("gpu_check: this machine has no GPU that torch can use")
    started = time.monotonic()
    machine = Machine(arguments.device)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, requests = society(Path(folder), arguments.prompts)
    first = arguments.shapes[0]
    prompts = [prompt for prompt, _ in requests[:64]]
    jobs: list[tuple[str, Callable[[], list[Row]]]] = []
    jobs += [] if arguments.no_tests else [("tests marked gpu", run_tests)]
    jobs += [("packed", partial(check_packed, machine, first, tokenizer, requests[:64]))]
    for shape in arguments.shapes:
        shared = (machine, shape, tokenizer)
        jobs += [
            (f"scoring, {shape}", partial(check_scoring, *shared, requests)),
            (f"sampling, {shape}", partial(check_sampling, *shared, prompts, arguments.tokens)),
            (f"PPO, {shape}", partial(check_ppo, *shared)),
        ]
    for name, job in jobs:
        if time.monotonic() - started > 60 * arguments.minutes:
            rows.append((name, "left out: no time", ""))
            continue
        try:
            rows += job()
        except (RuntimeError, ValueError, ImportError) as error:  # the other parts still run
            rows.append((name, "failed", " ".join(str(error).split())[:200]))
        machine.free()
        print(f"{name}: {time.monotonic() - started:.0f} s since the start", flush=True)
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    print(f"\n{machine.name}, {versions}\n\n| part | measured | beside |\n|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    if arguments.json is not None:
        write_json(arguments.json, {"device": machine.name, "versions": versions, "rows": rows})


if __name__ == "__main__":
    main()
