"""The callback in TRL's trainers, our PPO, two processes and ZeRO-3: the run stays what it was."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from selfcorrect.evaluate.callback import SelfCorrectionCallback
from selfcorrect.evaluate.measuring.cell_files import read_cell
from selfcorrect.evaluate.measuring.measure import measure
from selfcorrect.evaluate.scoring.load_model import load_model
from selfcorrect.train.ppo import PPOConfig, PPOTrainer
from tests.evaluate.measuring.test_callback import same_bits
from tests.evaluate.measuring.test_measure import make_plan
from tests.support import ROOT
from tests.support.tiny_models import tiny_model, tiny_tokenizer

torch.set_num_threads(1)

PROMPTS = [
    f"the {who} told {whose} that" for who in ("doctor", "nurse") for whose in ("his", "her")
]
KEY = "eval_winogender.Q+IF.correlation"


def share_of_fair(completions, **_):
    return [float(text.split().count("fair")) for text in completions]


def make_trainer(kind: str, out: Path, **more):
    """Three optimizer updates of one of the trainers, on a tiny model with dropout."""
    tokenizer = tiny_tokenizer()
    shared = {
        "output_dir": str(out), "max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "use_cpu": True, "seed": 1, "bf16": False,
        "per_device_train_batch_size": 4, "disable_tqdm": True, "gradient_checkpointing": False,
        **more,
    }  # fmt: skip
    (out / "base").mkdir(parents=True, exist_ok=True)
    tiny_model("llama", dropout=0.2).save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")
    given = {"model": str(out / "base"), "processing_class": tokenizer}
    if kind == "sft":
        data = Dataset.from_dict({"text": [f"{prompt} she is fair ." for prompt in PROMPTS] * 3})
        return SFTTrainer(args=SFTConfig(**shared, max_length=32), train_dataset=data, **given)
    if kind == "dpo":
        data = Dataset.from_dict(
            {"prompt": PROMPTS * 3, "chosen": [" she is fair"] * 12, "rejected": [" he"] * 12}
        )
        return DPOTrainer(args=DPOConfig(**shared, max_length=32), train_dataset=data, **given)
    data = Dataset.from_dict({"prompt": PROMPTS * 3})
    sampled = {"max_completion_length": 5, "reward_funcs": share_of_fair}
    reward = sampled.pop("reward_funcs")
    if kind == "grpo":
        arguments = GRPOConfig(**shared, **sampled, num_generations=2)
        return GRPOTrainer(args=arguments, reward_funcs=reward, train_dataset=data, **given)
    arguments = PPOConfig(**shared, **sampled)
    return PPOTrainer(args=arguments, reward_funcs=reward, train_dataset=data, **given)


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo", "ppo"])
def test_every_trainer_ends_in_the_same_weights_and_logs_the_metrics(tmp_path, kind) -> None:
    cells = make_plan(tmp_path / "data", conditions=["Q", "Q+IF", "Q+IF+CoT"])
    bare = make_trainer(kind, tmp_path / "run")
    start = {name: tensor.clone() for name, tensor in bare.model.state_dict().items()}
    bare.train()
    watched = make_trainer(kind, tmp_path / "run")
    callback = SelfCorrectionCallback(
        cells, lambda step: tmp_path / f"step-{step}", {0, 1, 3}, trainer=watched
    )
    watched.add_callback(callback)
    watched.train()
    assert same_bits(bare.model, watched.model)
    assert any(not torch.equal(start[n], t) for n, t in bare.model.state_dict().items())
    assert [e["step"] for e in watched.state.log_history if KEY in e] == [0, 1, 3]
    names = sorted(path.name for path in tmp_path.glob("step-*"))
    assert names == ["step-0", "step-1", "step-3"]
    # The trainer's own entries are all still there.
    own = [e for e in bare.state.log_history if "loss" in e]
    assert len([e for e in watched.state.log_history if "loss" in e]) == len(own) == 3


WORKER = """
import json, os, sys
from selfcorrect.train.distributed.worker import spare_the_compiler
sys.path.insert(0, sys.argv[2])
import torch, torch.distributed as dist
import tests.evaluate.measuring.test_callback_trainers as t
from pathlib import Path
torch.set_num_threads(1)
if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    spare_the_compiler()
folder, attached = Path(sys.argv[1]), sys.argv[3] == "attached"
arguments = t.SFTConfig(
    output_dir=str(folder / "out"), max_steps=2, learning_rate=1e-2, logging_steps=1,
    save_strategy="no", report_to=[], use_cpu=True, seed=1, bf16=False, max_length=32,
    per_device_train_batch_size=2, disable_tqdm=True, gradient_checkpointing=False,
)
tokenizer = t.tiny_tokenizer()
data = t.Dataset.from_dict({"text": [f"{prompt} she is fair ." for prompt in t.PROMPTS] * 3})
trainer = t.SFTTrainer(
    model=str(folder / "base"), args=arguments, train_dataset=data, processing_class=tokenizer
)
if attached:
    cells = t.make_plan(folder / "data", conditions=["Q", "Q+IF", "Q+IF+CoT"])
    trainer.add_callback(t.SelfCorrectionCallback(
        cells, lambda step: folder / f"step-{step}", {0, 2}, trainer=trainer
    ))
trainer.train()
split = [hasattr(p, "ds_id") for p in trainer.model.parameters()]
trainer.save_model(str(folder / f"saved-{sys.argv[3]}"))
rank = trainer.accelerator.process_index
logged = [e["step"] for e in trainer.state.log_history if t.KEY in e]
facts = {"world": trainer.accelerator.num_processes, "split": all(split), "logged": logged}
json.dump(facts, open(folder / f"{rank}.json", "w"))
dist.barrier()
dist.destroy_process_group()
"""

ZERO3 = {
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu"), "auto"),
    **dict.fromkeys(("gradient_accumulation_steps", "gradient_clipping"), "auto"),
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "stage3_gather_16bit_weights_on_model_save": True,
        "overlap_comm": False,
        "stage3_param_persistence_threshold": 0,  # or tiny tensors would stay whole
    },
}


ZERO3_LAUNCH = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config: {{deepspeed_config_file: {folder}/ds3.json, zero3_init_flag: true}}
machine_rank: 0
num_machines: 1
num_processes: 2
use_cpu: true
"""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_two_processes_share_the_items_and_the_run_stays_the_same(tmp_path, engine) -> None:
    if engine == "zero3":
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "ds3.json").write_text(json.dumps(ZERO3))
    (tmp_path / "zero3.yaml").write_text(ZERO3_LAUNCH.format(folder=tmp_path))
    (tmp_path / "worker.py").write_text(WORKER)
    cells = make_plan(tmp_path / "data", conditions=["Q", "Q+IF", "Q+IF+CoT"])
    ddp = "torch.distributed.run --nproc_per_node 2 --rdzv_backend c10d --rdzv_endpoint localhost:0"
    zero3 = f"accelerate.commands.launch --config_file {tmp_path}/zero3.yaml"
    zero3 += f" --main_process_port {free_port()}"
    launcher = ddp.split() if engine == "ddp" else zero3.split()
    for how in ("bare", "attached"):
        command = [sys.executable, "-m", *launcher, str(tmp_path / "worker.py")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CI": "1"}
        if engine == "ddp":
            environment["ACCELERATE_USE_CPU"] = "true"
        done = subprocess.run(
            [*command, str(tmp_path), str(ROOT), how],
            capture_output=True,
            text=True,
            timeout=400,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    facts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [one["world"] for one in facts] == [2, 2]
    assert [one["split"] for one in facts] == [engine == "zero3"] * 2
    assert facts[0]["logged"] == [0, 2]  # the first process logs
    one, other = (
        load_model(tmp_path / f"saved-{how}", device="cpu")[0] for how in ("bare", "attached")
    )
    assert same_bits(one, other)
    # What was measured inside is what the saved weights say.
    later = measure(cells, other, tiny_tokenizer(), tmp_path / "later")
    for path in later:
        inside, expected = read_cell(tmp_path / "step-2" / path.name)[0], read_cell(path)[0]
        assert inside.equals(expected)
    first = read_cell(tmp_path / "step-0" / later[0].name)[0]
    assert not first.equals(read_cell(later[0])[0])
