"""PPO under each engine and critic, in every process of one launch; and in one process alone.

Sampling is greedy (top_k 1) and a rollout batch is one minibatch, so that neither the random
numbers of a process nor how rows are dealt out can differ: what is left must be the same curve.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import torch
from accelerate.utils import gather_object
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import TrainerCallback

from selfcorrect.train.distributed.settings import deepspeed_settings
from selfcorrect.train.distributed.worker import skip_inference_kernel
from selfcorrect.train.ppo import PPOTrainer
from tests.train.ppo.test_ppo_trainer import make_args, make_prompts, make_tokenizer, target_share

CRITICS = ("shared", "separate", "lora")
CASES = [
    *(("ddp", critic) for critic in CRITICS),
    ("zero1", "shared"),
    *(("zero2", critic) for critic in CRITICS),
    *(("zero3", critic) for critic in CRITICS),
]
RESUMED = [("ddp", "shared"), ("zero1", "shared"), ("zero2", "separate"), ("zero3", "lora")]
CURVES = ("objective/score", "objective/kl", "value/loss", "value/explained_variance")
ROWS = 4  # of a device, where there are two


class StopAt(TrainerCallback):
    """Ends training at an optimizer update, with its state saved."""

    def __init__(self, update: int) -> None:
        self.update = update

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.update:
            control.should_save = control.should_training_stop = True
        return control


def make_trainer(home: Path, out: Path, critic: str, rows: int, **more) -> PPOTrainer:
    """Three rollout batches of 2 x 2 x ROWS completions, three updates on each."""
    arguments = make_args(
        out, critic=critic, per_device_train_batch_size=rows, gradient_accumulation_steps=2,
        num_iterations=3, max_steps=9, top_k=1, max_grad_norm=0.0, learning_rate=3e-3,
        critic_learning_rate=1e-2, logging_steps=3, use_cpu=True,
        critic_path=str(home / "reward") if critic == "separate" else None, **more,
    )  # fmt: skip
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return PPOTrainer(
        str(home / "base"), target_share, arguments, train_dataset=make_prompts(48),
        processing_class=make_tokenizer(), peft_config=lora if critic == "lora" else None,
    )  # fmt: skip


def outcome(trainer: PPOTrainer) -> tuple[dict, dict]:
    """Curves, and all weights (critic among them) on rank 0."""
    logs = [entry for entry in trainer.state.log_history if "ppo_step" in entry]
    curves = {n: [entry[n] for entry in logs if n in entry] for n in CURVES}
    if trainer.is_deepspeed_enabled:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
    else:
        state = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    return curves, {name: t.detach().float().clone().contiguous() for name, t in state.items()}


def choose(engine: str, folder: Path) -> None:
    """What `accelerate launch` would have set for this engine."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = str(engine != "ddp").lower()
    os.environ["ACCELERATE_DEEPSPEED_ZERO3_INIT"] = str(engine == "zero3").lower()
    if engine != "ddp":
        settings = deepspeed_settings(engine, on_gpu=False)
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # split all
        file = folder / f"{engine}.{os.environ['RANK']}.json"
        file.write_text(json.dumps(settings))
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(file)


def main() -> None:
    home, folder, cases = Path(sys.argv[1]), Path(sys.argv[2]), CASES
    torch.set_num_threads(1)
    os.environ.pop("ACCELERATE_USE_CPU", None)  # the arguments say so
    if importlib.util.find_spec("deepspeed"):
        skip_inference_kernel()
    else:
        cases = [case for case in CASES if case[0] == "ddp"]
    for engine, critic in cases:
        choose(engine, folder)
        out = folder / f"{engine}-{critic}"
        trainer = make_trainer(home, out, critic, ROWS)
        trainer.train()
        split = [hasattr(p, "ds_id") for p in trainer.model.parameters()]
        curves, weights = outcome(trainer)
        sums = [sum(float(t.double().sum()) for t in weights.values())]
        sums = gather_object(sums) if engine != "zero3" else sums  # which rank 0 has alone
        facts = {
            "curves": curves,
            "episodes": trainer.episodes,
            "stage": getattr(trainer.accelerator.state.deepspeed_plugin, "zero_stage", None),
            "split": all(split),
            "world": trainer.accelerator.num_processes,
            "sums": sums,
        }
        trainer.save_policy(out / "policy")
        writes = trainer.accelerator.is_main_process
        if writes:
            (out / "facts.json").write_text(json.dumps(facts))
            save_file(weights, out / "weights.safetensors")
        if (engine, critic) not in RESUMED:
            continue
        stopped = make_trainer(home, out / "again", critic, ROWS)
        stopped.add_callback(StopAt(4))  # within the second rollout batch
        stopped.train()
        resumed = make_trainer(home, out / "again", critic, ROWS)
        resumed.train(resume_from_checkpoint=str(out / "again" / "checkpoint-4"))
        _, weights = outcome(resumed)
        if writes:
            save_file(weights, out / "resumed.safetensors")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
