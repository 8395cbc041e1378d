"""What PPO relies on in TRL, peft and transformers: a release that moves it fails here by name.

What the methods do is tested where PPO uses it: the loss in test_ppo_step.py, the passes in
test_ppo_forward.py, checkpoints in test_ppo_resume.py, the timing hooks in test_ppo_logging.py.
"""

import ast
import inspect
import textwrap

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import Trainer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import FusedCausalLMOutput, RepeatSampler

from selfcorrect.train.ppo import PPOTrainer
from selfcorrect.train.ppo.actor_critic import ActorCriticTrainer
from selfcorrect.train.ppo.on_policy import OnPolicyTrainer
from selfcorrect.train.ppo.prompts import DialoguePrompts
from tests.support.ppo_models import make_prompts, make_trainer

# Methods that PPO overrides or calls, and the parameters that it passes or takes.
OF_GRPO = {
    "_generate": ["prompts"],
    "_tokenize_prompts": ["prompts"],
    "_generate_single_turn": ["prompt_ids"],
    "_generate_and_score_completions": ["inputs"],
    "_calculate_rewards": ["inputs", "prompts", "completions", "completion_ids_list"],
    "_get_per_token_logps_and_entropies": [
        "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy",
        "compute_aux_loss",
    ],
    "_prepare_inputs": ["generation_batch"],
    "_compute_loss": ["model", "inputs"],
    "training_step": ["model", "inputs", "num_items_in_batch"],
    "log": ["logs", "start_time"],
    "_get_train_sampler": ["dataset"],
    "_load_optimizer_and_scheduler": ["checkpoint"],
}  # fmt: skip
OF_TRANSFORMERS = {
    "create_optimizer": ["model"],
    "_clip_grad_norm": ["model"],
    "_save": ["output_dir", "state_dict"],
    "_save_optimizer_and_scheduler": ["output_dir"],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
}
CALLED = {
    "get_high_entropy_mask": ["entropies", "mask", "threshold"],
    "get_off_policy_mask": [
        "advantages", "per_token_logps", "sampling_per_token_logps", "mask", "off_policy_threshold",
    ],
}  # fmt: skip
OWNERS = (DialoguePrompts, OnPolicyTrainer, ActorCriticTrainer, PPOTrainer)
METHODS = [(GRPOTrainer, *method) for method in (OF_GRPO | CALLED).items()]
METHODS += [(Trainer, *method) for method in OF_TRANSFORMERS.items()]
# Private attributes that TRL sets and PPO reads or writes.
PRIVATE = {
    "_step", "_buffered_inputs", "_tokenizer", "_metrics", "_logs", "_entropy_bonus_enabled",
    "_last_world_entropy", "_entropy_window_stats",
}  # fmt: skip
PUBLIC = {
    "tools", "beta", "ref_model", "eos_token_ids", "reward_weights", "max_completion_length",
    "use_vllm", "environment_factories", "epsilon_low", "epsilon_high", "top_entropy_quantile",
    "off_policy_mask_threshold", "vllm_importance_sampling_correction", "entropy_coef",
    "use_adaptive_entropy", "aux_loss_enabled", "router_aux_loss_coef", "temperature",
    "generation_config",
}  # fmt: skip


@pytest.mark.parametrize(("owner", "name", "expected"), METHODS, ids=lambda value: str(value)[:40])
def test_method_exists_with_its_parameters(owner, name, expected):
    method = getattr(owner, name, None)
    assert method is not None, f"{owner.__name__}.{name} is gone; PPO overrides or calls it"
    parameters = [p for p in inspect.signature(method).parameters if p != "self"]
    missing = [p for p in expected if p not in parameters]
    assert not missing, f"{owner.__name__}.{name} no longer takes {missing}; it takes {parameters}"
    order = [p for p in parameters if p in expected]
    assert order == expected, f"{owner.__name__}.{name} now takes its parameters as {parameters}"


def test_every_override_is_in_the_contract():
    overrides = {
        name
        for owner in OWNERS
        for name, member in vars(owner).items()
        if inspect.isfunction(member) and not name.startswith("__") and hasattr(GRPOTrainer, name)
    }
    assert overrides == {*OF_GRPO, *OF_TRANSFORMERS}


def private_names(source: str) -> tuple[set[str], set[str]]:
    """Return the names in `self._name` and `super()._name`, and those that are assigned to."""
    used, assigned = set(), set()
    for node in ast.walk(ast.parse(source)):
        is_private = isinstance(node, ast.Attribute) and node.attr.startswith("_")
        if is_private and ast.unparse(node.value) in ("self", "super()"):
            used.add(node.attr)
            if isinstance(node.ctx, ast.Store):
                assigned.add(node.attr)
    return used - {"__init__"}, assigned


def test_every_private_name_is_in_the_contract():
    """Each `self._name` and `super()._name` is defined by PPO or pinned above."""
    used, defined = set(), set()
    for owner in OWNERS:
        names, assigned = private_names(textwrap.dedent(inspect.getsource(owner)))
        used |= names
        defined |= vars(owner).keys() | (assigned - PRIVATE)
    inherited = {name for name in used if hasattr(GRPOTrainer, name)}
    assert inherited and inherited <= {*OF_GRPO, *OF_TRANSFORMERS}
    assert used - defined - inherited == PRIVATE


def test_trainer_sets_the_attributes_that_ppo_reads(models, tmp_path):
    trainer = GRPOTrainer(
        str(models / "base"), lambda completions, **_: [0.0] * len(completions),
        GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
        train_dataset=make_prompts(),
    )  # fmt: skip
    assert not [name for name in PRIVATE | PUBLIC if not hasattr(trainer, name)]


def test_rollout_batch_has_the_columns_that_ppo_reads(models, tmp_path):
    trainer = make_trainer(models, tmp_path)
    batch = GRPOTrainer._generate_and_score_completions(trainer, list(make_prompts(8)))
    assert {
        "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "num_items_in_batch",
        "old_per_token_logps", "ref_per_token_logps",
    } <= batch.keys()  # fmt: skip
    assert trainer._handover["values"].shape == batch["old_per_token_logps"].shape
    assert trainer._handover["scores"].shape == (8, 1)


def test_callbacks_are_told_of_the_optimizer():
    for name in ("on_train_begin", "on_pre_optimizer_step", "on_optimizer_step"):
        assert hasattr(TrainerCallback, name), f"TrainerCallback.{name} is gone"


def test_fused_output_has_its_per_token_fields():
    assert {"log_probs", "entropy"} <= FusedCausalLMOutput.__dataclass_fields__.keys()


def test_group_size_is_the_only_check_that_ppo_circumvents():
    with pytest.raises(ValueError, match="at least 2 generations"):
        GRPOConfig("unused", num_generations=1, bf16=False, use_cpu=True)


def test_sampler_has_its_seed_and_generator():
    sampler = RepeatSampler(range(4), mini_repeat_count=1, batch_size=2, seed=3)
    assert sampler.seed == 3 and sampler.shuffle
    assert isinstance(sampler.generator, torch.Generator)


def test_adapter_layers_tell_which_adapters_are_active():
    assert isinstance(BaseTunerLayer.disable_adapters, property)
    assert isinstance(BaseTunerLayer.active_adapters, property)
