"""Actor and critic in one forward pass, on real tokens only and at their true positions."""

import functools
import types
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from selfcorrect.train.ppo.critic import Critic

CRITIC = "critic"


@dataclass
class ActorCriticOutput(FusedCausalLMOutput):
    """TRL's per-token output, and `state_values` (rows, tokens): V before each token is sampled.

    (Not `values`: the output is also a dict, whose `values()` DistributedDataParallel calls.)
    """

    state_values: Tensor | None = None


def attach(language_model: PreTrainedModel, critic: Critic | None) -> None:
    """Teach a model that has TRL's fused head to score completions, with values if it has a critic.

    `model(input_ids, labels, scored_only=True)` returns flat tensors (1, n) for the n tokens whose
    label is not -100, row by row: neither the LM head nor the critic's head works on prompts and
    padding. The critic becomes a submodule, reached through the model's own forward:
    DistributedDataParallel and ZeRO then see one module, one forward and one backward.
    """
    if critic is not None:
        language_model.add_module(CRITIC, critic)
    plain_forward = language_model.forward

    @functools.wraps(type(language_model).forward)  # `generate` reads the signature
    def forward(
        self: PreTrainedModel,
        *args: Any,
        scored_only: bool = False,
        with_values: bool = False,
        detach_trunk: bool = False,
        **kwargs: Any,
    ) -> Any:
        if not scored_only:
            return plain_forward(*args, **kwargs)
        labels = kwargs.pop("labels")
        following = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        scored = following != -100
        places = torch.nonzero(scored.flatten()).squeeze(1)  # of the states that predict them
        up_to_them = scored.flip(1).cumsum(1).flip(1) > 0  # behind a row's last one is padding
        real = torch.nonzero(up_to_them.flatten()).squeeze(1)
        states: list[Tensor] = []

        def keep_predicting(module: nn.Module, inputs: Any, output: Any) -> Any:
            output.last_hidden_state = _states_at(places, output.last_hidden_state)
            states.append(output.last_hidden_state)
            return output

        hook = self.base_model.register_forward_hook(keep_predicting)
        only: AbstractContextManager[None] = token_work_at(places, self.base_model, before=real)
        if kwargs.get("output_router_logits"):
            only = nullcontext()  # experts are balanced over whole rows
        try:
            with only:
                answer = plain_forward(
                    *args, shift_labels=following.flatten()[places][None], **kwargs
                )
        finally:
            hook.remove()
        output = ActorCriticOutput(**answer)
        if with_values:
            hidden = states[0].detach() if detach_trunk else states[0]
            critic = getattr(self, CRITIC)
            if critic.backbone is not None:
                inputs = {k: v for k, v in kwargs.items() if k in ("input_ids", "attention_mask")}
                with token_work_at(places, critic.backbone, before=real):
                    hidden = critic.backbone(**inputs, use_cache=False).last_hidden_state
                hidden = _states_at(places, hidden)
            output.state_values = critic(hidden)
        return output

    language_model.forward = types.MethodType(forward, language_model)


def _states_at(places: Tensor, hidden: Tensor) -> Tensor:
    """States (1, places, size) out of hidden states (rows, tokens, size)."""
    return hidden.flatten(0, 1).index_select(0, places)[None]


@contextmanager
def token_work_at(
    read: Tensor, backbone: PreTrainedModel, *, before: Tensor | None = None
) -> Iterator[None]:
    """Inside, what works on each token by itself does so on chosen ones alone; others get zeros.

    Nobody else's state changes by it. `read` are the places, of rows x tokens flattened, whose last
    states are read: the last layer's feed-forward network, queries and projection of what attention
    brings work on no others. `before` are those that the feed-forward networks below work on: every
    token that attention carries to a place that is read (default: all tokens). Layers in which none
    of these is found by its name, and checkpointed ones, which would be computed again without
    this, do all of it.
    """
    stacks = [m for m in backbone.children() if isinstance(m, nn.ModuleList) and len(m)]
    *below, last = stacks[0] if len(stacks) == 1 else [None]
    attention = getattr(last, "self_attn", None)
    wanted = [(getattr(last, "mlp", None), read)]
    wanted += [(getattr(attention, name, None), read) for name in ("q_proj", "o_proj")]
    if before is not None:
        wanted += [(getattr(layer, "mlp", None), before) for layer in below]
    if getattr(last, "gradient_checkpointing", False):
        wanted = []
    hooks = [hook for module, places in wanted if module for hook in _work_at(places, module)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _work_at(places: Tensor, part: nn.Module) -> list[Any]:
    """Hooks that hand `part` the states at `places`, and put its answers back there."""
    shapes: list[torch.Size] = []

    def choose(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        shapes.append(inputs[0].shape)
        return (_states_at(places, inputs[0]),)

    def put_back(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # experts' routing beside it
            return (put_back(module, inputs, output[0]), *output[1:])
        shape = (*shapes[-1][:2], output.size(-1))
        return output.new_zeros(shape).flatten(0, 1).index_copy(0, places, output[0]).view(shape)

    return [part.register_forward_pre_hook(choose), part.register_forward_hook(put_back)]


@contextmanager
def hidden_critic(language_model: PreTrainedModel) -> Iterator[None]:
    """Take the critic out of the module tree for a while: nobody saves, loads or syncs it."""
    critic = language_model._modules.pop(CRITIC)
    try:
        yield
    finally:
        language_model._modules[CRITIC] = critic


class CompletionPass:
    """Stands in for the model where TRL scores completions: no padding between, values kept aside.

    TRL's rows are a left-padded prompt and a right-padded completion, as wide as the whole rollout
    batch. Here each row's tokens move to the front, and columns that are then padding in every row
    are cut. Causal attention cannot see the padding behind a row, so no mask is needed, and each
    token stands at its true position, which matters where positions are absolute (GPT-2; TRL passes
    none). What comes back is laid out as TRL expects it.
    """

    def __init__(self, model: nn.Module, width: int, **call: Any) -> None:
        self.model = model
        self.width = width
        self.call = call
        self.values: list[Tensor] = []

    def __call__(
        self, *, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **extra: Any
    ) -> ActorCriticOutput:
        """One micro-batch; all arguments as TRL passes them."""
        order = _real_first(attention_mask)
        if "output_router_logits" in extra:  # experts are balanced over real tokens
            extra["attention_mask"] = attention_mask.gather(1, order)
        output = self.model(
            input_ids=input_ids.gather(1, order),
            labels=labels.gather(1, order),
            scored_only=True,
            **self.call,
            **extra,
        )
        scored = labels[:, -self.width :] != -100

        def laid_out(flat: Tensor) -> Tensor:
            return flat.new_zeros(scored.shape).masked_scatter(scored, flat)

        output.log_probs = laid_out(output.log_probs)
        if output.entropy is not None:
            output.entropy = laid_out(output.entropy)
        if output.state_values is not None:
            self.values.append(laid_out(output.state_values))
        return output


def _real_first(attention_mask: Tensor) -> Tensor:
    """Columns (rows, longest row) that put each row's real tokens first, in their order."""
    longest = int(attention_mask.sum(dim=1).max())
    return attention_mask.argsort(dim=1, descending=True, stable=True)[:, : max(longest, 1)]
