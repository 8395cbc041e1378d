"""Memory of each stage of a recipe: base, reward, PPO with all its models, and evaluation."""

from dataclasses import dataclass, replace

from selfcorrect.train.planning.memory import (
    Adapter,
    Batch,
    Engine,
    Footprint,
    activations,
    at_the_peak,
    backward_buffers,
    frozen,
    gathered,
    head,
    key_values,
    passing,
    rows_a_pass,
    trained,
)
from selfcorrect.train.planning.model_shape import ModelShape

MEASURING_TOKENS = {True: 32768, False: 4096}  # evaluate/scoring/packed.py, on a GPU and on a CPU
PACK_TOKENS = 512  # of evaluate/scoring/packed.py
LARGEST_LOGITS = 2**26  # of evaluate/scoring/forwards.py


@dataclass(frozen=True)
class Rollout:
    """Sizes of a PPO step on one device, from the recipe's `ppo.trainer`.

    `rows` are sampled together, `batch` is one forward and backward pass over prompt and
    completion. `critic` is shared, separate or lora; `gathers` says whether ZeRO-3 puts the whole
    policy together to generate.
    """

    rows: int
    prompt: int
    completion: int
    batch: Batch
    critic: str
    reference: bool
    adapter: Adapter | None
    gathers: bool = True


def pretraining(shape: ModelShape, batch: Batch, engine: Engine) -> Footprint:
    """From scratch: all logits at once, several times over in the weighted loss."""
    found = _training("base", shape, None, batch, engine)
    # logits, their copy without the last place, log-softmax, and two gradients of that size
    found.parts["logits"] = 5 * 4.0 * batch.tokens * shape.vocabulary
    return found


def fine_tuning(shape: ModelShape, batch: Batch, engine: Engine) -> Footprint:
    """TRL's SFTTrainer, whose LM head is tiled."""
    found = _training("base", shape, None, batch, engine)
    found.parts["logits"] = head(shape, batch, engine, learns=True)
    return found


def reward_fitting(
    shape: ModelShape, adapter: Adapter | None, batch: Batch, engine: Engine
) -> Footprint:
    """TRL's RewardTrainer: both answers of a pair in one pass, no LM head."""
    return _training("reward", shape, adapter, batch, engine, with_head=False)


def _training(
    stage: str,
    shape: ModelShape,
    adapter: Adapter | None,
    batch: Batch,
    engine: Engine,
    with_head: bool = True,
) -> Footprint:
    parameters = shape.parameters if with_head else shape.backbone
    trainable = parameters if adapter is None else shape.adapter(adapter.rank, set(adapter.targets))
    weights, gradients, optimizer = trained(parameters, trainable, engine, batch.bf16)
    kept = activations(shape, adapter, batch, engine) + backward_buffers(shape, batch)
    return Footprint(
        stage,
        "learning",
        {
            "weights": weights + gathered(shape, engine, batch.bf16),
            "gradients": at_the_peak(gradients, kept, batch, engine),
            "optimizer": optimizer,
            "activations": kept,
        },
    )


def ppo(shape: ModelShape, rollout: Rollout, engine: Engine, measures: bool) -> Footprint:
    """PPO's worst moment: sampling a rollout batch, scoring it, learning from it, or measuring."""
    moments = [_generating(shape, rollout, engine), _learning(shape, rollout, engine)]
    if measures:
        moments.append(_measuring(shape, rollout, engine))
    return max(moments, key=lambda moment: moment.total)


def resident(shape: ModelShape, rollout: Rollout, engine: Engine) -> dict[str, float]:
    """What stays in memory all through PPO; gradients and a copy under autocast come on top."""
    bf16 = rollout.batch.bf16
    adapter = rollout.adapter
    own = shape.parameters if adapter is None else shape.adapter(adapter.rank, set(adapter.targets))
    # Frozen and trained alike: what is in use is one module to the engine.
    base = 0 if adapter is None else shape.parameters
    weights, _, optimizer = trained(base + own, own, engine, bf16 and engine.zero > 0)
    parts = {"weights": weights, "optimizer": optimizer}
    critic, trains = _critic(shape, rollout)
    critic_weights, _, critic_optimizer = trained(critic, trains, engine, bf16 and engine.zero > 0)
    parts["critic"] = critic_weights + critic_optimizer
    whole = rollout.reference and adapter is None
    parts["reference"] = frozen(shape.parameters, engine, bf16) if whole else 0.0
    parts["reward model"] = frozen(shape.backbone, engine, bf16)
    return parts


def _critic(shape: ModelShape, rollout: Rollout) -> tuple[float, float]:
    """The critic's own parameters, and how many of them learn."""
    if rollout.critic == "shared":
        return shape.hidden, shape.hidden
    if rollout.critic == "lora":
        assert rollout.adapter is not None
        own = shape.adapter(rollout.adapter.rank, set(rollout.adapter.targets))
        return own, own
    return shape.backbone, shape.backbone


def _learning(shape: ModelShape, rollout: Rollout, engine: Engine) -> Footprint:
    batch = rollout.batch
    parts = resident(shape, rollout, engine)
    adapter = rollout.adapter
    own = shape.parameters if adapter is None else shape.adapter(adapter.rank, set(adapter.targets))
    critic, critic_trains = _critic(shape, rollout)
    if batch.bf16 and engine.zero == 0:  # autocast's copies
        parts["weights"] += 2.0 * shape.parameters
        parts["critic"] += 2.0 * critic
    parts["weights"] += gathered(shape, engine, batch.bf16)
    kept = activations(shape, adapter, batch, engine)
    parts["activations"] = kept
    gradients = trained(own, own, engine, batch.bf16)[1]
    parts["gradients"] = at_the_peak(gradients, kept, batch, engine)
    gradients = trained(critic, critic_trains, engine, batch.bf16)[1]
    kept = 0.0
    if rollout.critic != "shared":
        mode = adapter if rollout.critic == "lora" else None
        kept = activations(shape, mode, batch, engine)
    late = at_the_peak(gradients, kept, batch, engine)
    parts["critic"] += kept + late
    # The critic goes backward first, and the LM head's tiles take the place of what it frees.
    freed = max(0.0, kept + late - gradients)
    one_pass = _one_pass(shape, rollout, engine)
    parts["activations"] += backward_buffers(shape, one_pass)
    parts["logits"] = max(0.0, head(shape, one_pass, engine, learns=adapter is None) - freed)
    return Footprint("ppo", "learning", parts)


def _one_pass(shape: ModelShape, rollout: Rollout, engine: Engine) -> Batch:
    rows = rows_a_pass(shape, rollout.batch, engine)
    return replace(rollout.batch, rows=rows, scored=rows * rollout.completion)


def _generating(shape: ModelShape, rollout: Rollout, engine: Engine) -> Footprint:
    bf16 = rollout.batch.bf16
    parts = resident(shape, rollout, engine)
    if engine.zero == 3 and rollout.gathers:
        parts["weights"] += 2.0 * shape.parameters
        if rollout.critic == "separate":
            parts["critic"] += 2.0 * shape.backbone
    else:
        parts["weights"] += gathered(shape, engine, bf16)
    tokens = rollout.rows * (rollout.prompt + rollout.completion)
    parts["KV cache"] = key_values(shape, tokens, bf16)
    prompts = replace(rollout.batch, rows=rollout.rows, length=rollout.prompt)
    parts["activations"] = passing(shape, prompts)
    parts["logits"] = 4 * 4.0 * rollout.rows * shape.vocabulary  # and what sampling makes of them
    return Footprint("ppo", "generating", parts)


def _measuring(shape: ModelShape, rollout: Rollout, engine: Engine) -> Footprint:
    found = Footprint("ppo", "measuring", resident(shape, rollout, engine))
    found.parts["activations"], found.parts["logits"] = _scoring(shape, engine)
    return found


def _scoring(shape: ModelShape, engine: Engine) -> tuple[float, float]:
    """Bytes of one packed forward: what passes through it with its mask, and its logits."""
    tokens = MEASURING_TOKENS[engine.gpu]
    forward = passing(shape, Batch(tokens // PACK_TOKENS, PACK_TOKENS))
    mask = 2 * 4.0 * tokens * PACK_TOKENS
    wanted = tokens // 8  # one place in eight at most is asked for, on BBQ
    return forward + mask, 4.0 * min(LARGEST_LOGITS, wanted * shape.vocabulary)


def evaluation(shape: ModelShape, engine: Engine, rows: int, length: int) -> Footprint:
    """Measuring a saved checkpoint by itself, in float32."""
    forward, logits = _scoring(shape, engine)
    sampling = key_values(shape, rows * length, False) + 24.0 * rows * shape.vocabulary
    parts = {"weights": 4.0 * shape.parameters, "activations": forward, "logits": logits}
    if sampling > forward + logits:
        parts |= {"activations": 0.0, "KV cache": key_values(shape, rows * length, False)}
        parts["logits"] = 24.0 * rows * shape.vocabulary  # float64 noise for every word
    return Footprint("evaluation", "measuring", parts)
