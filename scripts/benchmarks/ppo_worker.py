"""Train one arm of ppo.py on tiny models, and print JSON.

It runs under two Pythons: this project's, and one with TRL 1.8 and without this project.
"""

import argparse
import json
import random
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

BF16 = "-bf16"  # ends the name of an arm whose frozen weights and products are bfloat16


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama, and of a step: prompts and completions (`cap`: at most) in tokens."""

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    intermediate_size: int
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    completions: int = 64
    minibatch: int = 32
    epochs: int = 2
    cap: int = 24
    prompt_tokens: tuple[int, int] = (10, 40)
    end_probability: float = 0.1  # of the end token, at each position

    @property
    def updates(self) -> int:
        """Optimizer updates in a step."""
        return self.epochs * self.completions // self.minibatch


SHAPES = {
    "quickstart": Shape(64, 3, 250, 176),
    "larger": Shape(256, 4, 4096, 704),
    # The step of the recipe smollm2-135m-cpu: two updates of 4 completions each
    "smollm2": Shape(576, 30, 49152, 1536, 9, 3, 8, 4, 1, 32, (120, 160), 0.01),
    "smollm2-third": Shape(576, 10, 49152, 1536, 9, 3, 8, 4, 1, 32, (120, 160), 0.01),
}


def prepare(shape: str, folder: Path) -> dict[str, Any]:
    """Save policy, reward model and their tokenizer in `folder`."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(0)
    sizes = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=sizes.vocab_size, hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size, num_hidden_layers=sizes.num_hidden_layers,
        num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=sizes.num_key_value_heads,
        max_position_embeddings=256, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        num_labels=1,
    )  # fmt: skip
    policy = LlamaForCausalLM(config)
    with torch.no_grad():  # dimension 0 is constant, and only the end token reads it
        embeddings, head = policy.model.embed_tokens.weight, policy.lm_head.weight
        torch.nn.init.normal_(embeddings, std=0.5)
        embeddings[:, 0] = 4.0
        head[:, 0] = 0.0
        ids = torch.randint(2, config.vocab_size, (64, 32))
        constant = policy.model(ids).last_hidden_state[..., 0].mean()
        odds = sizes.end_probability / (1 - sizes.end_probability)
        head[1] = 0.0
        head[1, 0] = torch.log(torch.tensor(odds * (config.vocab_size - 1))) / constant
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", *_words(config.vocab_size)])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    for name, model in (("policy", policy), ("reward", LlamaForSequenceClassification(config))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {}


def peak(dtype: str) -> dict[str, Any]:
    """Measure a product of 1024 x 1024 on one thread, in FLOP/s."""
    import torch

    a, b = torch.randn(2, 1024, 1024).to(getattr(torch, dtype))
    seconds = []
    for _ in range(12):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return {"flops_per_second": 2 * 1024**3 / statistics.median(seconds[2:])}


def train(arm: str, folder: Path, shape: str, steps: int, warmup: int) -> dict[str, Any]:
    """Train one arm for `warmup + steps` PPO steps; return the cost of the last `steps`."""
    from transformers import TrainerCallback

    marks: list[tuple[float, float, dict[str, float], int]] = []
    phases = dict.fromkeys(("generate", "score", "train"), 0.0)
    tokens = [0]
    sizes = SHAPES[shape]
    updates = 1 if arm == "trl18-ppo" else sizes.updates  # TRL 1.8 counts rollout batches

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
            if state.global_step % updates == 0:
                seen = tokens[0] or int(state.num_input_tokens_seen)
                marks.append((time.process_time(), time.perf_counter(), dict(phases), seen))

    texts = _prompts(sizes)
    make = _trl18 if arm == "trl18-ppo" else _current
    trainer = make(arm, folder, sizes, texts, warmup + steps, Clock(), phases, tokens)
    trainer.train()
    marks = marks[warmup - 1 :]
    pairs = list(pairwise(marks))
    first, last = marks[0], marks[-1]
    spent = {name: (last[2][name] - first[2][name]) / steps for name in phases}
    backbone, head = _multiplying(folder / "policy")
    return {
        "cpu_seconds": [b[0] - a[0] for a, b in pairs],
        "wall_seconds": [b[1] - a[1] for a, b in pairs],
        "tokens_per_step": (last[3] - first[3]) / steps,
        "phases": spent if any(spent.values()) else None,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "flops_per_token": _flops_per_token(arm, sizes, backbone, head),
    }


def _current(
    arm: str, folder: Path, sizes: Shape, texts: list[str], steps: int, clock: Any,
    phases: dict[str, float], tokens: list[int],
) -> Any:  # fmt: skip
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from selfcorrect.train.ppo import PPOConfig, PPOTrainer, RewardModelScorer
    from selfcorrect.train.ppo.reward_models import load_reward_model

    in_bf16 = arm.endswith(BF16)
    settings: dict[str, Any] = {
        **_settings(folder, sizes, steps * sizes.updates),
        "steps_per_generation": sizes.completions // sizes.minibatch,
        "gradient_accumulation_steps": 1, "per_device_train_batch_size": sizes.minibatch,
        "num_iterations": sizes.epochs, "beta": 0.05, "max_completion_length": sizes.cap,
        "bf16": in_bf16,
    }  # fmt: skip
    algorithm, _, variant = arm.removesuffix(BF16).partition("-")
    lora = None
    if variant == "lora":
        from peft import LoraConfig

        lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    held = "bfloat16" if in_bf16 else "float32"
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=getattr(torch, held))
    rater = load_reward_model(folder / "reward", held)
    base: Any = PPOTrainer
    if algorithm == "ppo":
        critic_path = str(folder / "reward") if variant == "separate" else None
        args: Any = PPOConfig(**{**settings, "critic": variant, "critic_path": critic_path})
    else:
        base, texts = GRPOTrainer, texts[: len(texts) // 2]
        args = GRPOConfig(**settings, num_generations=2)

    class Timed(base):  # type: ignore[misc]
        """Records wall seconds by phase, in the same way for both algorithms."""

        def _generate(self, *a: Any, **k: Any) -> Any:
            return _spend(phases, "generate", super()._generate, *a, **k)

        def _generate_and_score_completions(self, *a: Any, **k: Any) -> Any:
            return _spend(phases, "score", super()._generate_and_score_completions, *a, **k)

        def training_step(self, *a: Any, **k: Any) -> Any:
            return _spend(phases, "train", super().training_step, *a, **k)

    return Timed(
        policy, RewardModelScorer(rater, tokenizer), args, peft_config=lora,
        train_dataset=Dataset.from_dict({"prompt": texts}), processing_class=tokenizer,
        callbacks=[clock],
    )  # fmt: skip


def _trl18(
    arm: str, folder: Path, sizes: Shape, texts: list[str], steps: int, clock: Any,
    phases: dict[str, float], tokens: list[int],
) -> Any:  # fmt: skip
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    # per_device 64, accumulation 1: the only way in TRL 1.8 to 2 updates per epoch of 64 rows
    args = PPOConfig(
        **_settings(folder, sizes, -1), per_device_train_batch_size=sizes.completions,
        gradient_accumulation_steps=1, num_mini_batches=sizes.completions // sizes.minibatch,
        num_ppo_epochs=sizes.epochs, total_episodes=steps * sizes.completions,
        response_length=sizes.cap, stop_token="eos", temperature=1.0, num_sample_generations=0,
        kl_coef=0.05, local_rollout_forward_batch_size=sizes.completions,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "policy") for _ in "pr")
    rater, critic = (
        AutoModelForSequenceClassification.from_pretrained(folder / "reward") for _ in "rc"
    )
    get_reward = ppo_trainer.get_reward

    def counting(model: Any, ids: Any, pad: int, start: int) -> Any:
        if model is rater:
            tokens[0] += int((ids != pad).sum())
        return get_reward(model, ids, pad, start)

    ppo_trainer.get_reward = counting
    generate = ppo_trainer.batch_generation
    ppo_trainer.batch_generation = lambda *a: _spend(phases, "generate", generate, *a)
    rows = Dataset.from_dict({"input_ids": tokenizer(texts)["input_ids"]})
    return PPOTrainer(
        args, tokenizer, model=policy, ref_model=reference, reward_model=rater,
        value_model=critic, train_dataset=rows, callbacks=[clock],
    )  # fmt: skip


def _settings(folder: Path, sizes: Shape, max_steps: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "out"), "learning_rate": 1e-6, "report_to": "none",
        "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True,
        "save_strategy": "no", "logging_steps": sizes.updates, "max_steps": max_steps, "seed": 0,
    }  # fmt: skip


def _spend(
    phases: dict[str, float], name: str, work: Callable[..., Any], *args: Any, **more: Any
) -> Any:
    """Do the work and add its time to a phase, without that of phases within it."""
    start, before = time.perf_counter(), sum(phases.values())
    try:
        return work(*args, **more)
    finally:
        within = sum(phases.values()) - before
        phases[name] += time.perf_counter() - start - within


def _words(vocabulary: int) -> list[str]:
    return [f"w{i}" for i in range(vocabulary - 2)]


def _prompts(sizes: Shape) -> list[str]:
    rng, words = random.Random(0), _words(sizes.vocab_size)
    lengths = [rng.randint(*sizes.prompt_tokens) for _ in range(4 * sizes.completions)]
    return [" ".join(rng.choices(words, k=length)) for length in lengths]


def _multiplying(policy: Path) -> tuple[int, int]:
    """Return the parameters in matrix products: of the backbone, and of the LM head."""
    from safetensors import safe_open

    sizes = {"model.": 0, "lm_head.": 0}
    with safe_open(policy / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            if "embed_tokens" not in name:
                size = file.get_tensor(name).numel()
                sizes["lm_head." if name.startswith("lm_head.") else "model."] += size
    return sizes["model."], sizes["lm_head."]


def _flops_per_token(arm: str, sizes: Shape, backbone: int, head: int) -> int:
    """Return useful FLOPs of a PPO step per token of its rollout batch."""
    policy = backbone + head
    own_critic = 0 if arm.startswith("grpo") or arm == "ppo-shared" else backbone
    passes = 2 if arm == "trl18-ppo" else 3  # generation, reference, and the old policy's
    forward = 2 * (passes * policy + backbone + own_critic)  # and reward model, values
    return forward + (4 if "lora" in arm else 6) * sizes.epochs * (policy + own_critic)


def main() -> None:
    """Do one job; the last line printed is its JSON."""
    import torch

    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("job")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--warmup", type=int)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    if arguments.job == "prepare":
        answer = prepare(arguments.shape, arguments.folder)
    elif arguments.job == "peak":
        answer = peak(arguments.dtype)
    else:
        answer = train(
            arguments.job, arguments.folder, arguments.shape, arguments.steps, arguments.warmup
        )
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
