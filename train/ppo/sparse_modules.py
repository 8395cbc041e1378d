"""Run token-wise parts of a transformer only at the positions whose output is used."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def select_positions(hidden: Tensor, positions: Tensor) -> Tensor:
    """Return the states (1, positions, size) at flat positions of states (rows, tokens, size)."""
    return hidden.flatten(0, 1).index_select(0, positions)[None]


@contextmanager
def only_positions(
    needed: Tensor, backbone: PreTrainedModel, *, attended: Tensor
) -> Iterator[None]:
    """Run token-wise modules (MLPs, last-layer q/o projections) only at positions in use.

    Other positions hold zeros and must not be read. Positions are indices into rows x tokens,
    flattened. `needed` are those whose last hidden state is read: the last layer's MLP, queries and
    output projection run at no others. `attended` are those that attention carries to a needed
    position: the MLPs of the layers below run at no others. Layers whose modules have other names,
    and checkpointed layers, which would be recomputed outside this block, run at every position.
    """
    stacks = [m for m in backbone.children() if isinstance(m, nn.ModuleList) and len(m)]
    *below, last = stacks[0] if len(stacks) == 1 else [None]
    attention = getattr(last, "self_attn", None)
    sparse = [(getattr(last, "mlp", None), needed)]
    sparse += [(getattr(attention, name, None), needed) for name in ("q_proj", "o_proj")]
    sparse += [(getattr(layer, "mlp", None), attended) for layer in below]
    if getattr(last, "gradient_checkpointing", False):
        sparse = []
    hooks = [hook for module, at in sparse if module for hook in _hook_positions(module, at)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hook_positions(module: nn.Module, positions: Tensor) -> list[Any]:
    """Return hooks that pass `module` the states at `positions` and put its output back there."""
    shapes: list[torch.Size] = []

    def select(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        shapes.append(inputs[0].shape)
        return (select_positions(inputs[0], positions),)

    def put_back(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # a mixture of experts returns its routing too
            return (put_back(module, inputs, output[0]), *output[1:])
        shape = (*shapes[-1][:2], output.size(-1))
        zeros = output.new_zeros(shape).flatten(0, 1)
        return zeros.index_copy(0, positions, output[0]).view(shape)

    return [module.register_forward_pre_hook(select), module.register_forward_hook(put_back)]
