"""TRL's vLLM class with its own weight sync, and no vLLM behind it."""

from types import SimpleNamespace

import torch
from trl.generation import vllm_generation

from tests.support.ppo_models import VOCABULARY


class Receiver:
    """The engine's model, or the server, at the other end of TRL's sync."""

    def __init__(self) -> None:
        self.syncs: list[dict[str, torch.Tensor]] = [{}]

    def load_weights(self, weights) -> None:
        self.syncs[-1] |= {name: tensor.clone() for name, tensor in weights}

    def update_named_params(self, metadata, weights) -> None:
        self.load_weights(weights)
        assert [name for name, *_ in metadata] == list(self.syncs[-1])

    def reset_prefix_cache(self) -> None:  # ends a sync
        self.syncs.append({})

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}


class FakeVLLM(vllm_generation.VLLMGeneration):
    """Draws random completions, each token with the log-probability -1."""

    def _init_vllm(self) -> None:
        self.receiver = self.vllm_client = Receiver()
        runner = SimpleNamespace(model_runner=SimpleNamespace(model=self.receiver))
        engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=runner))
        reset = self.receiver.reset_prefix_cache
        self.llm = SimpleNamespace(llm_engine=engine, reset_prefix_cache=reset)
        self.generator = torch.Generator().manual_seed(0)

    def generate(self, prompts, images, num_generations, profiler=None):
        shape = (len(prompts), self.max_completion_length)
        ids = torch.randint(5, VOCABULARY, shape, generator=self.generator).tolist()
        return prompts, ids, [[[-1.0] for _ in row] for row in ids], None
