"""PPO under each parallelism and critic, in two ranks or in one process.

Arguments: the folder of models, the folder of outcomes, and cases such as zero2-shared.

Sampling is greedy (top_k 1) and a rollout batch is one minibatch, so neither a process's random
numbers nor the assignment of rows to processes can make a difference: the curves must be the same.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file
from transformers import TrainerCallback

from selfcorrect.train.ppo import PPOTrainer
from selfcorrect.train.ppo.losses import explained_variance, whiten
from tests.support.ppo_models import CRITICS, make_prompts, make_trainer
from tests.support.ranks import set_parallelism, start_ranks

CASES = [
    *(("ddp", critic) for critic in CRITICS),
    ("zero1", "shared"),
    *(("zero2", critic) for critic in CRITICS),
    *(("zero3", critic) for critic in CRITICS),
]
# The others differ from these in nothing that is not in one of them: `matrix`.
ALWAYS = [
    *(("ddp", critic) for critic in ("shared", "lora")),
    *(("zero1", "shared"), ("zero2", "separate")),
    *(("zero3", critic) for critic in ("separate", "lora")),
]
RESUMED = [("ddp", "shared"), ("zero1", "shared"), ("zero2", "separate"), ("zero3", "lora")]
CURVES = (
    "objective/score", "objective/kl", "value/loss", "value/explained_variance", "grad_norm",
    "value/grad_norm",
)  # fmt: skip
# The default, but for an adapter, whose gradients are smaller: it must clip.
MAX_GRAD_NORM = {"shared": 1.0, "separate": 1.0, "lora": 0.3}
ROWS = 4  # per micro-batch, of each of two processes


class SaveWithin(TrainerCallback):
    """Save the state within the second rollout batch."""

    def on_step_end(self, args, state, control, **_):
        control.should_save = state.global_step == 3
        return control


def make_greedy_trainer(models: Path, out: Path, critic: str, rows: int) -> PPOTrainer:
    """Return a trainer for three rollout batches of 2 x 2 x ROWS rows, with two updates each."""
    return make_trainer(
        models, out, critic, prompts=make_prompts(48), per_device_train_batch_size=rows,
        gradient_accumulation_steps=2, num_iterations=2, max_steps=6, top_k=1,
        max_grad_norm=MAX_GRAD_NORM[critic], learning_rate=5e-3, critic_learning_rate=1e-2,
        logging_steps=2,
        critic_path=str(models / "reward") if critic == "separate" else None,
    )  # fmt: skip


def curves_and_weights(trainer: PPOTrainer) -> tuple[dict, dict]:
    """Return the logged curves, and all weights with the critic's, on rank 0."""
    logs = [entry for entry in trainer.state.log_history if "ppo_step" in entry]
    curves = {n: [entry[n] for entry in logs if n in entry] for n in CURVES}
    if trainer.is_deepspeed_enabled:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
    else:
        state = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    return curves, {name: t.detach().float().clone().contiguous() for name, t in state.items()}


def train_cases(models: Path, folder: Path, cases: list[tuple[str, str]]) -> None:
    """Train each case in this rank; the first rank writes the outcomes."""
    for parallelism, critic in cases:
        set_parallelism(parallelism, folder)
        out = folder / f"{parallelism}-{critic}"
        trainer = make_greedy_trainer(models, out, critic, ROWS)
        if (parallelism, critic) in RESUMED:
            trainer.add_callback(SaveWithin())
        trainer.train()
        split = [hasattr(p, "ds_id") for p in trainer.model.parameters()]
        curves, weights = curves_and_weights(trainer)
        sums = [sum(float(t.double().sum()) for t in weights.values())]
        if parallelism != "zero3":  # then only rank 0 has the weights
            sums = gather_object(sums)
        facts = {
            "curves": curves,
            "episodes": trainer.episodes,
            "stage": getattr(trainer.accelerator.state.deepspeed_plugin, "zero_stage", None),
            "split": all(split),
            "world": trainer.accelerator.num_processes,
            "sums": sums,
        }
        trainer.save_policy(out / "policy")
        is_main = trainer.accelerator.is_main_process
        if is_main:
            (out / "facts.json").write_text(json.dumps(facts))
            save_file(weights, out / "weights.safetensors")
        if (parallelism, critic) not in RESUMED:
            continue
        resumed = make_greedy_trainer(models, out / "again", critic, ROWS)
        resumed.train(resume_from_checkpoint=str(out / "checkpoint-3"))
        _, weights = curves_and_weights(resumed)
        if is_main:
            save_file(weights, out / "resumed.safetensors")
    rank = torch.distributed.get_rank()
    (folder / f"whitening.{rank}.json").write_text(json.dumps(whitening(rank)))


def whitening(rank: int) -> dict[str, float]:
    """Return what differs between sums over both ranks' halves of a batch and over all of it."""

    def reduce(sums: torch.Tensor) -> torch.Tensor:
        torch.distributed.all_reduce(sums)
        return sums

    x = torch.arange(24.0).reshape(6, 4).square()
    mask = torch.tensor([[1, 1, 0, 0]] * 2 + [[1, 1, 1, 1]] * 3 + [[0, 0, 0, 0]]).float()
    guesses = x.roll(1, 0)
    half = slice(3 * rank, 3 * rank + 3)
    whitened = whiten(x[half], mask[half], reduce)
    return {
        "gap": float((whitened - whiten(x, mask)[half]).abs().max()),
        "single": explained_variance(guesses, x, mask),
        "reduced": explained_variance(guesses[half], x[half], mask[half], reduce),
    }


if __name__ == "__main__":
    models, folder, *names = sys.argv[1:]
    start_ranks(train_cases, Path(models), Path(folder), [tuple(n.split("-")) for n in names])
