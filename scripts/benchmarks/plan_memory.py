"""Compare the memory that `selfcorrect plan` estimates with measured peaks of small CPU runs.

    python scripts/benchmarks/plan_memory.py --json plan-memory.json

Every case runs in its own process, on one thread: first the same stage on a tiny model, so that all
libraries are loaded, then the case. The measurement is the peak of resident memory during the case,
less the resident memory before it (Linux's VmHWM, reset through clear_refs). Models are random,
weights are float32 where no type is named, and every prompt and answer has the length that the
estimate assumes.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from selfcorrect.scripts.benchmarks.random_models import save_figures, word_tokenizer

WORDS = 16384
SIZES = {
    "small": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
              "num_attention_heads": 4, "num_key_value_heads": 4},
    "medium": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
               "num_attention_heads": 8, "num_key_value_heads": 4},
    "deep": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 16,
             "num_attention_heads": 6, "num_key_value_heads": 6},
}  # fmt: skip
LORA = {"r": 8, "target_modules": "all-linear"}
METHODS = ("ppo", "grpo", "sft")  # of the policy; other stages are base, reward and evaluation

Case = dict[str, Any]


def make_case(stage: str, model_type: str = "llama", size: str = "medium", **settings: Any) -> Case:
    """Return one run: a stage or a policy method, a model, and settings other than the defaults."""
    fields = {"model_type": model_type, **SIZES[size], "max_position_embeddings": 1024}
    if model_type == "gpt_neox":
        del fields["num_key_value_heads"]
    defaults = {"prompt": 96, "completion": 32, "rows": 8, "steps_per_generation": 2}
    return {"stage": stage, "size": size, "fields": fields, **defaults, **settings}


CASES = [
    make_case("base"),
    make_case("base", "gpt_neox", prompt=224),
    make_case("base", rows=4, prompt=480, checkpointing=True),
    make_case("reward"),
    make_case("reward", "gpt_neox", "small", prompt=224),
    make_case("reward", size="small", lora=LORA),
    make_case("ppo"),
    make_case("ppo", size="small", rows=16, prompt=160),
    make_case("ppo", "gpt_neox", "deep"),
    make_case("ppo", "olmo2"),
    make_case("ppo", "gemma3_text"),
    make_case("ppo", critic="shared"),
    make_case("ppo", size="small", lora=LORA, prompt=160),
    make_case("ppo", size="small", rows=16, prompt=224, checkpointing=True),
    make_case("grpo"),
    make_case("grpo", size="small", rows=16, prompt=160),
    make_case("grpo", "gpt_neox", "deep"),
    make_case("grpo", size="small", lora=LORA, prompt=160),
    make_case("sft"),
    make_case("sft", "gpt_neox", "small", rows=16, prompt=224),
    make_case("sft", size="small", lora=LORA, prompt=160),
    make_case("sft", "gemma3_text"),
    make_case("sft", "gemma3_text", "small", lora=LORA, prompt=160),
    make_case("reward", lora=LORA, frozen="bfloat16"),
    make_case("ppo", lora=LORA, frozen="bfloat16"),
    make_case("ppo", lora=LORA, prompt=160, frozen="bfloat16", checkpointing=True),
    make_case("ppo", bf16=True, frozen="bfloat16"),
    make_case("ppo", trained="bfloat16", frozen="bfloat16"),
    make_case("grpo", lora=LORA, frozen="bfloat16"),
    make_case("sft", trained="bfloat16"),
    make_case("evaluation", prompt=384, completion=128, frozen="float32"),
    make_case("evaluation", prompt=384, completion=128, frozen="bfloat16"),
]


def label(case: Case) -> str:
    """Describe a case in a few words."""
    words = [case["stage"], case["fields"]["model_type"], case["size"]]
    words += [f"{case['rows']}x({case['prompt']}+{case['completion']})"]
    words += [f"critic {case['critic']}"] if "critic" in case else []
    words += ["lora"] if "lora" in case else []
    words += ["checkpointing"] if case.get("checkpointing") else []
    words += ["autocast"] if case.get("bf16") else []
    words += [f"{key} {case[key]}" for key in ("frozen", "trained") if key in case]
    return " ".join(words)


def make_recipe(case: Case, path: str) -> Any:
    """Return a case as a recipe on the model in `path`."""
    from selfcorrect.recipes.load import check_recipe

    rows = {"per_device_train_batch_size": case["rows"]}
    if case.get("checkpointing"):
        rows["gradient_checkpointing"] = True
    if case.get("bf16"):
        rows["bf16"] = True
    held = {"frozen": case.get("frozen", "float32"), "trained": case.get("trained", "float32")}
    policy = {
        **rows, "steps_per_generation": case["steps_per_generation"], "num_iterations": 1,
        "max_completion_length": case["completion"], "critic": case.get("critic", "auto"),
    }  # fmt: skip
    method = case["stage"] if case["stage"] in METHODS else "ppo"
    content = {
        "name": "bench",
        "models": [{"name": "m", "path": path}],
        "data": {"preferences": {"path": "none"}},
        "base": {"method": "sft", "trainer": {**rows, "max_steps": 2}},
        "reward": {"trainer": {**rows, "max_steps": 2}, "lora": case.get("lora")},
        "policy": {
            "method": method, "steps": 2, "checkpoints": [0], "trainer": policy,
            "lora": case.get("lora"),
        },
        "precision": held,
        "evaluate": {"attach": "off"},
    }  # fmt: skip
    return check_recipe(content, "bench")


def estimate(case: Case) -> Any:
    """Return the estimated footprint of a case."""
    from selfcorrect.train.planning.memory import Parallelism
    from selfcorrect.train.planning.model_shape import shape_of
    from selfcorrect.train.planning.settings import Lengths, stage_footprints
    from selfcorrect.train.planning.stage_memory import evaluation_footprint

    lengths = Lengths(case["prompt"], case["prompt"], case["completion"], case["completion"])
    shape = shape_of(case["fields"], "case", WORDS)
    if case["stage"] == "evaluation":
        length = case["prompt"] + case["completion"]
        parallelism = Parallelism(gpu=False)
        return evaluation_footprint(shape, parallelism, case["rows"], length, case["frozen"])
    footprints = stage_footprints(make_recipe(case, "."), shape, lengths, Parallelism(gpu=False))
    stage = "policy" if case["stage"] in METHODS else case["stage"]
    return next(footprint for footprint in footprints if footprint.stage == stage)


def measure(case: Case, malloc: str) -> tuple[int, float]:
    """Return peak bytes and CPU seconds of a case, run in its own process."""
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CI": "1"}
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if malloc == "mapped":
        threads |= {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_MMAP_MAX_": "1000000"}
    output = run_self("--run", json.dumps(case), env={**os.environ, **quiet, **threads})
    measured = json.loads(output.splitlines()[-1])
    return int(measured["bytes"]), float(measured["seconds"])


def run_self(*arguments: str, env: dict[str, str] | None = None) -> str:
    """Run this file in another process and return its stdout; exit where it fails."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"plan_memory {' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


# ---- in the case's own process -------------------------------------------------------------------


def run_case(case: Case) -> None:
    """Run the stage on a tiny model, then on the case's; print the second run's peak and time."""
    import torch

    torch.set_num_threads(1)
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4}  # fmt: skip
    if "num_key_value_heads" in case["fields"]:
        tiny["num_key_value_heads"] = 4
    warm_up = {**case, "rows": 4, "fields": {**case["fields"], **tiny}}
    with tempfile.TemporaryDirectory() as folder:
        for name, content in (("tiny", warm_up), ("case", case)):
            run_self("--save-models", json.dumps(content), str(Path(folder) / name))
        run_stage(warm_up, Path(folder) / "tiny")
        Path("/proc/self/clear_refs").write_text("5")
        before, started = memory("VmRSS"), time.process_time()
        run_stage(case, Path(folder) / "case")
        seconds = time.process_time() - started
        print(json.dumps({"bytes": memory("VmHWM") - before, "seconds": seconds}))


def memory(name: str) -> int:
    """Return a line of Linux's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def make_tokenizer() -> Any:
    """Return a tokenizer of WORDS words, one token per word."""
    special = ["<pad>", "<s>", "</s>", "Human", "Assistant", ":"]
    words = [*special, *(f"w{i}" for i in range(WORDS - len(special)))]
    return word_tokenizer(words, "w0", pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def save_models(case: Case, folder: Path) -> None:
    """Write a random base model and its reward model, the latter as train_reward leaves it."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from selfcorrect.recipes.foundation.atomic_files import write_json

    fields = dict(case["fields"])
    model_type = fields.pop("model_type")
    tokens = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(model_type, **fields, **tokens)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "reward")
    for name in ("base", "reward"):
        make_tokenizer().save_pretrained(folder / name)
    facts = {"score_mean": 0.0, "score_standard_deviation": 1.0}
    write_json(folder / "reward" / "stage.json", facts)


def sample_and_score(case: Case, folder: Path) -> None:
    """Sample a batch of texts and score two options after each, as for Q+IF+CoT."""
    from selfcorrect.evaluate.scoring.engine import Sampling
    from selfcorrect.evaluate.scoring.load_model import load_model
    from selfcorrect.evaluate.scoring.packed import PackedEngine

    engine = PackedEngine(*load_model(folder / "base", dtype=case["frozen"], device="cpu"))
    prompt = " ".join(f"w{i}" for i in range(case["prompt"] - 1))  # after <s>
    keys = [f"row {i}" for i in range(case["rows"])]
    engine.sample_then_score(
        [prompt] * len(keys), keys,
        lambda _, sample: (f"{prompt} {sample.text}", (" w7", " w8")),
        Sampling(case["completion"], temperature=1.0, seed=0),
    )  # fmt: skip


def run_stage(case: Case, folder: Path) -> None:
    """Train two steps of the stage through the package's own code."""
    from transformers import AutoTokenizer

    from selfcorrect.evaluate.prompts.dialogue import AUTO
    from selfcorrect.train.feedback.feedback import Feedback, Preference
    from selfcorrect.train.ppo.prompts import policy_prompt_ids
    from selfcorrect.train.stages import JobFacts
    from selfcorrect.train.stages.base import train_base
    from selfcorrect.train.stages.policy import train_policy
    from selfcorrect.train.stages.reward import train_reward

    if case["stage"] == "evaluation":
        sample_and_score(case, folder)
        return
    recipe = make_recipe(case, str(folder / "base"))
    held = recipe.precision
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")

    def prompt_of(question: str) -> tuple[list[dict[str, str]], int]:
        messages = [{"role": "user", "content": question}]
        return messages, len(policy_prompt_ids(tokenizer, messages, AUTO))

    template_tokens = prompt_of("w1")[1] - 1
    prompt, length = prompt_of(" ".join(f"w{i}" for i in range(case["prompt"] - template_tokens)))
    assert length == case["prompt"]  # some models replace the tokenizer
    answer, other = (  # and the end token
        " ".join(f"w{first + i}" for i in range(case["completion"] - 1)) for first in (0, 5000)
    )
    rows = 4 * case["rows"]
    pairs = [Preference(prompt, answer, other)] * rows
    feedback = Feedback(pairs, [prompt] * rows)
    if case["stage"] == "base":
        job = JobFacts(folder / "job", 0, trained=held.trained)
        train_base(job, recipe, recipe.models[0], pairs)
    elif case["stage"] == "reward":
        shutil.copytree(folder / "base", folder / "job" / "base")
        job = JobFacts(folder / "job", 0, frozen=held.frozen, trained=held.trained)
        train_reward(job, recipe.reward, feedback, tokenizer)
    else:
        record = {"model": "m", "parameters": 1, "seed": 0, "recipe_digest": "", "versions": {},
                  "adapter_of": None}  # fmt: skip
        job = JobFacts(folder, 0, frozen=held.frozen, trained=held.trained)
        train_policy(job, recipe.policy, feedback, tokenizer, record, None)


def main() -> None:
    """Measure the chosen cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--only", default="", help="measure the cases whose label has this text")
    parser.add_argument(
        "--malloc", choices=("mapped", "default"), default="mapped",
        help="mapped: freed blocks go back to the system, so that resident memory is the memory in "
        "use; default: glibc's allocator unchanged",
    )  # fmt: skip
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--save-models", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.save_models:
        case, folder = arguments.save_models
        save_models(json.loads(case), Path(folder))
        return
    if arguments.run:
        run_case(json.loads(arguments.run))
        return
    from selfcorrect.train.planning.model_shape import shape_of

    rows = []
    columns = ["case", "parameters, M", "measured, MB", "planned, MB", "planned / measured"]
    print(f"| {' | '.join([*columns, 'CPU, s', 'moment'])} |")
    print("|---|---|---|---|---|---|---|")
    for case in (case for case in CASES if arguments.only in label(case)):
        footprint, (peak, seconds) = estimate(case), measure(case, arguments.malloc)
        size = shape_of(case["fields"], "case", WORDS).parameters
        rows.append({"case": label(case), "measured": peak, "planned": footprint.total,
                     **footprint.parts, "cpu_seconds": seconds})  # fmt: skip
        print(
            f"| {label(case)} | {size / 1e6:.1f} | {peak / 1e6:.0f} | {footprint.total / 1e6:.0f} "
            f"| {footprint.total / peak:.2f} | {seconds:.1f} | {footprint.moment} |",
            flush=True,
        )
    save_figures(arguments.json, rows)


if __name__ == "__main__":
    main()
