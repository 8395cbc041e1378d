"""Reward models of every causal architecture: made, saved, read back, read at the last token."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig
from transformers import (
    AutoModelForSequenceClassification,
    DebertaV2Config,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaForSequenceClassification,
    RobertaConfig,
    T5Config,
    XLNetConfig,
)

from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.load import load_recipe
from selfcorrect.train.check import check_training
from selfcorrect.train.ppo.reward_models import (
    has_linear_score,
    load_reward_model,
    longest_row,
    new_reward_model,
    score_rows,
    without_unread_end,
)
from tests.support.architectures import CAUSAL, members, small_config, small_model
from tests.support.ppo_models import END, make_tokenizer

PADDING = 0
# Rows of other lengths, that end with an end token, with the padding token, or with a word.
ROWS = [[5, 6, 7, 2], [5], [5, PADDING], [5, *[PADDING] * 6], [8, 9, 10, 11, 12, 2], [7] * 13]
UNREADABLE = {  # transformers cannot read what it saves of them, or only at one length
    "emu3": "a reward model is made from a causal language model",
    "mllama": "a reward model is made from a causal language model",
}


def right_scores(model, rows=ROWS):
    """Return the head's value of the last state of each row, run by itself."""
    scores = []
    for row in rows:
        ids = torch.tensor([row])
        with torch.no_grad():
            states = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
            scores.append(model.score(states)[0, -1, 0].item())
    return scores


@pytest.mark.parametrize("architecture", members(name for name in CAUSAL if name != "reformer"))
def test_every_causal_family_has_a_reward_model(architecture, tmp_path):
    causal = small_model(architecture)
    causal.save_pretrained(tmp_path / "base")
    if architecture in UNREADABLE:
        with pytest.raises(InputError, match=UNREADABLE[architecture]):
            new_reward_model(tmp_path / "base")
        return
    made = new_reward_model(tmp_path / "base").eval()
    with torch.no_grad():
        made.score.weight.mul_(10)
    made.save_pretrained(tmp_path / "reward")
    model = load_reward_model(tmp_path / "reward").eval()
    assert model.config.architectures[0].endswith("ForSequenceClassification")
    weights, read = made.state_dict(), model.state_dict()
    assert list(weights) == list(read)
    assert all(torch.equal(weights[name], read[name]) for name in weights)
    trunk = causal.state_dict()
    shared = [name for name in read if name in trunk]
    assert len(shared) >= len(read) - 1 and all(torch.equal(read[n], trunk[n]) for n in shared)
    right = right_scores(model)
    spread = max(right) - min(right)
    assert len({round(score, 6) for score in right}) == len(ROWS)
    for settings in ({}, {"sparse": True}):
        assert score_rows(model, ROWS, 8, **settings) == pytest.approx(right, abs=1e-4 * spread)
    made.train()
    ids = torch.tensor([[5, 6, 7, 8]])
    made(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
    gradients = {n: p.grad for n, p in made.named_parameters() if p.grad is not None}
    assert gradients.pop("score.weight").abs().sum() > 0
    assert any(gradient.abs().sum() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "opt", "mpt", "qwen3_moe"])
def test_file_is_that_of_transformers_classifier(architecture, tmp_path):
    """Both read the other's files, to the same scores."""
    small_model(architecture).save_pretrained(tmp_path / "base")
    made = new_reward_model(tmp_path / "base").eval()
    made.config.pad_token_id = 66  # in no row, so transformers reads the last token too
    made.save_pretrained(tmp_path / "ours")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    scores = [theirs(input_ids=torch.tensor([row])).logits.item() for row in ROWS]
    assert score_rows(made, ROWS, 8) == pytest.approx(scores, abs=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    read = load_reward_model(tmp_path / "theirs").eval()
    assert score_rows(read, ROWS, 8) == pytest.approx(score_rows(made, ROWS, 8), abs=1e-6)


def test_new_head_is_that_of_transformers_for_a_seed(tmp_path):
    small_model("llama").save_pretrained(tmp_path)
    torch.manual_seed(3)
    made = new_reward_model(tmp_path)
    torch.manual_seed(3)
    theirs = LlamaForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    assert torch.equal(made.score.weight, theirs.score.weight)


def test_gpt2_reads_rows_that_end_with_its_padding(tmp_path):
    """Token 0 pads GPT-2's rows and is "!" in its texts."""
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 20}
    config = GPT2Config(**sizes, num_labels=1, pad_token_id=0, eos_token_id=19)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    model = load_reward_model(tmp_path).eval()
    late = [[7], [7, 0], [7, 0, 0, 0, 0, 0]]
    scores = score_rows(model, late, 8)
    assert scores == pytest.approx(right_scores(model, late), abs=1e-6)
    assert len({round(score, 4) for score in scores}) == 3


ENCODERS = {
    "deberta": DebertaV2Config(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, relative_attention=True, position_buckets=4, num_labels=1,
        pad_token_id=0, initializer_range=0.5, pos_att_type=["p2c", "c2p"],
    ),
    "roberta": RobertaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=40, num_labels=1, initializer_range=0.5,
    ),
    "xlnet": XLNetConfig(  # reads its last column, which padding on the right would take
        vocab_size=40, d_model=16, n_layer=2, n_head=2, d_inner=16, num_labels=1,
        initializer_range=0.5, pad_token_id=0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("padding", [None, -1, 0, 7])
def test_scores_do_not_depend_on_the_padding_token(models, padding):
    """Some configurations have -1 for no padding."""
    model = new_reward_model(models / "base").eval()
    expected = right_scores(model)
    model.config.pad_token_id = padding
    assert score_rows(model, ROWS, 6) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ENCODERS)
def test_classifier_of_another_kind_reads_in_its_own_way(kind, tmp_path):
    """Also of a family that has a causal model; its scores are those of every row by itself."""
    torch.manual_seed(0)
    given = AutoModelForSequenceClassification.from_config(ENCODERS[kind]).eval()
    given.save_pretrained(tmp_path)
    model = load_reward_model(tmp_path).eval()
    assert type(model) is type(given)
    with torch.no_grad():
        right = [
            given(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item()
            for ids in (torch.tensor([row]) for row in ROWS)
        ]
    assert score_rows(model, ROWS, 8, sparse=True) == pytest.approx(right, abs=1e-5)
    assert len({round(score, 5) for score in right}) == len(ROWS)


@pytest.mark.parametrize("kind", ENCODERS)
def test_no_critic_starts_from_an_encoder(kind, models, tmp_path):
    AutoModelForSequenceClassification.from_config(ENCODERS[kind]).save_pretrained(tmp_path)
    assert not has_linear_score(tmp_path)
    assert has_linear_score(models / "reward")


def test_encoder_reads_as_much_as_its_tokenizer_says(models):
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 38
    encoder = AutoModelForSequenceClassification.from_config(ENCODERS["roberta"])
    assert longest_row(encoder, tokenizer) == 38
    assert longest_row(load_reward_model(models / "reward"), tokenizer) == 64


def test_model_trained_with_its_end_as_padding_is_read_before_the_end(models):
    """transformers read the token before the end in its training, so nothing was learned there."""
    model, tokenizer = load_reward_model(models / "reward"), make_tokenizer()
    rows = [[5, 6, END], [5, 6, END, END], [5, 6], [END]]
    assert without_unread_end(model, tokenizer, rows) == rows
    model.config.pad_token_id = END
    assert without_unread_end(model, tokenizer, rows) == [[5, 6], [5, 6], [5, 6], [END]]


@pytest.mark.parametrize("architecture", ["llama", "granite"])
def test_causal_model_without_a_trained_head_is_no_reward_model(architecture, tmp_path):
    small_model(architecture).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"score\.weight is missing"):
        load_reward_model(tmp_path)


def test_family_without_a_reward_model_is_refused_before_anything_starts(tmp_path):
    T5Config(num_layers=1).save_pretrained(tmp_path)
    model = [f"models=[{{name: m, path: {tmp_path}}}]", "base=null"]
    with pytest.raises(InputError, match=r"models\.0\.path: no causal .* t5"):
        check_training(load_recipe("quickstart", model))
    small_config("granite").save_pretrained(tmp_path)
    check_training(load_recipe("quickstart", model))


@pytest.mark.parametrize("kind", ["adapter", "cached hub model", "code", "GGUF"])
def test_given_models_of_every_kind_are_checked_before_anything_starts(kind, tmp_path, monkeypatch):
    folder, given, key = tmp_path / "base", str(tmp_path / "base"), r"models\.0\.path: "
    T5Config(num_layers=1).save_pretrained(folder)
    if kind == "adapter":
        LoraConfig(base_model_name_or_path=given).save_pretrained(tmp_path / "adapter")
        given = str(tmp_path / "adapter")
    elif kind == "cached hub model":
        given = "someone/encoder-decoder"
        cached = tmp_path / "hub" / "models--someone--encoder-decoder"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("0" * 40)
        shutil.copytree(folder, cached / "snapshots" / ("0" * 40))
        monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    elif kind == "code":
        config = {"model_type": "made_up", "auto_map": {"AutoConfig": "made_up.Config"}}
        (folder / "config.json").write_text(json.dumps(config))
    else:
        given, key = str(folder / "model.gguf"), "none"
        Path(given).write_bytes(b"GGUF")
    recipe = load_recipe("quickstart", [f"models=[{{name: m, path: {given}}}]", "base=null"])
    if kind == "GGUF":
        check_training(recipe)  # its configuration is in the file
        return
    with pytest.raises(InputError, match=key) as error:
        check_training(recipe)
    assert "\n" not in str(error.value)
