"""PPO as a whole, on tiny random models: its numbers, its files, its resume, its errors."""

import copy
import json
import math
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from selfcorrect.train.ppo import PPOConfig, PPOTrainer, RewardModelScorer, losses
from selfcorrect.train.ppo.resume import newest_resumable

WORDS = [f"w{i}" for i in range(24)]
SPECIAL = ["<pad>", "<eos>", "<unk>", "Human:", "Assistant:"]
TARGETS = range(5, 13)  # the tokens that the toy reward asks for
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}Human: {{ m['content'] }} "
    "{% else %}Assistant: {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SHAPES = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 8},
    "gemma": {**LLAMA, "head_dim": 8},
    # Windows narrower than the rows; tied and wide, these two would only repeat the prompt.
    "gemma2": {**LLAMA, "head_dim": 8, "sliding_window": 4, "tie_word_embeddings": False},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 1},
    "gpt_neox": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
    "gemma3_text": {
        **LLAMA,
        "head_dim": 8,
        "sliding_window": 4,
        "tie_word_embeddings": False,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
CRITICS = ("shared", "separate", "lora")


@pytest.fixture(scope="session", autouse=True)
def quiet():
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CI", "1")  # no telemetry
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


def make_tokenizer(words=WORDS) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left", chat_template=TEMPLATE,
    )  # fmt: skip


def make_config(kind="llama", **more):
    size = len(SPECIAL) + len(WORDS)
    ids = {"pad_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 64}
    if kind == "gpt2":
        ids.pop("max_position_embeddings")
    return AutoConfig.for_model(kind, vocab_size=size, **SHAPES[kind], **ids, **more)


def widen(model) -> None:
    """Random models are near uniform; wider weights tell errors apart, and an adapter can learn."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
        model.get_output_embeddings().weight.mul_(4)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Folders `base` (a policy), `reward` (a classifier) and `gpt2`, `gpt_neox`, all random."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for kind in SHAPES:
        model = AutoModelForCausalLM.from_config(make_config(kind))
        widen(model)
        model.save_pretrained(folder / ("base" if kind == "llama" else kind))
    config = make_config(num_labels=1)
    reward = AutoModelForSequenceClassification.from_config(config)
    reward.save_pretrained(folder / "reward")
    for path in folder.iterdir():
        make_tokenizer().save_pretrained(path)
    return folder


def make_prompts(count=24, plain=False, seed=0) -> Dataset:
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 8))) for _ in range(count)]
    if plain:
        return Dataset.from_dict({"prompt": [f"Human: {t} Assistant:" for t in texts]})
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": t}] for t in texts]})


def target_share(completion_ids, **unused):
    return [sum(token in TARGETS for token in ids) / len(ids) for ids in completion_ids]


def make_args(folder, **settings) -> PPOConfig:
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "steps_per_generation": 2,
        "gradient_accumulation_steps": 1,
        "num_iterations": 2,
        "max_completion_length": 6,
        "max_steps": 8,
        "learning_rate": 3e-3,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": 3,
    }
    return PPOConfig(**{**defaults, **settings})


def make_trainer(home, folder, critic="shared", reward=target_share, callbacks=None, **settings):
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return PPOTrainer(
        str(home / "base"), reward, make_args(folder, critic=critic, **settings),
        train_dataset=make_prompts(), processing_class=make_tokenizer(), callbacks=callbacks,
        peft_config=lora if critic == "lora" else None,
    )  # fmt: skip


def tensors_of(trainer) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in trainer.model.state_dict().items()}


def assert_identical(ours, theirs):
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


# ---- probabilities and values ------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHAPES)
def test_padded_rows_score_as_each_row_does_alone(home, tmp_path, kind):
    """Left-padded prompts, ragged completions: policy, reference and critic against plain rows."""
    path = home / ("base" if kind == "llama" else kind)
    trainer = PPOTrainer(
        str(path), target_share, make_args(tmp_path, critic="separate"),
        train_dataset=make_prompts(), processing_class=make_tokenizer(),
    )  # fmt: skip
    torch.nn.init.normal_(trainer.critic.head.weight)
    plain = AutoModelForCausalLM.from_pretrained(path)
    rng = random.Random(1)
    rows = [
        ([rng.randrange(5, 29) for _ in range(p)], [rng.randrange(5, 29) for _ in range(c)])
        for p, c in [(9, 2), (1, 5), (4, 1), (6, 4)]
    ]
    ids = torch.tensor([[0] * (12 - len(p)) + p + c + [0] * (7 - len(c)) for p, c in rows])
    mask = (ids != 0).long()
    call = trainer._get_per_token_logps_and_entropies
    for model in (trainer.model, trainer.ref_model):
        with torch.no_grad():
            of_policy = model is trainer.model
            log_probs, entropy, _ = call(
                model, ids, mask, 7, batch_size=2, compute_entropy=of_policy
            )
        assert log_probs.shape == (4, 7)
        for row, (prompt, completion) in enumerate(rows):
            n = len(completion)
            logits = plain(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            every = logits.log_softmax(-1)
            alone = every.gather(1, torch.tensor(completion)[:, None]).squeeze(1)
            torch.testing.assert_close(log_probs[row, :n], alone, atol=2e-5, rtol=1e-5)
            if of_policy:
                spread = -(every.exp() * every).sum(-1)
                torch.testing.assert_close(entropy[row, :n], spread, atol=2e-5, rtol=1e-5)
    values = trainer._take_values()
    for row, (prompt, completion) in enumerate(rows):
        hidden = plain.base_model(torch.tensor([prompt + completion])).last_hidden_state
        alone = trainer.critic(hidden)[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(values[row, : len(completion)], alone, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", SHAPES)
def test_networks_work_on_real_tokens_and_the_last_layer_on_scored_ones(home, tmp_path, kind):
    path = home / ("base" if kind == "llama" else kind)
    trainer = PPOTrainer(
        str(path), target_share, make_args(tmp_path, critic="separate"),
        train_dataset=make_prompts(), processing_class=make_tokenizer(),
    )  # fmt: skip
    worked, queries = ({"policy": [], "critic": []} for _ in "mq")
    backbones = {"policy": trainer.language_model.base_model, "critic": trainer.critic.backbone}
    for name, backbone in backbones.items():
        layers = next(m for m in backbone.children() if isinstance(m, torch.nn.ModuleList))
        for layer in layers:
            parts = [(next(layer.mlp.children()), worked)]
            if hasattr(layer, "self_attn"):
                parts.append((layer.self_attn.q_proj, queries))
            for part, counts in parts:
                part.register_forward_hook(
                    lambda module, inputs, output, seen=counts[name]: seen.append(
                        inputs[0].shape[:2].numel()
                    )
                )
    # Rows of 3 + 2 and 5 + 1 tokens. A row's last token predicts nothing, so none is read there.
    ids = torch.tensor([[0, 0, 5, 6, 7, 8, 1], [9, 10, 11, 12, 13, 1, 0]])
    trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, (ids != 0).long(), 2, compute_entropy=False, batch_size=2
    )
    assert worked == {"policy": [4 + 5, 2 + 1], "critic": [4 + 5, 2 + 1]}
    if hasattr(layers[-1], "self_attn"):  # otherwise queries are made together with keys
        assert queries == {"policy": [2 * 6, 2 + 1], "critic": [2 * 6, 2 + 1]}


def test_experts_are_balanced_over_whole_rows(tmp_path):
    """Their loss counts every token of the mask, so no network may leave tokens out."""
    shape = {**LLAMA, "num_experts": 4, "moe_intermediate_size": 8, "num_experts_per_tok": 2}
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=len(SPECIAL) + len(WORDS), **shape, head_dim=8, pad_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "experts")
    make_tokenizer().save_pretrained(tmp_path / "experts")
    trainer = PPOTrainer(
        str(tmp_path / "experts"), target_share, make_args(tmp_path / "out", max_steps=2),
        train_dataset=make_prompts(), processing_class=make_tokenizer(),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 2
    assert any(math.isfinite(e.get("aux_loss", math.nan)) for e in trainer.state.log_history)


@pytest.mark.parametrize("critic", CRITICS)
def test_gradient_checkpointing_changes_no_update(home, tmp_path, critic):
    """What is computed a second time must be what was computed first."""
    after = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            home, tmp_path / str(checkpointing), critic, max_steps=4,
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        trainer.train()
        after.append(tensors_of(trainer))
    assert after[0].keys() == after[1].keys()
    for name, tensor in after[0].items():
        torch.testing.assert_close(after[1][name], tensor, atol=1e-5, rtol=1e-4)


def test_critic_starts_as_the_normalised_reward_model(home, tmp_path):
    trainer = make_trainer(
        home, tmp_path, "separate", critic_path=str(home / "reward"), score_shift=0.3,
        score_scale=0.5,
    )  # fmt: skip
    reward_model = AutoModelForSequenceClassification.from_pretrained(home / "reward")
    ids = torch.tensor([[5, 6, 7, 8]])
    score = reward_model(ids).logits
    value = trainer.critic(trainer.critic.backbone(ids).last_hidden_state)[:, -1:]
    torch.testing.assert_close(value, (score - 0.3) / 0.5)


@pytest.mark.parametrize("critic", CRITICS)
def test_without_a_reward_model_values_start_at_zero(home, tmp_path, critic):
    trainer = make_trainer(home, tmp_path, critic)
    ids = torch.tensor([[3, 5, 4, 6, 7]])
    trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 2)
    assert trainer._take_values().tolist() == [[0.0, 0.0]]


def test_adapter_critic_starts_from_an_adapter_reward_model(home, tmp_path):
    from peft import get_peft_model

    torch.manual_seed(5)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    base = AutoModelForSequenceClassification.from_pretrained(home / "base", num_labels=1)
    rater = get_peft_model(base, lora)
    for name, parameter in rater.named_parameters():
        if "lora_" in name or "score" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    rater.save_pretrained(tmp_path / "rater")
    trainer = make_trainer(home, tmp_path / "out", "lora", critic_path=str(tmp_path / "rater"))
    ids = torch.tensor([[5, 6, 7, 8]])
    value = trainer.critic(trainer.critic.backbone(ids).last_hidden_state)[:, -1:]
    torch.testing.assert_close(value, rater.eval()(ids).logits)
    with pytest.raises(InputError, match="holds no adapter"):
        make_trainer(home, tmp_path / "out", "lora", critic_path=str(home / "reward"))


# ---- a whole step ------------------------------------------------------------------------------


class Rollouts(TrainerCallback):
    """A reward function that remembers what it was asked to score, and what it answered."""

    __name__ = "remembered"

    def __init__(self):
        self.seen = []

    def __call__(self, prompts, completion_ids, **unused):
        scores = target_share(completion_ids)
        self.seen.append((prompts, completion_ids, scores))
        return scores


def slow_step(model, head, rows, settings):
    """PPO updates from first principles on `rows` (prompt ids, completion ids, score).

    One row at a time without padding, one loop a token; full-batch epochs with AdamW, gradients
    of model and head clipped apart. `head` is a shared critic's.
    """
    reference = copy.deepcopy(model)
    groups = [{"params": list(model.parameters())}, {"params": list(head.parameters())}]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, eps=1e-5, weight_decay=0.0)

    def evaluate(network, prompt, completion):
        out = network(torch.tensor([prompt + completion]), output_hidden_states=True)
        every = out.logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        chosen = every.gather(1, torch.tensor(completion)[:, None]).squeeze(1)
        return chosen, head(out.hidden_states[-1][0, len(prompt) - 1 : -1]).squeeze(-1)

    memory = []
    with torch.no_grad():
        for prompt, completion, score in rows:
            old, values = evaluate(model, prompt, completion)
            kl = old - evaluate(reference, prompt, completion)[0]
            rewards = (-settings.beta * kl).tolist()
            ended = completion[-1] == 1
            rewards[-1] += (score - settings.score_shift) / settings.score_scale
            rewards[-1] -= 0.0 if ended else settings.missing_eos_penalty
            following, running, advantages = 0.0, 0.0, []
            for reward, value in zip(rewards[::-1], values.tolist()[::-1], strict=True):
                running = (
                    reward
                    + settings.gamma * following
                    - value
                    + (settings.gamma * settings.lam * running)
                )
                following = value
                advantages.insert(0, running)
            memory.append((old, values, torch.tensor(advantages)))
    everything = torch.cat([advantages for _, _, advantages in memory])
    mean, deviation = everything.mean(), everything.std(unbiased=False)
    count = len(everything)
    for epoch in range(settings.num_iterations):
        total = 0.0
        for (prompt, completion, _), (old, values, advantages) in zip(rows, memory, strict=True):
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


def test_one_step_is_the_update_from_first_principles(home, tmp_path):
    rollouts = Rollouts()
    trainer = make_trainer(
        home, tmp_path, reward=rollouts, per_device_train_batch_size=8, steps_per_generation=1,
        num_iterations=3, max_steps=3, learning_rate=1e-2, missing_eos_penalty=0.4,
        score_shift=0.1, score_scale=0.5, gamma=0.97, lam=0.9, max_grad_norm=0.3,
    )  # fmt: skip
    torch.nn.init.normal_(trainer.critic.head.weight, std=0.2)
    model = AutoModelForCausalLM.from_pretrained(home / "base")
    before = copy.deepcopy(model.state_dict())
    head = copy.deepcopy(trainer.critic.head)
    trainer.train()
    tokenizer = make_tokenizer()
    [(prompts, completions, scores)] = rollouts.seen
    rows = [
        (tokenizer(f"Human: {prompt[0]['content']} Assistant:")["input_ids"], completion, score)
        for prompt, completion, score in zip(prompts, completions, scores, strict=True)
    ]
    slow_step(model, head, rows, trainer.args)
    live = trainer.language_model.state_dict()
    for name, slow in model.state_dict().items():
        torch.testing.assert_close(live[name], slow, atol=2e-4, rtol=1e-3)
    moved = max(float((live[n] - before[n]).abs().max()) for n in before)
    wrong = max(float((live[n] - s).abs().max()) for n, s in model.state_dict().items())
    assert wrong < 0.01 * moved
    torch.testing.assert_close(trainer.critic.head.weight, head.weight, atol=2e-4, rtol=1e-3)
    log = trainer.state.log_history
    assert log[2]["clip_ratio/region_mean"] > 0
    assert trainer.last_score == pytest.approx(sum(scores) / 8)
    ended = sum(completion[-1] == 1 for completion in completions) / 8
    assert log[0]["completions/ended_by_eos"] == pytest.approx(ended)


@pytest.mark.parametrize("critic", CRITICS)
def test_learning_raises_the_reward(home, tmp_path, critic):
    settings = {
        "per_device_train_batch_size": 16, "learning_rate": 3e-2 if critic == "lora" else 1e-2,
        "max_steps": 40, "beta": 0.01, "lr_scheduler_type": "constant", "vf_coef": 0.1,
    }  # fmt: skip
    trainer = PPOTrainer(
        str(home / "base"), target_share,
        make_args(tmp_path, critic=critic, **settings),
        train_dataset=make_prompts(64), processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear") if critic == "lora" else None,
    )  # fmt: skip
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "objective/score" in entry]
    first, last = log[0]["objective/score"], log[-1]["objective/score"]
    assert last > first + 0.2
    assert log[-1]["objective/kl"] > 0
    wanted = {
        "objective/kl_coef", "value/explained_variance", "value/clip_fraction", "value/loss",
        "clip_ratio/region_mean", "entropy", "completions/mean_length",
        "completions/ended_by_eos", "episodes", "num_tokens", "ppo_step", "time/generate",
        "time/score", "time/train",
    }  # fmt: skip
    assert wanted <= log[-1].keys() | log[0].keys()


# ---- steps, counters, checkpoints --------------------------------------------------------------


class Watch(TrainerCallback):
    """Notes the trainer's public counters after every optimizer update."""

    def __init__(self):
        self.trainer, self.notes = None, []

    def on_step_end(self, args, state, control, **unused):
        t = self.trainer
        at_boundary = state.global_step % t.args.updates_per_rollout == 0
        self.notes.append((state.global_step, at_boundary, t.ppo_step, t.episodes, t.tokens))


def watched(home, folder, critic="shared", **settings):
    watch = Watch()
    watch.trainer = make_trainer(home, folder, critic, callbacks=[watch], **settings)
    return watch.trainer, watch


def test_counters_follow_the_rollouts(home, tmp_path):
    trainer, watch = watched(home, tmp_path)
    assert (trainer.ppo_step, trainer.episodes, trainer.tokens) == (0, 0, 0)
    trainer.train()
    assert trainer.args.updates_per_rollout == 4
    assert [note[:4] for note in watch.notes] == [
        (1, False, 0, 8), (2, False, 0, 8), (3, False, 0, 8), (4, True, 1, 8),
        (5, False, 1, 16), (6, False, 1, 16), (7, False, 1, 16), (8, True, 2, 16),
    ]  # fmt: skip
    tokens = [note[4] for note in watch.notes]
    assert tokens[0] == tokens[3] < tokens[4] == tokens[7]


RESUMED = {
    "max_steps": 16,
    "kl_target": 1.0,
    "kl_horizon": 100,
    "critic_learning_rate": 5e-3,
}


@pytest.fixture(scope="module", params=CRITICS)
def uninterrupted(request, home, tmp_path_factory):
    """A run of 16 updates that keeps a checkpoint after each; 12 updates use every prompt once."""
    folder = tmp_path_factory.mktemp(request.param)
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer, watch = watched(home, folder, request.param, **RESUMED, **saving)
    trainer.train()
    return trainer, watch, folder


@pytest.mark.parametrize("done", [4, 5, 12, 15])
def test_resumed_run_equals_the_uninterrupted_one_to_the_bit(home, uninterrupted, tmp_path, done):
    """At a rollout's end, within one, where the prompts are used up, and within the next."""
    whole, watch, folder = uninterrupted
    checkpoint = folder / f"checkpoint-{done}"
    torch.manual_seed(99)
    resumed, again = watched(home, tmp_path, whole.args.critic, **RESUMED)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_identical(tensors_of(whole), tensors_of(resumed))
    assert again.notes == watch.notes[done:]
    assert (resumed.kl_coef, resumed.last_kl) == (whole.kl_coef, whole.last_kl)
    assert resumed.kl_coef != 0.05
    same = ("loss", "objective/score", "value/loss", "objective/kl")
    last = [run.state.log_history[-2] for run in (whole, resumed)]
    assert [last[0].get(key) for key in same] == [last[1].get(key) for key in same]
    in_progress = checkpoint / "rollout-0.safetensors"
    assert in_progress.exists() == (done % 4 != 0)
    assert (checkpoint / "critic" / "critic.safetensors").exists()


def test_saving_does_not_change_the_run(home, uninterrupted, tmp_path):
    whole, _, _ = uninterrupted
    unsaved = make_trainer(home, tmp_path, whole.args.critic, **RESUMED)
    unsaved.train()
    unsaved.save_policy(tmp_path / "policy")
    assert_identical(tensors_of(whole), tensors_of(unsaved))


def test_a_checkpoint_cut_short_is_passed_over(home, tmp_path):
    trainer = make_trainer(home, tmp_path, save_strategy="steps", save_steps=4)
    trainer.train()
    assert newest_resumable(tmp_path) == tmp_path / "checkpoint-8"
    (tmp_path / "checkpoint-8" / "trainer_state.json").unlink()
    assert newest_resumable(tmp_path) == tmp_path / "checkpoint-4"
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert newest_resumable(tmp_path) is None


def test_a_damaged_checkpoint_is_passed_over_and_never_resumed(home, tmp_path, caplog):
    make_trainer(home, tmp_path, save_strategy="steps", save_steps=5, max_steps=5).train()
    checkpoint = tmp_path / "checkpoint-5"
    trainer = make_trainer(home, tmp_path)
    for name in (
        "rollout-0.safetensors",
        "critic/critic.safetensors",
        "ppo.json",
        "optimizer.safetensors",
    ):
        whole = (checkpoint / name).read_bytes()
        flipped = bytearray(whole)
        flipped[-9] ^= 1
        (checkpoint / name).write_bytes(flipped)
        assert newest_resumable(tmp_path) is None
        assert f"{name}: damaged or replaced" in caplog.messages[-1]
        with pytest.raises(InputError, match=re.escape(name)):
            trainer.train(resume_from_checkpoint=str(checkpoint))
        (checkpoint / name).write_bytes(whole)
    assert newest_resumable(tmp_path) == checkpoint


def test_resuming_with_other_settings_is_refused(home, tmp_path):
    make_trainer(home, tmp_path, save_strategy="steps", save_steps=5, max_steps=5).train()
    checkpoint = str(tmp_path / "checkpoint-5")
    with pytest.raises(InputError, match="another kind of critic"):
        make_trainer(home, tmp_path, "separate").train(resume_from_checkpoint=checkpoint)
    with pytest.raises(InputError, match="gradient_accumulation_steps"):
        other = make_trainer(home, tmp_path, gradient_accumulation_steps=2)
        other.train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("critic", CRITICS)
def test_saved_policy_is_the_live_one_and_nothing_else(home, tmp_path, critic, caplog):
    trainer = make_trainer(home, tmp_path / "out", critic, max_steps=4)
    trainer.train()
    folder = tmp_path / "policy"
    trainer.save_policy(folder)
    assert not [f for f in folder.rglob("*") if f.suffix in (".bin", ".pt", ".pkl")]
    ids = torch.tensor([[3, 5, 6, 4, 7, 8]])
    with torch.no_grad():
        live = trainer.model.eval()(input_ids=ids).logits
    if critic == "lora":
        loaded = AutoPeftModelForCausalLM.from_pretrained(folder)
        names = load_file(folder / "adapter_model.safetensors").keys()
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(home / "base")
    else:
        loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        names = load_file(folder / "model.safetensors").keys()
    assert not [name for name in names if "critic" in name]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, live)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATE and tokenizer.eos_token == "<eos>"
    assert "critic" in dict(trainer.language_model.named_children()), "the critic did not come back"


def test_output_of_actor_and_critic_is_still_a_dict_of_tensors(home, tmp_path):
    """DistributedDataParallel walks through it to find what needs gradients."""
    ids = torch.tensor([[3, 5, 6, 4, 7, 8]])
    output = make_trainer(home, tmp_path).model(
        input_ids=ids, labels=ids, fused_lm_head=True, scored_only=True, with_values=True
    )
    assert {"log_probs", "entropy", "state_values"} <= output.keys()
    assert all(isinstance(tensor, torch.Tensor) for tensor in output.values())


def test_adapters_of_policy_and_critic_share_one_copy_of_the_base(home, tmp_path):
    trainer = make_trainer(home, tmp_path, "lora")
    assert trainer.ref_model is None

    def size(parameters):
        return sum({p.untyped_storage().data_ptr(): p.numel() for p in parameters}.values())

    adapter = size(p for n, p in trainer.model.named_parameters() if "lora_" in n) // 2
    base = size(AutoModelForCausalLM.from_pretrained(home / "base").parameters())
    head = sum(p.numel() for p in trainer.critic.head.parameters())
    assert adapter > 0
    assert size(trainer.model.parameters()) == base + 2 * adapter + head


def test_policy_that_comes_with_an_adapter_keeps_it_as_the_reference(home, tmp_path):
    from peft import get_peft_model

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    policy = get_peft_model(base, lora)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    trainer = PPOTrainer(
        policy, target_share, make_args(tmp_path, learning_rate=1e-2), train_dataset=make_prompts(),
        processing_class=make_tokenizer(),
    )  # fmt: skip
    assert trainer.critic_kind == "lora"
    start = {n: p.clone() for n, p in trainer.critic.named_parameters() if p.requires_grad}
    trainer.train()
    assert trainer.state.log_history[0]["objective/kl"] == pytest.approx(0.0, abs=1e-6)
    assert abs(trainer.last_kl) > 1e-4
    now = dict(trainer.critic.named_parameters())
    still = [n for n in start if torch.equal(start[n], now[n]) and ".ref." not in n]
    assert not still, "the critic's adapter was switched off by the reference pass"
    trainer.save_policy(tmp_path / "policy")
    assert not (tmp_path / "policy" / "ref").exists()


# ---- settings that change what learns ----------------------------------------------------------


@pytest.mark.parametrize("critic", CRITICS)
def test_in_warm_up_only_the_critic_moves(home, tmp_path, critic):
    trainer = make_trainer(home, tmp_path, critic, critic_warmup_steps=1, max_steps=4)
    before = tensors_of(trainer)
    trainer.train()
    after = tensors_of(trainer)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("critic." in name for name in moved)


def test_critic_has_its_own_learning_rate_under_the_same_schedule(home, tmp_path):
    trainer = make_trainer(home, tmp_path, "separate", critic_learning_rate=0.5, max_steps=4)
    trainer.create_optimizer()
    critic = {id(p) for p in trainer.critic.parameters()}
    for group in trainer.optimizer.param_groups:
        expected = {True: 0.5, False: 3e-3}
        assert {group["lr"]} == {expected[id(p) in critic] for p in group["params"]}
    count = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert count == len([p for p in trainer.model.parameters() if p.requires_grad])


def test_a_huge_value_gradient_does_not_shrink_the_policy_gradient(home, tmp_path):
    norms = {}
    for vf_coef in (0.1, 1000.0):
        trainer = make_trainer(home, tmp_path, "separate", vf_coef=vf_coef, max_steps=1)
        trainer.train()
        norms[vf_coef] = trainer.language_model.lm_head.weight.detach().clone()
    torch.testing.assert_close(norms[0.1], norms[1000.0])


def test_single_update_per_rollout_still_has_values(home, tmp_path):
    """There TRL skips the old policy's pass, and PPO makes its own."""
    trainer = make_trainer(
        home, tmp_path, num_iterations=1, gradient_accumulation_steps=2, max_steps=2,
    )  # fmt: skip
    trainer.train()
    assert trainer.ppo_step == 2
    assert trainer.state.log_history[-2]["value/loss"] > 0


@pytest.mark.parametrize("critic", CRITICS)
def test_old_values_are_those_of_the_critic_that_learns(home, tmp_path, critic, monkeypatch):
    """Not those of the reference pass, in which an adapter critic is switched off as well."""
    seen = []
    inner = losses.value_errors

    def note(values, old_values, *rest):
        seen.append((values.detach(), old_values))
        return inner(values, old_values, *rest)

    monkeypatch.setattr(losses, "value_errors", note)
    make_trainer(home, tmp_path, critic, max_steps=8, learning_rate=1e-2).train()
    values, old_values = seen[4]  # the first minibatch of the second rollout
    torch.testing.assert_close(values, old_values)
    assert values.abs().max() > 1e-3


def test_every_epoch_deals_the_same_rows_in_another_order(home, tmp_path):
    trainer = make_trainer(home, tmp_path, max_steps=4)
    seen = []
    inner = trainer._compute_loss

    def note(model, inputs):
        seen.append([tuple(row.tolist()) for row in inputs["completion_ids"]])
        return inner(model, inputs)

    trainer._compute_loss = note
    trainer.train()
    first, second = seen[0] + seen[1], seen[2] + seen[3]
    assert sorted(first) == sorted(second) and first != second


def test_without_kl_there_is_no_reference_and_no_kl_is_claimed(home, tmp_path):
    trainer = make_trainer(home, tmp_path, beta=0.0, max_steps=4)
    trainer.train()
    assert trainer.ref_model is None and trainer.last_kl is None
    assert "objective/kl" not in trainer.state.log_history[0]


# ---- rewards -----------------------------------------------------------------------------------


def test_reward_model_sees_the_prompt_as_rendered_and_the_end_token(home):
    model = AutoModelForSequenceClassification.from_pretrained(home / "reward")
    scorer = RewardModelScorer(model, make_tokenizer(), batch_size=2)
    prompts = [[{"role": "user", "content": text}] for text in ("w1 w2", "w3", "w4 w5 w6")]
    ids = [[6, 7, 1], [8], [9, 10, 11, 1]]
    texts = [
        "Human: w1 w2 Assistant: w1 w2 <eos>",
        "Human: w3 Assistant: w3",
        "Human: w4 w5 w6 Assistant: w4 w5 w6 <eos>",
    ]
    tokenizer = make_tokenizer()
    rows = [tokenizer(text)["input_ids"] for text in texts]
    assert scorer.token_ids(prompts, ids) == rows
    alone = [model(torch.tensor([row])).logits.item() for row in rows]
    assert scorer(prompts=prompts, completions=None, completion_ids=ids) == pytest.approx(
        alone, abs=1e-5
    )
    plain = ["Human: w1 w2 Assistant:", "Human: w3 Assistant:", "Human: w4 w5 w6 Assistant:"]
    assert scorer.token_ids(plain, ids) == rows
    other = make_tokenizer(WORDS[::-1])
    elsewhere = RewardModelScorer(model, other, policy_tokenizer=tokenizer)
    assert elsewhere.token_ids(prompts, ids) == [other(text)["input_ids"] for text in texts]


def test_reward_model_sees_what_the_template_puts_behind_the_end_token(home):
    model = AutoModelForSequenceClassification.from_pretrained(home / "reward")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("{{ eos_token }}", "{{ eos_token }} w9 ")
    scorer = RewardModelScorer(model, tokenizer)
    whole = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    trained_on = tokenizer.apply_chat_template(whole, tokenize=True, return_dict=False)
    assert scorer.token_ids([whole[:1]], [[7, 1]]) == [trained_on]
    assert scorer.token_ids([whole[:1]], [[7]]) == [trained_on[:-2]]


def test_reward_model_folder_and_function_together(home, tmp_path):
    trainer = make_trainer(home, tmp_path, reward=[str(home / "reward"), target_share],
                           reward_weights=[1.0, 0.5], max_steps=1)  # fmt: skip
    trainer.train()
    log = trainer.state.log_history[0]
    mixed = log["rewards/reward/mean"] + 0.5 * log["rewards/target_share/mean"]
    assert log["objective/score"] == pytest.approx(mixed, abs=1e-6)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda n: [math.nan] * n, "'broken' returned nan for completion 0 of 8"),
        (lambda n: [1.0] * (n - 1) + [None], "'broken' returned None for completion 7 of 8"),
        (lambda n: [1.0] * (n + 1), "'broken' returned 9 rewards for 8 completions"),
        (lambda n: 1.0, "'broken' returned float, not a list"),
    ],
)
def test_bad_rewards_are_named(home, tmp_path, answer, message):
    def broken(prompts, **unused):
        return answer(len(prompts))

    with pytest.raises(RunFailure, match=message):
        make_trainer(home, tmp_path, reward=broken).train()


# ---- failing clearly ---------------------------------------------------------------------------


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
        ({"critic": "shared", "critic_path": "x"}, "critic_path has no use with critic: shared"),
        ({"per_device_train_batch_size": 1, "steps_per_generation": 1}, "at least 2 completions"),
        ({"num_generations": 3}, "divisible by num_generations"),
    ],
)
def test_bad_settings_are_one_clear_line(tmp_path, settings, message):
    with pytest.raises(InputError, match=message) as caught:
        make_args(tmp_path, **settings)
    assert "\n" not in str(caught.value)


def test_updates_per_rollout_is_epochs_times_minibatches(tmp_path):
    args = make_args(
        tmp_path, num_iterations=3, steps_per_generation=8, gradient_accumulation_steps=2
    )
    assert args.updates_per_rollout == 12
    assert args.num_generations == 1 and args.generation_batch_size == 32


def test_inputs_that_do_not_fit_are_one_clear_line(home, tmp_path):
    with pytest.raises(InputError, match="needs a policy that trains an adapter"):
        PPOTrainer(str(home / "base"), target_share, make_args(tmp_path, critic="lora"),
                   train_dataset=make_prompts(), processing_class=make_tokenizer())  # fmt: skip
    with pytest.raises(InputError, match="7 prompts are too few for a rollout batch of 8"):
        PPOTrainer(str(home / "base"), target_share, make_args(tmp_path),
                   train_dataset=make_prompts(7), processing_class=make_tokenizer())  # fmt: skip
    with pytest.raises(InputError, match="exceed the model's context of 64"):
        make_trainer(home, tmp_path, max_completion_length=60).train()
    with pytest.raises(InputError, match=r"(?i)target modules"):
        PPOTrainer(str(home / "base"), target_share, make_args(tmp_path), peft_config=LoraConfig(
            target_modules=["nothing"]), train_dataset=make_prompts(),
            processing_class=make_tokenizer())  # fmt: skip


def test_a_folder_that_is_no_reward_model_is_refused(home, tmp_path):
    with pytest.raises(InputError, match=r"no reward model at .*nowhere"):
        make_trainer(home, tmp_path, reward=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"is no reward model: it lacks score\.weight"):
        make_trainer(home, tmp_path, "separate", critic_path=str(home / "base"))


def test_a_run_that_drifts_too_far_stops_by_name(home, tmp_path):
    with pytest.raises(RunFailure, match=r"above max_kl 0\.01"):
        make_trainer(home, tmp_path, learning_rate=0.1, max_kl=0.01, max_steps=20).train()


def test_a_loss_that_is_not_finite_stops_before_it_acts(home, tmp_path):
    trainer = make_trainer(home, tmp_path)
    before = tensors_of(trainer)
    inner = trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: inner(model, inputs) * math.nan
    with pytest.raises(RunFailure, match="ppo step 1: the loss is nan"):
        trainer.train()
    assert_identical(before, tensors_of(trainer))


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("critic", CRITICS)
def test_every_architecture_trains_an_adapter_with_every_critic(home, tmp_path, kind, critic):
    path = home / ("base" if kind == "llama" else kind)
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = PPOTrainer(
        str(path), target_share, make_args(tmp_path, critic=critic, max_steps=4),
        train_dataset=make_prompts(plain=True), processing_class=make_tokenizer(), peft_config=lora,
    )  # fmt: skip
    before = tensors_of(trainer)
    trainer.train()
    moved = {n for n, t in tensors_of(trainer).items() if not torch.equal(t, before[n])}
    assert any("lora_B.default" in name for name in moved)
    assert not any("base_layer" in name and "critic.backbone" not in name for name in moved)
    trainer.save_policy(tmp_path / "policy")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "policy")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    trainer.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, trainer.model(ids).logits, atol=0, rtol=0)


def test_an_adapter_that_matches_no_layer_is_one_clear_line(home, tmp_path):
    lora = LoraConfig(r=2, target_modules=["no_such_layer"], task_type="CAUSAL_LM")
    with pytest.raises(InputError, match="no_such_layer"):
        PPOTrainer(
            str(home / "base"), target_share, make_args(tmp_path), train_dataset=make_prompts(),
            processing_class=make_tokenizer(), peft_config=lora,
        )  # fmt: skip
