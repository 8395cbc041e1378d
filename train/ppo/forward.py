"""Actor and critic in one forward pass, on real tokens only and at their true positions."""

import functools
import types
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from selfcorrect.train.ppo.critic import Critic, trunk_of
from selfcorrect.train.ppo.noise import checkpoint_in_eval
from selfcorrect.train.ppo.sparse_modules import only_positions, select_positions

CRITIC = "critic"
IGNORED = -100  # label of tokens that are not scored


@dataclass
class ActorCriticOutput(FusedCausalLMOutput):
    """TRL's per-token output, and `state_values` (rows, tokens): V before each token is sampled.

    Not `values`: the output is also a dict, whose `values()` DistributedDataParallel calls.
    """

    state_values: Tensor | None = None


class TokenOutputs(NamedTuple):
    """Outputs (rows, tokens) for the tokens of completions; no values from the reference."""

    log_probs: Tensor
    entropies: Tensor | None
    values: Tensor | None
    aux_loss: Tensor | None  # () of a mixture of experts


def patch_forward(
    language_model: PreTrainedModel, critic: Critic | None, temperature: float
) -> None:
    """Make a model with TRL's fused head score completions only, with values if it has a critic.

    `model(input_ids, labels, scored_only=True)` then returns flat tensors (1, n) for the n tokens
    with a label, row by row: neither the LM head nor the critic's head runs on prompts and padding.
    With `plain=True` the logits are those of the model's own forward, divided by `temperature`.
    The critic becomes a submodule, reached through the model's own forward, so that
    DistributedDataParallel and ZeRO see one module, one forward and one backward.
    """
    if critic is not None:
        language_model.add_module(CRITIC, critic)
    original_forward = language_model.forward

    @functools.wraps(type(language_model).forward)  # `generate` reads the signature
    def forward(
        self: PreTrainedModel,
        *args: Any,
        scored_only: bool = False,
        with_values: bool = False,
        detach_trunk: bool = False,
        plain: bool = False,
        **kwargs: Any,
    ) -> Any:
        if not scored_only:
            return original_forward(*args, **kwargs)
        checkpoint_in_eval(self)
        next_labels = nn.functional.pad(kwargs.pop("labels")[:, 1:], (0, 1), value=IGNORED)
        predicts = next_labels != IGNORED
        predicting = torch.nonzero(predicts.flatten()).squeeze(1)
        predicted = next_labels.flatten()[predicting][None]
        precedes = predicts.flip(1).cumsum(1).flip(1) > 0  # a predicting position, or is one
        attended = torch.nonzero(precedes.flatten()).squeeze(1)
        inputs = {k: v for k, v in kwargs.items() if k in ("input_ids", "attention_mask")}
        trunk, critic = trunk_of(self), getattr(self, CRITIC, None)
        states: list[Tensor] = []

        def keep_predicting(module: nn.Module, inputs: Any, output: Any) -> Any:
            output.last_hidden_state = select_positions(output.last_hidden_state, predicting)
            states.append(output.last_hidden_state)
            return output

        def keep_input(head: nn.Module, inputs: tuple[Tensor]) -> None:
            states.append(select_positions(inputs[0], predicting))

        def sparse(backbone: nn.Module) -> AbstractContextManager[None]:
            if plain or kwargs.get("output_router_logits"):
                return nullcontext()  # experts are balanced over complete rows
            return only_positions(predicting, backbone, attended=attended, inputs=inputs)

        with sparse(trunk):
            if plain:  # some families' own forward calls parts of the trunk, and never the trunk
                hook = self.get_output_embeddings().register_forward_pre_hook(keep_input)
            else:
                hook = trunk.register_forward_hook(keep_predicting)
            try:
                if plain:
                    kwargs.pop("fused_lm_head", None)
                    output = _score_logits(
                        original_forward(*args, use_cache=False, **kwargs),
                        predicting, predicted, temperature,
                    )  # fmt: skip
                else:
                    scored = original_forward(*args, shift_labels=predicted, **kwargs)
                    output = ActorCriticOutput(**scored)
            finally:
                hook.remove()
        if with_values and critic is not None:
            hidden = states[0].detach() if detach_trunk else states[0]
            if critic.backbone is not None:
                with sparse(critic.backbone):
                    hidden = critic.backbone(**inputs, use_cache=False).last_hidden_state
                hidden = select_positions(hidden, predicting)
            output.state_values = critic(hidden)
        return output

    language_model.forward = types.MethodType(forward, language_model)


def _score_logits(
    output: Any, predicting: Tensor, predicted: Tensor, temperature: float
) -> ActorCriticOutput:
    """Return log-probabilities of tokens `predicted` (1, n), and entropies, from plain logits."""
    logits = select_positions(output.logits, predicting).float() / temperature
    log_probs = logits.log_softmax(dim=-1)
    return ActorCriticOutput(
        log_probs=log_probs.gather(2, predicted[..., None]).squeeze(2),
        entropy=-(log_probs.exp() * log_probs).sum(dim=-1),
        aux_loss=getattr(output, "aux_loss", None),
    )


@contextmanager
def hidden_critic(language_model: PreTrainedModel) -> Iterator[None]:
    """Take the critic out of the module tree in the block, so that it is not saved or synced."""
    critic = language_model._modules.pop(CRITIC)
    try:
        yield
    finally:
        language_model._modules[CRITIC] = critic


class CompletionPass:
    """Stand-in for the model in TRL's scoring loop: removes padding and collects the values.

    TRL's rows are a left-padded prompt and a right-padded completion, as wide as the whole rollout
    batch. Each row's tokens move to the front, and columns that are padding in every row are cut.
    Causal attention cannot see the padding after a row, so no mask is needed, and each token is at
    its true position, which matters for absolute positions (GPT-2; TRL passes none). The output is
    laid out as TRL expects it.
    """

    def __init__(self, model: nn.Module, num_columns: int, **options: Any) -> None:
        self.model = model
        self.num_columns = num_columns  # of the completions
        self.options = options
        self.values: list[Tensor] = []  # of each micro-batch, (rows, columns)

    def __call__(
        self, *, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **extra: Any
    ) -> ActorCriticOutput:
        """Score one micro-batch; the arguments are those that TRL passes to a model."""
        columns = _real_first(attention_mask)
        if "output_router_logits" in extra:  # experts are balanced over real tokens
            extra["attention_mask"] = attention_mask.gather(1, columns)
        output = self.model(
            input_ids=input_ids.gather(1, columns),
            labels=labels.gather(1, columns),
            scored_only=True,
            **self.options,
            **extra,
        )
        is_scored = labels[:, -self.num_columns :] != IGNORED

        def lay_out(flat: Tensor) -> Tensor:
            return flat.new_zeros(is_scored.shape).masked_scatter(is_scored, flat)

        output.log_probs = lay_out(output.log_probs)
        if output.entropy is not None:
            output.entropy = lay_out(output.entropy)
        if output.state_values is not None:
            self.values.append(lay_out(output.state_values))
        return output


def _real_first(attention_mask: Tensor) -> Tensor:
    """Return column indices (rows, longest row) that put each row's real tokens first, in order."""
    longest = int(attention_mask.sum(dim=1).max())
    return attention_mask.argsort(dim=1, descending=True, stable=True)[:, : max(longest, 1)]
