"""Tiny models saved as other trainers save their checkpoints, file by file.

The lists of files follow the trainers' sources: transformers 5 `Trainer._save_checkpoint`, verl's
`FSDPCheckpointManager.save_checkpoint`, OpenRLHF's `save_hf_ckpt`, open-instruct's `save_freq`, and
prime-rl's `WeightCheckpointManager`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from selfcorrect.recipes.society.settings import SocietySettings
from selfcorrect.recipes.society.tokenizer import make_tokenizer
from selfcorrect.recipes.society.world import make_world

SOCIETY = {"seed": 1, "blocks_per_template": 1}
# What a series of these models is asked: few items without reasoning.
ASKED: dict[str, Any] = {
    "data": {"society": SOCIETY},
    "evaluate": {"experiments": ["winogender"], "conditions": ["Q", "Q+IF"], "limit": 6},
}
_tokenizers: list[Any] = []


def tokenizer() -> Any:
    """Return the society's tokenizer, made once."""
    if not _tokenizers:
        _tokenizers.append(make_tokenizer(make_world(SocietySettings(**SOCIETY))))
    return _tokenizers[0]


def model(step: int, hidden: int = 16, seed: int = 0) -> Any:
    """Return a random Llama that moves away from its beginning with the step."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=hidden, intermediate_size=2 * hidden,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=256,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        made = AutoModelForCausalLM.from_config(config)
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8).add_(0.002 * step * torch.randn_like(parameter))
    return made.eval()


def save(folder: Path, step: int, **shape: int) -> Path:
    """Save a model and its tokenizer; return the folder."""
    model(step, **shape).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def _touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"a pickle that nobody reads")


def trl(out: Path, step: int, **shape: int) -> None:
    """Save checkpoint-<step> of a transformers or TRL trainer."""
    folder = save(out / f"checkpoint-{step}", step, **shape)
    _touch(folder, "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))


def trl_lora(out: Path, step: int) -> None:
    """Save checkpoint-<step> of a TRL trainer with an adapter on the model <out>/../base."""
    from peft import LoraConfig, get_peft_model

    base = out.parent / "base"
    if not base.exists():
        save(base, 0)
    loaded = model(0)
    loaded.name_or_path = str(base)
    loaded.config._name_or_path = str(base)
    settings = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step)
        adapted = get_peft_model(loaded, settings)
    folder = out / f"checkpoint-{step}"
    adapted.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    _touch(folder, "optimizer.pt", "rng_state.pth", "training_args.bin")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))


def verl(out: Path, step: int) -> None:
    """Save global_step_<step> of verl, with `hf_model` among the saved contents."""
    verl_sharded(out, step)
    save(out / f"global_step_{step}/actor/huggingface", step)


def verl_sharded(out: Path, step: int) -> None:
    """Save global_step_<step> of verl as it is by default: weights in parts by rank."""
    actor = out / f"global_step_{step}" / "actor"
    for rank in (0, 1):
        for kind in ("model", "optim", "extra_state"):
            _touch(actor, f"{kind}_world_size_2_rank_{rank}.pt")
    (actor / "fsdp_config.json").write_text('{"FSDP_version": 2, "world_size": 2}')
    _touch(out / f"global_step_{step}", "data.pt")
    model(step).config.save_pretrained(actor / "huggingface")
    tokenizer().save_pretrained(actor / "huggingface")
    (out / "latest_checkpointed_iteration.txt").write_text(str(step))


def verl_lora(out: Path, step: int) -> None:
    """Save global_step_<step> of verl's LoRA: the adapter beside the parts by rank."""
    verl_sharded(out, step)
    trl_lora(out.parent / "made", step)
    (out.parent / f"made/checkpoint-{step}").rename(out / f"global_step_{step}/actor/lora_adapter")


def openrlhf(out: Path, step: int) -> None:
    """Save global_step<step>_hf of OpenRLHF beside DeepSpeed's own state."""
    save(out / f"global_step{step}_hf", step)
    _touch(out / f"_actor/global_step{step}", "mp_rank_00_model_states.pt")


def open_instruct(out: Path, step: int) -> None:
    """Save step_<step> of open-instruct."""
    save(out / f"step_{step}", step)


def prime_rl(out: Path, step: int) -> None:
    """Save weights/step_<step> of prime-rl beside the state that it resumes from."""
    folder = save(out / f"weights/step_{step}", step)
    _touch(folder, "STABLE")
    _touch(out / f"checkpoints/step_{step}/trainer", ".metadata", "__0_0.distcp")


TRAINERS: dict[str, Callable[[Path, int], None]] = {
    "trl": trl,
    "trl_lora": trl_lora,
    "verl": verl,
    "verl_lora": verl_lora,
    "openrlhf": openrlhf,
    "open_instruct": open_instruct,
    "prime_rl": prime_rl,
}
