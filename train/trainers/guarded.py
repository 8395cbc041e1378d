"""Trainer that stops on numbers that are not finite and writes its training state without pickles.

transformers pickles the optimizer, schedule and random states. Here the same nested values are
tensors in a safetensors file, with the structure as JSON in its metadata, so that nothing read on
resuming can name a function. See docs/reference/numerics.md for the checks.
"""

# ruff: noqa: TID253  (all of this file is torch and transformers)

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer

from selfcorrect.evaluate.callback import temporary_eval_mode
from selfcorrect.evaluate.scoring.load_model import PICKLES
from selfcorrect.recipes.foundation import signals
from selfcorrect.recipes.foundation.atomic_files import atomic_file
from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from selfcorrect.train.trainers.callbacks import SaveOnSigterm
from selfcorrect.train.trainers.state import newest_state

REMEDY = "lower the learning rate; the last good state is kept"
STRUCTURE = "tree"  # metadata key of the JSON
UNREAD_PICKLE = "training_args.bin"  # transformers writes it and never reads it


class GuardedTrainer(Trainer):
    """Trainer that acts on no loss or gradient, and saves no model, that is not finite.

    TRL's trainers get it as their last base class. Its training state holds no pickles, except
    where DeepSpeed or FSDP splits the optimizer: they save and load it in their own way.
    Raises RunFailure for a number that is not finite, InputError for an unreadable state.
    """

    stage = "training"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.model, PeftModel):
            # TRL casts adapters over 4-bit weights to bfloat16, which loses small updates.
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        leave_casts_to_autocast(self.model)

    @property
    def step_label(self) -> str:
        """Stage and current update, for messages."""
        return f"{self.stage}: update {self.state.global_step + 1}"

    @property
    def _is_split(self) -> bool:
        return bool(self.is_deepspeed_enabled or self.is_fsdp_enabled)

    # ---- finite numbers --------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run a forward and backward pass; raise RunFailure if the loss is not finite."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise RunFailure(f"{self.step_label}: the loss is {loss.item()}; {REMEDY}")
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        self.check_gradient(norm)
        return norm

    def check_gradient(self, norm: Any) -> None:
        """Raise RunFailure if a gradient norm is not finite.

        Not under fp16 or DeepSpeed, whose loss scalers skip such an update.
        """
        is_scaled = self.accelerator.scaler is not None or self._is_split
        if norm is None or is_scaled or torch.isfinite(torch.as_tensor(norm)):
            return
        raise RunFailure(f"{self.step_label}: the gradient norm is {float(norm)}; {REMEDY}")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.check_model()
        super()._save_checkpoint(model, trial)

    @torch.no_grad()
    def check_model(self) -> None:
        """Raise RunFailure if a weight, or a logit for two tokens, is not finite.

        Finite weights can be so large that every logit overflows.
        """
        if self._is_split:
            return  # no rank holds the complete model; the next loss will show it
        model = self.accelerator.unwrap_model(self.model)
        where = f"{self.stage}: after update {self.state.global_step}"
        for name, weight in model.named_parameters():
            if not torch.isfinite(weight).all():
                raise RunFailure(f"{where}: the weight {name} is not finite; {REMEDY}")
        with temporary_eval_mode(model):
            ids = torch.tensor([[0, 1]], device=model.device)
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        if not torch.isfinite(logits).all():
            raise RunFailure(f"{where}: the model's logits are not finite; {REMEDY}")

    # ---- training state without pickles ----------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._is_split:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            folder = Path(output_dir)
            save_nested(folder / "optimizer.safetensors", self.optimizer.state_dict())
            save_nested(folder / "scheduler.safetensors", self.lr_scheduler.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._is_split or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        self.optimizer.load_state_dict(load_nested(folder / "optimizer.safetensors"))
        self.lr_scheduler.load_state_dict(load_nested(folder / "scheduler.safetensors"))

    def _save_rng_state(self, output_dir: str) -> None:
        states = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        save_nested(self._rng_file(output_dir), states)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        states = load_nested(self._rng_file(checkpoint))
        random.setstate(states["python"])
        np.random.set_state(states["numpy"])
        torch.set_rng_state(states["cpu"])
        if torch.cuda.device_count() == len(states["cuda"]):
            torch.cuda.set_rng_state_all(states["cuda"])

    def _rng_file(self, folder: str) -> Path:
        return Path(folder) / f"random-{self.args.process_index}.safetensors"

    def _save_scaler(self, output_dir: str) -> None:
        scaler = self.accelerator.scaler
        if scaler is not None and self.args.should_save:
            save_nested(Path(output_dir) / "scaler.safetensors", scaler.state_dict())

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = self.accelerator.scaler
        if checkpoint is not None and scaler is not None:
            scaler.load_state_dict(load_nested(Path(checkpoint) / "scaler.safetensors"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        state = Path(resume_from_checkpoint)
        for path in [] if self._is_split else sorted(state.rglob("*")):
            if path.suffix in PICKLES and path.name != UNREAD_PICKLE:
                raise InputError(
                    f"{path}: a pickle, which could run code and is never loaded; "
                    f"delete {state.parent} to start the stage over"
                )
        super()._load_from_checkpoint(resume_from_checkpoint, model)


def leave_casts_to_autocast(model: nn.Module) -> None:
    """Have adapters read their input as it is where autocast chooses the type of the product.

    peft would first cast it to the type of the adapter's weights, and autocast back again. The
    numbers are the same, but every layer would keep a copy of an input that several share.
    """
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        has_dropout = not all(isinstance(d, nn.Identity) for d in layer.lora_dropout.values())
        if has_dropout or layer.lora_variant:
            continue  # these do more with the input, in its own type, than multiply it

        def cast(x: Any, dtype: Any, by_peft: Any = layer._cast_input_dtype) -> Any:
            is_cast = x is not None and torch.is_autocast_enabled(x.device.type)
            return x if is_cast else by_peft(x, dtype)

        layer._cast_input_dtype = cast


def train_or_resume(trainer: GuardedTrainer, work: Path) -> None:
    """Train from the newest state below `work` to the end, without transformers' own printing.

    Raises Terminated on SIGTERM, after the current optimizer update and with the state saved, and
    RunFailure if the trained model is not finite.
    """
    trainer.remove_callback(PrinterCallback)  # the run shows its own progress
    # Added last, so that it sees `should_save` as other callbacks left it.
    trainer.add_callback(SaveOnSigterm(getattr(trainer, "updates_per_step", 1)))
    with signals.deferred():
        trainer.train(resume_from_checkpoint=newest_state(work))
    trainer.check_model()


def save_nested(path: Path, value: Any) -> None:
    """Write nested dicts, lists and tuples of tensors, arrays, numbers and text as safetensors."""
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_to_json(value, tensors))
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata={STRUCTURE: structure})


def load_nested(path: Path) -> Any:
    """Read a file of `save_nested`; raise InputError if it is missing, damaged or another kind."""
    try:
        with safe_open(path, "pt") as file:
            return _from_json(json.loads(file.metadata()[STRUCTURE]), file)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{path}: missing or damaged, so this state cannot be resumed; "
            f"delete {path.parent} to resume from the previous state"
        ) from None


def _to_json(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name, tensor = str(len(tensors)), value.detach().cpu().contiguous()
        is_shared = any(tensor.data_ptr() == known.data_ptr() for known in tensors.values())
        tensors[name] = tensor.clone() if is_shared else tensor
        return {"tensor": name}
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": str(value.dtype)}
    if isinstance(value, dict):
        return {"dict": [[key, _to_json(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_to_json(item, tensors) for item in value]
        return items if isinstance(value, list) else {"tuple": items}
    return value


def _from_json(value: Any, file: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(item, file) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return file.get_tensor(value["tensor"])
    if "array" in value:
        return np.array(value["array"], dtype=value["dtype"])
    if "tuple" in value:
        return tuple(_from_json(item, file) for item in value["tuple"])
    return {key: _from_json(item, file) for key, item in value["dict"]}
