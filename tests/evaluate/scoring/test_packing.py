"""Tries: every path is there once, packs keep their budget, and each way gives plain scores."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    MambaConfig,
    MistralConfig,
    MptConfig,
)

from selfcorrect.evaluate.prompts.tokenized import Continuation
from selfcorrect.evaluate.scoring.forwards import _families, _paths, ancestors
from selfcorrect.evaluate.scoring.packed import Scorer
from selfcorrect.evaluate.scoring.token_trie import Pack, Packing, Prepared, pack
from tests.evaluate.scoring.test_scoring import REQUESTS, plain_log_probability
from tests.support.tiny_models import ARCHITECTURES, tiny_model, tiny_tokenizer

torch.set_num_threads(1)


def random_requests(seed: int, number: int = 40) -> list[list[Continuation]]:
    """Rows over three tokens, so that prefixes are shared at every depth, and some rows twice."""
    chance = random.Random(seed)
    asked = []
    for _ in range(number):
        prompt = [chance.randrange(3) for _ in range(chance.randrange(1, 9))]
        options = [
            prompt + [chance.randrange(3) for _ in range(chance.randrange(1, 4))] for _ in range(3)
        ]
        asked.append([Continuation(tuple(option), len(prompt)) for option in options])
    return asked


def path(one: Pack, node: int) -> list[int]:
    """The tokens from the root to a node, by the rule on subtrees alone."""
    return [int(t) for u, t in enumerate(one.tokens) if u <= node <= one.ends[u]]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("pack_tokens", [1, 12, 40, 10_000])
def test_every_wanted_value_hangs_on_its_own_prefix(seed, pack_tokens):
    asked = random_requests(seed)
    packing = pack(asked, pack_tokens)
    found: dict[int, list[tuple[list[int], int]]] = {}
    for one in packing.packs:
        for node in range(len(one)):
            assert len(path(one, node)) == one.depths[node] + 1
        prefixes = {tuple(path(one, node)) for node in range(len(one))}
        assert len(prefixes) == len(one)  # no prefix stands twice in a pack
        for node, token, option in zip(
            one.wanted_nodes, one.wanted_tokens, one.wanted_options, strict=True
        ):
            found.setdefault(int(option), []).append((path(one, int(node)), int(token)))
    options = [option for request in asked for option in request]
    for index, option in enumerate(options):
        expected = [
            (list(option.tokens[:at]), option.tokens[at])
            for at in range(option.start, len(option.tokens))
        ]
        assert sorted(found[index]) == sorted(expected)
    assert packing.num_options == [3] * len(asked)
    assert packing.lengths == [max(len(o.tokens) - 1 for o in request) for request in asked]


@pytest.mark.parametrize("pack_tokens", [12, 40, 200])
def test_packs_keep_their_budget_unless_one_row_is_longer(pack_tokens):
    packing = pack(random_requests(3, 200), pack_tokens)
    assert len(packing.packs) > 1
    for one in packing.packs:
        assert len(one) <= max(pack_tokens, int(one.depths.max()) + 1)
    # What is cut apart is little: each cut repeats one shared prefix at most.
    whole = len(pack(random_requests(3, 200), 10_000).packs[0])
    repeated = sum(len(one) for one in packing.packs) - whole
    assert repeated <= 12 * (len(packing.packs) - 1)


def test_the_mask_lets_a_node_see_itsancestors_and_itself_alone():
    [one] = pack(random_requests(1), 10_000).packs
    mask = ancestors(torch.from_numpy(one.ends)[None], torch.float32)[0, 0]
    for node in range(len(one)):
        seen = np.flatnonzero(mask[node].numpy() == 0).tolist()
        assert [int(one.tokens[u]) for u in seen] == path(one, node) and seen[-1] == node
    assert set(mask.unique().tolist()) == {0.0, torch.finfo(torch.float32).min}


def test_paths_and_families_cover_every_leaf_once():
    [one] = pack(random_requests(2), 10_000).packs
    paths = _paths(one)
    leaves = [int(row[-1]) for row in paths]
    assert leaves == [node for node in range(len(one)) if one.ends[node] == node]
    for row in paths:
        assert one.tokens[row].tolist() == path(one, int(row[-1]))
    families = _families(one)
    assert [int(row[-1]) for family in families for row in family.rows] == leaves
    for family in families:
        for row in family.rows:
            assert row[: len(family.prefix)].tolist() == family.prefix.tolist()
    assert any(len(family.rows) > 1 for family in families)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("way", ["packed", "prefixed", "plain"])
def test_every_way_gives_the_scores_of_one_plain_forward_each(architecture, way, caplog):
    model, tokenizer = tiny_model(architecture), tiny_tokenizer()
    for pack_tokens, batch_tokens in [(512, 4096), (16, 40)]:
        scorer = Scorer(model, tokenizer, pack_tokens=pack_tokens, batch_tokens=batch_tokens)
        scorer.score(REQUESTS[:1])
        assert scorer._way == scorer._forwards.packed and not caplog.records
        scorer._way = getattr(scorer._forwards, way)
        for (prompt, options), scores in zip(REQUESTS, scorer.score(REQUESTS), strict=True):
            plain = [plain_log_probability(model, tokenizer, prompt, o) for o in options]
            assert scores == pytest.approx(plain, abs=1e-5)


TOKENS = {"vocab_size": len(tiny_tokenizer()), "pad_token_id": 0, "eos_token_id": 2}
OTHERS = {
    "bloom": (BloomConfig(**TOKENS, hidden_size=32, n_layer=2, n_head=4), "prefixed"),
    "mpt": (MptConfig(**TOKENS, d_model=32, n_layers=2, n_heads=4), "prefixed"),
    "falcon with alibi": (
        FalconConfig(
            **TOKENS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True
        ),
        None,
    ),
    "mamba": (MambaConfig(**TOKENS, hidden_size=32, num_hidden_layers=2, state_size=4), None),
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_with_masks_of_their_own_fall_back_and_say_so(name, caplog):
    config, expected = OTHERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(8)
    tokenizer = tiny_tokenizer()
    scorer = Scorer(model, tokenizer)
    scores = scorer.score(REQUESTS)
    for (prompt, options), found in zip(REQUESTS, scores, strict=True):
        plain = [plain_log_probability(model, tokenizer, prompt, option) for option in options]
        assert found == pytest.approx(plain, abs=1e-4)
    assert scorer._way != scorer._forwards.packed
    if expected is not None:
        assert scorer._way == getattr(scorer._forwards, expected)
    [record] = [r for r in caplog.records if r.name.startswith("selfcorrect")]
    assert "cannot be scored in packs" in record.getMessage()


def test_beyond_a_sliding_window_rows_are_run_plainly():
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(**TOKENS, **shape, **heads, sliding_window=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(8)
    tokenizer = tiny_tokenizer()
    scorer = Scorer(model, tokenizer)
    short = [REQUESTS[i] for i in (0, 2, 5)]
    assert scorer.score(short) and scorer._way == scorer._forwards.packed
    for (prompt, options), found in zip(REQUESTS, scorer.score(REQUESTS), strict=True):
        plain = [plain_log_probability(model, tokenizer, prompt, option) for option in options]
        assert found == pytest.approx(plain, abs=1e-5)


def test_bfloat16_stays_near_float32_in_packs(caplog):
    """bfloat16 keeps 8 bits: within 5 % of each log-probability, 0.3 nats at the most here."""
    tokenizer = tiny_tokenizer()
    exact = Scorer(tiny_model(sharpness=2), tokenizer).score(REQUESTS)
    scorer = Scorer(tiny_model(sharpness=2).bfloat16(), tokenizer)
    rough = scorer.score(REQUESTS)
    assert scorer._way == scorer._forwards.packed
    assert not [r for r in caplog.records if r.name.startswith("selfcorrect")]
    for one, other in zip(exact, rough, strict=True):
        assert other == pytest.approx(one, rel=0.05)
        assert other == pytest.approx(one, abs=0.3)
    assert rough != exact
    scorer._way = scorer._forwards.plain  # rounding, not the way, is what sets them apart
    for one, other in zip(rough, scorer.score(REQUESTS), strict=True):
        assert other == pytest.approx(one, abs=0.3)


@pytest.mark.parametrize("way", ["packed", "plain"])
def test_a_lone_chain_is_not_taken_for_a_trie(way, monkeypatch):
    """A model that reads a trie from end to end is right about one row: found out all the same."""
    scorer = Scorer(tiny_model(), tiny_tokenizer())
    if way == "plain":
        seen = scorer._forwards.packed

        def from_end_to_end(packs):
            return seen([replace(one, ends=np.full_like(one.ends, len(one) - 1)) for one in packs])

        monkeypatch.setattr(scorer._forwards, "packed", from_end_to_end)
    scorer.score([("<s> the doctor told her that", (" he", " she"))])  # one row, one wanted node
    assert (scorer._way == scorer._forwards.packed) == (way == "packed")


def test_prepared_packs_serve_every_model_with_the_same_tokenizer():
    tokenizer, made = tiny_tokenizer(), []

    def requests():
        made.append(1)
        return REQUESTS

    prepared = Prepared()
    for architecture in ("llama", "gpt2"):
        model = tiny_model(architecture)
        kept = Scorer(model, tokenizer, prepared=prepared).score_kept("key", requests)
        assert kept == Scorer(model, tokenizer).score(REQUESTS)
    assert len(made) == 1
    other = tiny_tokenizer(["the", "doctor"])  # another vocabulary: other tokens
    Scorer(tiny_model(), other, prepared=prepared).score_kept("key", requests)
    Scorer(tiny_model(), tokenizer, prepared=prepared, pack_tokens=20).score_kept("key", requests)
    assert len(made) == 3


def test_the_padding_of_a_batch_changes_nothing():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    scorer = Scorer(model, tokenizer)
    packing = scorer.prepare(REQUESTS)
    alone = [scorer._forwards.packed([one]) for one in pack_apart(packing)]
    values = [next(iter(found))[1] for found in alone]
    together = dict(scorer._forwards.packed(pack_apart(packing)))
    for index, one in enumerate(values):
        assert together[index] == pytest.approx(one, abs=1e-5)


def pack_apart(packing: Packing) -> list[Pack]:
    """The packing's packs, and a small one beside them that has to be padded."""
    first = packing.packs[0]
    small = replace(
        first,
        tokens=first.tokens[:3],
        depths=np.arange(3, dtype=np.int32),
        ends=np.array([2, 2, 2], dtype=np.int32),
        wanted_nodes=np.array([2], dtype=np.int32),
        wanted_tokens=np.array([5], dtype=np.int32),
        wanted_options=np.array([0], dtype=np.int32),
    )
    return [*packing.packs, small]
