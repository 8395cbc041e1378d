"""PPO's updates: against first principles, against TRL's loss, and what each setting changes."""

import copy
from collections import defaultdict

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer
from trl.trainer import grpo_trainer

from selfcorrect.train.ppo import losses
from tests.support.fake_vllm import FakeVLLM
from tests.support.ppo_models import (
    CRITICS,
    END,
    Counters,
    RecordingReward,
    copy_weights,
    make_policy,
    make_prompts,
    make_tokenizer,
    make_trainer,
)


def slow_step(model, head, rows, settings):
    """Make the PPO updates from first principles on `rows` (prompt ids, completion ids, score).

    One row at a time without padding, one loop per token; full-batch epochs with AdamW, gradients
    of model and head clipped apart. `head` is a shared critic's.
    """
    reference = copy.deepcopy(model)
    groups = [{"params": list(model.parameters())}, {"params": list(head.parameters())}]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, eps=1e-5, weight_decay=0.0)

    def evaluate(network, prompt, completion):
        output = network(torch.tensor([prompt + completion]), output_hidden_states=True)
        distribution = output.logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        log_probs = distribution.gather(1, torch.tensor(completion)[:, None]).squeeze(1)
        return log_probs, head(output.hidden_states[-1][0, len(prompt) - 1 : -1]).squeeze(-1)

    rollout = []
    with torch.no_grad():
        for prompt, completion, score in rows:
            old, values = evaluate(model, prompt, completion)
            kl = old - evaluate(reference, prompt, completion)[0]
            rewards = (-settings.beta * kl).tolist()
            rewards[-1] += (score - settings.score_shift) / settings.score_scale
            rewards[-1] -= 0.0 if completion[-1] == END else settings.missing_eos_penalty
            next_value, running, advantages = 0.0, 0.0, []
            for reward, value in zip(rewards[::-1], values.tolist()[::-1], strict=True):
                error = reward + settings.gamma * next_value - value
                running = error + settings.gamma * settings.lam * running
                next_value = value
                advantages.insert(0, running)
            rollout.append((old, values, torch.tensor(advantages)))
    all_advantages = torch.cat([advantages for _, _, advantages in rollout])
    mean, deviation = all_advantages.mean(), all_advantages.std(unbiased=False)
    count = len(all_advantages)
    for epoch in range(settings.num_iterations):
        total = 0.0
        for (prompt, completion, _), (old, values, advantages) in zip(rows, rollout, strict=True):
            whitened = (advantages - mean) / deviation
            new, value = evaluate(model, prompt, completion)
            ratio = (new - old).exp()
            low, high = 1 - settings.epsilon, 1 + settings.epsilon
            policy_loss = -torch.minimum(ratio * whitened, ratio.clamp(low, high) * whitened)
            near = values + (value - values).clamp(-0.2, 0.2)
            target = advantages + values
            error = torch.maximum((value - target) ** 2, (near - target) ** 2) / 2
            total = total + (policy_loss + settings.vf_coef * error).sum() / count
        optimizer.zero_grad()
        total.backward()
        for part in (model, head):
            torch.nn.utils.clip_grad_norm_(part.parameters(), settings.max_grad_norm)
        for group in optimizer.param_groups:  # the default schedule: linear to zero
            group["lr"] = settings.learning_rate * (1 - epoch / settings.num_iterations)
        optimizer.step()


def test_one_step_is_the_update_from_first_principles(models, tmp_path):
    reward = RecordingReward()
    trainer = make_trainer(
        models, tmp_path, reward=reward, per_device_train_batch_size=8, steps_per_generation=1,
        num_iterations=3, max_steps=3, learning_rate=1e-2, missing_eos_penalty=0.4,
        score_shift=0.1, score_scale=0.5, gamma=0.97, lam=0.9, max_grad_norm=0.3,
    )  # fmt: skip
    torch.nn.init.normal_(trainer.critic.head.weight, std=0.2)
    model = AutoModelForCausalLM.from_pretrained(models / "base")
    before = copy.deepcopy(model.state_dict())
    head = copy.deepcopy(trainer.critic.head)
    trainer.train()
    tokenizer = make_tokenizer()
    [(prompts, completions, scores)] = reward.calls
    rows = [
        (tokenizer(f"Human: {prompt[0]['content']} Assistant:")["input_ids"], completion, score)
        for prompt, completion, score in zip(prompts, completions, scores, strict=True)
    ]
    slow_step(model, head, rows, trainer.args)
    trained = trainer.language_model.state_dict()
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(trained[name], expected, atol=2e-4, rtol=1e-3)
    moved = max(float((trained[n] - before[n]).abs().max()) for n in before)
    error = max(float((trained[n] - t).abs().max()) for n, t in model.state_dict().items())
    assert error < 0.01 * moved
    torch.testing.assert_close(trainer.critic.head.weight, head.weight, atol=2e-4, rtol=1e-3)
    log = trainer.state.log_history
    assert log[2]["clip_ratio/region_mean"] > 0
    assert trainer.last_score == pytest.approx(sum(scores) / 8)
    ended = sum(completion[-1] == END for completion in completions) / 8
    assert log[0]["completions/ended_by_eos"] == pytest.approx(ended)


def trl_state(trainer):
    """Return the state that TRL's loss changes: its metrics and the entropy controller."""
    names = ("_metrics", "entropy_coef", "_last_world_entropy", "_entropy_window_stats")
    return {name: copy.deepcopy(getattr(trainer, name)) for name in names}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"epsilon": 0.1, "epsilon_high": 0.3, "steps_per_generation": 4,
         "gradient_accumulation_steps": 2},
        {"delta": 1.1},
        {"mask_truncated_completions": True},
        {"top_entropy_quantile": 0.5, "entropy_coef": 0.01},
        {"entropy_coef": 0.01, "use_adaptive_entropy": True, "entropy_target": 2.6,
         "steps_per_generation": 4, "gradient_accumulation_steps": 2},
        {"off_policy_mask_threshold": 0.01},
        {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 48},
        {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 48,
         "vllm_importance_sampling_mode": "sequence_truncate", "off_policy_mask_threshold": 0.01},
        {"router_aux_loss_coef": 0.01},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)  # fmt: skip
def test_policy_loss_and_metrics_are_trls(models, tmp_path, monkeypatch, settings):
    """GRPOTrainer's loss ("dapo", beta 0) on every micro-batch: value, gradient and metrics."""
    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", FakeVLLM)
    policy = "base"
    if "router_aux_loss_coef" in settings:
        policy = make_policy("qwen3_moe")
        policy.save_pretrained(tmp_path / "experts")
        policy.config._name_or_path = str(tmp_path / "experts")
    settings = {"vf_coef": 0.0, "learning_rate": 1e-2, "gradient_accumulation_steps": 1, **settings}
    trainer = make_trainer(models, tmp_path, policy=policy, logging_steps=100, **settings)
    weight = trainer.language_model.lm_head.weight
    compute_loss, losses_seen = trainer._compute_loss, []

    def compare(model, inputs):
        before, beta = trl_state(trainer), trainer.beta
        trainer._metrics = {"train": defaultdict(list)}
        trainer.beta = 0.0
        expected = GRPOTrainer._compute_loss(trainer, model, inputs)
        expected_gradient = torch.autograd.grad(expected, weight)[0]
        after = trl_state(trainer)
        for name, value in before.items():
            setattr(trainer, name, value)
        trainer._metrics, trainer.beta = {"train": defaultdict(list)}, beta
        loss = compute_loss(model, inputs)
        gradient = torch.autograd.grad(loss, weight, retain_graph=True)[0]
        metrics = trainer._metrics["train"]
        ppo_only = {name: metrics.pop(name) for name in ("value/loss", "value/clip_fraction")}
        assert all(len(values) == 1 for values in ppo_only.values())
        torch.testing.assert_close(trl_state(trainer), after, atol=0, rtol=0, equal_nan=True)
        assert torch.equal(loss, expected) and torch.equal(gradient, expected_gradient)
        before["_metrics"]["train"] |= metrics
        trainer._metrics = before["_metrics"]
        losses_seen.append(loss.item())
        return loss

    trainer._compute_loss = compare
    trainer.train()
    updates = trainer.args.gradient_accumulation_steps * 8
    assert len(losses_seen) == updates and len(set(losses_seen)) > updates / 4


@pytest.mark.parametrize("critic", CRITICS)
def test_learning_raises_the_reward(models, tmp_path, critic):
    trainer = make_trainer(
        models, tmp_path, critic, prompts=make_prompts(64), per_device_train_batch_size=16,
        lora=LoraConfig(r=4, target_modules="all-linear") if critic == "lora" else None,
        learning_rate=3e-2 if critic == "lora" else 1e-2, max_steps=40, beta=0.01,
        lr_scheduler_type="constant", vf_coef=0.1,
    )  # fmt: skip
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "objective/score" in entry]
    assert log[-1]["objective/score"] > log[0]["objective/score"] + 0.2
    assert log[-1]["objective/kl"] > 0


# ---- steps and counters ------------------------------------------------------------------------


def test_counters_follow_the_rollout_batches(models, tmp_path):
    counters = Counters()
    trainer = counters.trainer = make_trainer(models, tmp_path, callbacks=[counters])
    assert (trainer.ppo_step, trainer.episodes, trainer.tokens) == (0, 0, 0)
    trainer.train()
    assert trainer.args.updates_per_rollout == 4
    assert [row[:2] for row in counters.rows] == [
        (0, 8), (0, 8), (0, 8), (1, 8), (1, 16), (1, 16), (1, 16), (2, 16),
    ]  # fmt: skip
    tokens = [row[2] for row in counters.rows]
    assert tokens[0] == tokens[3] < tokens[4] == tokens[7]


def test_each_epoch_has_the_same_rows_in_another_order(models, tmp_path):
    trainer = make_trainer(models, tmp_path, max_steps=4)
    micro_batches, compute_loss = [], trainer._compute_loss

    def record(model, inputs):
        micro_batches.append([tuple(row.tolist()) for row in inputs["completion_ids"]])
        return compute_loss(model, inputs)

    trainer._compute_loss = record
    trainer.train()
    first, second = micro_batches[0] + micro_batches[1], micro_batches[2] + micro_batches[3]
    assert len(first) == 8 and sorted(first) == sorted(second) and first != second


def test_single_update_per_rollout_still_has_values(models, tmp_path):
    """TRL skips the old policy's pass then, so PPO makes its own."""
    trainer = make_trainer(
        models, tmp_path, num_iterations=1, gradient_accumulation_steps=2, max_steps=2
    )
    trainer.train()
    assert trainer.ppo_step == 2
    assert trainer.state.log_history[-2]["value/loss"] > 0


@pytest.mark.parametrize("critic", CRITICS)
def test_old_values_are_those_of_the_learning_critic(models, tmp_path, critic, monkeypatch):
    """Not those of the reference pass, in which an adapter critic is switched off as well."""
    calls, value_loss = [], losses.clipped_value_loss

    def record(values, old_values, *rest):
        calls.append((values.detach(), old_values))
        return value_loss(values, old_values, *rest)

    monkeypatch.setattr(losses, "clipped_value_loss", record)
    make_trainer(models, tmp_path, critic, max_steps=8, learning_rate=1e-2).train()
    values, old_values = calls[4]  # the first minibatch of the second rollout batch
    torch.testing.assert_close(values, old_values)
    assert values.abs().max() > 1e-3


# ---- settings that change what learns ----------------------------------------------------------


@pytest.mark.parametrize("critic", CRITICS)
def test_only_the_critic_moves_in_warm_up(models, tmp_path, critic):
    trainer = make_trainer(models, tmp_path, critic, critic_warmup_steps=1, max_steps=4)
    before = copy_weights(trainer)
    trainer.train()
    after = copy_weights(trainer)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("critic." in name for name in moved)


def test_critic_learning_rate_applies_to_the_critic_alone(models, tmp_path):
    trainer = make_trainer(models, tmp_path, "separate", critic_learning_rate=0.5, max_steps=4)
    trainer.create_optimizer()
    critic = {id(p) for p in trainer.critic.parameters()}
    for group in trainer.optimizer.param_groups:
        assert {0.5 if id(p) in critic else 3e-3 for p in group["params"]} == {group["lr"]}
    count = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert count == len([p for p in trainer.model.parameters() if p.requires_grad])


def test_huge_value_gradient_does_not_shrink_the_policy_gradient(models, tmp_path):
    heads = []
    for vf_coef in (0.1, 1000.0):
        trainer = make_trainer(models, tmp_path, "separate", vf_coef=vf_coef, max_steps=1)
        trainer.train()
        heads.append(trainer.language_model.lm_head.weight.detach().clone())
    torch.testing.assert_close(*heads)


def test_beta_zero_has_no_reference_and_logs_no_kl(models, tmp_path):
    trainer = make_trainer(models, tmp_path, beta=0.0, max_steps=4)
    trainer.train()
    assert trainer.ref_model is None and trainer.last_kl is None
    assert "objective/score" in trainer.state.log_history[0]
    assert "objective/kl" not in trainer.state.log_history[0]
