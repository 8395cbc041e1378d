"""Tokens and floating-point operations of a recipe's stages, and what its runs leave on the disk.

A forward pass costs 2 FLOPs a token and weight that multiplies, and 2 x 2 x queries for every
earlier token it looks at; a training pass three times that, or twice where only an adapter learns
(Kaplan et al. 2020, arXiv:2001.08361, table 1). Padding costs nothing here, so times are low.
"""

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from selfcorrect.evaluate.prompts.stimuli import Section
from selfcorrect.recipes.schema import Recipe
from selfcorrect.recipes.society.benchmarks import write_benchmarks
from selfcorrect.recipes.society.settings import SocietySettings
from selfcorrect.recipes.society.world import make_world
from selfcorrect.train.planning.feedback import FeedbackFacts
from selfcorrect.train.planning.memory import Engine
from selfcorrect.train.planning.model_shape import ModelShape
from selfcorrect.train.planning.settings import (
    Settings,
    adapter_of,
    base_settings,
    ppo_settings,
    reward_settings,
    rollout_of,
)
from selfcorrect.train.planning.stage_memory import Rollout

# Whole benchmarks: items; tokens an item and condition that is only scored, conditions and options
# sharing what they have in common; and tokens of a prompt that the model continues by itself.
# Measured with evaluate/scoring/token_trie.py and SmolLM2's tokenizer on the published files,
# 2026-11-23.
BENCHMARKS = {
    "bbq": (58492, 45.6, 172.0),
    "winogender": (60, 37.6, 147.0),
    "law_school": (3888, 126.1, 284.0),
}
# The paper's conditions: those that are only scored, and texts that the model writes an item.
PAPER_CONDITIONS = {"bbq": (2, 1), "winogender": (3, 1), "law_school": (2, 1)}
SOCIETY_TOKENS = (20.0, 60.0)  # the same two lengths for the society's files, roughly
# Each further order of the options (docs/results/evaluation-speed.md: 2.70 for three).
ORDER_COST = 0.9


@dataclass(frozen=True)
class Work:
    """What one stage of one model and seed computes, on all devices together.

    `passes` counts forward and backward passes on each device. `sampled` tokens are drawn one after
    the other, in `draws` batches of `rows` on each device, by `sampling_flops` of the `flops`.
    """

    stage: str
    tokens: float
    flops: float
    passes: float = 0.0
    sampled: float = 0.0
    sampling_flops: float = 0.0
    draws: float = 0.0
    rows: int = 0


def forward_flops(shape: ModelShape, length: float, scored: float = 0.0) -> float:
    """FLOPs of one forward pass over a row of `length` tokens, the LM head at `scored` of them."""
    weights = shape.layers * sum(a * b for a, b in shape.matrices.values())
    attention = shape.layers * 4 * shape.queries * length / 2
    return length * (2 * weights + attention) + 2 * scored * shape.embedding


def stage_works(
    recipe: Recipe, shape: ModelShape, facts: FeedbackFacts, engine: Engine
) -> list[Work]:
    """The recipe's stages in their order, and its evaluation at every kept checkpoint."""
    works = [_base(recipe, shape, facts, engine)] if recipe.base is not None else []
    if recipe.reward.path is None:
        works.append(_reward(recipe, shape, facts, engine))
    rollout = rollout_of(recipe, shape, facts.lengths, engine)
    return [*works, _ppo(recipe, shape, facts, rollout, engine), _evaluation(recipe, shape)]


def _base(recipe: Recipe, shape: ModelShape, facts: FeedbackFacts, engine: Engine) -> Work:
    assert recipe.base is not None
    if recipe.base.method == "pretrain":
        length = 64.0  # a document of the society; only attention depends on it
        flops = 3 * facts.corpus / length * forward_flops(shape, length, length)
        passes = facts.corpus / (recipe.base.batch_tokens * engine.processes)
        return Work("base", facts.corpus, flops, passes)
    settings = base_settings(recipe)
    length = facts.lengths.prompt + facts.lengths.answer
    rows = _rows_seen(settings, facts.pairs, engine)
    flops = 3 * rows * forward_flops(shape, length, facts.lengths.answer)
    again = flops / 3 if settings.checkpointing else 0.0
    return Work("base", rows * length, flops + again, _passes(settings, rows, engine))


def _rows_seen(settings: Settings, rows: float, engine: Engine) -> float:
    """Rows that a stage learns from: epochs times rows, or what `max_steps` allows."""
    if settings.values["max_steps"] <= 0:
        return rows * float(settings.values["num_train_epochs"])
    batch = settings.number("per_device_train_batch_size") * engine.processes
    accumulated = batch * settings.number("gradient_accumulation_steps")
    return float(settings.values["max_steps"] * accumulated)


def _passes(settings: Settings, rows: float, engine: Engine) -> float:
    return rows / (settings.number("per_device_train_batch_size") * engine.processes)


def _reward(recipe: Recipe, shape: ModelShape, facts: FeedbackFacts, engine: Engine) -> Work:
    settings = reward_settings(recipe)
    length = facts.lengths.prompt + facts.lengths.answer
    pairs = _rows_seen(settings, facts.pairs * (1 - recipe.reward.held_out), engine)
    passes = (2 if recipe.reward.lora else 3) + (1 if settings.checkpointing else 0)
    flops = passes * 2 * pairs * forward_flops(shape, length)
    return Work("reward", 2 * pairs * length, flops, _passes(settings, pairs, engine))


def _ppo(
    recipe: Recipe, shape: ModelShape, facts: FeedbackFacts, rollout: Rollout, engine: Engine
) -> Work:
    """Every completion as long as it may be."""
    settings = ppo_settings(recipe)
    rows = recipe.ppo.steps * rollout.rows * engine.processes
    length = facts.lengths.prompt + rollout.completion
    trunk = forward_flops(shape, length)
    scoring = forward_flops(shape, length, rollout.completion)
    critic = 0.0 if rollout.critic == "shared" else trunk
    once = scoring + scoring + critic + trunk  # sampling, old policy with its values, reward model
    once += scoring if rollout.reference else 0.0
    times = (2 if rollout.adapter else 3) + (1 if settings.checkpointing else 0)
    epochs = settings.number("num_iterations")
    flops = rows * (once + epochs * times * (scoring + critic))
    models = 1 if rollout.critic == "shared" else 2
    micro_batches = recipe.ppo.steps * rollout.rows / rollout.batch.rows
    only_forward = (1 + models + rollout.reference) / 3  # a third of the work of a training pass
    return Work(
        "ppo",
        rows * length,
        flops,
        micro_batches * (epochs * models + only_forward),
        rows * rollout.completion,
        rows * scoring,
        recipe.ppo.steps,
        rollout.rows,
    )


def _evaluation(recipe: Recipe, shape: ModelShape) -> Work:
    """All conditions at every checkpoint; what the model writes is as long as it may be.

    Experiments that are not the paper's are left out: their sizes are not known here.
    """
    asked = recipe.evaluate
    tokens = flops = drawing = written = 0.0
    for name, items, scored, prompt in _experiments(recipe):
        plain, sampling = _conditions(recipe, name)
        orders = 1 + ORDER_COST * (asked.permutations - 1)
        read = items * plain * scored * orders
        texts = items * sampling * asked.samples * asked.permutations
        tokens += read + texts * (prompt + asked.max_new_tokens)
        written += texts * asked.max_new_tokens
        flops += read * forward_flops(shape, 1.0, 0.1)
        drawing += texts * forward_flops(shape, prompt + asked.max_new_tokens, asked.max_new_tokens)
        flops += texts * forward_flops(shape, prompt + asked.max_new_tokens)  # then it is scored
    kept = len(recipe.ppo.checkpoints)
    length = 200 + asked.max_new_tokens
    rows = max(1, 32768 // length)
    draws = kept * written / (rows * asked.max_new_tokens)
    return Work(
        "evaluation",
        kept * tokens,
        kept * (flops + drawing),
        sampled=kept * written,
        sampling_flops=kept * drawing,
        draws=draws,
        rows=rows,
    )


def _experiments(recipe: Recipe) -> list[tuple[str, int, float, float]]:
    names = [name for name in recipe.evaluate.experiments if name in BENCHMARKS]
    most = recipe.evaluate.limit
    if recipe.data.society is not None:
        counts = _society_items(recipe.data.society.model_dump_json())
        return [(name, min(counts[name], most or counts[name]), *SOCIETY_TOKENS) for name in names]
    return [
        (name, min(BENCHMARKS[name][0], most or BENCHMARKS[name][0]), *BENCHMARKS[name][1:])
        for name in names
    ]


@cache
def _society_items(settings: str) -> dict[str, int]:
    """Lines of the benchmark files that a society with these settings has."""
    with tempfile.TemporaryDirectory() as folder:
        write_benchmarks(make_world(SocietySettings.model_validate_json(settings)), Path(folder))
        return {
            name: sum(
                len(path.read_text(encoding="utf-8").splitlines())
                for path in (Path(folder) / name).iterdir()
            )
            for name in BENCHMARKS
        }


def _conditions(recipe: Recipe, experiment: str) -> tuple[int, int]:
    """How many conditions are only scored, and how many texts the model writes an item."""
    if recipe.evaluate.conditions is None and recipe.data.stimuli is None:
        return PAPER_CONDITIONS[experiment]
    section = _stimuli(recipe.data.stimuli, experiment)
    asked = recipe.evaluate.conditions or list(section.conditions)
    offered = [name for name in asked if name in {**section.conditions, **section.controls}]
    texts = [section.num_samples(name) for name in offered]
    return texts.count(0), sum(texts)


@cache
def _stimuli(own: Path | None, experiment: str) -> Section:
    from selfcorrect.evaluate.experiments.wording import (
        load_stimuli,  # with all experiments: a second
    )

    return load_stimuli(own).section(experiment)


@dataclass(frozen=True)
class Disk:
    """Bytes that one model and seed leave: for good, and beside that while a stage is at work."""

    base: float
    reward: float
    checkpoints: float
    working: float

    @property
    def kept(self) -> float:
        """Bytes that stay."""
        return self.base + self.reward + self.checkpoints


def disk(recipe: Recipe, shape: ModelShape, rollout: Rollout, engine: Engine) -> Disk:
    """What is saved: weights in float32 (16 bit under DeepSpeed), two whole states to resume from.

    Evaluation adds some tens of MB a checkpoint, which are left out.
    """
    size = 2.0 if engine.zero and rollout.batch.bf16 else 4.0
    adapter = rollout.adapter
    own = shape.parameters if adapter is None else shape.adapter(adapter.rank, set(adapter.targets))
    critic = {"separate": shape.backbone, "lora": own, "shared": 0}[rollout.critic]
    states = [2 * (12.0 if engine.zero == 0 else 14.0) * (own + critic)]
    if recipe.reward.path is None:
        fitted = adapter_of("reward.lora", recipe.reward.lora, shape)
        learns = shape.adapter(fitted.rank, set(fitted.targets)) if fitted else shape.backbone
        states.append(2 * 12.0 * learns)
    if recipe.base is not None:
        states.append(2 * 12.0 * shape.parameters)
    return Disk(
        4.0 * shape.parameters,
        4.0 * shape.backbone if recipe.reward.path is None else 0.0,
        size * own * len(recipe.ppo.checkpoints),
        max(states),
    )
