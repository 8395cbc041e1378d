"""Base models: initialised as the recipe says, batched without loss, padded so that ends show."""

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.schema import Base, Model
from selfcorrect.recipes.society.documents import mixed_documents
from selfcorrect.recipes.society.settings import SocietySettings
from selfcorrect.recipes.society.tokenizer import make_tokenizer
from selfcorrect.recipes.society.world import make_world
from selfcorrect.train.stages.base import load_given_model
from selfcorrect.train.stages.corpus import CorpusTrainer, pack, scratch_model
from tests.support.tiny_models import tiny_model
from tests.support.tokenizer_forms import tokenizer_with

LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
WORLD = make_world(SocietySettings())
TOKENIZER = make_tokenizer(WORLD)


def test_pack_keeps_every_token_with_its_weight() -> None:
    base = Base(method="pretrain", batch_tokens=256)
    documents = list(mixed_documents(WORLD, 300))
    batches = list(pack(iter(documents), TOKENIZER, base, random.Random(0)))
    rows = {
        tuple(ids[: int((weights > 0).sum())].tolist()): weights[weights > 0].tolist()
        for batch in batches
        for ids, weights in zip(batch["input_ids"], batch["loss_weights"], strict=True)
    }
    wanted = {}
    for document in documents:
        parts = [(s.role, TOKENIZER(s.text)["input_ids"]) for s in document]
        ids = tuple(i for _, part in parts for i in part)
        wanted[ids] = [base.loss_weights[role] for role, part in parts for _ in part]
    assert rows == wanted
    assert all(batch["input_ids"].numel() <= 256 for batch in batches)


def test_corpus_loss_is_the_weighted_mean_of_token_losses() -> None:
    model = scratch_model(LLAMA, TOKENIZER, 0)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    weights = torch.tensor([[1.0, 4.0, 10.0, 10.0], [1.0, 10.0, 0.0, 0.0]])
    loss = CorpusTrainer.compute_loss(None, model, {"input_ids": ids, "loss_weights": weights})
    plain = 0.0
    for row, column, weight in ((0, 1, 4), (0, 2, 10), (0, 3, 10), (1, 1, 10)):
        logits = model(ids[row : row + 1, :column]).logits[0, -1]
        plain -= weight * logits.log_softmax(-1)[ids[row, column]].item()
    assert loss.item() == pytest.approx(plain / 34, abs=1e-5)


def test_scratch_model_depends_on_the_seed_only() -> None:
    first, again, other = (scratch_model(LLAMA, TOKENIZER, seed) for seed in (1, 1, 2))
    weights = [model.get_input_embeddings().weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 8}, "scratch: .* has no field hiden_size"),
        ({"model_type": "lama"}, "lama"),
        ({"num_attention_heads": 3}, "not a multiple of the number of attention heads"),
    ],
)
def test_wrong_scratch_configuration_is_one_line(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        scratch_model({**LLAMA, **change}, TOKENIZER, 0)
    assert "\n" not in str(caught.value)


def test_given_model_without_padding_is_saved_and_read_again(tmp_path) -> None:
    """Older files have the number -1 for a padding token that does not exist."""
    tokenizer = tokenizer_with("words", "end of turn")
    tokenizer.pad_token = None
    small_model = tiny_model(vocabulary=len(tokenizer))
    small_model.save_pretrained(tmp_path / "given")
    tokenizer.save_pretrained(tmp_path / "given")
    (tmp_path / "given" / "generation_config.json").unlink()
    config = json.loads((tmp_path / "given" / "config.json").read_text())
    (tmp_path / "given" / "config.json").write_text(json.dumps({**config, "pad_token_id": -1}))
    policy, padded = load_given_model(Model(name="m", path=str(tmp_path / "given")))
    policy.save_pretrained(tmp_path / "base")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert padded.pad_token == padded.eos_token
    assert read.config.pad_token_id == read.generation_config.pad_token_id == padded.pad_token_id
    end_of_turn = padded.convert_tokens_to_ids("<end_of_turn>")
    assert set(read.generation_config.eos_token_id) == {padded.eos_token_id, end_of_turn}
