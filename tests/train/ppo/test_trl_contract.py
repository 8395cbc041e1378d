"""What PPO relies on inside TRL, peft and transformers: a release that moves it fails by name."""

import ast
import inspect

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import Trainer, TrainerCallback
from transformers.modeling_layers import GenericForSequenceClassification
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer
from trl.trainer.utils import FusedCausalLMOutput, RepeatSampler, add_fused_lm_head

from selfcorrect.train.ppo import PPOTrainer
from selfcorrect.train.ppo.actor_critic import ActorCriticTrainer

# Methods that PPO overrides or calls, and the parameters it passes or takes.
OF_GRPO = {
    "_generate": ["prompts"],
    "_generate_single_turn": ["prompt_ids"],
    "_generate_and_score_completions": ["inputs"],
    "_calculate_rewards": ["inputs", "prompts", "completions", "completion_ids_list"],
    "_get_per_token_logps_and_entropies": [
        "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy",
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
CASES = [(GRPOTrainer, *case) for case in OF_GRPO.items()]
CASES += [(Trainer, *case) for case in OF_TRANSFORMERS.items()]


@pytest.mark.parametrize(("owner", "name", "expected"), CASES, ids=lambda case: str(case)[:40])
def test_method_exists_with_its_parameters(owner, name, expected):
    method = getattr(owner, name, None)
    assert method is not None, f"{owner.__name__}.{name} is gone; PPO overrides or calls it"
    found = [p for p in inspect.signature(method).parameters if p != "self"]
    gone = [p for p in expected if p not in found]
    assert not gone, f"{owner.__name__}.{name} no longer takes {gone}; it now takes {found}"
    order = [p for p in found if p in expected]
    assert order == expected, f"{owner.__name__}.{name} now takes its parameters as {found}"


def test_no_override_is_missing_from_the_contract():
    own = {
        name
        for owner in (ActorCriticTrainer, PPOTrainer)
        for name, member in vars(owner).items()
        if inspect.isfunction(member) and not name.startswith("__") and hasattr(GRPOTrainer, name)
    }
    assert own == {*OF_GRPO, *OF_TRANSFORMERS}


# Private attributes that TRL sets and PPO reads or writes; the methods are above.
PRIVATE = {"_step", "_buffered_inputs", "_tokenizer", "_metrics"}


def test_no_private_name_is_missing_from_the_contract():
    """Every `self._name` and `super()._name` of the trainer is PPO's own or pinned in this file."""
    used, own = set(), set()
    for owner in (ActorCriticTrainer, PPOTrainer):
        own |= vars(owner).keys()
        for node in ast.walk(ast.parse(inspect.getsource(owner))):
            if not isinstance(node, ast.Attribute) or not node.attr.startswith("_"):
                continue
            called = isinstance(node.value, ast.Call) and ast.unparse(node.value) == "super()"
            if called or ast.unparse(node.value) == "self":
                used.add(node.attr)
                if isinstance(node.ctx, ast.Store) and node.attr not in PRIVATE:
                    own.add(node.attr)
    inherited = {name for name in used if hasattr(GRPOTrainer, name)} - {"__init__"}
    assert inherited <= {*OF_GRPO, *OF_TRANSFORMERS}
    assert used - own - inherited - {"__init__"} == PRIVATE


def test_callbacks_still_hear_of_the_optimizer():
    for name in ("on_train_begin", "on_pre_optimizer_step", "on_optimizer_step"):
        assert hasattr(TrainerCallback, name), f"TrainerCallback.{name} is gone"


def source(function) -> str:
    return inspect.getsource(function)


@pytest.mark.parametrize(
    ("function", "fragment", "why"),
    [
        (GRPOTrainer._prepare_inputs, "self._buffered_inputs", "the rollout batch in progress"),
        (GRPOTrainer._prepare_inputs, "self._step % generate_every", "when a rollout is sampled"),
        (GRPOTrainer.training_step, "self._step += 1", "the count of micro-steps"),
        (GRPOTrainer._compute_loss, 'inputs["advantages"]', "per-token advantages"),
        (GRPOTrainer._compute_loss, "advantages.dim() == 1", "advantages of (rows, tokens)"),
        (GRPOTrainer._compute_loss, "self.beta != 0.0", "KL left out of the loss by beta 0"),
        (
            GRPOTrainer._compute_loss,
            "* self.current_gradient_accumulation_steps / self.args.steps_per_generation",
            "the denominator that the value loss shares",
        ),
        (
            GRPOTrainer._get_per_token_logps_and_entropies,
            "model(**model_inputs, labels=labels, fused_lm_head=True)",
            "how the model is called",
        ),
        (GRPOTrainer._generate_and_score_completions, "disable_adapter|use_adapter", "reference"),
        (GRPOTrainer._generate, "self.state.num_input_tokens_seen +=", "the count of tokens"),
        (GRPOTrainer._generate_and_score_completions, "self._generate(prompts)", "the sampling"),
        (
            GRPOTrainer._generate_and_score_completions,
            "self._calculate_rewards(inputs, prompts, completions, completion_ids_list)",
            "the scores",
        ),
        (add_fused_lm_head, "last_hidden_state[:, :-1]", "which states predict which tokens"),
        (add_fused_lm_head, "labels = shift_labels", "labels that are shifted already"),
        (add_fused_lm_head, 'backbone_attr = "base_model"', "the module whose states are gathered"),
        (Trainer._run_epoch, "on_pre_optimizer_step", "when the optimizer is timed"),
        (Trainer._run_epoch, "self._clip_grad_norm(model)", "clipping apart"),
        (Trainer._save_checkpoint, "self._save_optimizer_and_scheduler(output_dir)", "the state"),
        (
            GenericForSequenceClassification.forward,
            "input_ids != self.config.get_text_config().pad_token_id",
            "that reward models score the last token that is not padding",
        ),
    ],
)
def test_body_still_does_what_ppo_builds_on(function, fragment, why):
    text = source(function)
    assert any(part in text for part in fragment.split("|")), (
        f"{function.__qualname__} no longer holds {fragment!r} ({why})"
    )


def test_rollout_batch_still_has_the_columns_that_are_read():
    text = source(GRPOTrainer._generate_and_score_completions)
    for column in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask",
                   "num_items_in_batch", "old_per_token_logps", "ref_per_token_logps"):  # fmt: skip
        assert f'"{column}"' in text, f"TRL's rollout batch has no {column!r} any more"


def test_attributes_that_ppo_reads_are_still_set():
    text = source(GRPOTrainer.__init__)
    for name in ("_step", "_buffered_inputs", "beta", "ref_model", "eos_token_ids", "_tokenizer",
                 "reward_weights", "max_completion_length", "_metrics", "use_vllm",
                 "environment_factories"):  # fmt: skip
        assert f"self.{name} = " in text, f"GRPOTrainer no longer sets {name}"


def test_fused_output_still_has_its_per_token_fields():
    fields = FusedCausalLMOutput.__dataclass_fields__
    assert {"log_probs", "entropy"} <= fields.keys()


def test_group_size_is_still_the_only_check_that_ppo_steps_around():
    with pytest.raises(ValueError, match="at least 2 generations"):
        GRPOConfig("unused", num_generations=1, bf16=False, use_cpu=True)


def test_sampler_still_holds_its_seed_and_generator():
    sampler = RepeatSampler(range(4), mini_repeat_count=1, batch_size=2, seed=3)
    assert sampler.seed == 3 and sampler.shuffle
    assert isinstance(sampler.generator, torch.Generator)


def test_adapter_layers_still_say_what_is_active():
    assert isinstance(BaseTunerLayer.disable_adapters, property)
    assert isinstance(BaseTunerLayer.active_adapters, property)


def test_reference_adapter_is_still_called_ref():
    assert 'add_adapter("ref"' in source(GRPOTrainer.__init__)
    assert hasattr(grpo_trainer, "use_adapter")
