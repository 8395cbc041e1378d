"""Work, hours, disk and remedies of an estimate, by hand; and the feedback's facts."""

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.load import load_recipe, shipped_recipes, shipped_series
from selfcorrect.train.planning import devices
from selfcorrect.train.planning.devices import CPU_CORE, GPUS, device_named
from selfcorrect.train.planning.estimate import (
    check_parallelism,
    estimate_ladder,
    estimate_model,
    oversized_stages,
    suggest_settings,
)
from selfcorrect.train.planning.feedback import feedback_facts
from selfcorrect.train.planning.flops import FINAL_TOKENS, forward_flops, stage_work
from selfcorrect.train.planning.known_models import KNOWN_MODELS
from selfcorrect.train.planning.memory import Parallelism
from selfcorrect.train.planning.model_shape import Adapter, shape_of
from selfcorrect.train.planning.settings import Lengths
from tests.support import ROOT
from tests.support.estimates import FACTS, LLAMA, overridden, recipe_with

RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
SHAPE = shape_of(LLAMA, "llama")
FORWARD = forward_flops(SHAPE, 120)  # of a prompt and a completion of 20 tokens
SCORED = forward_flops(SHAPE, 120, 20)


@pytest.mark.parametrize("path", shipped_recipes(), ids=lambda path: path.stem)
def test_every_shipped_recipe_has_an_estimate(path: Path) -> None:
    recipe = load_recipe(str(path), ["data.preferences.limit=100"] * _has_pairs(path))
    if path.stem == "real-ladder":  # its models are files that users fetch
        names = ["HuggingFaceTB/SmolLM2-135M", "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B"]
        changes = [f"models.{i}={{name: m{i}, path: {name}}}" for i, name in enumerate(names)]
        recipe = load_recipe(str(path), changes)
    parallelism = Parallelism(gpu=False)
    for model in estimate_ladder(recipe, feedback_facts(recipe.data), parallelism):
        stages = [stage.stage for stage in model.footprints]
        assert "policy" in stages and all(stage.total > 0 for stage in model.footprints)
        assert [work.stage for work in model.work][-2:] == ["policy", "evaluation"]
        assert all(hours > 0 for hours in model.hours(CPU_CORE, 0.3).values())
        assert model.disk.kept > 0


def _has_pairs(path: Path) -> bool:
    return load_recipe(str(path)).data.preferences is not None


def test_shipped_recipes_are_all_yaml_files_but_the_stimuli() -> None:
    shipped = {*shipped_recipes(), *shipped_series()}
    assert set(RECIPES) - shipped == {ROOT / "recipes/society/stimuli.yaml"}


# ---- work ----------------------------------------------------------------------------------------


def test_forward_flops_by_hand() -> None:
    weights = 2 * (2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 24)
    attention = 2 * 4 * 8 * 5  # 2 layers, 4 x queries, 5 earlier tokens on average
    assert forward_flops(SHAPE, 10, 3) == 10 * (2 * weights + attention) + 2 * 3 * 80


@pytest.mark.parametrize(
    ("method", "critic", "per_row"),
    [
        # sampling, old policy, reference, reward model, and three epochs of forward and backward
        ("ppo", "shared", 3 * SCORED + FORWARD + 3 * 3 * SCORED),
        ("ppo", "separate", 3 * SCORED + 2 * FORWARD + 3 * 3 * (SCORED + FORWARD)),
        ("grpo", "separate", 3 * SCORED + FORWARD + 3 * 3 * SCORED),
    ],
)
def test_rollout_work_by_hand(method: str, critic: str, per_row: float) -> None:
    recipe = recipe_with(
        method, per_device_train_batch_size=4, steps_per_generation=2, num_iterations=3,
        max_completion_length=20, critic=critic,
    )  # fmt: skip
    work = {work.stage: work for work in stage_work(recipe, SHAPE, FACTS, Parallelism())}["policy"]
    rows = 10 * 8
    assert work.tokens == rows * 120
    assert work.sampled == rows * 20
    assert work.flops == pytest.approx(rows * per_row)


def test_grpo_with_one_update_per_step_skips_the_old_policy() -> None:
    settings = {"num_iterations": 1, "steps_per_generation": 1, "max_completion_length": 20}
    work = stage_work(recipe_with("grpo", **settings), SHAPE, FACTS, Parallelism())[-2]
    assert work.flops == pytest.approx(10 * 8 * (2 * SCORED + FORWARD + 3 * SCORED))


def test_fine_tuning_work_by_hand() -> None:
    """As many updates of as many rows as PPO makes, each row read once."""
    recipe = recipe_with(
        "sft", per_device_train_batch_size=4, steps_per_generation=4, num_iterations=3,
        gradient_accumulation_steps=2, gradient_checkpointing=True,
    )  # fmt: skip
    work = stage_work(recipe, SHAPE, FACTS, Parallelism())[-2]
    rows = 10 * 3 * 2 * 8  # steps, epochs, minibatches, rows per update
    assert (work.tokens, work.passes, work.sampled) == (rows * 130, rows / 4, 0)
    assert work.flops == pytest.approx(rows * 4 * forward_flops(SHAPE, 130, 30))
    # DPO reads both answers of a pair, and so does its reference.
    recipe = recipe.model_copy(
        update={"policy": recipe.policy.model_copy(update={"method": "dpo"})}
    )
    work = stage_work(recipe, SHAPE, FACTS, Parallelism())[-2]
    assert (work.tokens, work.passes, work.sampled) == (2 * rows * 130, 2 * rows / 4, 0)
    assert work.flops == pytest.approx(2 * rows * (4 + 1) * forward_flops(SHAPE, 130, 30))


def test_evaluation_work_follows_the_recipe() -> None:
    recipe = recipe_with()

    def tokens(**changes: Any) -> float:
        evaluate = recipe.evaluate.model_copy(update=changes)
        changed = recipe.model_copy(update={"evaluate": evaluate})
        return stage_work(changed, SHAPE, FACTS, Parallelism())[-1].tokens

    assert tokens(limit=20) == pytest.approx(2 * tokens(limit=10))
    assert tokens(conditions=["Q"], experiments=["bbq"]) == pytest.approx(2 * 10 * 45.6)
    reasoning = tokens(conditions=["Q", "Q+IF+CoT"], experiments=["bbq"])
    # The final question continues from the text, which is not read again.
    assert reasoning == pytest.approx(2 * 10 * (45.6 + 172 + 256 + FINAL_TOKENS))


def test_a_sampled_text_is_computed_once() -> None:
    """Its forward passes, and the final question's after them; twice would be 1.9 times as much."""
    evaluate = recipe_with().evaluate.model_copy(
        update={"conditions": ["Q+IF+CoT"], "experiments": ["bbq"]}
    )
    recipe = recipe_with().model_copy(update={"evaluate": evaluate})
    work = stage_work(recipe, SHAPE, FACTS, Parallelism())[-1]
    sampled = 2 * 10 * forward_flops(SHAPE, 172 + 256, 256)
    assert work.sampling_flops == pytest.approx(sampled)
    assert sampled < work.flops < 1.15 * sampled


def test_a_cpu_is_as_fast_as_the_threads_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product that is timed runs on `launch.threads` threads."""
    limits: list[int | None] = []

    def limit(threads: int | None) -> AbstractContextManager[None]:
        limits.append(threads)
        return nullcontext()

    monkeypatch.setattr(devices, "threadpool_limits", limit)
    assert device_named("cpu", threads=3).flops > 0 and not device_named("cpu").gpu
    assert limits == [3, None]


# ---- hours and disk ------------------------------------------------------------------------------


def test_hours_are_flops_over_the_reached_peak() -> None:
    shape = shape_of(KNOWN_MODELS["EleutherAI/pythia-12b"], "12b")
    estimate = estimate_model(recipe_with(), "m", shape, FACTS, Parallelism())
    work = next(work for work in estimate.work if work.stage == "reward")
    hours = estimate.hours(GPUS["a100"], 0.5)
    assert hours["reward"] == pytest.approx(work.flops / (312e12 * 0.5) / 3600)
    slow, fast = (estimate.hours(GPUS[name], 0.25) for name in ("a100", "h100"))
    assert slow["policy"] > fast["policy"]


@pytest.mark.parametrize("method", ["ppo", "grpo", "sft", "dpo"])
def test_a_tiny_model_on_a_fast_device_waits_for_python(method: str) -> None:
    estimate = estimate_model(recipe_with(method), "m", SHAPE, FACTS, Parallelism())
    a100, h100 = (estimate.hours(GPUS[name], 1.0) for name in ("a100", "h100"))
    for stage in ("reward", "policy"):
        assert h100[stage] == a100[stage] > 0


def test_disk_by_hand() -> None:
    disk = {
        method: estimate_model(recipe_with(method), "m", SHAPE, FACTS, Parallelism()).disk
        for method in ("ppo", "grpo", "sft", "dpo")
    }
    for use in disk.values():
        assert use.kept == 4 * (SHAPE.parameters * (1 + 2) + SHAPE.backbone)
    assert disk["ppo"].working == 2 * 12 * (SHAPE.parameters + SHAPE.backbone)
    for method in ("grpo", "sft", "dpo"):
        assert disk[method].working == 2 * 12 * SHAPE.parameters
    lora = estimate_model(recipe_with(lora={"r": 2}), "m", SHAPE, FACTS, Parallelism())
    adapter = Adapter(2, frozenset({"q_proj", "v_proj"}))
    assert lora.disk.checkpoints == 4 * 2 * SHAPE.trainable(adapter)


def test_reference_core_is_documented() -> None:
    page = (ROOT / "docs/results/ppo-speed.md").read_text(encoding="utf-8")
    assert f"{CPU_CORE.flops / 1e9:.0f} GFLOP/s" in page


# ---- remedies ------------------------------------------------------------------------------------


def test_suggested_settings_fit() -> None:
    shape = shape_of(KNOWN_MODELS["EleutherAI/pythia-2.8b"], "2.8b")
    recipe = recipe_with(per_device_train_batch_size=8)
    estimate = estimate_model(recipe, "m", shape, FACTS, Parallelism())
    assert [stage.stage for stage in oversized_stages(estimate, GPUS["h100"])] == ["policy"]
    words = suggest_settings(recipe, estimate, FACTS, GPUS["h100"])
    assert words is not None and "--zero 3 --processes" in words
    *settings, _, _, _, processes = words.split()
    changed = overridden(recipe, settings)
    fitting = estimate_model(changed, "m", shape, FACTS, Parallelism(int(processes), 3))
    assert not oversized_stages(fitting, GPUS["h100"])


def test_grpo_gets_no_suggestion_of_several_processes() -> None:
    shape = shape_of(KNOWN_MODELS["EleutherAI/pythia-12b"], "12b")
    recipe = recipe_with("grpo", per_device_train_batch_size=8)
    estimate = estimate_model(recipe, "m", shape, FACTS, Parallelism())
    assert oversized_stages(estimate, GPUS["h100"])
    assert suggest_settings(recipe, estimate, FACTS, GPUS["h100"]) is None


@pytest.mark.parametrize(
    ("method", "parallelism", "message"),
    [
        ("ppo", Parallelism(0), "give at least 1"),
        ("ppo", Parallelism(2, 4), "stage, 1, 2 or 3"),
        ("ppo", Parallelism(1, 2), "give --processes 2 or more"),
        ("grpo", Parallelism(2), r"policy\.method grpo trains in one process"),
    ],
)
def test_impossible_parallelism_is_refused(
    method: str, parallelism: Parallelism, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_parallelism(recipe_with(method), parallelism)


def test_zero_3_cannot_measure_inline() -> None:
    recipe = load_recipe("quickstart")
    with pytest.raises(InputError, match=r"evaluate\.attach=off"):
        check_parallelism(recipe, Parallelism(2, 3))


# ---- feedback ------------------------------------------------------------------------------------


def test_society_lengths_match_its_tokens() -> None:
    from selfcorrect.evaluate.prompts.dialogue import AUTO
    from selfcorrect.recipes.society.tokenizer import make_tokenizer
    from selfcorrect.recipes.society.world import make_world
    from selfcorrect.train.feedback.feedback import load_feedback, pair_ids
    from selfcorrect.train.ppo.prompts import policy_prompt_ids

    recipe = load_recipe("quickstart", ["data.society.pairs=300", "data.society.prompts=300"])
    facts = feedback_facts(recipe.data)
    assert recipe.data.society is not None
    tokenizer = make_tokenizer(make_world(recipe.data.society))
    assert facts.vocabulary == len(tokenizer)
    preferences = load_feedback(recipe.data, 0).preferences
    prompts = [len(policy_prompt_ids(tokenizer, pair.prompt, AUTO)) for pair in preferences]
    pairs = [len(row["chosen_ids"]) for row in pair_ids(tokenizer, preferences)]
    assert facts.lengths.prompt == pytest.approx(sum(prompts) / 300, rel=0.05)
    length = facts.lengths.prompt + facts.lengths.answer
    assert length == pytest.approx(sum(pairs) / 300, rel=0.05)


def test_local_pairs_and_their_letters_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    row = {"chosen": "\n\nHuman: " + "a" * 72 + "b" * 9, "rejected": "\n\nHuman: " + "a" * 72}
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(5)))
    facts = feedback_facts(overridden(recipe_with(), [f"data.preferences.path={path}"]).data)
    assert (facts.pairs, facts.prompts) == (5, 5)
    assert facts.lengths == Lengths(81 / 4.5, 18, 2.0, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read as JSON lines"), ("[]", "line 1: .*object"), ("", "no rows")],
)
def test_broken_pairs_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        feedback_facts(overridden(recipe_with(), [f"data.preferences.path={path}"]).data)


def test_uncountable_rows_need_a_limit() -> None:
    data = overridden(recipe_with(), ["data.preferences.limit=null"]).data
    with pytest.raises(InputError, match=r"set data\.preferences\.limit"):
        feedback_facts(data)
