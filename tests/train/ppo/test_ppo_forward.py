"""Log-probabilities and values of padded rows, and the critic's initial weights."""

import math
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from selfcorrect.recipes.foundation.errors import InputError
from tests.support.ppo_models import (
    CRITICS,
    SHAPES,
    assert_same_weights,
    copy_weights,
    make_policy,
    make_tokenizer,
    make_trainer,
    policy_name,
)


@pytest.mark.parametrize("architecture", SHAPES)
def test_padded_rows_score_as_each_row_alone(models, tmp_path, architecture):
    """Left-padded prompts, ragged completions: policy, reference and critic against plain rows."""
    name = policy_name(architecture)
    trainer = make_trainer(models, tmp_path, "separate", policy=name)
    torch.nn.init.normal_(trainer.critic.head.weight)
    plain = AutoModelForCausalLM.from_pretrained(models / name)
    rng = random.Random(1)
    rows = [
        ([rng.randrange(5, 29) for _ in range(p)], [rng.randrange(5, 29) for _ in range(c)])
        for p, c in [(9, 2), (1, 5), (4, 1), (6, 4)]
    ]
    ids = torch.tensor([[0] * (12 - len(p)) + p + c + [0] * (7 - len(c)) for p, c in rows])
    mask = (ids != 0).long()
    with torch.no_grad():
        policy = trainer._forward_completions(
            trainer.model, ids, mask, 7, batch_size=2, compute_entropy=True
        )
        reference = trainer._forward_completions(trainer.ref_model, ids, mask, 7, batch_size=2)
    assert policy.log_probs.shape == policy.values.shape == (4, 7)
    assert reference.values is None
    close = {"atol": 2e-5, "rtol": 1e-5}
    for row, (prompt, completion) in enumerate(rows):
        n, tokens = len(completion), torch.tensor([prompt + completion])
        with torch.no_grad():
            output = plain(tokens, output_hidden_states=True)
            hidden = plain.base_model(tokens).last_hidden_state
            values = trainer.critic(hidden)[0, len(prompt) - 1 : -1]
        distribution = output.logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        log_probs = distribution.gather(1, torch.tensor(completion)[:, None]).squeeze(1)
        entropies = -(distribution.exp() * distribution).sum(-1)
        torch.testing.assert_close(policy.log_probs[row, :n], log_probs, **close)
        torch.testing.assert_close(reference.log_probs[row, :n], log_probs, **close)
        torch.testing.assert_close(policy.entropies[row, :n], entropies, **close)
        torch.testing.assert_close(policy.values[row, :n], values, **close)


@pytest.mark.parametrize("architecture", SHAPES)
def test_modules_run_only_at_positions_in_use(models, tmp_path, architecture):
    """MLPs at real tokens; in the last layer, MLP and queries where a token is predicted."""
    trainer = make_trainer(models, tmp_path, "separate", policy=policy_name(architecture))
    # Rows of 3 + 2 and 5 + 1 tokens. Nothing is read at a row's last token: it predicts nothing.
    ids = torch.tensor([[0, 0, 5, 6, 7, 8, 1], [9, 10, 11, 12, 13, 1, 0]])
    trainer._forward_completions(trainer.model, ids, (ids != 0).long(), 2)  # tries it
    mlp_positions, query_positions = ({"policy": [], "critic": []} for _ in range(2))
    backbones = {"policy": trainer.language_model.base_model, "critic": trainer.critic.backbone}
    for name, backbone in backbones.items():
        layers = next(m for m in backbone.children() if isinstance(m, torch.nn.ModuleList))
        for layer in layers:
            modules = [(next(layer.mlp.children()), mlp_positions)]
            if hasattr(layer, "self_attn"):
                modules.append((layer.self_attn.q_proj, query_positions))
            for module, counts in modules:
                module.register_forward_hook(
                    lambda module, inputs, output, count=counts[name]: count.append(
                        inputs[0].shape[:2].numel()
                    )
                )
    trainer._forward_completions(trainer.model, ids, (ids != 0).long(), 2, batch_size=2)
    assert mlp_positions == {"policy": [4 + 5, 2 + 1], "critic": [4 + 5, 2 + 1]}
    if hasattr(layers[-1], "self_attn"):  # other models compute queries together with keys
        assert query_positions == {"policy": [2 * 6, 2 + 1], "critic": [2 * 6, 2 + 1]}


def test_experts_are_balanced_over_complete_rows(tmp_path):
    """Their loss counts every token of the mask, so no module may leave tokens out."""
    make_policy("qwen3_moe").save_pretrained(tmp_path / "experts")
    make_tokenizer().save_pretrained(tmp_path / "experts")
    trainer = make_trainer(tmp_path, tmp_path / "out", "separate", policy="experts", max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2
    assert any(math.isfinite(e.get("aux_loss", math.nan)) for e in trainer.state.log_history)


@pytest.mark.parametrize("critic", CRITICS)
def test_gradient_checkpointing_changes_no_update(models, tmp_path, critic):
    """Recomputed activations must be those of the first computation."""
    weights = []
    for setting in (False, True):
        trainer = make_trainer(
            models, tmp_path / str(setting), critic, max_steps=4, gradient_checkpointing=setting
        )
        trainer.train()
        weights.append(copy_weights(trainer))
    torch.testing.assert_close(weights[1], weights[0], atol=1e-5, rtol=1e-4)


def test_output_of_actor_and_critic_is_a_dict_of_tensors(models, tmp_path):
    """DistributedDataParallel walks through it to find tensors that need gradients."""
    ids = torch.tensor([[3, 5, 6, 4, 7, 8]])
    output = make_trainer(models, tmp_path).model(
        input_ids=ids, labels=ids, fused_lm_head=True, scored_only=True, with_values=True
    )
    assert {"log_probs", "entropy", "state_values"} <= output.keys()
    assert all(isinstance(tensor, torch.Tensor) for tensor in output.values())


# ---- the critic's initial weights --------------------------------------------------------------


def test_critic_starts_as_the_normalised_reward_model(models, tmp_path):
    trainer = make_trainer(
        models, tmp_path, "separate", critic_path=str(models / "reward"), score_shift=0.3,
        score_scale=0.5,
    )  # fmt: skip
    reward_model = AutoModelForSequenceClassification.from_pretrained(models / "reward")
    ids = torch.tensor([[5, 6, 7, 8]])
    score = reward_model(ids).logits
    value = trainer.critic(trainer.critic.backbone(ids).last_hidden_state)[:, -1:]
    torch.testing.assert_close(value, (score - 0.3) / 0.5)


@pytest.mark.parametrize("critic", CRITICS)
def test_values_start_at_zero_without_a_reward_model(models, tmp_path, critic):
    trainer = make_trainer(models, tmp_path, critic)
    ids = torch.tensor([[3, 5, 4, 6, 7]])
    outputs = trainer._forward_completions(trainer.model, ids, torch.ones_like(ids), 2)
    assert outputs.values.tolist() == [[0.0, 0.0]]


def test_adapter_critic_starts_from_an_adapter_reward_model(models, tmp_path):
    torch.manual_seed(5)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    base = AutoModelForSequenceClassification.from_pretrained(models / "base", num_labels=1)
    reward_model = get_peft_model(base, lora)
    for name, parameter in reward_model.named_parameters():
        if "lora_" in name or "score" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    reward_model.save_pretrained(tmp_path / "reward")
    trainer = make_trainer(models, tmp_path / "out", "lora", critic_path=str(tmp_path / "reward"))
    ids = torch.tensor([[5, 6, 7, 8]])
    value = trainer.critic(trainer.critic.backbone(ids).last_hidden_state)[:, -1:]
    torch.testing.assert_close(value, reward_model.eval()(ids).logits)
    with pytest.raises(InputError, match="holds no adapter"):
        make_trainer(models, tmp_path / "out", "lora", critic_path=str(models / "reward"))


# ---- adapters ----------------------------------------------------------------------------------


def test_policy_and_critic_adapters_share_one_copy_of_the_base(models, tmp_path):
    trainer = make_trainer(models, tmp_path, "lora")
    assert trainer.ref_model is None

    def size(parameters):
        return sum({p.untyped_storage().data_ptr(): p.numel() for p in parameters}.values())

    adapter = size(p for n, p in trainer.model.named_parameters() if "lora_" in n) // 2
    base = size(AutoModelForCausalLM.from_pretrained(models / "base").parameters())
    head = sum(p.numel() for p in trainer.critic.head.parameters())
    assert adapter > 0
    assert size(trainer.model.parameters()) == base + 2 * adapter + head


def test_policy_with_an_adapter_keeps_it_as_the_reference(models, tmp_path):
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(models / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    policy = get_peft_model(base, lora)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    trainer = make_trainer(models, tmp_path, "auto", policy=policy, learning_rate=1e-2)
    assert trainer.critic_kind == "lora"
    start = {n: p.clone() for n, p in trainer.critic.named_parameters() if p.requires_grad}
    trainer.train()
    assert trainer.state.log_history[0]["objective/kl"] == pytest.approx(0.0, abs=1e-6)
    assert abs(trainer.last_kl) > 1e-4
    end = dict(trainer.critic.named_parameters())
    unchanged = [n for n in start if torch.equal(start[n], end[n]) and ".ref." not in n]
    assert start and not unchanged, "the reference pass switched the critic's adapter off"
    trainer.save_policy(tmp_path / "policy")
    assert (tmp_path / "policy").is_dir() and not (tmp_path / "policy" / "ref").exists()


def test_reference_is_unchanged_by_training(models, tmp_path):
    trainer = make_trainer(models, tmp_path, max_steps=4)
    before = {name: t.clone() for name, t in trainer.ref_model.state_dict().items()}
    trainer.train()
    assert_same_weights(before, trainer.ref_model.state_dict())


def test_adapter_on_a_bfloat16_base_samples_as_it_scores(models, tmp_path):
    """Its products are 16-bit in sampling too, where accelerate's wrapper is not called."""
    base = AutoModelForCausalLM.from_pretrained(models / "base", dtype=torch.bfloat16)
    trainer = make_trainer(models, tmp_path, "lora", policy=base, bf16=True, max_steps=4)
    adapters = [m for n, m in trainer.model.named_modules() if n.endswith("lora_A.default")]
    seen: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    generate, depth = trainer._generate_single_turn, list[int]()

    def generating(*arguments):
        depth.append(1)
        try:
            return generate(*arguments)
        finally:
            depth.pop()

    trainer._generate_single_turn = generating
    for module in adapters:
        module.register_forward_hook(lambda *call: seen[bool(depth)].add(call[2].dtype))
    trainer.train()  # the first ratios are checked
    assert adapters and seen == {True: {torch.bfloat16}, False: {torch.bfloat16}}
