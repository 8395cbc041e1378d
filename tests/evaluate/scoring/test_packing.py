"""Tries: every path is there once, packs keep their budget, and each way gives plain scores."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from selfcorrect.evaluate.prompts.tokenized import Continuation
from selfcorrect.evaluate.scoring import trials
from selfcorrect.evaluate.scoring.forwards import _prefix_groups, paths
from selfcorrect.evaluate.scoring.packed import PackedEngine
from selfcorrect.evaluate.scoring.token_trie import Pack, Packing, PackingCache, pack
from selfcorrect.evaluate.scoring.tree_attention import (
    AttentionToEarlierNodes,
    tree_attention_mask,
)
from tests.support.scoring_cases import (
    REQUESTS,
    UNPACKABLE,
    plain_log_probability,
    random_model,
    sliding_window_model,
)
from tests.support.tiny_models import ARCHITECTURES, tiny_model, tiny_tokenizer

torch.set_num_threads(1)


def random_requests(seed: int, number: int = 40) -> list[list[Continuation]]:
    """Rows over three tokens, so that prefixes are shared at every depth, and some rows twice."""
    chance = random.Random(seed)
    requests = []
    for _ in range(number):
        prompt = [chance.randrange(3) for _ in range(chance.randrange(1, 9))]
        options = [
            prompt + [chance.randrange(3) for _ in range(chance.randrange(1, 4))] for _ in range(3)
        ]
        requests.append([Continuation(tuple(option), len(prompt)) for option in options])
    return requests


def used(engine: PackedEngine, requests) -> set[str]:
    """The names of the forwards that score the requests."""
    packs = engine.prepare(requests).packs
    return {way.name for way, _ in engine._ways.assign(packs)}


def path(tree: Pack, node: int) -> list[int]:
    """The tokens from the root to a node, by the rule on subtrees alone."""
    return [int(t) for u, t in enumerate(tree.tokens) if u <= node <= tree.ends[u]]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("pack_tokens", [1, 12, 40, 10_000])
def test_wanted_values_follow_their_own_prefix(seed, pack_tokens):
    requests = random_requests(seed)
    packing = pack(requests, pack_tokens)
    values: dict[int, list[tuple[list[int], int]]] = {}
    for tree in packing.packs:
        for node in range(len(tree)):
            assert len(path(tree, node)) == tree.depths[node] + 1
        prefixes = {tuple(path(tree, node)) for node in range(len(tree))}
        assert len(prefixes) == len(tree)  # no prefix is twice in a pack
        for node, token, option in zip(
            tree.wanted_nodes, tree.wanted_tokens, tree.wanted_options, strict=True
        ):
            values.setdefault(int(option), []).append((path(tree, int(node)), int(token)))
    options = [option for request in requests for option in request]
    for index, option in enumerate(options):
        expected = [
            (list(option.tokens[:at]), option.tokens[at])
            for at in range(option.start, len(option.tokens))
        ]
        assert sorted(values[index]) == sorted(expected)
    assert packing.num_options == [3] * len(requests)
    assert packing.lengths == [max(len(o.tokens) - 1 for o in request) for request in requests]


@pytest.mark.parametrize("pack_tokens", [12, 40, 200])
def test_packs_keep_their_budget_unless_one_row_is_longer(pack_tokens):
    packing = pack(random_requests(3, 200), pack_tokens)
    assert len(packing.packs) > 1
    for tree in packing.packs:
        assert len(tree) <= max(pack_tokens, int(tree.depths.max()) + 1)
    # What is cut apart is little: each cut repeats one shared prefix at most.
    num_nodes = len(pack(random_requests(3, 200), 10_000).packs[0])
    repeated = sum(len(tree) for tree in packing.packs) - num_nodes
    assert repeated <= 12 * (len(packing.packs) - 1)


def test_tree_mask_shows_a_node_its_ancestors_and_itself():
    [tree] = pack(random_requests(1), 10_000).packs
    mask = tree_attention_mask(torch.from_numpy(tree.ends)[None], torch.float32)[0, 0]
    for node in range(len(tree)):
        seen = np.flatnonzero(mask[node].numpy() == 0).tolist()
        assert [int(tree.tokens[u]) for u in seen] == path(tree, node) and seen[-1] == node
    assert set(mask.unique().tolist()) == {0.0, torch.finfo(torch.float32).min}


def test_attention_in_blocks_equals_attention_to_all_nodes():
    [tree] = pack(random_requests(1), 10_000).packs
    mask = tree_attention_mask(torch.from_numpy(tree.ends)[None], torch.float32)
    queries, keys, values = torch.randn(3, 2, 4, len(tree), 8)
    attention = torch.nn.functional.scaled_dot_product_attention
    expected = attention(queries, keys, values, attn_mask=mask)
    sizes = []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is attention:
                sizes.append((args[0].shape[-2], args[1].shape[-2]))
            return func(*args, **(kwargs or {}))

    assert len(tree) > 128
    with Spy(), AttentionToEarlierNodes():
        found = attention(queries, keys, values, attn_mask=mask)
    torch.testing.assert_close(found, expected)
    assert sizes[:2] == [(64, 64), (64, 128)]
    assert sizes[-1] == ((len(tree) - 1) % 64 + 1, len(tree))
    del sizes[:]
    with Spy(), AttentionToEarlierNodes():
        causal = attention(queries, keys, values, is_causal=True)
    assert sizes == [(len(tree), len(tree))]
    assert not torch.allclose(causal, expected)


def test_paths_and_prefix_groups_cover_every_leaf_once():
    [tree] = pack(random_requests(2), 10_000).packs
    rows = paths(tree)
    leaves = [int(row[-1]) for row in rows]
    assert leaves == [node for node in range(len(tree)) if tree.ends[node] == node]
    for row in rows:
        assert tree.tokens[row].tolist() == path(tree, int(row[-1]))
    groups = _prefix_groups(tree)
    assert [int(row[-1]) for group in groups for row in group.rows] == leaves
    for group in groups:
        for row in group.rows:
            assert row[: len(group.prefix)].tolist() == group.prefix.tolist()
    assert any(len(group.rows) > 1 for group in groups)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("forward", ["packed", "prefixed", "plain", "alone"])
def test_every_forward_gives_the_scores_of_single_plain_rows(architecture, forward):
    model, tokenizer = tiny_model(architecture), tiny_tokenizer()
    for pack_tokens, batch_tokens in [(512, 4096), (16, 40)]:
        engine = PackedEngine(model, tokenizer, pack_tokens=pack_tokens, batch_tokens=batch_tokens)
        for way in (engine._ways.packed, engine._ways.prefixed, engine._ways.plain):
            way.is_final = way.name != forward
        for (prompt, options), scores in zip(REQUESTS, engine.score(REQUESTS), strict=True):
            plain = [plain_log_probability(model, tokenizer, prompt, o) for o in options]
            assert scores == pytest.approx(plain, abs=1e-5)
        assert used(engine, REQUESTS) == {forward}


@pytest.mark.parametrize("name", UNPACKABLE)
def test_models_with_their_own_masks_fall_back_with_a_warning(name, caplog):
    config, expected = UNPACKABLE[name]
    model = random_model(config)
    tokenizer = tiny_tokenizer()
    engine = PackedEngine(model, tokenizer)
    for (prompt, options), scores in zip(REQUESTS, engine.score(REQUESTS), strict=True):
        plain = [plain_log_probability(model, tokenizer, prompt, option) for option in options]
        assert scores == pytest.approx(plain, abs=1e-4)
    assert used(engine, REQUESTS) == {expected}
    [record] = [r for r in caplog.records if r.name.startswith("selfcorrect")]
    assert "cannot be scored in packs" in record.getMessage()


def test_only_prompts_beyond_the_sliding_window_are_not_packed(caplog):
    model = sliding_window_model(8)
    tokenizer = tiny_tokenizer()
    engine = PackedEngine(model, tokenizer)
    for (prompt, options), scores in zip(REQUESTS, engine.score(REQUESTS), strict=True):
        plain = [plain_log_probability(model, tokenizer, prompt, option) for option in options]
        assert scores == pytest.approx(plain, abs=1e-5)
    short = [REQUESTS[i] for i in (0, 2, 5)]
    assert used(engine, short) == {"packed"} and used(engine, REQUESTS) == {"prefixed"}
    [record] = [r for r in caplog.records if r.name.startswith("selfcorrect")]
    assert "beyond 8 tokens" in record.getMessage()


def test_bfloat16_stays_near_float32_in_packs(caplog):
    """bfloat16 keeps 8 bits: within 5 % of each log-probability, 0.3 nats at the most here."""
    tokenizer = tiny_tokenizer()
    exact = PackedEngine(tiny_model(sharpness=2), tokenizer).score(REQUESTS)
    engine = PackedEngine(tiny_model(sharpness=2).bfloat16(), tokenizer)
    rough = engine.score(REQUESTS)
    assert used(engine, REQUESTS) == {"packed"}
    assert not [r for r in caplog.records if r.name.startswith("selfcorrect")]
    for exact_row, rough_row in zip(exact, rough, strict=True):
        assert rough_row == pytest.approx(exact_row, rel=0.05)
        assert rough_row == pytest.approx(exact_row, abs=0.3)
    assert rough != exact
    for way in (engine._ways.packed, engine._ways.prefixed, engine._ways.plain):
        engine._ways.give_up(way, ValueError())  # the difference is rounding, not the forward
    for rough_row, plain_row in zip(rough, engine.score(REQUESTS), strict=True):
        assert plain_row == pytest.approx(rough_row, abs=0.3)


@pytest.mark.parametrize("way", ["packed", "plain"])
def test_model_that_ignores_the_tree_mask_is_detected(way, monkeypatch):
    """It reads a trie from end to end, which is right for a single row."""
    engine = PackedEngine(tiny_model(), tiny_tokenizer())
    if way == "plain":
        run_tries = engine._forwards.run_tries

        def from_end_to_end(tries, *rest, **inputs):
            blind = [replace(tree, ends=np.full_like(tree.ends, len(tree) - 1)) for tree in tries]
            return run_tries(blind, *rest, **inputs)

        monkeypatch.setattr(engine._forwards, "run_tries", from_end_to_end)
    requests = [("<s> the doctor told her that", (" he", " she"))]  # one row, one wanted node
    engine.score(requests)
    assert ("packed" in used(engine, requests)) == (way == "packed")


def test_packing_cache_serves_every_model_with_the_same_tokenizer():
    tokenizer, made = tiny_tokenizer(), []

    def requests():
        made.append(1)
        return REQUESTS

    packings = PackingCache()
    for architecture in ("llama", "gpt2"):
        model = tiny_model(architecture)
        kept = PackedEngine(model, tokenizer, packings=packings).score_kept("key", requests)
        assert kept == PackedEngine(model, tokenizer).score(REQUESTS)
    assert len(made) == 1
    other = tiny_tokenizer(["the", "doctor"])  # another vocabulary: other tokens
    PackedEngine(tiny_model(), other, packings=packings).score_kept("key", requests)
    PackedEngine(tiny_model(), tokenizer, packings=packings, pack_tokens=20).score_kept(
        "key", requests
    )
    assert len(made) == 3


def test_newest_values_are_kept_within_a_bound(monkeypatch):
    monkeypatch.setattr("selfcorrect.evaluate.scoring.token_trie._RECENT_CHARACTERS", 8)
    cache, made = PackingCache(), []

    def values(*words: str) -> list[int]:
        def make(indices: list[int]) -> list[int]:
            made.extend(words[i] for i in indices)
            return [len(words[i]) for i in indices]

        return cache.recent([(word,) for word in words], make)

    assert values("abc", "d", "abc") == [3, 1, 3]
    assert values("d", "efgh", "abc") == [1, 4, 3]
    assert made == ["abc", "d", "abc", "efgh"]  # 8 characters: all are kept
    assert values("ij", "d") == [2, 1] and made[4:] == ["ij"]  # "efgh" was used longest ago
    assert values("abc", "efgh") == [3, 4] and made[5:] == ["efgh"]
    assert values("k" * 9) == [9] and values("k" * 9) == [9] and len(made) == 8  # too long to keep


def test_a_model_in_memory_is_tried_once(monkeypatch):
    model, tokenizer, packings = tiny_model(), tiny_tokenizer(), PackingCache()
    first = PackedEngine(model, tokenizer, packings=packings).score(REQUESTS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    expected = PackedEngine(model, tokenizer).score(REQUESTS)
    tried = []
    monkeypatch.setattr(trials.Ways, "_try", lambda *arguments: tried.append(arguments))
    later = PackedEngine(model, tokenizer, packings=packings)
    assert later.score(REQUESTS) == expected != first and not tried
    in_16_bits = PackedEngine(model.bfloat16(), tokenizer, packings=packings)
    assert not in_16_bits._ways.packed.within.row
    assert not PackedEngine(tiny_model(), tokenizer, packings=packings)._ways.packed.within.row


def test_batch_padding_changes_no_value():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    engine = PackedEngine(model, tokenizer)
    packing = engine.prepare(REQUESTS)
    alone = [engine._forwards.packed([tree]) for tree in pack_apart(packing)]
    values = [next(iter(result))[1] for result in alone]
    together = dict(engine._forwards.packed(pack_apart(packing)))
    for index, value in enumerate(values):
        assert together[index] == pytest.approx(value, abs=1e-5)


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
