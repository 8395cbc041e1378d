"""Run token-wise parts of a transformer only at the positions whose output is used."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from selfcorrect.evaluate.callback import temporary_eval_mode

# What a model can raise that does not support a kind of forward.
UNSUPPORTED = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError)

logger = logging.getLogger(__name__)

# Whether a backbone computes the same with some positions left out; tried at its first forward.
_is_exact: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def select_positions(hidden: Tensor, positions: Tensor) -> Tensor:
    """Return the states (1, positions, size) at flat positions of states (rows, tokens, size)."""
    return hidden.flatten(0, 1).index_select(0, positions)[None]


def rounding_error(dtype: torch.dtype) -> float:
    """Return the mean difference up to which two computations in `dtype` count as equal.

    It is the square root of the smallest relative difference of the type: 3e-4 in float32, 0.09 in
    bfloat16. Batches of other shapes round a hundred times less in float32, and a wrong mask, cap
    or position is far larger.
    """
    return float(torch.finfo(dtype).eps ** 0.5)


@contextmanager
def only_positions(
    needed: Tensor, backbone: nn.Module, *, attended: Tensor, inputs: Mapping[str, Any]
) -> Iterator[None]:
    """Run token-wise modules (MLPs, last-layer q/o projections) only at positions in use.

    Other positions hold zeros and must not be read. Positions are indices into rows x tokens,
    flattened. `needed` are those whose last hidden state is read: the last layer's MLP, queries and
    output projection run at no others. `attended` are those that attention carries to a needed
    position: the MLPs of the layers below run at no others. Layers whose modules have other names,
    and checkpointed layers, which would be recomputed outside this block, run at every position.

    `inputs` are those of the backbone. Before its first forward, it is run on them with and without
    leaving out the second half of every row. If the states differ, there is a warning, and the
    backbone always runs at every position.
    """
    if backbone not in _is_exact:
        _is_exact[backbone] = _try_half(backbone, inputs)
    modules = _token_wise(backbone, needed, attended) if _is_exact[backbone] else []
    with _run_at(modules, inputs["input_ids"].shape):
        yield


def _token_wise(
    backbone: nn.Module, needed: Tensor, attended: Tensor
) -> list[tuple[nn.Module, Tensor]]:
    """Return the modules that seem to be token-wise, each with the positions it has to run at."""
    stacks = [m for m in backbone.children() if isinstance(m, nn.ModuleList) and len(m)]
    *below, last = stacks[0] if len(stacks) == 1 else [None]
    if getattr(last, "gradient_checkpointing", False):
        return []
    attention = getattr(last, "self_attn", None)
    modules = [(getattr(last, "mlp", None), needed)]
    modules += [(getattr(attention, name, None), needed) for name in ("q_proj", "o_proj")]
    modules += [(getattr(layer, "mlp", None), attended) for layer in below]
    return [(module, at) for module, at in modules if isinstance(module, nn.Module)]


@torch.no_grad()
def _try_half(backbone: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Return whether the first half of every row stays the same if the second half is left out."""
    rows, tokens = inputs["input_ids"].shape
    columns = torch.arange(tokens, device=inputs["input_ids"].device).repeat(rows)
    end = tokens // 2
    needed, attended = (columns == end - 1).nonzero()[:, 0], (columns < end).nonzero()[:, 0]
    modules = _token_wise(backbone, needed, attended)
    if not modules or not end:
        return False
    with temporary_eval_mode(backbone):
        expected = select_positions(_hidden_states(backbone, inputs), needed)
        try:
            with _run_at(modules, (rows, tokens)):
                states = select_positions(_hidden_states(backbone, inputs), needed)
        except UNSUPPORTED as error:
            reason = " ".join(str(error).split())[:120] or type(error).__name__
        else:
            difference = ((states - expected).abs().mean() / expected.abs().mean()).item()
            tolerance = rounding_error(_computed_in(expected))
            if not difference > tolerance:  # NaN is reported with the loss
                return True
            reason = f"states are off by {difference:.2g}"
    logger.warning(
        "%s: its modules do not treat tokens one by one (%s): they run on padding and prompts too, "
        "which is slower",
        type(backbone).__name__,
        reason,
    )
    return False


def _computed_in(tensor: Tensor) -> torch.dtype:
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def _hidden_states(backbone: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    states: Tensor = backbone(**inputs, use_cache=False).last_hidden_state
    return states


@contextmanager
def _run_at(modules: list[tuple[nn.Module, Tensor]], shape: tuple[int, int]) -> Iterator[None]:
    """Run modules at flat positions of `shape` (rows, tokens), and put zeros elsewhere."""
    hooks = [hook for module, at in modules for hook in _hook_positions(module, at, shape)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hook_positions(module: nn.Module, positions: Tensor, shape: tuple[int, int]) -> list[Any]:
    """Return hooks that pass `module` the states at `positions` and put its output back there."""

    def at_positions(value: Any) -> Any:
        is_states = isinstance(value, Tensor) and value.dim() == 3 and value.shape[:2] == shape
        return select_positions(value, positions) if is_states else value

    def select(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tuple(map(at_positions, args)), {k: at_positions(v) for k, v in kwargs.items()}

    def put_back(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # a mixture of experts returns its routing too
            return (put_back(module, inputs, output[0]), *output[1:])
        zeros = output.new_zeros(shape[0] * shape[1], output.size(-1))
        return zeros.index_copy(0, positions, output[0]).view(*shape, -1)

    return [
        module.register_forward_pre_hook(select, with_kwargs=True),
        module.register_forward_hook(put_back),
    ]
