"""Bad settings, inputs and numbers: each ends in one line that names the setting."""

import math
import shutil
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, TrlParser

from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from selfcorrect.train.ppo import PPOConfig, PPOTrainer
from selfcorrect.train.ppo.separate_clipping import SeparateClipping
from tests.support.ppo_models import (
    assert_same_weights,
    copy_weights,
    make_args,
    make_prompts,
    make_tokenizer,
    make_trainer,
    target_share,
)

# ---- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 2}, "steps_per_generation .3."),
        ({"critic": "none"}, "critic is 'none'; allowed: auto, shared"),
        ({"kl_estimator": "k4"}, "kl_estimator is 'k4'"),
        ({"loss_type": "grpo"}, "loss_type is 'grpo'"),
        ({"lam": 1.5}, "lam is 1.5; it must be between 0 and 1"),
        ({"score_scale": 0.0}, "score_scale is 0.0"),
        ({"beta": -0.1}, "beta is -0.1"),
        ({"max_kl": 0.0}, "max_kl is 0.0"),
        ({"beta": 0.0, "kl_target": 6.0}, "kl_target needs a reference model, but beta is 0"),
        ({"critic": "shared", "critic_path": "x"}, "critic_path .* critic: shared"),
        ({"per_device_train_batch_size": 1, "steps_per_generation": 1}, "at least 2 completions"),
        ({"num_generations": 3}, "divisible by num_generations"),
    ],
)
def test_bad_settings_are_one_line(tmp_path, settings, message):
    with pytest.raises(InputError, match=message) as error:
        make_args(tmp_path, **settings)
    assert "\n" not in str(error.value)


def test_updates_per_rollout_is_epochs_times_minibatches(tmp_path):
    args = make_args(
        tmp_path, num_iterations=3, steps_per_generation=8, gradient_accumulation_steps=2
    )
    assert args.updates_per_rollout == 12
    assert args.num_generations == 1 and args.generation_batch_size == 32


def test_every_setting_of_ppo_has_help_from_the_docstring():
    own = set(vars(PPOConfig)["__annotations__"])
    assert {"epsilon", "critic", "vf_coef", "missing_eos_penalty"} <= own
    for field in fields(PPOConfig):
        if field.name in own:
            assert f"        {field.name}: " in PPOConfig.__doc__
            assert field.metadata["help"]
    shown = " ".join(TrlParser(PPOConfig).format_help().split())
    assert "weight of the value loss" in shown and "save memory at about 30 % of" in shown
    grpo_help = {field.name: field.metadata["help"] for field in fields(GRPOConfig)}["epsilon"]
    assert grpo_help != {f.name: f.metadata["help"] for f in fields(PPOConfig)}["epsilon"]


# ---- inputs ------------------------------------------------------------------------------------


def texts(*prompts: str) -> Dataset:
    return Dataset.from_dict({"prompt": list(prompts)})


def tokenizer_without(*tokens: str):
    tokenizer = make_tokenizer()
    for token in tokens:
        setattr(tokenizer, token, None)
    return tokenizer


UNMATCHED = LoraConfig(r=2, target_modules=["no_such_layer"], task_type="CAUSAL_LM")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"prompts": texts()}, "0 prompts are too few for a rollout batch of 8; add prompts"),
        ({"prompts": make_prompts(7)}, "7 prompts are too few for a rollout batch of 8"),
        ({"prompts": Dataset.from_dict({"text": ["w1"] * 24})}, "no column prompt, only text"),
        ({"prompts": texts(*[""] * 24)}, "a prompt has no tokens; leave empty prompts out"),
        ({"prompts": texts(*[*["w1"] * 7, ""])}, "a prompt has no tokens"),
        ({"prompts": texts(*["w1 " * 70] * 24)}, "prompt of 70 tokens and max_completion_length 6"),
        ({"max_completion_length": 60}, "exceed the model's context of 64"),
        ({"tokenizer": tokenizer_without("eos_token")}, "no end token; set eos_token"),
        ({"tokenizer": tokenizer_without("eos_token", "pad_token")}, "no end token; set eos_token"),
        ({"reward": []}, "reward_funcs"),
        ({"reward_weights": [1.0, 2.0]}, "reward weights .2. must match"),
        ({"generation_batch_size": 7, "steps_per_generation": None}, "generation_batch_size .7."),
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps .3."),
        ({"num_generations": 3}, "num_generations .3."),
        ({"max_completion_length": 0}, "max_new_tokens"),
        ({"lora": UNMATCHED}, "no_such_layer"),
    ],
)
def test_bad_input_is_one_line(models, tmp_path, case, message):
    with pytest.raises(InputError, match=message) as error:
        make_trainer(models, tmp_path, "auto", **case).train()
    assert str(error.value).startswith("ppo: ") and "\n" not in str(error.value)


def test_adapter_critic_needs_a_policy_with_an_adapter(models, tmp_path):
    with pytest.raises(InputError, match="critic: lora needs a policy that trains an adapter"):
        PPOTrainer(
            str(models / "base"), target_share, make_args(tmp_path, critic="lora"),
            train_dataset=make_prompts(), processing_class=make_tokenizer(),
        )  # fmt: skip


def test_folder_that_is_no_reward_model_is_refused(models, tmp_path):
    with pytest.raises(InputError, match=r"nowhere: not a reward model"):
        make_trainer(models, tmp_path, reward=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"base: not a reward model: score\.weight is missing"):
        make_trainer(models, tmp_path, "separate", critic_path=str(models / "base"))


def test_tokenizer_without_padding_token_trains_as_one_with(models, tmp_path):
    """TRL pads with the end token then; lengths, not ids, say what is padding."""
    runs = []
    for tokenizer in (make_tokenizer(), tokenizer_without("pad_token")):
        trainer = make_trainer(models, tmp_path, tokenizer=tokenizer, missing_eos_penalty=0.5)
        trainer.train()
        runs.append((copy_weights(trainer), trainer.state.log_history[0]))
    (weights, log), (weights_without, log_without) = runs
    assert_same_weights(weights, weights_without)
    for name in ("objective/rlhf_reward", "completions/ended_by_eos", "completions/mean_length"):
        assert log[name] == log_without[name]


def test_two_learning_rates_and_a_deepspeed_optimizer_are_refused(models, tmp_path):
    """transformers never calls `create_optimizer` then, so the check reads DeepSpeed's config."""
    trainer = make_trainer(models, tmp_path, "separate", critic_learning_rate=1e-2)

    def check_under(config):
        plugin = SimpleNamespace(deepspeed_config=config)
        trainer.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
        trainer._check_inputs()

    check_under({"zero_optimization": {"stage": 3}})
    with pytest.raises(InputError, match=r"critic_learning_rate cannot .* DeepSpeed JSON"):
        check_under({"optimizer": {"type": "AdamW"}})
    trainer.args.critic_learning_rate = None
    check_under({"optimizer": {"type": "AdamW"}})


def test_two_learning_rates_and_a_given_optimizer_are_refused(models, tmp_path):
    trainer = make_trainer(models, tmp_path, "separate", critic_learning_rate=1e-2)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="critic_learning_rate cannot be used"):
        trainer.create_optimizer()


def test_reward_adapter_that_matches_no_layer_is_one_line(models, tmp_path):
    from selfcorrect.recipes.schema import Reward
    from selfcorrect.train.feedback.feedback import Feedback, Preference
    from selfcorrect.train.stages import JobFacts
    from selfcorrect.train.stages.reward import train_reward

    pairs = [Preference([{"role": "user", "content": "w1"}], f"w{i}", "w2") for i in range(3, 20)]
    reward = Reward(lora={"target_modules": ["no_such_layer"]}, trainer={"use_cpu": True})
    shutil.copytree(models / "base", tmp_path / "base")
    with pytest.raises(InputError, match=r"^reward: .*`target_modules`") as error:
        train_reward(JobFacts(tmp_path, 0), reward, Feedback(pairs, []), make_tokenizer())
    assert "\n" not in str(error.value) and not (tmp_path / "reward").exists()


def test_prompts_without_room_for_a_completion_are_left_out_and_counted(caplog):
    from selfcorrect.train.stages.policy import fitting_prompts

    prompts = [[{"role": "user", "content": text}] for text in ("w1", "w2", "w3")]
    lengths = [2, 9, 8]
    kept, left_out = fitting_prompts(prompts, lengths, context=12, completion=4)
    assert kept == [prompts[0], prompts[2]]
    assert left_out == {"prompt and completion would exceed the context": 1}
    assert "1 of 3 prompts" in caplog.text
    assert fitting_prompts(prompts, lengths, context=None, completion=4) == (prompts, {})
    assert fitting_prompts(prompts, lengths, context=13, completion=4) == (prompts, {})
    with pytest.raises(InputError, match="the shortest has 2 tokens"):
        fitting_prompts(prompts, lengths, context=5, completion=4)


# ---- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda n: [math.nan] * n, "'broken' returned nan for completion 0 of 8"),
        (lambda n: [1.0] * (n - 1) + [None], "'broken' returned None for completion 7 of 8"),
        (lambda n: [1.0] * (n + 1), "'broken' returned 9 rewards for 8 completions"),
        (lambda n: 1.0, "'broken' returned float, not a list"),
    ],
)
def test_bad_rewards_are_named(models, tmp_path, returned, message):
    def broken(prompts, **_):
        return returned(len(prompts))

    with pytest.raises(RunFailure, match=message):
        make_trainer(models, tmp_path, reward=broken).train()


def test_kl_above_its_bound_stops_the_run(models, tmp_path):
    with pytest.raises(RunFailure, match=r"above max_kl 0\.01"):
        make_trainer(models, tmp_path, learning_rate=0.1, max_kl=0.01, max_steps=20).train()


def test_loss_that_is_not_finite_stops_before_the_update(models, tmp_path):
    trainer = make_trainer(models, tmp_path)
    before = copy_weights(trainer)
    compute_loss = trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: compute_loss(model, inputs) * math.nan
    with pytest.raises(RunFailure, match="ppo step 1: the loss is nan"):
        trainer.train()
    assert_same_weights(before, copy_weights(trainer))


def test_deepspeed_optimizer_that_clips_jointly_is_refused():
    clipping = SeparateClipping(torch.nn.Linear(1, 1))
    with pytest.raises(InputError, match="SimpleNamespace clips policy and critic jointly"):
        clipping.on_train_begin(
            SimpleNamespace(max_grad_norm=1.0), None, None,
            optimizer=SimpleNamespace(optimizer=SimpleNamespace()),
        )  # fmt: skip
