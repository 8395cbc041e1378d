"""Memory of each stage of a recipe: base, reward, policy with all its models, and evaluation."""

from dataclasses import dataclass, replace

from selfcorrect.evaluate.scoring.limits import (
    BATCH_TOKENS,
    CPU_SCORING_TOKENS,
    LARGEST_LOGITS,
    MOST_REORDERED,
    PACK_TOKENS,
)
from selfcorrect.train.planning.memory import (
    SIZES,
    Batch,
    Footprint,
    Parallelism,
    activation_bytes,
    backward_buffer_bytes,
    forward_buffer_bytes,
    frozen_bytes,
    gathered_bytes,
    gradient_bytes_at_peak,
    held_bytes,
    kv_cache_bytes,
    lm_head_bytes,
    training_bytes,
)
from selfcorrect.train.planning.model_shape import Adapter, ModelShape
from selfcorrect.train.ppo.limits import rows_per_pass


@dataclass(frozen=True)
class Rollout:
    """Sizes of one step of PPO or GRPO on one device, from the recipe's `policy.trainer`.

    `rows` completions are sampled together; `batch` is one forward and backward pass over prompts
    and completions. `critic` is shared, separate or lora, None for GRPO; `gathers`: ZeRO-3 gathers
    the whole policy to generate.
    """

    rows: int
    prompt: int
    completion: int
    batch: Batch
    critic: str | None
    reference: bool
    adapter: Adapter | None
    gathers: bool = True
    reward_model: bool = True


def pretraining_footprint(shape: ModelShape, batch: Batch, parallelism: Parallelism) -> Footprint:
    """Return the footprint of pretraining: all logits at once, copied by the weighted loss."""
    footprint = _training("base", shape, None, batch, parallelism)
    # logits, their copy without the last position, log-softmax, and two gradients of that size
    footprint.parts["logits"] = 5 * 4.0 * batch.tokens * shape.vocabulary
    return footprint


def fine_tuning_footprint(
    stage: str, shape: ModelShape, adapter: Adapter | None, batch: Batch, parallelism: Parallelism
) -> Footprint:
    """Return the footprint of TRL's SFTTrainer, whose LM head is tiled."""
    footprint = _training(stage, shape, adapter, batch, parallelism)
    footprint.parts["logits"] = lm_head_bytes(shape, batch, parallelism, adapter is None)
    return footprint


def reward_footprint(
    shape: ModelShape, adapter: Adapter | None, batch: Batch, parallelism: Parallelism
) -> Footprint:
    """Return the footprint of TRL's RewardTrainer: both answers of a pair in one pass."""
    return _training("reward", shape, adapter, batch, parallelism, with_head=False)


def _training(
    stage: str,
    shape: ModelShape,
    adapter: Adapter | None,
    batch: Batch,
    parallelism: Parallelism,
    with_head: bool = True,
) -> Footprint:
    parameters = shape.parameters if with_head else shape.backbone
    trainable = shape.trainable(adapter, parameters)
    frozen = 0 if adapter is None else parameters
    weights, gradients, optimizer = training_bytes(shape, frozen, trainable, parallelism, batch)
    kept = activation_bytes(shape, adapter, batch, parallelism)
    kept += backward_buffer_bytes(shape, batch)
    parts = {
        "weights": weights + gathered_bytes(shape, parallelism, batch.bf16),
        "gradients": gradient_bytes_at_peak(gradients, kept, batch, parallelism),
        "optimizer": optimizer,
        "activations": kept,
    }
    return Footprint(stage, "learning", parts)


def rollout_footprint(
    shape: ModelShape,
    rollout: Rollout,
    parallelism: Parallelism,
    sampled: tuple[int, int] | None = None,
) -> Footprint:
    """Return the worst moment of PPO or GRPO: sampling, learning, or measuring.

    `sampled`: rows that evaluation beside training samples together, and their tokens.
    """
    moments = [_generating(shape, rollout, parallelism), _learning(shape, rollout, parallelism)]
    if sampled is not None:
        resident = resident_parts(shape, rollout, parallelism)
        held = rollout.batch.trained if rollout.adapter is None else rollout.batch.frozen
        moments.append(measuring_footprint(shape, resident, parallelism, sampled, held))
    return max(moments, key=lambda moment: moment.total)


def resident_parts(
    shape: ModelShape, rollout: Rollout, parallelism: Parallelism
) -> dict[str, float]:
    """Return what stays in memory through all of PPO or GRPO, in bytes.

    Gradients, and the copies that autocast makes, come on top while learning.
    """
    batch, adapter = rollout.batch, rollout.adapter
    # autocast makes its copies while learning
    lasting = batch if parallelism.zero else replace(batch, bf16=False)
    trainable = shape.trainable(adapter)
    base = 0 if adapter is None else shape.parameters  # frozen weights are in the same module
    weights, _, optimizer = training_bytes(shape, base, trainable, parallelism, lasting)
    parts = {"weights": weights, "optimizer": optimizer}
    critic = critic_parameters(shape, rollout.critic, adapter)
    critic_weights, _, critic_optimizer = training_bytes(shape, 0, critic, parallelism, lasting)
    parts["critic"] = critic_weights + critic_optimizer
    has_copy = rollout.reference and adapter is None  # else the reference is the policy's base
    # The reference computes as the policy does: train/stages/policy.py.
    reference = batch.frozen if batch.bf16 and batch.frozen == "bfloat16" else batch.trained
    copied = frozen_bytes(shape, shape.parameters, parallelism, batch, reference)
    parts["reference"] = copied if has_copy else 0.0
    if rollout.reward_model:
        parts["reward model"] = frozen_bytes(
            shape, shape.backbone, parallelism, batch, batch.frozen
        )
    return parts


def critic_parameters(shape: ModelShape, critic: str | None, adapter: Adapter | None) -> int:
    """Return the critic's own parameters, all of which are trained."""
    if critic == "lora":
        return shape.trainable(adapter)
    return {None: 0, "shared": shape.hidden, "separate": shape.backbone}[critic]


def _learning(shape: ModelShape, rollout: Rollout, parallelism: Parallelism) -> Footprint:
    batch, adapter = rollout.batch, rollout.adapter
    parts = resident_parts(shape, rollout, parallelism)
    trainable = shape.trainable(adapter)
    critic = critic_parameters(shape, rollout.critic, adapter)
    if batch.bf16 and parallelism.zero == 0:  # autocast's copies
        of_policy = training_bytes(
            shape, 0 if adapter is None else shape.parameters, trainable, parallelism, batch
        )[0]
        parts["weights"] = of_policy
        parts["critic"] += 2.0 * critic * (batch.trained == "float32")
    parts["weights"] += gathered_bytes(shape, parallelism, batch.bf16)
    kept = activation_bytes(shape, adapter, batch, parallelism)
    parts["activations"] = kept
    gradients = training_bytes(shape, 0, trainable, parallelism, batch)[1]
    parts["gradients"] = gradient_bytes_at_peak(gradients, kept, batch, parallelism)
    gradients = training_bytes(shape, 0, critic, parallelism, batch)[1]
    kept = 0.0
    if rollout.critic in ("separate", "lora"):
        critic_adapter = adapter if rollout.critic == "lora" else None
        kept = activation_bytes(shape, critic_adapter, batch, parallelism)
    critic_gradients = gradient_bytes_at_peak(gradients, kept, batch, parallelism)
    parts["critic"] += kept + critic_gradients
    # The critic's backward pass comes first; the LM head's tiles then reuse what it frees.
    freed = max(0.0, kept + critic_gradients - gradients)
    one_pass = _one_pass(shape, rollout, parallelism)
    parts["activations"] += backward_buffer_bytes(shape, one_pass)
    logits = lm_head_bytes(shape, one_pass, parallelism, adapter is None)
    parts["logits"] = max(0.0, logits - freed)
    return Footprint("policy", "learning", parts)


def _one_pass(shape: ModelShape, rollout: Rollout, parallelism: Parallelism) -> Batch:
    """Return the part of a micro-batch that shares a pass: on one CPU process a few rows."""
    batch = rollout.batch
    rows = batch.rows
    if not parallelism.gpu and parallelism.processes == 1:
        weights = shape.parameters - shape.embedding
        rows = min(rows, rows_per_pass(weights, batch.length, batch.checkpointing))
    return replace(batch, rows=rows, scored=rows * rollout.completion)


def _generating(shape: ModelShape, rollout: Rollout, parallelism: Parallelism) -> Footprint:
    bf16 = rollout.batch.bf16
    parts = resident_parts(shape, rollout, parallelism)
    if parallelism.zero == 3 and rollout.gathers:
        parts["weights"] += 2.0 * shape.parameters
        if rollout.critic == "separate":
            parts["critic"] += 2.0 * shape.backbone
    else:
        parts["weights"] += gathered_bytes(shape, parallelism, bf16)
    tokens = rollout.rows * (rollout.prompt + rollout.completion)
    parts["KV cache"] = kv_cache_bytes(shape, tokens, bf16)
    prompts = replace(rollout.batch, rows=rollout.rows, length=rollout.prompt)
    parts["activations"] = forward_buffer_bytes(shape, prompts)
    parts["logits"] = 4 * 4.0 * rollout.rows * shape.vocabulary  # and sampling's copies of them
    return Footprint("policy", "generating", parts)


def measuring_footprint(
    shape: ModelShape,
    resident: dict[str, float],
    parallelism: Parallelism,
    sampled: tuple[int, int],
    held: str,
    stage: str = "policy",
) -> Footprint:
    """Return the footprint of evaluation, beside `resident` bytes by purpose.

    `sampled`: rows sampled together, and their tokens. `held` is the type of the model's weights,
    or of those under its adapter.
    """
    size = SIZES.get(held, 2.0)
    tokens = BATCH_TOKENS["gpu"] if parallelism.gpu else CPU_SCORING_TOKENS
    batch = Batch(tokens // PACK_TOKENS, PACK_TOKENS, bf16=size == 2)
    mask = 2 * size * tokens * PACK_TOKENS
    scored = tokens // 8  # on BBQ a probability is needed at one position in eight at most
    rows, length = sampled
    parts = {
        "activations": forward_buffer_bytes(shape, batch) + mask,
        "logits": 4.0 * min(LARGEST_LOGITS, max(rows, scored) * shape.vocabulary),
        # Rows leave the batch once a quarter has ended (slots.py), with a copy of their cache, from
        # which their answers are scored.
        "KV cache": 1.25 * kv_cache_bytes(shape, rows * length, size == 2),
    }
    if size == 2:  # probabilities are computed in float32, and so by a copy of the head
        parts["head"] = 4.0 * shape.embedding
    linear = shape.layers * sum(a * b for a, b in shape.matrices.values()) + shape.embedding
    if not parallelism.gpu and linear <= MOST_REORDERED:
        parts["reordered weights"] = size * linear
    return Footprint(stage, "measuring", resident | parts)


def evaluation_footprint(
    shape: ModelShape,
    parallelism: Parallelism,
    rows: int,
    length: int,
    held: str,
    devices: int = 1,
) -> Footprint:
    """Return the footprint of measuring a saved checkpoint, `rows` sampled together.

    `held` is the type of its weights; `devices` divide them, and the cache, among themselves.
    """
    weights = {"weights": held_bytes(shape, shape.parameters, held)}
    sampled = (rows, length)
    whole = measuring_footprint(shape, weights, parallelism, sampled, held, "evaluation")
    divided = ("weights", "KV cache")
    parts = {name: size / (devices if name in divided else 1) for name, size in whole.parts.items()}
    return replace(whole, parts=parts)
