"""PPO on a GPU: the reward rises in bfloat16, and what is frozen stays."""

import pytest
import torch
from peft import LoraConfig

from selfcorrect.train.ppo import PPOConfig, PPOTrainer
from tests.support.ppo_models import make_policy, make_prompts, make_tokenizer, target_share

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
ON_GPU = {"bf16": True}


@pytest.mark.parametrize("adapter", [False, True])
def test_learns_in_bfloat16(tmp_path, adapter):
    torch.manual_seed(0)
    held = torch.bfloat16 if adapter else torch.float32
    start = make_policy("llama").to(held)
    before = {name: value.clone() for name, value in start.state_dict().items()}
    start.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    arguments = PPOConfig(
        output_dir=str(tmp_path), max_steps=80, per_device_train_batch_size=16,
        steps_per_generation=1, gradient_accumulation_steps=1, num_iterations=2, seed=0,
        max_completion_length=8, learning_rate=3e-3, beta=0.0, logging_steps=2,
        report_to="none", save_strategy="no", disable_tqdm=True, **ON_GPU,
    )  # fmt: skip
    trainer = PPOTrainer(
        start if adapter else str(tmp_path / "base"), target_share, arguments,
        train_dataset=make_prompts(64), processing_class=make_tokenizer(),
        peft_config=lora if adapter else None,
    )  # fmt: skip
    trainer.train()
    scores = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    assert sum(scores[-5:]) / 5 > sum(scores[:5]) / 5 + 0.1
    weights = {
        name.replace("base_layer.", "").removeprefix("base_model.model."): value
        for name, value in trainer.model.state_dict().items()
    }
    same = [torch.equal(weights[n].cpu(), v.cpu()) for n, v in before.items() if n in weights]
    assert all(same) if adapter else not all(same)
    assert len(same) >= 10
