"""States to resume from as safetensors: optimizer, schedule and random numbers, no pickle.

transformers writes these three as pickles. Here the same nested values are kept as tensors, and as
JSON in the file's own metadata, so that nothing which is read on resuming can name a function.
"""

# ruff: noqa: TID253  (all of this file is torch and transformers)

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import Trainer

from selfcorrect.evaluate.scoring.load_model import PICKLES
from selfcorrect.recipes.foundation.atomic_files import atomic_file
from selfcorrect.recipes.foundation.errors import InputError

TREE = "tree"  # key of the JSON in the metadata
IGNORED = "training_args.bin"  # transformers writes it and never reads it


class PlainState(Trainer):
    """A Trainer whose states are no pickles; TRL's trainers get it as their last base.

    Where DeepSpeed or FSDP splits the optimizer, they save and load it in their own way.
    """

    @property
    def _is_split(self) -> bool:
        return bool(self.is_deepspeed_enabled or self.is_fsdp_enabled)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._is_split:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            folder = Path(output_dir)
            save(folder / "optimizer.safetensors", self.optimizer.state_dict())
            save(folder / "scheduler.safetensors", self.lr_scheduler.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._is_split or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        self.optimizer.load_state_dict(load(folder / "optimizer.safetensors"))
        self.lr_scheduler.load_state_dict(load(folder / "scheduler.safetensors"))

    def _save_rng_state(self, output_dir: str) -> None:
        states = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        save(self._random_file(output_dir), states)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        states = load(self._random_file(checkpoint))
        random.setstate(states["python"])
        np.random.set_state(states["numpy"])
        torch.set_rng_state(states["cpu"])
        if torch.cuda.device_count() == len(states["cuda"]):
            torch.cuda.set_rng_state_all(states["cuda"])

    def _save_scaler(self, output_dir: str) -> None:
        scaler = self.accelerator.scaler
        if scaler is not None and self.args.should_save:
            save(Path(output_dir) / "scaler.safetensors", scaler.state_dict())

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(load(Path(checkpoint) / "scaler.safetensors"))

    def _random_file(self, folder: str) -> Path:
        rank = self.args.process_index
        return Path(folder) / f"random-{rank}.safetensors"

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._is_split:
            _refuse_pickles(Path(resume_from_checkpoint))
        super()._load_from_checkpoint(resume_from_checkpoint, model)


def _refuse_pickles(state: Path) -> None:
    """InputError where a state holds a pickle: no version of this package has put it there."""
    for path in sorted(state.rglob("*")):
        if path.suffix in PICKLES and path.name != IGNORED:
            raise InputError(
                f"{path}: a pickle, which could run code and is never loaded; "
                f"delete {state.parent}, and the stage begins anew"
            )


def save(path: Path, value: Any) -> None:
    """Write nested dicts, lists and tuples of tensors, arrays, numbers and texts as safetensors."""
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_to_json(value, tensors))
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata={TREE: tree})


def load(path: Path) -> Any:
    """What `save` has written; InputError where the file is missing, damaged or another's."""
    try:
        with safe_open(path, "pt") as file:
            return _from_json(json.loads(file.metadata()[TREE]), file)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{path}: missing or damaged, so this state cannot be resumed; "
            f"delete {path.parent} to go on from the one before it"
        ) from None


def _to_json(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name, tensor = str(len(tensors)), value.detach().cpu().contiguous()
        shared = any(tensor.data_ptr() == other.data_ptr() for other in tensors.values())
        tensors[name] = tensor.clone() if shared else tensor
        return {"tensor": name}
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": str(value.dtype)}
    if isinstance(value, dict):
        return {"dict": [[key, _to_json(one, tensors)] for key, one in value.items()]}
    if isinstance(value, list | tuple):
        parts = [_to_json(one, tensors) for one in value]
        return parts if isinstance(value, list) else {"tuple": parts}
    return value


def _from_json(value: Any, file: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(one, file) for one in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return file.get_tensor(value["tensor"])
    if "array" in value:
        return np.array(value["array"], dtype=value["dtype"])
    if "tuple" in value:
        return tuple(_from_json(one, file) for one in value["tuple"])
    return {key: _from_json(one, file) for key, one in value["dict"]}
