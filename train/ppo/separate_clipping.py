"""Clip policy and critic apart under DeepSpeed too, whose ZeRO clips all parameters jointly.

ZeRO holds each gradient in parts, one per process, and clips while it updates, out of a trainer's
reach: it measures the norm of each of its groups of parameters, and then scales every group by the
norm of all. Here a group is scaled by the norm of its own network instead.
"""

import math
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from selfcorrect.recipes.foundation.errors import InputError

# ZeRO measures a group by one of these: where gradients are in memory, or offloaded.
MEASURES = ("get_grad_norm_direct", "complete_grad_norm_calculation_for_cpu_offload")
SUPPORTED = ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3")


class SeparateClipping(TrainerCallback):
    """Has ZeRO scale policy and critic each by its own norm, and keeps the two norms.

    Every group of parameters must belong to one of the two networks alone.
    """

    def __init__(self, critic: nn.Module) -> None:
        self._critic_ids = {id(p) for p in critic.parameters()}
        self._zero: Any = None
        self._is_critic: list[bool] = []  # of each group
        self._norms: list[Tensor] = []  # of each group, in this update
        self._num_scaled = 0  # groups, in this update
        self._loss_scale = 1.0

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        """Take over the clipping of DeepSpeed's optimizer; raise InputError if it is not ZeRO's."""
        zero = optimizer.optimizer
        if not args.max_grad_norm or zero is self._zero:
            return
        if type(zero).__name__ not in SUPPORTED:
            raise InputError(
                f"ppo: DeepSpeed's {type(zero).__name__} clips policy and critic jointly; use ZeRO "
                "stage 1, 2 or 3 with its own optimizer, or set max_grad_norm: 0"
            )
        groups = zero.bit16_groups if hasattr(zero, "bit16_groups") else zero.fp16_groups
        self._zero = zero
        self._is_critic = [id(group[0]) in self._critic_ids for group in groups]
        update, scale = zero.step, zero.unscale_and_clip_grads

        def step(*arguments: Any, **options: Any) -> Any:
            self._norms.clear()
            self._num_scaled, self._loss_scale = 0, float(zero.loss_scale)
            return update(*arguments, **options)

        def unscale_and_clip_grads(gradients: Any, _: Tensor) -> None:
            scale(gradients, self._combined(self._is_critic[self._num_scaled]))
            self._num_scaled += 1

        zero.step, zero.unscale_and_clip_grads = step, unscale_and_clip_grads
        for name in MEASURES:
            setattr(zero, name, self._remembering(getattr(zero, name)))

    def norms(self) -> tuple[float, float]:
        """Return the norms of policy and critic before clipping; infinite if ZeRO saw overflow."""
        if len(self._norms) < len(self._is_critic):
            return math.inf, math.inf
        policy, critic = (float(self._combined(part)) / self._loss_scale for part in (False, True))
        return policy, critic

    def _remembering(self, measure: Any) -> Any:
        def measured(*arguments: Any, **options: Any) -> Tensor:
            self._norms.append(measure(*arguments, **options))
            return self._norms[-1]

        return measured

    def _combined(self, is_critic: bool) -> Tensor:
        """Return the norm of one network, infinite if a group's is not valid."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        pairs = zip(self._norms, self._is_critic, strict=True)
        return combine_grad_norm_groups([norm for norm, part in pairs if part == is_critic])
