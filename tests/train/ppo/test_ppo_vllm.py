"""Sampling with vLLM, as far as it shows without one: TRL's own sync, and what reaches it."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl.trainer import grpo_trainer

from selfcorrect.recipes.foundation.errors import RunFailure
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


@pytest.mark.parametrize("mode", ["sequence_mask", "token_mask"])
def test_rows_that_importance_sampling_drops_teach_the_critic_nothing(
    models, tmp_path, monkeypatch, mode
):
    def generate(self, *arguments, **options):
        prompts, ids, logprobs, extra = draw(self, *arguments, **options)
        for row in logprobs[::2]:  # every other row was much less likely in vLLM
            row[:] = [[-20.0]] * len(row)
        return prompts, ids, logprobs, extra

    draw = FakeVLLM.generate
    monkeypatch.setattr(FakeVLLM, "generate", generate)
    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", FakeVLLM)
    trainer = make_trainer(
        models, tmp_path, use_vllm=True, vllm_mode="colocate", max_steps=2, vf_coef=1.0,
        vllm_importance_sampling_mode=mode,
    )  # fmt: skip
    compute_loss, weight, counts = trainer._compute_loss, trainer.critic.head.weight, []

    def gradient(model, inputs, rows):
        returns = inputs["returns"].clone()
        returns[rows] += 5.0
        loss = compute_loss(model, {**inputs, "returns": returns})
        return torch.autograd.grad(loss, weight)[0]

    def compare(model, inputs):
        dropped = (inputs["importance_sampling_ratio"] == 0).all(dim=1)
        counts.append(int(dropped.sum()))
        expected = gradient(model, inputs, [])
        assert torch.equal(gradient(model, inputs, dropped), expected)
        assert torch.equal(gradient(model, inputs, ~dropped), expected) == dropped.all().item()
        assert not inputs["advantages"][dropped].any()
        return compute_loss(model, inputs)

    trainer._compute_loss = compare
    trainer.train()
    assert sum(counts) == 4


@pytest.mark.parametrize("method", ["_init_vllm", "sync_weights", "generate"])
@pytest.mark.parametrize("kind", [ConnectionError, Exception])
def test_lost_server_is_one_line(models, tmp_path, monkeypatch, method, kind):
    def fail(*_, **__):
        raise kind("Request failed: 500,\nno such worker")

    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", FakeVLLM)
    monkeypatch.setattr(FakeVLLM, method, fail)
    with pytest.raises(RunFailure, match="vLLM's server: Request failed: 500, no such worker"):
        make_trainer(models, tmp_path, use_vllm=True, vllm_mode="server").train()
