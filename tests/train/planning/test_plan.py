"""What a recipe needs: shapes, memory, work, disk and time, against models, libraries and hands."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.load import check_recipe, load_recipe
from selfcorrect.recipes.schema import Model, Recipe
from selfcorrect.scripts.commands.__main__ import main
from selfcorrect.train.planning.devices import (
    CPU_CORE,
    GPUS,
    check_engine,
    does_not_fit,
    plan_model,
    remedy,
)
from selfcorrect.train.planning.feedback import FeedbackFacts, feedback_facts
from selfcorrect.train.planning.flops import forward_flops, stage_works
from selfcorrect.train.planning.known_models import KNOWN_MODELS
from selfcorrect.train.planning.memory import (
    Adapter,
    Batch,
    Engine,
    activations,
    at_the_peak,
    key_values,
    saved_in_layer,
    trained,
)
from selfcorrect.train.planning.model_shape import (
    DEFAULTS,
    GATED,
    MODEL_TYPES,
    model_shape,
    shape_of,
)
from selfcorrect.train.planning.settings import (
    LORA_RANK,
    LORA_TARGETS,
    PPO_DEFAULTS,
    TRAINER_DEFAULTS,
    Lengths,
    stage_footprints,
)
from tests.support import ROOT

LENGTHS = Lengths(100.0, 200, 30.0, 60)
FACTS = FeedbackFacts(1000, 1000, LENGTHS, "made up")
LLAMA = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 10}  # fmt: skip


def make(**ppo: Any) -> Recipe:
    """A recipe on a model of its own folder, with `ppo.trainer` keys."""
    lora = ppo.pop("lora", None)
    content = {
        "name": "made",
        "models": [{"name": "m", "path": "somewhere"}],
        "data": {"preferences": {"path": "none", "limit": 1000}},
        "reward": {"trainer": {"per_device_train_batch_size": 2}},
        "ppo": {"steps": 10, "checkpoints": [0, 10], "trainer": ppo, "lora": lora},
        "evaluate": {"attach": "off", "limit": 10},
    }
    return check_recipe(content, "made")


# ---- shapes --------------------------------------------------------------------------------------


def on_meta(fields: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    given = dict(fields)
    kind = given.pop("model_type")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given))


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_known_models_have_the_parameters_of_transformers(name: str) -> None:
    shape = shape_of(KNOWN_MODELS[name], name)
    model = on_meta(KNOWN_MODELS[name])
    assert sum(p.numel() for p in model.parameters()) == shape.parameters
    assert sum(p.numel() for p in model.base_model.parameters()) == shape.backbone


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_left_out_fields_are_those_of_transformers(kind: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind)
    for key, value in DEFAULTS[kind].items():
        assert getattr(config, key) == value, key
    shape = shape_of({"model_type": kind}, kind)
    assert sum(p.numel() for p in on_meta({"model_type": kind}).parameters()) == shape.parameters


def test_published_counts() -> None:
    """Parameters without embeddings as published (Pythia exactly, Qwen2.5 in billions)."""
    pythia = {"70m": 18_915_328, "160m": 85_056_000, "410m": 302_311_424, "1b": 805_736_448,
              "1.4b": 1_208_602_624, "2.8b": 2_517_652_480, "6.9b": 6_444_163_072,
              "12b": 11_327_027_200}  # fmt: skip
    qwen = {"0.5B": 0.36, "1.5B": 1.31, "3B": 2.77, "7B": 6.53, "32B": 31.0, "72B": 70.0}
    for size, number in pythia.items():
        shape = shape_of(KNOWN_MODELS[f"EleutherAI/pythia-{size}"], size)
        assert shape.parameters - 2 * shape.embedding == number
    for size, billions in qwen.items():
        shape = shape_of(KNOWN_MODELS[f"Qwen/Qwen2.5-{size}"], size)
        body = shape.parameters - shape.embedding * (1 if shape.tied else 2)
        assert body / 1e9 == pytest.approx(billions, rel=0.01)


def test_a_shape_by_hand() -> None:
    shape = shape_of(LLAMA, "llama")
    layer = 2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 24 + 2 * 8
    assert shape.layer == layer
    assert shape.backbone == 10 * 8 + 2 * layer + 8
    assert shape.parameters == shape.backbone + 10 * 8
    assert shape.adapter(4, {"q_proj", "down_proj"}) == 2 * 4 * ((8 + 8) + (24 + 8))


def test_a_shape_comes_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    given = Model(name="m", path=str(tmp_path))
    assert model_shape(given, "models.0") == shape_of(LLAMA, "llama")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./nowhere", r"models\.0\.path: no model folder \./nowhere"),
        ("{}", r"models\.0\.path: .*: no config\.json there"),
        ("{}/odd", "plan does not know the layers of a 'mamba' model; it knows llama"),
        ("{}/bad", "hidden_size is 'wide'; plan needs a whole number above 0"),
        ("{}/cut", "cannot be read"),
        ("some-owner/some-model", "can be had neither from the hub nor from its cache"),
    ],
)
def test_a_model_that_cannot_be_planned_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, text in (
        ("odd", json.dumps({"model_type": "mamba"})),
        ("bad", json.dumps({**LLAMA, "hidden_size": "wide"})),
        ("cut", "{"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        model_shape(Model(name="m", path=path.format(tmp_path)), "models.0")
    assert "\n" not in str(caught.value)


# ---- memory --------------------------------------------------------------------------------------

SMALL = {
    "gpt2": {"n_embd": 64, "n_inner": 160, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
             "attn_pdrop": 0.0, "vocab_size": 50},
    "gpt_neox": {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4,
                 "vocab_size": 50},
    **{kind: {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 50} for kind in GATED},
}  # fmt: skip


def kept_by_autograd(fields: dict[str, Any], layers: int, lora: list[str] | str | None) -> float:
    """Bytes that autograd keeps for the backward pass of a model's trunk, weights left out."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    given = {**fields, "n_layer": layers, "num_hidden_layers": layers}
    kind = given.pop("model_type")
    given.pop("num_hidden_layers" if kind == "gpt2" else "n_layer")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given)).base_model
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.0, target_modules=lora))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found, alive = {}, []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        alive.append(tensor)
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(input_ids=torch.ones(2, 48, dtype=torch.long), use_cache=False)
    return sum(found.values())


@pytest.mark.parametrize("lora", [None, "all-linear", "some"])
@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_activations_are_what_autograd_keeps(kind: str, lora: str | None) -> None:
    fields = {"model_type": kind, **SMALL[kind]}
    shape = shape_of(fields, kind)
    names: Any = lora
    if lora == "some":
        names = LORA_TARGETS.get(kind, ["q_proj", "v_proj"])
    targets = set(shape.matrices) if lora == "all-linear" else set(names or ())
    targets |= {name for name in shape.matrices if name.rpartition(".")[2] in targets}
    adapter = Adapter(4, frozenset(targets & set(shape.matrices))) if lora else None
    five, two = (kept_by_autograd(fields, layers, names) for layers in (5, 2))
    a_layer = (five - two) / 3 / (2 * 48) / 4
    assert sum(saved_in_layer(shape, adapter)) == pytest.approx(a_layer, rel=0.02)


def test_checkpointing_keeps_a_layers_input_and_one_layer() -> None:
    shape = shape_of({**LLAMA, "num_hidden_layers": 10}, "llama")
    engine = Engine(gpu=False)
    kept = activations(shape, None, Batch(1, 100, checkpointing=True), engine)
    norms, rest = saved_in_layer(shape, None)
    assert kept == 100 * 4 * (10 * 8 + norms + rest + 3 * 8)
    assert kept < activations(shape, None, Batch(1, 100), engine) / 3


def test_key_values_by_hand() -> None:
    shape = shape_of(LLAMA, "llama")  # one key-value head of 4, 2 layers, keys and values
    assert key_values(shape, 10, bf16=False) == 4 * 10 * 4 * 2 * 2


@pytest.mark.parametrize("processes", [2, 8])
@pytest.mark.parametrize("billions", [1.5, 72.7])
def test_zero_2_and_3_agree_with_deepspeeds_own_estimators(billions: float, processes: int) -> None:
    """Stage 2 to the byte; for stage 3 DeepSpeed counts 18 bytes, without the 16-bit gradients."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    parameters = int(billions * 1e9)
    two = estimate_zero2_model_states_mem_needs(parameters, processes, 1, cpu_offload=False)[1]
    three = estimate_zero3_model_states_mem_needs(
        parameters, 0, processes, 1, cpu_offload=False, cpu_offload_params=False
    )[1]
    ours = [sum(trained(parameters, parameters, Engine(processes, z), bf16=True)) for z in (2, 3)]
    assert ours[0] == pytest.approx(two, rel=1e-6)
    assert ours[1] == pytest.approx(three + 2 * parameters / processes, rel=1e-6)


def test_what_zero_divides() -> None:
    one, eight = Engine(1, 0), Engine(8, 0)
    assert trained(100, 100, one, bf16=False) == (400, 400, 800)
    assert trained(100, 100, one, bf16=True) == (600, 400, 800)  # autocast's copy
    assert trained(100, 100, eight, bf16=False) == (400, 800, 800)  # DDP's buckets
    assert trained(100, 100, Engine(8, 1), bf16=True) == (200, 250, 150)
    assert trained(100, 10, Engine(8, 3), bf16=True) == (25, 2.5 + 5, 15)


def test_gradients_take_the_place_of_activations_unless_they_wait() -> None:
    engine = Engine()
    assert at_the_peak(100, 70, Batch(1, 1), engine) == 30
    assert at_the_peak(100, 170, Batch(1, 1), engine) == 0
    assert at_the_peak(100, 70, Batch(1, 1, accumulates=True), engine) == 100
    assert at_the_peak(100, 70, Batch(1, 1), Engine(2, 0)) == 100


def need(recipe: Recipe, engine: Engine, stage: str = "ppo", kind: str = "1b") -> float:
    shape = shape_of(KNOWN_MODELS[f"EleutherAI/pythia-{kind}"], kind)
    every = stage_footprints(recipe, shape, LENGTHS, engine)
    return next(one.total for one in every if one.stage == stage)


def test_settings_change_the_need_in_the_right_direction() -> None:
    usual = need(make(), Engine())
    assert need(make(critic="shared"), Engine()) < usual
    assert need(make(beta=0.0), Engine()) < usual
    assert need(make(gradient_checkpointing=True), Engine()) < usual
    assert need(make(per_device_train_batch_size=2), Engine()) < usual
    assert need(make(lora={"r": 8}), Engine()) < usual / 2
    whole = make(ds3_gather_for_generation=True, steps_per_generation=1)
    apart = make(ds3_gather_for_generation=False, steps_per_generation=1)
    eight = Engine(8, 3)
    assert (
        need(apart, eight, kind="12b")
        <= need(whole, eight, kind="12b")
        < need(whole, Engine(), kind="12b")
    )


def test_rollouts_are_sampled_all_together() -> None:
    few, many = (make(steps_per_generation=n, per_device_train_batch_size=4) for n in (1, 64))
    shape = shape_of(KNOWN_MODELS["EleutherAI/pythia-1b"], "1b")
    every = stage_footprints(many, shape, LENGTHS, Engine())
    worst = next(one for one in every if one.stage == "ppo")
    assert worst.moment == "generating"
    assert worst.parts["KV cache"] == key_values(shape, 4 * 64 * (200 + 512), bf16=True)
    assert need(few, Engine()) < worst.total


def test_what_stands_for_missing_keys_is_what_the_libraries_take() -> None:
    import peft.utils.constants as constants
    from peft import LoraConfig
    from transformers import TrainingArguments
    from trl import RewardConfig, SFTConfig

    from selfcorrect.train.ppo.config import PPOConfig
    from selfcorrect.train.stages import base, corpus, reward

    def defaults(kind: type, ours: dict[str, Any]) -> dict[str, Any]:
        return {f.name: f.default for f in dataclasses.fields(kind)} | ours

    sft = defaults(SFTConfig, base.SFT_DEFAULTS)
    fit = defaults(RewardConfig, reward.DEFAULTS)
    ppo = defaults(PPOConfig, {})
    for key, value in TRAINER_DEFAULTS.items():
        if key == "bf16":  # None here: off in the first two stages, on a GPU in PPO
            assert (sft[key], fit[key], ppo[key]) == (False, False, None)
            continue
        for found in (sft, fit):
            assert found[key] == value or (key == "optim" and str(found[key].value) == value), key
    for key, value in PPO_DEFAULTS.items():
        if key not in ("num_train_epochs", "max_length", "optim"):
            assert ppo[key] == value, key
    plain = defaults(TrainingArguments, corpus.DEFAULTS)
    assert plain["per_device_train_batch_size"] == TRAINER_DEFAULTS["per_device_train_batch_size"]
    assert LoraConfig().r == LORA_RANK
    peft_targets = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    for kind, targets in LORA_TARGETS.items():
        assert peft_targets[kind] == targets


def test_what_other_files_decide_is_the_same_here() -> None:
    from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    from selfcorrect.evaluate.experiments.wording import load_stimuli
    from selfcorrect.evaluate.scoring import forwards, packed
    from selfcorrect.train.planning import flops, memory, stage_memory
    from selfcorrect.train.ppo import forward

    assert (memory.TILE_TOKENS, memory.TILE_WORDS) == (
        TOKEN_CHUNK_SIZE,
        _CHUNKED_LOGPROB_CHUNK_SIZE,
    )
    assert memory.LEAST_ROWS_A_PASS == forward.MIN_ROWS_A_PASS
    assert memory.LEAST_FLOPS_A_PASS == forward.MIN_FLOPS_A_PASS
    assert stage_memory.PACK_TOKENS == packed.PACK_TOKENS
    for name, (scored, written) in flops.PAPER_CONDITIONS.items():
        section = load_stimuli().section(name)
        texts = [section.num_samples(condition) for condition in section.conditions]
        assert (texts.count(0), sum(texts)) == (scored, written)
    assert stage_memory.LARGEST_LOGITS == forwards.LARGEST_LOGITS


# ---- work, time and disk -------------------------------------------------------------------------


def test_flops_by_hand() -> None:
    shape = shape_of(LLAMA, "llama")
    weights = 2 * (2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 24)
    attention = 2 * 4 * 8 * 5  # 2 layers, 4 x queries, 5 earlier tokens on average
    assert forward_flops(shape, 10, 3) == 10 * (2 * weights + attention) + 2 * 3 * 80


def test_ppo_work_by_hand() -> None:
    shape = shape_of(LLAMA, "llama")
    recipe = make(
        per_device_train_batch_size=4, steps_per_generation=2, num_iterations=3,
        max_completion_length=20, critic="shared",
    )  # fmt: skip
    work = {w.stage: w for w in stage_works(recipe, shape, FACTS, Engine())}["ppo"]
    rows = 10 * 8
    assert work.tokens == rows * 120
    assert work.sampled == rows * 20
    trunk, scored = forward_flops(shape, 120), forward_flops(shape, 120, 20)
    # sampling, old policy, reference, reward model, and three epochs of forward and backward
    assert work.flops == pytest.approx(rows * (3 * scored + trunk + 3 * 3 * scored))


def test_evaluation_work_follows_what_is_asked() -> None:
    shape = shape_of(LLAMA, "llama")
    recipe = make()

    def tokens(**changes: Any) -> float:
        asked = recipe.evaluate.model_copy(update=changes)
        other = recipe.model_copy(update={"evaluate": asked})
        return stage_works(other, shape, FACTS, Engine())[-1].tokens

    assert tokens(limit=20) == pytest.approx(2 * tokens(limit=10))
    assert tokens(conditions=["Q"], experiments=["bbq"]) == pytest.approx(2 * 10 * 45.6)
    both = tokens(conditions=["Q", "Q+IF+CoT"], experiments=["bbq"])
    assert both == pytest.approx(2 * 10 * (45.6 + 172 + 256))


def test_hours_are_flops_over_the_share_of_the_peak() -> None:
    shape = shape_of(KNOWN_MODELS["EleutherAI/pythia-12b"], "12b")
    plan = plan_model(make(), "m", shape, FACTS, Engine())
    work = next(w for w in plan.works if w.stage == "reward")
    assert plan.hours(GPUS["a100"], 0.5)["reward"] == pytest.approx(
        work.flops / (312e12 * 0.5) / 3600
    )
    assert plan.hours(GPUS["a100"], 0.25)["ppo"] > plan.hours(GPUS["h100"], 0.25)["ppo"]


def test_a_tiny_model_on_a_large_device_waits_for_python() -> None:
    shape = shape_of(LLAMA, "llama")
    plan = plan_model(make(), "m", shape, FACTS, Engine())
    for stage in ("reward", "ppo"):
        assert plan.hours(GPUS["h100"], 1.0)[stage] == plan.hours(GPUS["a100"], 1.0)[stage] > 0


def test_disk_by_hand() -> None:
    shape = shape_of(LLAMA, "llama")
    plan = plan_model(make(), "m", shape, FACTS, Engine())
    assert plan.disk.kept == 4 * (shape.parameters * (1 + 2) + shape.backbone)
    lora = plan_model(make(lora={"r": 2}), "m", shape, FACTS, Engine())
    assert lora.disk.checkpoints == 4 * 2 * shape.adapter(2, {"q_proj", "v_proj"})


# ---- what does not fit ---------------------------------------------------------------------------


def test_what_does_not_fit_comes_with_settings_under_which_it_does() -> None:
    shape = shape_of(KNOWN_MODELS["EleutherAI/pythia-2.8b"], "2.8b")
    recipe = make(per_device_train_batch_size=8)
    plan = plan_model(recipe, "m", shape, FACTS, Engine())
    assert [stage.stage for stage in does_not_fit(plan, GPUS["h100"])] == ["ppo"]
    words = remedy(recipe, plan, FACTS, GPUS["h100"])
    assert words is not None and "--zero 3 --processes" in words
    *settings, _, _, _, processes = words.split()
    changed = load_recipe_from(recipe, settings)
    other = plan_model(changed, "m", shape, FACTS, Engine(int(processes), 3))
    assert not does_not_fit(other, GPUS["h100"])


def load_recipe_from(recipe: Recipe, overrides: list[str]) -> Recipe:
    from selfcorrect.recipes.load import apply_override

    content = recipe.model_dump(mode="json")
    for override in overrides:
        apply_override(content, override)
    return check_recipe(content, "changed")


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (Engine(0), "there must be at least 1"),
        (Engine(2, 4), "stages 1, 2 and 3"),
        (Engine(1, 2), "give --processes 2 or more"),
    ],
)
def test_an_engine_that_cannot_be_is_one_line(engine: Engine, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_engine(make(), engine)


def test_zero_3_cannot_measure_inline() -> None:
    recipe = load_recipe("quickstart")
    with pytest.raises(InputError, match=r"evaluate\.attach=off"):
        check_engine(recipe, Engine(2, 3))


# ---- feedback ------------------------------------------------------------------------------------


def test_the_societys_lengths_are_those_of_its_tokens() -> None:
    from selfcorrect.recipes.society.tokenizer import make_tokenizer
    from selfcorrect.recipes.society.world import make_world
    from selfcorrect.train.feedback.feedback import load_feedback, pair_ids, render_prompt

    recipe = load_recipe("quickstart", ["data.society.pairs=300", "data.society.prompts=300"])
    facts = feedback_facts(recipe.data)
    assert recipe.data.society is not None
    tokenizer = make_tokenizer(make_world(recipe.data.society))
    assert facts.words == len(tokenizer)
    feedback = load_feedback(recipe.data, 0)
    prompts = [
        len(tokenizer(render_prompt(tokenizer, p.prompt))["input_ids"])
        for p in feedback.preferences
    ]
    pairs = [len(pair_ids(tokenizer, p)["chosen_ids"]) for p in feedback.preferences]
    assert facts.lengths.prompt == pytest.approx(sum(prompts) / 300, rel=0.05)
    whole = facts.lengths.prompt + facts.lengths.answer
    assert whole == pytest.approx(sum(pairs) / 300, rel=0.05)


def test_local_pairs_are_counted_and_their_letters_too(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"chosen": "\n\nHuman: " + "a" * 72 + "b" * 9, "rejected": "\n\nHuman: " + "a" * 72}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 5))
    recipe = make()
    data = load_recipe_from(recipe, [f"data.preferences.path={path}"]).data
    facts = feedback_facts(data)
    assert (facts.pairs, facts.prompts) == (5, 5)
    assert facts.lengths == Lengths(81 / 4.5, 18, 2.0, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read as JSON lines"), ("[]", "line 1: a row is an object"), ("", "no rows")],
)
def test_broken_pairs_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        feedback_facts(load_recipe_from(make(), [f"data.preferences.path={path}"]).data)


def test_rows_that_cannot_be_counted_are_said() -> None:
    data = load_recipe_from(make(), ["data.preferences.limit=null"]).data
    with pytest.raises(InputError, match=r"set data\.preferences\.limit"):
        feedback_facts(data)


# ---- the command ---------------------------------------------------------------------------------


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["selfcorrect", "plan", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_command_says_what_a_recipe_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "quickstart", "--device", "cpu", "--price-per-hour", "2") == 0
    shown = capsys.readouterr().out
    for words in ("width-64", "reward: learning", "all (h200)", "price", "more while training"):
        assert words in shown
    assert call(monkeypatch, "pythia-full", "ppo.trainer.per_device_train_batch_size=64") == 0
    shown = capsys.readouterr().out
    assert "pythia-1b: ppo needs" in shown and "pythia-1b: fits with ppo.trainer." in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quickstart", "--device", "tpu"], "--device tpu: there are a100, h100, h200 and cpu"),
        (["quickstart", "--utilisation", "0"], "--utilisation"),
        (["quickstart", "--price-per-hour", "nan"], "--price-per-hour"),
        (["quickstart", "--zero", "2"], "give --processes 2 or more"),
        (["quickstart", "--zero", "7", "--processes", "2"], "--zero 7"),
        (["quickstart", "--zero", "3", "--processes", "2"], "evaluate.attach=off"),
        (["pythia-full", "models.0.path=./none"], "models.0.path: no model folder ./none"),
        (["pythia-full", "data.preferences.limit=null"], "set data.preferences.limit"),
        (["pythia-full", "ppo.trainer.optim=adafactor"], "ppo.trainer.optim"),
        (["pythia-lora", "ppo.lora.target_modules=[nothing]"], "ppo.lora.target_modules"),
        (["pythia-full", "ppo.trainer.critic=lora"], "ppo.trainer.critic"),
        (["pythia-full", "ppo.trainer.generation_batch_size=12"], "no multiple of"),
    ],
)
def test_bad_input_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert call(monkeypatch, *arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1


def test_planning_needs_no_torch() -> None:
    import subprocess

    code = (
        "import sys; sys.argv = ['selfcorrect', 'plan', 'pythia-full']\n"
        "from selfcorrect.scripts.commands.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_reference_core_is_the_one_that_is_documented() -> None:
    page = ROOT / "docs/results/ppo-speed.md"
    assert f"{CPU_CORE.flops / 1e9:.0f} GFLOP/s" in page.read_text(encoding="utf-8")
