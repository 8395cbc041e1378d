"""How much memory each stage of a run needs on a device, from shapes and settings alone.

A stage's need is that of its worst moment, with every row as long as the data and settings allow.
What autograd keeps was read off transformers' layers and is held against them, and against measured
peaks, by tests/train/planning/test_plan.py and scripts/benchmarks/plan_memory.py;
docs/results/planning-accuracy.md says how close it comes.
"""

import math
from dataclasses import dataclass, field

from selfcorrect.train.planning.model_shape import GATED, ModelShape

TILE_TOKENS, TILE_WORDS = 4096, 32768  # TRL computes the LM head in tiles of this size
TILE_COPIES = 8  # float32 tiles alive at once where no GPU kernel folds them (measured)
LEAST_ROWS_A_PASS, LEAST_FLOPS_A_PASS = 16, 2e8  # of train/ppo/forward.py, on a CPU
LIVE_PARAMETERS = 1e9  # ZeRO-3 keeps at most this many gathered (stage3_max_live_parameters)


@dataclass(frozen=True)
class Engine:
    """How a run is spread over devices: DeepSpeed's ZeRO stage (0: none) and the processes."""

    processes: int = 1
    zero: int = 0
    gpu: bool = True


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: its rank, and the matrices it is on."""

    rank: int
    targets: frozenset[str]


@dataclass(frozen=True)
class Batch:
    """What one forward and backward pass of a device sees, and how.

    `scored` counts the tokens at whose places the LM head is computed, `bf16` says whether matrix
    products are in bfloat16, `checkpointing` whether activations are recomputed, `accumulates`
    whether several such passes add up to one update.
    """

    rows: int
    length: int
    scored: int = 0
    bf16: bool = False
    checkpointing: bool = False
    accumulates: bool = False

    @property
    def tokens(self) -> int:
        """Rows times their padded length."""
        return self.rows * self.length


@dataclass
class Footprint:
    """Bytes on one device at a stage's worst moment, by what they are for."""

    stage: str
    moment: str
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Bytes in all."""
        return sum(self.parts.values())


def trained(
    parameters: float, trainable: float, engine: Engine, bf16: bool
) -> tuple[float, float, float]:
    """Bytes of weights, gradients and Adam's states of a module in training, on one device.

    Without DeepSpeed weights are float32, and under autocast a bfloat16 copy of those in use is
    kept for the backward pass. With it, as DeepSpeed's own estimators count: 16-bit weights and
    gradients, float32 weights, gradients and two moments, of which stage 1 divides the states,
    stage 2 the gradients too, stage 3 everything (Rajbhandari et al. 2020, arXiv:1910.02054).
    """
    share = 1 / engine.processes
    if engine.zero == 0:
        buckets = 4 * trainable if engine.processes > 1 else 0.0  # of DistributedDataParallel
        copy = 2 * parameters if bf16 else 0.0
        return 4 * parameters + copy, 4 * trainable + buckets, 8 * trainable
    size = 2 if bf16 else 4
    weights = size * parameters * (share if engine.zero == 3 else 1.0)
    gradients = size * trainable * (share if engine.zero >= 2 else 1.0) + 4 * trainable * share
    return weights, gradients, 12 * trainable * share


def at_the_peak(gradients: float, kept: float, batch: Batch, engine: Engine) -> float:
    """Bytes of gradients there are while `kept` bytes of activations are.

    The backward pass frees activations as it makes gradients, so that only the larger of both
    counts; unless gradients of an earlier pass wait, or an engine keeps buffers for them.
    """
    if batch.accumulates or engine.processes > 1 or engine.zero:
        return gradients
    return max(0.0, gradients - kept)


def frozen(parameters: float, engine: Engine, bf16: bool) -> float:
    """Bytes of the weights of a model that only answers: the reference, the reward model."""
    if engine.zero == 0:
        return 4 * parameters
    return (2 if bf16 else 4) * parameters / (engine.processes if engine.zero == 3 else 1)


def gathered(shape: ModelShape, engine: Engine, bf16: bool) -> float:
    """Bytes of the weights that ZeRO-3 has put together for the layers at work."""
    if engine.zero != 3:
        return 0.0
    live = min(shape.parameters, LIVE_PARAMETERS)
    return max(4.0 * shape.largest_matrix, (2 if bf16 else 4) * live)


def saved_in_layer(shape: ModelShape, adapter: Adapter | None) -> tuple[int, int]:
    """Numbers a token that autograd keeps of one layer: in norms, and everything else.

    A frozen weight needs no input for its gradient, so an adapter's layer keeps less.
    """
    h, q, k, i = shape.hidden, shape.queries, shape.keys, shape.intermediate
    targets = set(shape.matrices) if adapter is None else adapter.targets
    low_rank = 0 if adapter is None else adapter.rank * len(targets)
    first, second = (h if _any(targets, names) else 0 for names in (ATTENTION_IN, MLP_IN))
    last = i if _any(targets, MLP_OUT) else 0
    inputs = first + second + last + low_rank
    if shape.model_type in GATED:
        twice = 2 if adapter is None else 1  # the normed value is for the norm's own weight
        norms = 2 * h * twice
        if shape.model_type in ("qwen3", "olmo2"):
            norms += (q + k) * twice
        return norms, inputs + 2 * q + 2 * k + 3 * i
    if shape.model_type == "gpt_neox":
        return h, inputs + 6 * h + (h if _any(targets, {"dense"}) else 0) + i
    return 2 * h, inputs + 4 * h + 4 * i  # gpt2, whose GELU is five operations


ATTENTION_IN = {"q_proj", "k_proj", "v_proj", "query_key_value", "attn.c_attn"}
MLP_IN = {"gate_proj", "up_proj", "dense_h_to_4h", "mlp.c_fc"}
MLP_OUT = {"down_proj", "dense_4h_to_h", "mlp.c_proj"}


def _any(targets: set[str] | frozenset[str], names: set[str]) -> bool:
    return not names.isdisjoint(targets)


def activations(shape: ModelShape, adapter: Adapter | None, batch: Batch, engine: Engine) -> float:
    """Bytes kept for the backward pass through one model's layers."""
    norms, rest = saved_in_layer(shape, adapter)
    size = 2 if batch.bf16 else 4
    layer = 4 * norms + size * rest  # norms compute in float32
    outside = (4 * 2 + size) * shape.hidden
    if batch.checkpointing:
        stream = (2 if batch.bf16 and engine.zero else 4) * shape.hidden
        return batch.tokens * (shape.layers * stream + layer + outside)
    return batch.tokens * (shape.layers * layer + outside)


def passing(shape: ModelShape, batch: Batch) -> float:
    """Bytes that come and go within one layer of a forward pass that keeps nothing."""
    return batch.tokens * (2 if batch.bf16 else 4) * (3 * shape.intermediate + 3 * shape.hidden)


def backward_buffers(shape: ModelShape, batch: Batch) -> float:
    """Bytes of the gradients of activations that pass through one layer at a time."""
    return batch.tokens * (2 if batch.bf16 else 4) * (2 * shape.intermediate + 3 * shape.hidden)


def head(shape: ModelShape, batch: Batch, engine: Engine, learns: bool) -> float:
    """Bytes of TRL's tiled LM head at `batch.scored` places, with its gradients if it learns."""
    tile = min(batch.scored, TILE_TOKENS) * min(shape.vocabulary, TILE_WORDS)
    logits = tile * (2.0 if batch.bf16 else 4.0) if engine.gpu else 4.0 * tile * TILE_COPIES
    return logits + (4.0 * shape.embedding if learns else 0.0)


def key_values(shape: ModelShape, tokens: int, bf16: bool) -> float:
    """Bytes of the key-value cache of `tokens` tokens."""
    return (2.0 if bf16 else 4.0) * tokens * 2 * shape.keys * shape.layers


def rows_a_pass(shape: ModelShape, batch: Batch, engine: Engine) -> int:
    """Rows that share a forward pass: all of the batch, but on a CPU and one process a few."""
    if engine.gpu or engine.processes > 1:
        return batch.rows
    weights = shape.parameters - shape.embedding
    least = math.ceil(LEAST_FLOPS_A_PASS / (2 * weights * max(batch.length, 1)))
    fewest = LEAST_ROWS_A_PASS // 2 if batch.checkpointing else LEAST_ROWS_A_PASS
    return min(batch.rows, max(fewest, least))
