"""Attention within tries of tokens: the mask, and on a CPU the pairs that need computing."""
# ruff: noqa: TID253  -- all torch; imported only where a model is at hand

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_BLOCK = 64  # queries
SEVERAL_BLOCKS = 2 * _BLOCK  # nodes from which on blocks save time


def tree_attention_mask(
    ends: torch.Tensor, dtype: torch.dtype, cached: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the additive mask (B, 1, L, C + L) of tries in preorder: 0 for a node's ancestors.

    `ends` (B, L) is the last node of each node's subtree; a node also attends to itself. `cached`
    (B, C) marks the columns of a preceding cache that all nodes of a row attend to.
    """
    nodes = torch.arange(ends.shape[1], device=ends.device)
    attended = (nodes[:, None] >= nodes) & (nodes[:, None] <= ends[:, None, :])
    if cached is not None:
        before = cached.to(ends.device)[:, None, :].expand(-1, len(nodes), -1)
        attended = torch.cat([before, attended], dim=2)
    mask = torch.full(attended.shape, torch.finfo(dtype).min, dtype=dtype, device=ends.device)
    return mask.masked_fill_(attended, 0.0)[:, None]


class AttentionToEarlierNodes(TorchFunctionMode):
    """Leave later nodes out of `scaled_dot_product_attention`, one block of queries at a time.

    Enter it around the forward of a model that is given `tree_attention_mask` without a cache. In
    preorder no node attends to a later one, but PyTorch computes all pairs where it is given a
    mask, and in bfloat16 on a CPU they take a fifth of a forward. Results change by rounding only.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        mask = kwargs.get("attn_mask")
        if func is not torch.nn.functional.scaled_dot_product_attention or mask is None:
            return func(*args, **kwargs)
        query, key, value = args
        length = query.shape[-2]
        if mask.shape[-2:] != (length, length):
            return func(*args, **kwargs)
        blocks = []
        for start in range(0, length, _BLOCK):
            end = min(start + _BLOCK, length)
            kwargs["attn_mask"] = mask[..., start:end, :end]
            blocks.append(
                func(query[..., start:end, :], key[..., :end, :], value[..., :end, :], **kwargs)
            )
        return torch.cat(blocks, dim=-2)
