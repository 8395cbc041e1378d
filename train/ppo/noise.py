"""Models without dropout, layer drop, router jitter or other noise that training switches on."""

import random
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

RandomStates = list[Any]


def random_states(device: torch.device) -> RandomStates:
    """Return the states of all random number generators that a forward on `device` can draw from.

    Two lists are equal if nothing was drawn between them.
    """
    numpy: Any = np.random.get_state()
    states = [random.getstate(), numpy[1].tolist(), numpy[2], torch.get_rng_state().tolist()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state().tolist())
    return states


@contextmanager
def eval_below(model: nn.Module) -> Iterator[None]:
    """Run the block with all modules below `model` in eval mode; the mode of `model` stays."""
    modes = [(module, module.training) for module in model.modules() if module is not model]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def hold_in_eval(model: PreTrainedModel) -> None:
    """Keep all modules below `model` in eval mode, whatever mode `model` is set to.

    Trainers read the mode of `model` itself, which still changes. Layers are checkpointed in train
    mode only, so `checkpoint_in_eval` must be called before each forward.
    """

    def train(self: PreTrainedModel, mode: bool = True) -> PreTrainedModel:
        nn.Module.train(self, False)
        self.training = mode
        return self

    model.train = types.MethodType(train, model)
    model.train(model.training)


def is_held_in_eval(model: PreTrainedModel) -> bool:
    """Return whether `hold_in_eval` was called."""
    return "train" in vars(model)


def checkpoint_in_eval(model: PreTrainedModel) -> None:
    """Let the layers of a model that is held in eval mode checkpoint, but run in eval mode."""
    if not is_held_in_eval(model):
        return
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
            layer.training = model.training
            checkpoint = layer._gradient_checkpointing_func
            if not hasattr(checkpoint, "runs_in_eval"):
                layer._gradient_checkpointing_func = _in_eval(layer, checkpoint)


def _in_eval(layer: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Return `checkpoint` with the layer in eval mode, also while it is computed again."""

    def run(function: Callable[..., Any], *inputs: Any) -> Any:
        def in_eval(*values: Any) -> Any:
            layer.training = False
            try:
                return function(*values)
            finally:
                layer.training = True

        return checkpoint(in_eval, *inputs)

    run.runs_in_eval = True  # type: ignore[attr-defined]
    return run
