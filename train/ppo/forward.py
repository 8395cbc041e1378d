"""Actor and critic in one forward pass, on real tokens only and at their true positions."""

import functools
import inspect
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
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

    `model(..., score_last=T)` returns log-probabilities of the last T tokens only, so the LM head
    does no work on prompts. The critic becomes a submodule, reached through the model's own
    forward: DistributedDataParallel and ZeRO then see one module, one forward and one backward.
    """
    if critic is not None:
        language_model.add_module(CRITIC, critic)
    plain_forward = language_model.forward

    @functools.wraps(type(language_model).forward)  # `generate` reads the signature
    def forward(
        self: PreTrainedModel,
        *args: Any,
        score_last: int | None = None,
        with_values: bool = False,
        detach_trunk: bool = False,
        **kwargs: Any,
    ) -> Any:
        if score_last is None:
            return plain_forward(*args, **kwargs)
        states: list[Tensor] = []

        def keep_last(module: nn.Module, inputs: Any, output: Any) -> Any:
            output.last_hidden_state = output.last_hidden_state[:, -score_last - 1 :]
            states.append(output.last_hidden_state)
            return output

        hook = self.base_model.register_forward_hook(keep_last)
        labels = kwargs.pop("labels")[:, -score_last - 1 :]
        try:
            scored = plain_forward(*args, labels=labels, **kwargs)
        finally:
            hook.remove()
        output = ActorCriticOutput(**scored)
        if with_values:
            hidden = states[0].detach() if detach_trunk else states[0]
            critic = getattr(self, CRITIC)
            if critic.backbone is not None:
                known = ("input_ids", "attention_mask", "position_ids")
                inputs = {k: v for k, v in kwargs.items() if k in known}
                hidden = critic.backbone(**inputs, use_cache=False).last_hidden_state
            output.state_values = critic(hidden[:, -score_last - 1 : -1])
        return output

    language_model.forward = types.MethodType(forward, language_model)


@contextmanager
def hidden_critic(language_model: PreTrainedModel) -> Iterator[None]:
    """Take the critic out of the module tree for a while: nobody saves, loads or syncs it."""
    critic = language_model._modules.pop(CRITIC)
    try:
        yield
    finally:
        language_model._modules[CRITIC] = critic


def takes_positions(language_model: PreTrainedModel) -> bool:
    """Whether the backbone can be told where in its text each token stands."""
    return "position_ids" in inspect.signature(language_model.base_model.forward).parameters


class CompletionPass:
    """Stands in for the model where TRL scores completions: trims, adds positions, keeps values.

    TRL passes no position ids, which is wrong for left-padded prompts where positions are absolute
    (GPT-2), and it passes rows as wide as the whole rollout batch. Columns that are padding in
    every row of a micro-batch are cut here, and what comes back is as wide as TRL expects.
    """

    def __init__(self, model: nn.Module, width: int, positions: bool, **call: Any) -> None:
        self.model = model
        self.width = width
        self.positions = positions
        self.call = call
        self.values: list[Tensor] = []

    def __call__(
        self, *, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **extra: Any
    ) -> ActorCriticOutput:
        """One micro-batch; all arguments as TRL passes them."""
        first, end = real_columns(attention_mask)
        # At least one completion column stays, and one state before it.
        end = max(end, input_ids.size(1) - self.width + 1)
        first = min(first, input_ids.size(1) - self.width - 1)
        cut = input_ids.size(1) - end
        mask = attention_mask[:, first:end]
        if self.positions:
            extra["position_ids"] = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        output = self.model(
            input_ids=input_ids[:, first:end],
            attention_mask=mask,
            labels=labels[:, first:end],
            score_last=self.width - cut,
            **self.call,
            **extra,
        )
        output.log_probs = pad(output.log_probs, (0, cut))
        if output.entropy is not None:
            output.entropy = pad(output.entropy, (0, cut))
        if output.state_values is not None:
            self.values.append(pad(output.state_values, (0, cut)))
        return output


def real_columns(attention_mask: Tensor) -> tuple[int, int]:
    """First and one past the last column with a real token in any row."""
    real = torch.nonzero(attention_mask.any(dim=0)).flatten()
    return (int(real[0]), int(real[-1]) + 1) if len(real) else (0, attention_mask.size(1))
