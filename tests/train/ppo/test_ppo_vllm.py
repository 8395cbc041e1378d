"""Sampling with vLLM, as far as it shows without one: TRL's own sync, and what reaches it."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl.trainer import grpo_trainer

from tests.support.fake_vllm import FakeVLLM
from tests.support.ppo_models import CRITICS, make_trainer


@pytest.mark.parametrize("mode", ["colocate", "server"])
@pytest.mark.parametrize("critic", CRITICS)
def test_vllm_gets_the_policy_and_never_the_critic(models, tmp_path, monkeypatch, critic, mode):
    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", FakeVLLM)
    trainer = make_trainer(
        models, tmp_path, critic, use_vllm=True, vllm_mode=mode, vllm_gpu_memory_utilization=0.2,
        vllm_server_port=8123, vllm_max_model_length=48, temperature=0.7,
    )  # fmt: skip
    vllm = trainer.vllm_generation
    assert isinstance(vllm, FakeVLLM)
    assert (vllm.mode, vllm.gpu_memory_utilization, vllm.server_port) == (mode, 0.2, 8123)
    assert (vllm.max_model_length, vllm.max_completion_length) == (48, 6)
    assert vllm.temperature == 0.7
    trainer.train()
    policy = AutoModelForCausalLM.from_pretrained(models / "base")
    names = set(dict(policy.named_parameters()))
    first, second, *rest = vllm.receiver.syncs
    assert rest == [{}]  # one sync before each of the two rollout batches
    assert set(first) == set(second) == names
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(first[name], parameter.data)  # before training
    assert any(not torch.equal(first[name], second[name]) for name in names)
    assert any("critic" in name for name in dict(trainer.model.named_parameters()))  # it is back
