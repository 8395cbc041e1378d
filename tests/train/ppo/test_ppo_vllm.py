"""Sampling with vLLM, as far as a machine without one shows: TRL's own sync, what reaches it."""

from types import SimpleNamespace

import pytest
import torch
from trl.generation import vllm_generation
from trl.trainer import grpo_trainer

from tests.train.ppo.test_ppo_trainer import CRITICS, home, make_trainer  # noqa: F401  (home is a fixture)


class Receiver:
    """The engine's model, or the server, at the other end of TRL's sync."""

    def __init__(self) -> None:
        self.syncs: list[dict[str, torch.Tensor]] = [{}]

    def load_weights(self, weights) -> None:
        self.syncs[-1] |= {name: tensor.clone() for name, tensor in weights}

    def update_named_params(self, metadata, weights) -> None:
        self.load_weights(weights)
        assert [name for name, *_ in metadata] == list(self.syncs[-1])

    def reset_prefix_cache(self) -> None:  # the end of a sync
        self.syncs.append({})

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}


class Recorded(vllm_generation.VLLMGeneration):
    """TRL's class with its own walk through the weights, and no vLLM behind it."""

    def _init_vllm(self) -> None:
        self.receiver = self.vllm_client = Receiver()
        runner = SimpleNamespace(model_runner=SimpleNamespace(model=self.receiver))
        engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=runner))
        reset = self.receiver.reset_prefix_cache
        self.llm = SimpleNamespace(llm_engine=engine, reset_prefix_cache=reset)
        self.tokens = torch.Generator().manual_seed(0)
        newest.append(self)

    def generate(self, prompts, images, num_generations, profiler=None):
        length = self.max_completion_length
        ids = [torch.randint(5, 29, (length,), generator=self.tokens).tolist() for _ in prompts]
        return prompts, ids, [[[-1.0] for _ in row] for row in ids], None


newest: list[Recorded] = []


@pytest.mark.parametrize("mode", ["colocate", "server"])
@pytest.mark.parametrize("critic", CRITICS)
def test_vllm_is_given_the_policy_and_never_the_critic(
    home, tmp_path, monkeypatch, critic, mode  # noqa: F811
) -> None:  # fmt: skip
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", Recorded)
    trainer = make_trainer(
        home, tmp_path, critic, use_vllm=True, vllm_mode=mode, vllm_gpu_memory_utilization=0.2,
        vllm_server_port=8123, vllm_max_model_length=48, temperature=0.7,
    )  # fmt: skip
    reached = newest[-1]
    assert reached is trainer.vllm_generation
    asked = (reached.mode, reached.gpu_memory_utilization, reached.server_port)
    assert asked == (mode, 0.2, 8123)
    assert (reached.max_model_length, reached.max_completion_length) == (48, 6)
    assert reached.temperature == 0.7
    trainer.train()
    expected = AutoModelForCausalLM.from_pretrained(home / "base")
    names = set(dict(expected.named_parameters()))
    first, second, *rest = reached.receiver.syncs
    assert rest == [{}]  # once before each of the two rollout batches
    assert set(first) == set(second) == names
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(first[name], parameter.data)  # before training
    assert any(not torch.equal(first[name], second[name]) for name in names)
    assert any("critic" in name for name in dict(trainer.model.named_parameters()))  # it is back
