"""The callback changes no run: of TRL's trainers, our PPO, two ranks, and ZeRO-3."""

import json
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
from tests.support.callback_worker import METRIC_KEY, PARALLELISMS, PROMPTS
from tests.support.fork_server import ForkServer
from tests.support.ranks import run_module
from tests.support.tiny_models import (
    same_weights,
    save_model,
    tiny_model,
    tiny_plan,
    tiny_tokenizer,
    write_tiny_winogender,
)

torch.set_num_threads(1)


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
    base = save_model(out / "base", tiny_model("llama", dropout=0.2))
    model = {"model": str(base), "processing_class": tokenizer}
    if kind == "sft":
        data = Dataset.from_dict({"text": [f"{prompt} she is fair ." for prompt in PROMPTS] * 3})
        return SFTTrainer(args=SFTConfig(**shared, max_length=32), train_dataset=data, **model)
    if kind == "dpo":
        data = Dataset.from_dict(
            {"prompt": PROMPTS * 3, "chosen": [" she is fair"] * 12, "rejected": [" he"] * 12}
        )
        return DPOTrainer(args=DPOConfig(**shared, max_length=32), train_dataset=data, **model)
    data = Dataset.from_dict({"prompt": PROMPTS * 3})
    model["reward_funcs"] = share_of_fair
    if kind == "grpo":
        arguments = GRPOConfig(**shared, max_completion_length=5, num_generations=2)
        return GRPOTrainer(args=arguments, train_dataset=data, **model)
    arguments = PPOConfig(**shared, max_completion_length=5)
    return PPOTrainer(args=arguments, train_dataset=data, **model)


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo", "ppo"])
def test_every_trainer_ends_in_the_same_weights_and_logs_the_metrics(tmp_path, kind) -> None:
    plan = tiny_plan(tmp_path / "data", ["Q", "Q+IF", "Q+IF+CoT"])
    bare = make_trainer(kind, tmp_path / "run")
    start = {name: tensor.clone() for name, tensor in bare.model.state_dict().items()}
    bare.train()
    watched = make_trainer(kind, tmp_path / "run")
    callback = SelfCorrectionCallback(
        plan, lambda step: tmp_path / f"step-{step}", {0, 1, 3}, trainer=watched
    )
    watched.add_callback(callback)
    watched.train()
    assert same_weights(bare.model, watched.model)
    assert any(not torch.equal(start[n], t) for n, t in bare.model.state_dict().items())
    assert [e["step"] for e in watched.state.log_history if METRIC_KEY in e] == [0, 1, 3]
    names = sorted(path.name for path in tmp_path.glob("step-*"))
    assert names == ["step-0", "step-1", "step-3"]
    for trainer in (bare, watched):  # the trainer's own entries are all still there
        assert len([e for e in trainer.state.log_history if "loss" in e]) == 3


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, forks: ForkServer) -> Path:
    """A folder for each parallelism, with what its two ranks trained and saw."""
    folder = tmp_path_factory.mktemp("ranks")
    for parallelism in PARALLELISMS:
        save_model(folder / parallelism / "base", tiny_model("llama"))
        write_tiny_winogender(folder / parallelism / "data")
    run_module(forks, "callback_worker", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", PARALLELISMS)
def test_two_ranks_share_the_items_and_end_in_the_same_weights(two_ranks, parallelism) -> None:
    if parallelism == "zero3":
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    folder = two_ranks / parallelism
    plan = tiny_plan(folder / "data", ["Q", "Q+IF", "Q+IF+CoT"])
    facts = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    assert [rank["world"] for rank in facts] == [2, 2]
    assert [rank["split"] for rank in facts] == [parallelism == "zero3"] * 2
    assert facts[0]["logged"] == [0, 2]  # the first process logs
    bare, attached = (
        load_model(folder / f"saved-{mode}", device="cpu")[0] for mode in ("bare", "attached")
    )
    assert same_weights(bare, attached)
    # The live scores are those of the saved weights.
    later = measure(plan, attached, tiny_tokenizer(), folder / "later")
    for path in later:
        live, expected = read_cell(folder / "step-2" / path.name)[0], read_cell(path)[0]
        assert live.equals(expected)
    first = read_cell(folder / "step-0" / later[0].name)[0]
    assert not first.equals(read_cell(later[0])[0])
