"""Tokens and floating-point operations of a recipe's stages.

A forward pass costs 2 FLOPs per token and weight, and 2 x 2 x queries per earlier token attended
to; a training pass costs three times that, or twice if only an adapter is trained (Kaplan et al.
2020, arXiv:2001.08361, table 1). Padding is not counted, so times are lower bounds.
"""

import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from selfcorrect.evaluate.prompts.stimuli import Section
from selfcorrect.evaluate.scoring.limits import BATCH_TOKENS
from selfcorrect.recipes.schema import Recipe
from selfcorrect.recipes.series import Measured
from selfcorrect.recipes.society.benchmarks import write_benchmarks
from selfcorrect.recipes.society.settings import SocietySettings
from selfcorrect.recipes.society.world import make_world
from selfcorrect.train.planning.feedback import FeedbackFacts
from selfcorrect.train.planning.memory import Parallelism
from selfcorrect.train.planning.model_shape import ModelShape
from selfcorrect.train.planning.settings import (
    Settings,
    base_settings,
    policy_settings,
    reward_settings,
    rollout_of,
    updates_per_step,
)

# Tokens of a scored item and of a continued prompt in the society's benchmarks, roughly
SOCIETY_TOKENS = (20.0, 60.0)
# Tokens of the final question and its options after a sampled text: 41 in BBQ, 50 in Winogender, 61
# in the law school by SmolLM2's tokenizer
FINAL_TOKENS = 45.0
# Each further order of the options (docs/results/evaluation-speed.md: 2.70 for three).
ORDER_COST = 0.9


@dataclass(frozen=True)
class Work:
    """What one stage of one model and seed computes, on all devices together.

    `passes` counts forward and backward passes on each device. `sampled` tokens are sampled one
    after the other, in `batches` of `rows` on each device, with `sampling_flops` of the `flops`.
    """

    stage: str
    tokens: float
    flops: float
    passes: float = 0.0
    sampled: float = 0.0
    sampling_flops: float = 0.0
    batches: float = 0.0
    rows: int = 0


def forward_flops(shape: ModelShape, length: float, scored: float = 0.0) -> float:
    """Return FLOPs of a forward pass over `length` tokens, with the LM head at `scored` of them."""
    weights = shape.layers * sum(a * b for a, b in shape.matrices.values())
    attention = shape.layers * 4 * shape.queries * length / 2
    return length * (2 * weights + attention) + 2 * scored * shape.embedding


def stage_work(
    recipe: Recipe, shape: ModelShape, facts: FeedbackFacts, parallelism: Parallelism
) -> list[Work]:
    """Return the work of the recipe's stages in their order, and of all its evaluation."""
    work = [_base(recipe, shape, facts, parallelism)] if recipe.base is not None else []
    if recipe.reward.is_fitted:
        work.append(_reward(recipe, shape, facts, parallelism))
    policy = _offline_policy if recipe.policy.is_offline else _rollouts
    evaluation = evaluation_work(recipe, shape, len(recipe.policy.checkpoints))
    return [*work, policy(recipe, shape, facts, parallelism), evaluation]


def _base(
    recipe: Recipe, shape: ModelShape, facts: FeedbackFacts, parallelism: Parallelism
) -> Work:
    assert recipe.base is not None
    if recipe.base.method == "sft":
        settings = base_settings(recipe)
        rows = _rows_seen(settings, facts.pairs, parallelism)
        return _fine_tuning("base", settings, shape, facts, rows, parallelism)
    length = 64.0  # a document of the society; only attention depends on it
    flops = 3 * facts.corpus / length * forward_flops(shape, length, length)
    passes = facts.corpus / (recipe.base.batch_tokens * parallelism.processes)
    return Work("base", facts.corpus, flops, passes)


def _offline_policy(
    recipe: Recipe, shape: ModelShape, facts: FeedbackFacts, parallelism: Parallelism
) -> Work:
    """Return the work of SFT, or of DPO: two texts a row, which the reference reads too."""
    settings = policy_settings(recipe)
    updates = recipe.policy.steps * updates_per_step(settings, parallelism)
    rows = updates * settings.rows_per_update * parallelism.processes
    has_adapter = recipe.policy.lora is not None
    work = _fine_tuning("policy", settings, shape, facts, rows, parallelism, has_adapter)
    if recipe.policy.method == "sft":
        return work
    passes = _training_passes(settings, has_adapter)
    return replace(
        work,
        tokens=2 * work.tokens,
        flops=2 * work.flops * (passes + 1) / passes,
        passes=2 * work.passes,
    )


def _fine_tuning(
    stage: str,
    settings: Settings,
    shape: ModelShape,
    facts: FeedbackFacts,
    rows: float,
    parallelism: Parallelism,
    has_adapter: bool = False,
) -> Work:
    """Return the work of training on `rows` prompts with their preferred answers."""
    length = facts.lengths.prompt + facts.lengths.answer
    forward = rows * forward_flops(shape, length, facts.lengths.answer)
    flops = _training_passes(settings, has_adapter) * forward
    return Work(stage, rows * length, flops, _passes(settings, rows, parallelism))


def _training_passes(settings: Settings, has_adapter: bool) -> int:
    """Return the cost of a forward and backward pass, in forward passes."""
    return (2 if has_adapter else 3) + (1 if settings.checkpointing else 0)


def _rows_seen(settings: Settings, rows: float, parallelism: Parallelism) -> float:
    """Return the rows that a stage trains on: epochs times rows, or what `max_steps` allows."""
    updates = settings.values["max_steps"]
    if updates <= 0:
        return rows * float(settings.values["num_train_epochs"])
    return float(updates * settings.rows_per_update * parallelism.processes)


def _passes(settings: Settings, rows: float, parallelism: Parallelism) -> float:
    return rows / (settings.number("per_device_train_batch_size") * parallelism.processes)


def _reward(
    recipe: Recipe, shape: ModelShape, facts: FeedbackFacts, parallelism: Parallelism
) -> Work:
    settings = reward_settings(recipe)
    length = facts.lengths.prompt + facts.lengths.answer
    pairs = _rows_seen(settings, facts.pairs * (1 - recipe.reward.held_out), parallelism)
    passes = _training_passes(settings, recipe.reward.lora is not None)
    flops = passes * 2 * pairs * forward_flops(shape, length)
    return Work("reward", 2 * pairs * length, flops, _passes(settings, pairs, parallelism))


def _rollouts(
    recipe: Recipe, shape: ModelShape, facts: FeedbackFacts, parallelism: Parallelism
) -> Work:
    """Return the work of PPO or GRPO, with every completion as long as it may be."""
    settings = policy_settings(recipe)
    rollout = rollout_of(recipe, shape, facts.lengths, parallelism)
    rows = recipe.policy.steps * rollout.rows * parallelism.processes
    length = facts.lengths.prompt + rollout.completion
    trunk = forward_flops(shape, length)
    scoring = forward_flops(shape, length, rollout.completion)
    has_critic = rollout.critic in ("separate", "lora")
    critic = trunk if has_critic else 0.0
    epochs = settings.number("num_iterations")
    micro_batches = recipe.policy.steps * rollout.rows / rollout.batch.rows
    # GRPO skips the old policy where each rollout batch is used for one update.
    scores_old = rollout.critic is not None or updates_per_step(settings, parallelism) > 1
    sampling = scoring
    once = sampling + scoring * scores_old + critic
    once += trunk * rollout.reward_model + scoring * rollout.reference
    training = _training_passes(settings, rollout.adapter is not None)
    flops = rows * (once + epochs * training * (scoring + critic))
    models = 2 if has_critic else 1
    only_forward = (1 + models * scores_old + rollout.reference) / 3  # of a training pass's work
    return Work(
        "policy",
        rows * length,
        flops,
        micro_batches * (epochs * models + only_forward),
        rows * rollout.completion,
        rows * sampling,
        recipe.policy.steps,
        rollout.rows,
    )


def evaluation_work(recipe: Measured, shape: ModelShape, kept: int) -> Work:
    """Return the work of all conditions at `kept` checkpoints, with reasoning as long as it may be.

    Experiments whose benchmark has no stated size are left out.
    """
    evaluate = recipe.evaluate
    tokens = flops = sampling_flops = sampled = 0.0
    for name, items, scored_tokens, prompt_tokens in _workloads(recipe):
        num_scored, num_sampled = _conditions(recipe, name)
        orders = 1 + ORDER_COST * (evaluate.permutations - 1)
        scored = items * num_scored * scored_tokens * orders
        texts = items * num_sampled * evaluate.samples * evaluate.permutations
        length = prompt_tokens + evaluate.max_new_tokens
        tokens += scored + texts * length
        sampled += texts * evaluate.max_new_tokens
        flops += scored * forward_flops(shape, 1.0, 0.1)
        sampling_flops += texts * forward_flops(shape, length, evaluate.max_new_tokens)
        # The answer continues from the text's cache.
        answers = texts * FINAL_TOKENS
        tokens += answers
        flops += answers * forward_flops(shape, length + FINAL_TOKENS, 1) / (length + FINAL_TOKENS)
    rows = max(1, BATCH_TOKENS["gpu"] // (200 + evaluate.max_new_tokens))
    return Work(
        "evaluation",
        kept * tokens,
        kept * (flops + sampling_flops),
        sampled=kept * sampled,
        sampling_flops=kept * sampling_flops,
        batches=kept * sampled / (rows * evaluate.max_new_tokens),
        rows=rows,
    )


def _workloads(recipe: Measured) -> Iterator[tuple[str, int, float, float]]:
    """Yield name, items, tokens of a scored item and of a continued prompt, by experiment."""
    from selfcorrect.evaluate.experiments import EXPERIMENTS

    society = recipe.data.society
    for name in recipe.evaluate.experiments:
        workload = EXPERIMENTS[name].workload if name in EXPERIMENTS else None
        if workload is None:
            continue
        items, tokens = workload.num_items, (workload.scored_tokens, workload.prompt_tokens)
        if society is not None:
            items, tokens = _society_items(society.model_dump_json()).get(name, 0), SOCIETY_TOKENS
        elif isinstance(recipe, Recipe) and recipe.data.feedback is not None:
            items -= _items_spoken_of(name, tuple(recipe.data.feedback.bbq))
        yield name, min(items, recipe.evaluate.limit or items), *tokens


@cache
def _items_spoken_of(experiment: str, categories: tuple[str, ...]) -> int:
    """Return the published questions of BBQ or MBBQ about groups of feedback's categories."""
    from selfcorrect.evaluate.data.catalogue import catalogue
    from selfcorrect.evaluate.experiments.base import axes_of

    spoken = frozenset[str]().union(*map(axes_of, categories))
    files = catalogue()[experiment].files if experiment in ("bbq", "mbbq") else ()
    translated = re.compile(r"(_control)?_[a-z]{2}$")  # MBBQ's Age_control_es
    names = [(Path(file.path).name.partition(".")[0], file.rows) for file in files]
    return sum(rows for name, rows in names if axes_of(translated.sub("", name)) & spoken)


@cache
def _society_items(settings: str) -> dict[str, int]:
    """Return the lines of a society's benchmark files, by experiment."""
    with tempfile.TemporaryDirectory() as folder:
        write_benchmarks(make_world(SocietySettings.model_validate_json(settings)), Path(folder))
        items: Counter[str] = Counter()
        for path in Path(folder).glob("*/*"):
            items[path.parent.name] += len(path.read_text(encoding="utf-8").splitlines())
        return items


def _conditions(recipe: Measured, experiment: str) -> tuple[int, int]:
    """Return how many conditions are only scored, and how many texts the model writes per item."""
    section = _stimuli(recipe.data.stimuli, experiment)
    offered = {**section.conditions, **section.controls}
    names = recipe.evaluate.conditions or section.conditions
    texts = [section.num_samples(name) for name in names if name in offered]
    return texts.count(0), sum(texts)


@cache
def _stimuli(path: Path | None, experiment: str) -> Section:
    from selfcorrect.evaluate.experiments.wording import load_stimuli

    return load_stimuli(path).section(experiment)
