"""A PPO run whose rollouts vLLM samples, in the same process unless a server's port is given.

Each run needs a process of its own:
python -m tests.support.vllm_rollouts MODELS FOLDER CRITIC [kill|resume|PORT [disk]]
With `disk`, weights go to the server through a folder.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl.generation.vllm_client import VLLMClient

from tests.support.killed_child import die
from tests.support.ppo_models import END, PADDING, VOCABULARY, make_tokenizer, make_trainer

KILLED_AFTER = 5  # optimizer updates: within the second of two rollout batches


def save_policy(models: Path) -> None:
    """Save a policy with heads that vLLM's CPU kernels take."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        pad_token_id=PADDING, eos_token_id=END,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.save_pretrained(models / "base")
    make_tokenizer().save_pretrained(models / "base")


def weights_in_vllm(llm) -> dict[str, torch.Tensor]:
    worker = llm.llm_engine.model_executor.driver_worker
    return dict(worker.model_runner.model.named_parameters())


def weights_of_policy(trainer) -> dict[str, torch.Tensor]:
    """Return the policy's weights under vLLM's names, fused as vLLM fuses them."""
    # Cloned one by one: an adapter is merged only while they are named.
    fused = {name: t.clone() for name, t in trainer.vllm_generation._iter_named_params()}
    for group, parts in {
        "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "mlp.gate_up_proj": ("gate_proj", "up_proj"),
    }.items():
        block, name = group.split(".")
        for layer in range(2):
            prefix = f"model.layers.{layer}.{block}"
            pieces = [fused.pop(f"{prefix}.{part}.weight") for part in parts]
            fused[f"{prefix}.{name}.weight"] = torch.cat(pieces)
    return fused


def send_through(folder: Path) -> None:
    """Let TRL's client send weights through a folder: its own way, NCCL, is for GPUs alone."""

    def update(client: VLLMClient, metadata: list, named_params) -> None:
        folder.mkdir(exist_ok=True)
        weights = {name: tensor.detach().clone() for name, tensor in named_params}
        assert [name for name, *_ in metadata] == list(weights)
        save_file(weights, folder / "model.safetensors")
        reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        client._post(f"{client.base_url}/collective_rpc", json=reload)

    VLLMClient.init_communicator = lambda client, device: None
    VLLMClient.update_named_params = update


def digest_in_server(client: VLLMClient) -> str:
    asked = {"method": "digest_of_weights"}
    return client._post(f"{client.base_url}/collective_rpc", json=asked)["results"][0]


class DieAfter(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == KILLED_AFTER:
            die()


def main(models: str, folder: str, critic: str, mode: str = "", way: str = "") -> None:
    from tests.support.ppo_models import copy_weights

    if way == "disk":
        send_through(Path(folder).absolute() / "sent")
    saving = {"save_strategy": "steps", "save_steps": 1}
    where = {"vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.05}
    if mode.isdigit():
        where = {"vllm_mode": "server", "vllm_server_port": int(mode), "vllm_server_timeout": 600}
    trainer = make_trainer(
        Path(models), Path(folder), critic, use_vllm=True, vllm_max_model_length=64, **where,
        callbacks=[DieAfter()] if mode == "kill" else [], **saving,
    )  # fmt: skip
    vllm = trainer.vllm_generation
    synced, sync, unequal = [], vllm.sync_weights, []

    def compare():
        sync()
        if mode.isdigit():
            synced.append(digest_in_server(vllm.vllm_client))
            return
        expected = weights_of_policy(trainer)  # the critic is hidden while vLLM samples
        held = weights_in_vllm(vllm.llm)
        unequal.extend(expected.keys() ^ held.keys())
        for name, tensor in expected.items():  # vLLM adds rows to the vocabulary, up to 64 times n
            if name in held and not torch.equal(held[name][: len(tensor)], tensor):
                unequal.append(name)
        synced.append(hashlib.sha256(str(sorted(expected)).encode()).hexdigest())

    vllm.sync_weights = compare
    trainer.train(resume_from_checkpoint=True if mode == "resume" else None)
    digest = hashlib.sha256()
    for name, tensor in sorted(copy_weights(trainer).items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    log = [
        {key: value for key, value in entry.items() if "importance" in key or key == "reward"}
        for entry in trainer.state.log_history
    ]
    facts = {"digest": digest.hexdigest(), "syncs": synced, "unequal": unequal, "log": log}
    (Path(folder) / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
