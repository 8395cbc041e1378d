"""Stop training before a number that is not finite is saved; see docs/reference/numerics.md."""

# ruff: noqa: TID253  (all of this file is torch and transformers)

from typing import Any

import torch

from selfcorrect.evaluate.callback import undisturbed
from selfcorrect.recipes.foundation.errors import RunFailure
from selfcorrect.train.trainers.plain_state import PlainState

REMEDY = "lower the learning rate; the last good state is kept"


class FiniteTrainer(PlainState):
    """A Trainer that acts on no loss or gradient, and saves no model, that is not finite.

    TRL's trainers get it as their last base. Raises RunFailure with one line.
    """

    stage = "training"

    @property
    def place(self) -> str:
        """Which update is under way, for messages."""
        return f"{self.stage}: update {self.state.global_step + 1}"

    def training_step(
        self, model: Any, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """A forward and backward pass; the loss must be finite."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise RunFailure(f"{self.place}: the loss is {loss.item()}; {REMEDY}")
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        self.check_gradient(norm)
        return norm

    def check_gradient(self, norm: Any) -> None:
        """RunFailure for a norm that is not finite; with fp16 a loss scaler skips the update."""
        scaled = self.accelerator.scaler is not None or self._is_split  # DeepSpeed has its own
        if norm is None or scaled or torch.isfinite(_tensor(norm)):
            return
        raise RunFailure(f"{self.place}: the gradient's norm is {float(norm)}; {REMEDY}")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.check_model()
        super()._save_checkpoint(model, trial)

    @torch.no_grad()
    def check_model(self) -> None:
        """RunFailure where a weight, or an answer to two tokens, is not finite.

        Weights can be finite and yet so large that every answer overflows.
        """
        if self._is_split:
            return  # no process has the whole model; the next loss tells
        model = self.accelerator.unwrap_model(self.model)
        where = f"{self.stage}: after update {self.state.global_step}"
        for name, weight in model.named_parameters():
            if not torch.isfinite(weight).all():
                raise RunFailure(f"{where}: the weight {name} is not finite; {REMEDY}")
        with undisturbed(model):
            ids = torch.tensor([[0, 1]], device=model.device)
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        if not torch.isfinite(logits).all():
            raise RunFailure(f"{where}: the model's answers are not finite; {REMEDY}")


def _tensor(norm: Any) -> torch.Tensor:
    return norm if isinstance(norm, torch.Tensor) else torch.tensor(norm)
