"""How close is `selfcorrect plan` to the truth? Peak memory of small CPU runs beside the plan's.

    python scripts/benchmarks/plan_memory.py --json plan-memory.json

Every case runs in a process of its own, on one thread: first the same stage on a tiny model, so
that all libraries are in, then the case; what counts is the highest resident memory during the case
over the resident memory before it (Linux's VmHWM, set back through clear_refs). Models are random,
weights are float32; every prompt and answer has the length that the plan assumes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

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


def case(stage: str, kind: str = "llama", size: str = "medium", **more: Any) -> dict[str, Any]:
    """One run: a stage, a model, and settings that differ from the usual."""
    fields = {"model_type": kind, **SIZES[size], "max_position_embeddings": 1024}
    if kind in ("gpt_neox",):
        del fields["num_key_value_heads"]
    usual = {"prompt": 96, "completion": 32, "rows": 8, "steps_per_generation": 2}
    return {"stage": stage, "size": size, "fields": fields, **usual, **more}


CASES = [
    case("sft"),
    case("sft", "gpt_neox", prompt=224),
    case("sft", rows=4, prompt=480, checkpointing=True),
    case("reward"),
    case("reward", "gpt_neox", "small", prompt=224),
    case("reward", size="small", lora=LORA),
    case("ppo"),
    case("ppo", size="small", rows=16, prompt=160),
    case("ppo", "gpt_neox", "deep"),
    case("ppo", "olmo2"),
    case("ppo", critic="shared"),
    case("ppo", size="small", lora=LORA, prompt=160),
    case("ppo", size="small", rows=16, prompt=224, checkpointing=True),
]


def measure(one: dict[str, Any], malloc: str) -> tuple[int, float]:
    """Peak bytes and CPU seconds of one case, in a process of its own."""
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CI": "1"}
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if malloc == "mapped":
        threads |= {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_MMAP_MAX_": "1000000"}
    done = subprocess.run(
        [sys.executable, __file__, "--worker", json.dumps(one)],
        env={**os.environ, **quiet, **threads}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"plan_memory: {label(one)} failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return int(found["bytes"]), float(found["seconds"])


def planned(one: dict[str, Any]) -> Any:
    """The footprint that the plan has for a case."""
    from selfcorrect.train.planning.memory import Engine
    from selfcorrect.train.planning.model_shape import shape_of
    from selfcorrect.train.planning.settings import Lengths, stage_footprints

    lengths = Lengths(one["prompt"], one["prompt"], one["completion"], one["completion"])
    shape = shape_of(one["fields"], "case", WORDS)
    every = stage_footprints(recipe_of(one, "."), shape, lengths, Engine(gpu=False))
    return next(stage for stage in every if stage.stage == one["stage"].replace("sft", "base"))


def recipe_of(one: dict[str, Any], path: str) -> Any:
    """A case as a recipe on a given model."""
    from selfcorrect.recipes.load import check_recipe

    rows = {"per_device_train_batch_size": one["rows"]}
    extra = {"gradient_checkpointing": True} if one.get("checkpointing") else {}
    ppo = {
        **rows, **extra, "steps_per_generation": one["steps_per_generation"], "num_iterations": 1,
        "max_completion_length": one["completion"], "critic": one.get("critic", "auto"),
    }  # fmt: skip
    content = {
        "name": "bench",
        "models": [{"name": "m", "path": path}],
        "data": {"preferences": {"path": "none"}},
        "base": {"method": "sft", "trainer": {**rows, **extra, "max_steps": 2}},
        "reward": {"trainer": {**rows, **extra, "max_steps": 2}, "lora": one.get("lora")},
        "ppo": {"steps": 2, "checkpoints": [0], "trainer": ppo, "lora": one.get("lora")},
        "evaluate": {"attach": "off"},
    }
    return check_recipe(content, "bench")


def label(one: dict[str, Any]) -> str:
    """A case in a few words."""
    words = [one["stage"], one["fields"]["model_type"], one["size"]]
    words += [f"{one['rows']}x({one['prompt']}+{one['completion']})"]
    words += [f"critic {one['critic']}"] if "critic" in one else []
    words += ["lora"] if "lora" in one else []
    words += ["checkpointing"] if one.get("checkpointing") else []
    return " ".join(words)


# ---- in the process of its own -------------------------------------------------------------------


def work(one: dict[str, Any]) -> None:
    """Run a stage on a tiny model, then as asked; print the peak between."""
    import torch

    torch.set_num_threads(1)
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4}  # fmt: skip
    if "num_key_value_heads" in one["fields"]:
        tiny["num_key_value_heads"] = 4
    with tempfile.TemporaryDirectory() as folder:
        warm = {**one, "rows": 2, "fields": {**one["fields"], **tiny}}
        prepare({"tiny": warm, "case": one}, Path(folder))
        run_stage(warm, Path(folder) / "tiny")
        Path("/proc/self/clear_refs").write_text("5")
        before, started = memory("VmRSS"), time.process_time()
        run_stage(one, Path(folder) / "case")
        seconds = time.process_time() - started
        print(json.dumps({"bytes": memory("VmHWM") - before, "seconds": seconds}))


def memory(name: str) -> int:
    """A line of Linux's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def make_tokenizer() -> Any:
    """One token a word, of WORDS words."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "Human", "Assistant", ":"]
    words = [*special, *(f"w{i}" for i in range(WORDS - len(special)))]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def prepare(cases: dict[str, dict[str, Any]], folder: Path) -> None:
    """Random models, and reward models of their shape, saved by a process that ends."""
    calls = [
        f"plan_memory.save_models({one!r}, {str(folder / name)!r})" for name, one in cases.items()
    ]
    code = "; ".join(["import plan_memory", *calls])
    here = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])


def save_models(one: dict[str, Any], path: str) -> None:
    """Write base/ and reward/ below `path`, the latter as train_reward leaves it."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from selfcorrect.recipes.foundation.atomic_files import write_json

    folder, fields = Path(path), dict(one["fields"])
    kind = fields.pop("model_type")
    tokens = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(kind, **fields, **tokens)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "reward")
    for name in ("base", "reward"):
        make_tokenizer().save_pretrained(folder / name)
    facts = {"score_mean": 0.0, "score_standard_deviation": 1.0}
    write_json(folder / "reward" / "stage.json", facts)


def run_stage(one: dict[str, Any], folder: Path) -> None:
    """Two steps of the stage, through the package's own code."""
    from transformers import AutoTokenizer

    from selfcorrect.train.feedback.feedback import Feedback, Preference
    from selfcorrect.train.stages.base import train_base
    from selfcorrect.train.stages.policy import train_policy
    from selfcorrect.train.stages.reward import train_reward

    recipe = recipe_of(one, str(folder / "base"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    around = len(tokenizer(_rendered(tokenizer, "w1"))["input_ids"]) - 1
    question = " ".join(f"w{i}" for i in range(one["prompt"] - around))
    answer = " ".join(f"w{i}" for i in range(one["completion"] - 1))  # and the end token
    asked = [{"role": "user", "content": question}]
    rendered = _rendered(tokenizer, question)
    assert len(tokenizer(rendered)["input_ids"]) == one["prompt"]  # some models swap tokenizers
    pairs = [Preference(asked, answer, answer.replace("w1 ", "w2 "))] * (4 * one["rows"])
    if one["stage"] == "sft":
        train_base(recipe, recipe.models[0], pairs, folder / "out", 0, _silent)
    elif one["stage"] == "reward":
        train_reward(recipe.reward, folder / "base", pairs, tokenizer, folder / "out", 0, _silent)
    else:
        record = {"model": "m", "parameters": 1, "seed": 0, "recipe_digest": "", "versions": {},
                  "adapter_of": None}  # fmt: skip
        train_policy(
            recipe.ppo, str(folder / "base"), folder / "reward",
            Feedback([], [asked] * (4 * one["rows"])), tokenizer, folder / "out", 0, record,
            _silent, None,
        )  # fmt: skip


def _rendered(tokenizer: Any, word: str) -> str:
    from selfcorrect.train.feedback.feedback import render_prompt

    return render_prompt(tokenizer, [{"role": "user", "content": word}])


def _silent(stage: str, done: int, total: int) -> None:
    return None


def main() -> None:
    """Measure every case, or the one a worker is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="cases whose label has this text in it")
    parser.add_argument(
        "--malloc", choices=("mapped", "default"), default="mapped",
        help="mapped: large blocks go back to the system when freed, so that resident memory is "
        "what is in use; default: as glibc keeps them",
    )  # fmt: skip
    given = parser.parse_args()
    if given.worker:
        work(json.loads(given.worker))
        return
    rows = []
    columns = ["case", "parameters, M", "measured, MB", "planned, MB", "planned / measured"]
    print(f"| {' | '.join([*columns, 'CPU, s', 'moment'])} |")
    print("|---|---|---|---|---|---|---|")
    for one in (c for c in CASES if given.only in label(c)):
        from selfcorrect.train.planning.model_shape import shape_of

        plan, (peak, seconds) = planned(one), measure(one, given.malloc)
        size = shape_of(one["fields"], "case", WORDS).parameters
        rows.append({"case": label(one), "measured": peak, "planned": plan.total, **plan.parts,
                     "cpu_seconds": seconds})  # fmt: skip
        print(
            f"| {label(one)} | {size / 1e6:.1f} | {peak / 1e6:.0f} | {plan.total / 1e6:.0f} "
            f"| {plan.total / peak:.2f} | {seconds:.1f} | {plan.moment} |",
            flush=True,
        )
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
