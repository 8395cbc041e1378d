"""Checkpoints: resuming to the bit, damaged and unfitting ones, and the saved policy."""

import json
import re
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.train.trainers.state import newest_state
from tests.support.ppo_models import (
    CRITICS,
    SHAPES,
    TEMPLATE,
    Counters,
    assert_same_weights,
    copy_weights,
    make_prompts,
    make_trainer,
    policy_name,
)

SETTINGS = {"max_steps": 16, "kl_target": 1.0, "kl_horizon": 100, "critic_learning_rate": 5e-3}


def counted_trainer(*args, **settings):
    counters = Counters()
    counters.trainer = make_trainer(*args, callbacks=[counters], **settings)
    return counters.trainer, counters


@pytest.fixture(scope="module", params=CRITICS)
def uninterrupted(request, models, tmp_path_factory):
    """A run of 16 updates with a checkpoint after each; 12 updates use every prompt once."""
    folder = tmp_path_factory.mktemp(request.param)
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer, counters = counted_trainer(models, folder, request.param, **SETTINGS, **saving)
    trainer.train()
    return trainer, counters, folder


@pytest.mark.parametrize("done", [4, 5, 12, 15])
def test_resumed_run_equals_the_uninterrupted_one_bitwise(models, uninterrupted, tmp_path, done):
    """At the end of a rollout batch, within one, where the prompts run out, and after that."""
    complete, counters, folder = uninterrupted
    checkpoint = folder / f"checkpoint-{done}"
    torch.manual_seed(99)
    resumed, resumed_counters = counted_trainer(models, tmp_path, complete.args.critic, **SETTINGS)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_weights(copy_weights(complete), copy_weights(resumed))
    assert resumed_counters.rows == counters.rows[done:]
    assert (resumed.kl_coef, resumed.last_kl) == (complete.kl_coef, complete.last_kl)
    assert resumed.kl_coef != 0.05
    last, resumed_last = (run.state.log_history[-2] for run in (complete, resumed))
    for metric in ("loss", "objective/score", "value/loss", "objective/kl"):
        assert resumed_last.get(metric) == last.get(metric)
    assert (checkpoint / "rollout-0.safetensors").exists() == (done % 4 != 0)
    assert (checkpoint / "critic" / "critic.safetensors").exists()


def test_saving_does_not_change_the_run(models, uninterrupted, tmp_path):
    complete, _, _ = uninterrupted
    unsaved = make_trainer(models, tmp_path, complete.args.critic, **SETTINGS)
    unsaved.train()
    unsaved.save_policy(tmp_path / "policy")
    assert_same_weights(copy_weights(complete), copy_weights(unsaved))


@pytest.fixture(scope="module")
def checkpoint(models, tmp_path_factory):
    """A checkpoint within a rollout batch."""
    folder = tmp_path_factory.mktemp("stopped")
    make_trainer(models, folder, save_strategy="steps", save_steps=5, max_steps=5).train()
    return folder / "checkpoint-5"


def test_partial_checkpoint_is_removed_and_the_older_one_resumed(models, tmp_path):
    make_trainer(models, tmp_path, save_strategy="steps", save_steps=4).train()
    older, newer = tmp_path / "checkpoint-4", tmp_path / "checkpoint-8"
    assert newest_state(tmp_path) == str(newer)
    (newer / "complete").unlink()
    assert newest_state(tmp_path) == str(older) and not newer.exists()
    shutil.rmtree(older)
    assert newest_state(tmp_path) is None


@pytest.mark.parametrize(
    "name",
    [
        "rollout-0.safetensors",
        "critic/critic.safetensors",
        "ppo.json",
        "optimizer.safetensors",
        "model.safetensors",
    ],
)
def test_damaged_checkpoint_is_never_resumed(models, checkpoint, tmp_path, caplog, name):
    copy = shutil.copytree(checkpoint, tmp_path / "checkpoint-5")
    damaged = bytearray((copy / name).read_bytes())
    damaged[-9] ^= 1
    (copy / name).write_bytes(damaged)
    with pytest.raises(InputError, match=re.escape(f"{name}: damaged")):
        make_trainer(models, tmp_path).train(resume_from_checkpoint=str(copy))
    assert newest_state(tmp_path) is None and not copy.exists()
    assert f"{name}: damaged" in caplog.messages[-1]


@pytest.mark.parametrize(
    ("critic", "settings", "message"),
    [
        ("separate", {}, "critic.safetensors: holds another kind of critic"),
        ("shared", {"gradient_accumulation_steps": 2}, "ppo.json: .* gradient_accumulation_steps"),
    ],
)
def test_resuming_with_other_settings_is_refused(
    models, checkpoint, tmp_path, critic, settings, message
):
    trainer = make_trainer(models, tmp_path, critic, **settings)
    with pytest.raises(InputError, match=message):
        trainer.train(resume_from_checkpoint=str(checkpoint))


# ---- the saved policy --------------------------------------------------------------------------


@pytest.mark.parametrize("critic", CRITICS)
def test_saved_policy_is_the_trained_one_without_its_critic(models, tmp_path, critic):
    trainer = make_trainer(models, tmp_path / "out", critic, max_steps=4)
    trainer.train()
    folder = tmp_path / "policy"
    trainer.save_policy(folder)
    assert not [f for f in folder.rglob("*") if f.suffix in (".bin", ".pt", ".pkl")]
    ids = torch.tensor([[3, 5, 6, 4, 7, 8]])
    with torch.no_grad():
        logits = trainer.model.eval()(input_ids=ids).logits
    if critic == "lora":
        loaded = AutoPeftModelForCausalLM.from_pretrained(folder)
        names = load_file(folder / "adapter_model.safetensors").keys()
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(models / "base")
    else:
        loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        names = load_file(folder / "model.safetensors").keys()
    assert names and not [name for name in names if "critic" in name]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, logits)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATE and tokenizer.eos_token == "<eos>"
    assert "critic" in dict(trainer.language_model.named_children()), "the critic is gone"


@pytest.mark.parametrize("architecture", SHAPES)
@pytest.mark.parametrize("critic", CRITICS)
def test_every_architecture_trains_and_saves_an_adapter(models, tmp_path, architecture, critic):
    trainer = make_trainer(
        models, tmp_path, critic, policy=policy_name(architecture), max_steps=4,
        prompts=make_prompts(plain=True),
        lora=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    before = copy_weights(trainer)
    trainer.train()
    moved = {n for n, t in copy_weights(trainer).items() if not torch.equal(t, before[n])}
    assert any("lora_B.default" in name for name in moved)
    assert not any("base_layer" in name and "critic.backbone" not in name for name in moved)
    trainer.save_policy(tmp_path / "policy")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "policy")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trainer.model(ids).logits)
