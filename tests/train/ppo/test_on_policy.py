"""Rollouts sample the policy that is scored: settings, noise, passes, and the checks of a start."""

import dataclasses
import json
import logging

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig

from selfcorrect.evaluate.prompts.dialogue import read_style
from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from selfcorrect.train.ppo.noise import is_held_in_eval
from selfcorrect.train.ppo.rewards import RewardModelScorer
from selfcorrect.train.ppo.sparse_modules import only_positions
from selfcorrect.train.stages.baselines import GRPOBaseline
from tests.support.architectures import small_model
from tests.support.ppo_models import (
    END,
    PADDING,
    VOCABULARY,
    make_args,
    make_prompts,
    make_tokenizer,
    make_trainer,
)

# What a published generation_config.json may hold; each would change the samples.
SETTINGS = {
    "temperature": 0.2, "top_k": 2, "top_p": 0.3, "min_p": 0.5, "typical_p": 0.2, "top_h": 0.2,
    "epsilon_cutoff": 0.05, "eta_cutoff": 0.2, "min_length": 60, "min_new_tokens": 5,
    "max_length": 3, "max_time": 0.0, "num_beams": 3, "length_penalty": 5.0,
    "no_repeat_ngram_size": 1, "repetition_penalty": 9.0, "encoder_repetition_penalty": 9.0,
    "suppress_tokens": [5, 6, 7, 8, 9], "begin_suppress_tokens": list(range(5, 28)),
    "forced_bos_token_id": 7, "forced_eos_token_id": 7, "bad_words_ids": [[5], [6], [7], [8]],
    "sequence_bias": [[[5], 50.0]], "guidance_scale": 3.0, "penalty_alpha": 0.6,
    "exponential_decay_length_penalty": [1, 9.0], "prompt_lookup_num_tokens": 2,
    "watermarking_config": {"greenlist_ratio": 0.2, "bias": 20.0, "context_width": 1},
    "renormalize_logits": True, "remove_invalid_values": True, "cache_implementation": "static",
    "num_return_sequences": 2, "do_sample": False, "use_cache": False, "stop_strings": ["w1"],
    "token_healing": True,
}  # fmt: skip


def grpo(models, folder, *, policy="base", lora=None, **settings) -> GRPOBaseline:
    model = policy if not isinstance(policy, str) else AutoModelForCausalLM.from_pretrained(
        models / policy
    )  # fmt: skip
    classifier = AutoModelForSequenceClassification.from_pretrained(models / "reward")
    style = read_style("auto", {}, "2026-01-01")
    scorer = RewardModelScorer(classifier, make_tokenizer(), style=style)
    args = make_args(folder, num_generations=4, scale_rewards="group", **settings)
    return GRPOBaseline(
        model, scorer, args, style, train_dataset=make_prompts(plain=True),
        processing_class=make_tokenizer(), peft_config=lora,
    )  # fmt: skip


def trainer_of(method: str, models, folder, **settings):
    return (grpo if method == "grpo" else make_trainer)(models, folder, **settings)


# ---- sampling --------------------------------------------------------------------------------


def sampled(trainer, prompts):
    torch.manual_seed(4)
    ids, _ = trainer._generate_single_turn(prompts, None, {}, 1)
    return ids


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_samples_are_the_same_whatever_generation_config_says(models, tmp_path, method):
    trainer = trainer_of(method, models, tmp_path, max_completion_length=8)
    prompts = [[3, 5, 6, 7, 4], [3, 8, 4], [3, 9, 10, 11, 12, 4], [3, 5, 5, 4]]
    trainer.model.generation_config = GenerationConfig(eos_token_id=END)
    expected = sampled(trainer, prompts)
    assert len({tuple(row) for row in expected}) > 1
    for name, value in SETTINGS.items():
        trainer.model.generation_config = given = GenerationConfig(eos_token_id=END)
        setattr(given, name, value)
        assert sampled(trainer, prompts) == expected, name
        assert trainer.model.generation_config is given


def test_settings_of_the_trainer_are_obeyed(models, tmp_path):
    words = [[word] for word in range(5, 29)]
    trainer = make_trainer(
        models, tmp_path, temperature=1e-4, generation_kwargs={"bad_words_ids": words}
    )
    rows = sampled(trainer, [[3, 5, 6, 7, 4]] * 4)
    assert len({tuple(row) for row in rows}) == 1 and not {*range(5, 29)} & set(rows[0])


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_saved_policy_has_the_generation_config_it_came_with(models, tmp_path, method):
    """Also one that transformers would refuse to save once TRL has changed it."""
    given = {"temperature": 0.3, "do_sample": False, "min_p": 0.2, "eos_token_id": [1, 4]}
    model = AutoModelForCausalLM.from_pretrained(models / "base")
    model.save_pretrained(tmp_path / "policy")
    (tmp_path / "policy" / "generation_config.json").write_text(json.dumps(given))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    saving = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = trainer_of(method, models, tmp_path / "out", policy=model, **saving)
    assert 4 in trainer.eos_token_ids
    trainer.train()
    trainer.save_policy(tmp_path / "saved")
    for folder in (tmp_path / "saved", tmp_path / "out" / "checkpoint-1"):
        saved = json.loads((folder / "generation_config.json").read_text())
        assert {k: v for k, v in saved.items() if k != "transformers_version"} == given


# ---- noise -----------------------------------------------------------------------------------


def save_small(folder, name, **settings):
    """Save a tiny model with the tokens of the tests of PPO."""
    ids = {"vocab_size": VOCABULARY, "pad_token_id": PADDING, "eos_token_id": END}
    model = small_model(name, **ids, **settings)
    model.save_pretrained(folder / name)
    make_tokenizer().save_pretrained(folder / name)


def differences(trainer) -> list[float]:
    """Return the mean differences that the trainer computes while it trains."""
    found, mean = [], trainer._mean_difference

    def record(*pair):
        found.append(mean(*pair))
        return found[-1]

    trainer._mean_difference = record
    trainer.train()
    return found


NOISY = {
    "opt": {"layerdrop": 0.5},
    "bloom": {},
    "phimoe": {"input_jitter_noise": 0.1, "router_jitter_noise": 0.1},
    "mixtral": {"router_jitter_noise": 0.1},
    "xglm": {"layerdrop": 0.5},
    "falcon": {},
    "gptj": {},
}


@pytest.mark.parametrize("name", NOISY)
@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_policy_starts_at_its_reference_with_ratio_one_whatever_noise(
    models, tmp_path, name, method
):
    save_small(tmp_path, name, dropout=0.1, **NOISY[name])
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / name)
    trainer = trainer_of(method, models, tmp_path / "out", policy=policy, max_steps=2)
    *_, kl, ratio = differences(trainer)
    assert ratio < 1e-6
    if method == "ppo":
        assert kl == 0.0 and trainer.state.log_history[0]["objective/kl"] == 0.0
        assert trainer.state.log_history[0]["clip_ratio/region_mean"] == 0.0
    assert is_held_in_eval(trainer.language_model) == (name != "gptj")  # nn.Dropout has p = 0


@pytest.mark.parametrize("critic", ["separate", "lora"])
def test_critic_of_a_noisy_family_is_silent_too(tmp_path, critic):
    save_small(tmp_path, "opt", dropout=0.1)
    lora = LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(
        tmp_path, tmp_path / "out", critic, policy="opt", lora=lora if critic == "lora" else None,
        gradient_checkpointing=critic == "lora", max_steps=2,
    )  # fmt: skip
    assert differences(trainer)[1] == 0.0
    nn.init.normal_(trainer.critic.head.weight)
    trainer.model.train()
    ids = torch.tensor([[3, 5, 6, 4, 7, 8, 9]])
    first, second = (
        trainer._forward_completions(trainer.model, ids, torch.ones_like(ids), 3).values
        for _ in range(2)
    )
    assert first.requires_grad and torch.equal(first, second)


def test_dropout_that_is_asked_for_stays_on_with_a_warning(tmp_path, caplog):
    save_small(tmp_path, "opt", dropout=0.1)
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(
            tmp_path, tmp_path / "out", policy="opt", disable_dropout=False, max_steps=1
        )
        trainer.train()
    assert not is_held_in_eval(trainer.language_model)
    assert "policy and reference of opt differ" in caplog.text and "dropout is on" in caplog.text


class Noise(nn.Module):
    """Noise that no mode switches off."""

    def forward(self, states):
        return states + torch.rand_like(states)


def test_noise_that_nothing_switches_off_stops_the_run(models, tmp_path):
    trainer = make_trainer(models, tmp_path)
    trainer.language_model.lm_head = nn.Sequential(Noise(), trainer.language_model.lm_head)
    trainer.language_model.get_output_embeddings = lambda: trainer.language_model.lm_head[1]
    with pytest.raises(RunFailure, match=r"ppo step 1: .* draws random numbers even in eval mode"):
        trainer.train()


# ---- a start that is not one -----------------------------------------------------------------


def test_reference_with_other_weights_stops_the_run(models, tmp_path):
    policy = AutoModelForCausalLM.from_pretrained(models / "base")
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.05)
    with pytest.raises(RunFailure, match=r"no weight has changed yet.*reference is read from"):
        make_trainer(models, tmp_path, policy=policy).train()
    with pytest.raises(RunFailure, match=r"no weight has changed yet.*reference is read from"):
        grpo(models, tmp_path, policy=policy).train()


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_adapter_that_does_not_start_at_zero_stops_the_run(models, tmp_path, method):
    lora = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    with pytest.raises(RunFailure, match="set init_lora_weights: true"):
        trainer_of(method, models, tmp_path, lora=lora).train()


def test_resumed_run_checks_the_ratio_alone(models, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, "learning_rate": 0.05}
    make_trainer(models, tmp_path, **settings).train()
    trainer = make_trainer(models, tmp_path, **settings)
    checked = []
    trainer._check_equal = lambda first, second, mask, passes, cause: checked.append(passes)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert checked == ["two passes over the same completions"]


# ---- passes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_another_cap_of_logits_is_warned_of_and_honoured(models, tmp_path, caplog, method):
    save_small(tmp_path, "recurrent_gemma", logits_soft_cap=2.0)
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "recurrent_gemma")
    trainer = trainer_of(method, models, tmp_path / "out", policy=policy, max_steps=1)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer._pass_options == {"plain": True}
    assert "recurrent_gemma: the fast pass over completions cannot be used" in caplog.text


@pytest.mark.parametrize("method", ["ppo", "grpo"])
@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_padded_rows_keep_their_positions(models, tmp_path, method, name):
    """TRL passes no positions: its GRPO scores padded rows of GPT-2 at wrong ones."""
    save_small(tmp_path, name)
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / name)
    trainer = trainer_of(method, models, tmp_path / "out", policy=policy, max_steps=1)
    ids = torch.tensor([[0, 0, 0, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15]])
    with torch.no_grad():
        padded = trainer._get_per_token_logps_and_entropies(trainer.model, ids, (ids > 0).long(), 2)
        logits = policy(ids[:1, 3:]).logits[0, 1:3].log_softmax(-1)
    torch.testing.assert_close(padded[0][0], logits.gather(1, ids[0, 5:, None])[:, 0])


class MeansOverRows(nn.Module):
    """A layer whose output depends on the other rows of the batch."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, states):
        return self.layer(states) + states.mean(dim=(0, 1), keepdim=True)


def test_model_whose_rows_depend_on_each_other_is_run_row_by_row(models, tmp_path, caplog):
    model = AutoModelForCausalLM.from_pretrained(models / "base")
    trainer = make_trainer(models, tmp_path, policy=model, beta=0.0, max_steps=2)
    for layer in trainer.language_model.model.layers:
        layer.mlp = MeansOverRows(layer.mlp)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer._pass_options == {"plain": True, "batch_size": 1}
    assert "do not treat tokens one by one" in caplog.text


class TwoArguments(nn.Linear):
    def forward(self, states, residual, *, scale):
        return super().forward(states) * scale + residual, "routing"


class Shifts(nn.Linear):
    """Mixes each token with the one before, as RWKV's do."""

    def forward(self, states):
        return super().forward(states + nn.functional.pad(states, (0, 0, 1, -1)))


class Backbone(nn.Module):
    """Layers that call their `mlp` in their own way."""

    def __init__(self, kind):
        super().__init__()
        self.layers = nn.ModuleList(nn.Module() for _ in range(2))
        for layer in self.layers:
            layer.mlp = kind(4, 4)
        self.seen = []
        self.layers[0].mlp.register_forward_hook(
            lambda module, inputs, output: self.seen.append(inputs[0].shape[1])
        )

    def forward(self, input_ids, use_cache=None):
        states = nn.functional.one_hot(input_ids, 4).float()
        for layer in self.layers:
            if isinstance(layer.mlp, TwoArguments):
                states, _ = layer.mlp(states, states, scale=2.0)
            else:
                states = states + layer.mlp(states)
        return dataclasses.make_dataclass("Output", ["last_hidden_state"])(states)


@pytest.mark.parametrize(("kind", "is_exact"), [(TwoArguments, True), (Shifts, False)])
def test_modules_are_judged_by_what_they_compute(kind, is_exact, caplog):
    torch.manual_seed(0)
    backbone, ids = Backbone(kind), torch.tensor([[0, 1, 2, 3, 1], [3, 2, 1, 0, 0]])
    plain = backbone(ids).last_hidden_state
    used, last = torch.tensor([0, 1, 2, 5, 6]), torch.tensor([2, 6])
    with only_positions(last, backbone, attended=used, inputs={"input_ids": ids}):
        states = backbone(ids).last_hidden_state
    assert backbone.seen[-1] == (5 if is_exact else ids.shape[1])
    torch.testing.assert_close(states.flatten(0, 1)[last], plain.flatten(0, 1)[last])
    assert ("do not treat tokens one by one" in caplog.text) != is_exact


def test_model_that_cannot_read_rows_of_any_length_is_one_line(tmp_path):
    save_small(tmp_path, "reformer")
    with pytest.raises(
        InputError, match="ppo: a model of type reformer cannot be trained"
    ) as error:
        make_trainer(tmp_path, tmp_path / "out", policy="reformer").train()
    assert "\n" not in str(error.value)
