"""Bad input to PPO: each ends in one line that names the setting, before anything is learned."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.train.ppo import PPOTrainer
from tests.train.ppo.test_ppo_trainer import (  # noqa: F401  (home and quiet are fixtures)
    assert_identical,
    home,
    make_args,
    make_prompts,
    make_tokenizer,
    make_trainer,
    quiet,
    target_share,
    tensors_of,
)


def build(home, folder, prompts=None, tokenizer=None, reward=target_share, **settings):  # noqa: F811
    return PPOTrainer(
        str(home / "base"), reward, make_args(folder, **settings),
        train_dataset=make_prompts() if prompts is None else prompts,
        processing_class=tokenizer or make_tokenizer(),
    )  # fmt: skip


def texts(*prompts: str) -> Dataset:
    return Dataset.from_dict({"prompt": list(prompts)})


def without(*names: str):
    tokenizer = make_tokenizer()
    for name in names:
        setattr(tokenizer, name, None)
    return tokenizer


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"prompts": texts()}, "0 prompts are too few for a rollout batch of 8; add prompts"),
        ({"prompts": Dataset.from_dict({"text": ["w1"] * 24})}, "no column prompt, only text"),
        ({"prompts": texts(*[""] * 24)}, "a prompt has no tokens; leave empty prompts out"),
        ({"prompts": texts(*[*["w1"] * 7, ""])}, "a prompt has no tokens"),
        ({"prompts": texts(*["w1 " * 70] * 24)}, "prompt of 70 tokens and max_completion_length 6"),
        ({"tokenizer": without("eos_token")}, "no end token; set eos_token"),
        ({"tokenizer": without("eos_token", "pad_token")}, "no end token; set eos_token"),
        ({"reward": []}, "reward_funcs"),
        ({"reward_weights": [1.0, 2.0]}, "reward weights .2. must match"),
        ({"generation_batch_size": 7, "steps_per_generation": None}, "generation_batch_size .7."),
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps .3."),
        ({"num_generations": 3}, "num_generations .3."),
        ({"max_completion_length": 0}, "max_new_tokens"),
    ],
)
def test_bad_input_is_one_line(home, tmp_path, case, message):  # noqa: F811
    with pytest.raises(InputError, match=message) as caught:
        build(home, tmp_path, **case).train()
    assert str(caught.value).startswith("ppo: ") and "\n" not in str(caught.value)


def test_a_tokenizer_without_padding_token_trains_as_one_with(home, tmp_path):  # noqa: F811
    """TRL pads with the end token then; lengths, not ids, say what is padding."""
    runs = []
    for tokenizer in (make_tokenizer(), without("pad_token")):
        trainer = build(home, tmp_path, tokenizer=tokenizer, missing_eos_penalty=0.5)
        trainer.train()
        runs.append((tensors_of(trainer), trainer.state.log_history[0]))
    assert_identical(runs[0][0], runs[1][0])
    same = ("objective/rlhf_reward", "completions/ended_by_eos", "completions/mean_length")
    assert [runs[0][1][key] for key in same] == [runs[1][1][key] for key in same]


def test_two_learning_rates_and_a_deepspeed_optimizer_are_refused(home, tmp_path):  # noqa: F811
    """Read off DeepSpeed's configuration: transformers then never asks for an optimizer."""
    trainer = make_trainer(home, tmp_path, "separate", critic_learning_rate=1e-2)

    def under(config):
        plugin = SimpleNamespace(deepspeed_config=config)
        trainer.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
        trainer._check_inputs()

    under({"zero_optimization": {"stage": 3}})
    with pytest.raises(InputError, match=r"critic_learning_rate cannot .* DeepSpeed JSON"):
        under({"optimizer": {"type": "AdamW"}})
    trainer.args.critic_learning_rate = None
    under({"optimizer": {"type": "AdamW"}})


def test_two_learning_rates_and_a_given_optimizer_are_refused(home, tmp_path):  # noqa: F811
    trainer = make_trainer(home, tmp_path, "separate", critic_learning_rate=1e-2)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="critic_learning_rate cannot be used"):
        trainer.create_optimizer()


def test_reward_adapter_that_matches_no_layer_is_one_line(home, tmp_path):  # noqa: F811
    from selfcorrect.recipes.schema import Reward
    from selfcorrect.train.feedback.feedback import Feedback, Preference
    from selfcorrect.train.stages import JobFacts
    from selfcorrect.train.stages.reward import train_reward

    shutil.copytree(home / "base", tmp_path / "base")
    pairs = [Preference([{"role": "user", "content": "w1"}], f"w{i}", "w2") for i in range(3, 20)]
    reward = Reward(lora={"target_modules": ["no_such_layer"]}, trainer={"use_cpu": True})
    with pytest.raises(InputError, match=r"^reward: .*`target_modules`") as caught:
        train_reward(JobFacts(tmp_path, 0), reward, Feedback(pairs, []), make_tokenizer())
    assert "\n" not in str(caught.value) and not (tmp_path / "reward").exists()


def test_policy_adapter_that_matches_no_layer_is_one_line(home, tmp_path):  # noqa: F811
    lora = LoraConfig(r=2, target_modules=["no_such_layer"], task_type="CAUSAL_LM")
    with pytest.raises(InputError, match="no_such_layer") as caught:
        PPOTrainer(
            str(home / "base"), target_share, make_args(tmp_path), train_dataset=make_prompts(),
            processing_class=make_tokenizer(), peft_config=lora,
        )  # fmt: skip
    assert "\n" not in str(caught.value)


def test_prompts_without_room_for_a_completion_are_left_out_and_counted(caplog) -> None:
    from selfcorrect.train.stages.policy import fitting_prompts
    from tests.train.ppo.test_ppo_trainer import make_tokenizer

    tokenizer = make_tokenizer()
    texts = ["w1 w2", "w1 " * 9, "w3", "w1 " * 8]
    kept, left_out = fitting_prompts(texts, tokenizer, context=12, completion=4)
    assert kept == ["w1 w2", "w3", "w1 " * 8]
    assert left_out == {"prompt and completion would exceed the context": 1}
    assert "1 of 4 prompts are left out" in caplog.text
    assert fitting_prompts(texts, tokenizer, context=None, completion=4) == (texts, {})
    assert fitting_prompts(texts, tokenizer, context=13, completion=4) == (texts, {})
    with pytest.raises(InputError, match="the shortest has 1 tokens"):
        fitting_prompts(texts, tokenizer, context=4, completion=4)
