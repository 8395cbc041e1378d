"""Linear layers for a few rows on a CPU: weights in the order in which oneDNN reads them.

A product of 16 rows takes hardly longer than reading the weights, and `torch.nn.functional.linear`
reorders them in every call. Here that is done once, as torch's compiler does with frozen weights.
"""
# ruff: noqa: TID253  -- all torch; imported only where a model is at hand

import logging
from functools import partial
from typing import Any

import torch

from selfcorrect.evaluate.scoring.limits import MOST_REORDERED

_FEWEST = 2**14  # numbers in a weight

logger = logging.getLogger(__name__)


class ReorderedLinears:
    """While entered, a model's linear layers multiply by reordered copies of their weights.

    Without effect where torch offers none, on other devices, and for very small or large models.
    """

    def __init__(self, model: Any, num_rows: int) -> None:
        self.forwards: list[tuple[torch.nn.Linear, Any]] = []
        layers = [
            module
            for module in model.modules()
            if type(module) is torch.nn.Linear
            and "forward" not in vars(module)
            and module.weight.device.type == "cpu"
            and module.weight.dtype in (torch.float32, torch.bfloat16)
            and module.weight.numel() >= _FEWEST
        ]
        is_apt = sum(layer.weight.numel() for layer in layers) <= MOST_REORDERED
        if not is_apt or torch.is_autocast_enabled("cpu"):
            return
        try:
            for layer in layers:
                weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), num_rows)
                self.forwards.append((layer, partial(_linear, weight, layer.bias)))
        except (RuntimeError, AttributeError) as error:
            logger.info("weights are not reordered: %s", error)
            self.forwards = []

    def __enter__(self) -> None:
        for layer, forward in self.forwards:
            layer.forward = forward  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        for layer, _forward in self.forwards:
            vars(layer).pop("forward", None)  # a patch of the head may have taken it away


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product
