"""The critic: a linear head on the policy's trunk or on a backbone, and its initial weights."""

import copy
import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import load_peft_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from selfcorrect.evaluate.scoring.load_model import ADAPTER, refuse_pickles
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.train.ppo.config import PPOConfig
from selfcorrect.train.ppo.reward_models import load_reward_model

# Settings that two adapters must share for the weights of one to fit into the other.
ADAPTER_SHAPE = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "target_modules")


class Critic(nn.Module):
    """Values of states; a state is a prompt and the completion so far.

    `backbone` is None for a critic that reads the policy's trunk. The head computes in float32.
    """

    def __init__(self, hidden_size: int, backbone: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return values (rows, tokens) of hidden states (rows, tokens, hidden_size)."""
        with torch.autocast(hidden.device.type, enabled=False):
            weight, bias = self.head.weight.float(), self.head.bias.float()
            return nn.functional.linear(hidden.float(), weight, bias).squeeze(-1)

    def start_head(self, score: nn.Linear, shift: float, scale: float) -> None:
        """Copy the reward model's head with the normalisation: V = (score - shift) / scale."""
        parts = [p for p in (score.weight, score.bias) if p is not None]
        with _gathered(parts), torch.no_grad():
            self.head.weight.copy_(score.weight / scale)
            self.head.bias.fill_(-shift / scale)
            if score.bias is not None:
                self.head.bias.add_(score.bias / scale)


def critic_kind(args: PPOConfig, policy: nn.Module) -> str:
    """Resolve "auto"; raise InputError if the policy does not allow the critic."""
    if args.critic == "auto":
        return "lora" if is_peft_model(policy) else "separate"
    if args.critic == "lora" and not is_peft_model(policy):
        raise InputError(
            "ppo: critic: lora needs a policy that trains an adapter; "
            "give lora settings or set critic: separate"
        )
    return args.critic


def build_critic(kind: str, policy: nn.Module, args: PPOConfig) -> Critic:
    """Build a critic of the given kind, initialised from `args.critic_path` if that is set."""
    language_model = language_model_of(policy)
    # The critic learns: it is held as the policy's trained weights are, not as a frozen base.
    trained = next(p.dtype for p in policy.parameters() if p.requires_grad)
    dtype = str(trained).removeprefix("torch.")
    hidden_size = language_model.get_output_embeddings().in_features
    if kind == "shared":
        return Critic(hidden_size)
    if kind == "lora":
        critic = Critic(hidden_size, copy_trainable(trunk_of(language_model)))
        if args.critic_path is not None:
            _start_from_adapter(critic, policy, Path(args.critic_path), args)
        return critic
    if args.critic_path is None:
        path = language_model.config.name_or_path
        policy_copy = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, trust_remote_code=args.trust_remote_code
        )
        return Critic(hidden_size, trunk_of(policy_copy))
    reward_model = load_reward_model(args.critic_path, dtype)
    score = _score_head(reward_model, args.critic_path)
    critic = Critic(score.in_features, trunk_of(reward_model))
    critic.start_head(score, args.score_shift, args.score_scale)
    return critic


def language_model_of(policy: nn.Module) -> PreTrainedModel:
    """Return the causal language model, without the adapter wrapper if there is one."""
    return policy.get_base_model() if is_peft_model(policy) else policy


def trunk_of(language_model: PreTrainedModel) -> PreTrainedModel:
    """Return the model below the LM head; some families name it other than transformers expects."""
    trunk = language_model.base_model
    if trunk is not language_model:
        return trunk
    named = (m for m in language_model.children() if isinstance(m, PreTrainedModel))
    return next(named, language_model)


def copy_trainable(module: nn.Module) -> nn.Module:
    """Copy the module tree and its trainable tensors; share the frozen ones and the buffers."""
    frozen = [p for p in module.parameters() if not p.requires_grad]
    shared = {id(t): t for t in [*frozen, *module.buffers()]}
    return copy.deepcopy(module, shared)


def _score_head(reward_model: PreTrainedModel, path: str) -> nn.Linear:
    head = getattr(reward_model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise InputError(
            f"ppo: critic_path {path}: {type(reward_model).__name__} has no linear "
            "`score` head with one output; use a reward model that has one"
        )
    return head


def _start_from_adapter(critic: Critic, policy: nn.Module, path: Path, args: PPOConfig) -> None:
    """Load the reward model's adapter and head into a critic over the same frozen base."""
    file = path / ADAPTER
    if not file.is_file():
        raise InputError(
            f"ppo: critic_path {path} holds no adapter, but critic: lora needs one; "
            "set critic: separate or remove critic_path"
        )
    adapter = json.loads(file.read_text(encoding="utf-8"))
    policy_adapter = policy.peft_config["default"].to_dict()
    for key in ADAPTER_SHAPE:
        if _as_json(adapter.get(key)) != _as_json(policy_adapter.get(key)):
            raise InputError(
                f"{file}: {key} is {adapter.get(key)}, but the policy's is "
                f"{_as_json(policy_adapter.get(key))}; make them equal or set critic: separate"
            )
    with refuse_pickles(path):
        weights = load_peft_weights(str(path), device="cpu")
    prefix = f"base_model.model.{language_model_of(policy).base_model_prefix}."
    trainable = {
        name.removeprefix("backbone.").replace(".default", ""): p
        for name, p in critic.named_parameters()
        if name.startswith("backbone.") and p.requires_grad
    }
    saved = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
    heads = [t for name, t in weights.items() if name.endswith("score.weight")]
    if saved.keys() != trainable.keys() or len(heads) != 1:
        raise InputError(
            f"{path}: the tensors are not those of the policy's adapter and one score "
            "head; set critic: separate or remove critic_path"
        )
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(saved[name])
    score = nn.Linear(heads[0].size(1), 1, bias=False)
    score.weight = nn.Parameter(heads[0].float())
    critic.start_head(score, args.score_shift, args.score_scale)


def _as_json(value: Any) -> Any:
    """Return a setting as JSON holds it: sets and lists sorted, enumerations as their values."""
    if isinstance(value, set | list | tuple):
        return sorted(value)
    return getattr(value, "value", value)


def _gathered(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
    """Gather parameters that ZeRO-3 has split; do nothing otherwise."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)
