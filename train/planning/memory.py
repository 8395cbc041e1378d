"""Bytes that training needs on one device, from shapes and settings alone.

A stage's footprint is that of its worst moment, with every row as long as data and settings allow.
What autograd keeps was read off transformers' layers; tests/train/planning/test_memory.py compares
it with those layers, and scripts/benchmarks/plan_memory.py compares footprints with measured peaks
(docs/results/planning-accuracy.md).
"""

from dataclasses import dataclass, field

from selfcorrect.train.planning.model_shape import GATED, Adapter, ModelShape

TILE_TOKENS, TILE_WORDS = 4096, 32768  # TRL computes the LM head in tiles of this size
TILE_COPIES = 8  # float32 tiles alive at once where no GPU kernel fuses them (measured)
SIZES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}  # bytes of a weight
# NF4 in blocks of 64 with a float32 scale each, which are quantised to 8 bits in blocks of 256
# (Dettmers et al. 2023, arXiv:2305.14314, section 3): 4.127 bits
FOUR_BITS = (4 + 8 / 64 + 32 / (64 * 256)) / 8
LIVE_PARAMETERS = 1e9  # ZeRO-3 keeps at most this many gathered (stage3_max_live_parameters)


@dataclass(frozen=True)
class Parallelism:
    """How training is spread over devices: the processes, and DeepSpeed's ZeRO stage (0: none).

    `fast` is the type that `precision: auto` means there for large models.
    """

    processes: int = 1
    zero: int = 0
    gpu: bool = True
    fast: str = "bfloat16"


@dataclass(frozen=True)
class Batch:
    """One forward and backward pass on one device.

    `scored` counts the tokens at which the LM head is computed; `bf16`: matrix products are in
    bfloat16; `checkpointing`: activations are recomputed; `accumulates`: several passes add up to
    one update. `frozen` and `trained` are the types of weights that do not learn, and that do.
    """

    rows: int
    length: int
    scored: int = 0
    bf16: bool = False
    checkpointing: bool = False
    accumulates: bool = False
    frozen: str = "float32"
    trained: str = "float32"

    @property
    def tokens(self) -> int:
        """Rows times their padded length."""
        return self.rows * self.length


@dataclass
class Footprint:
    """Bytes on one device at a stage's worst moment, by purpose."""

    stage: str
    moment: str
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return sum(self.parts.values())


def held_bytes(shape: ModelShape, parameters: float, dtype: str) -> float:
    """Return bytes of a model's weights; in 4 bits its embeddings and norms stay bfloat16."""
    if dtype != "4bit" or not parameters:
        return SIZES.get(dtype, 0.0) * parameters
    linear = shape.layers * sum(a * b for a, b in shape.matrices.values())
    return FOUR_BITS * linear + SIZES["bfloat16"] * (parameters - linear)


def training_bytes(
    shape: ModelShape, frozen: float, trainable: float, parallelism: Parallelism, batch: Batch
) -> tuple[float, float, float]:
    """Return bytes of weights, gradients and Adam's moments of a module, on one device.

    `frozen` and `trainable` count its parameters. Under autocast a bfloat16 copy of the float32
    weights in use is kept for the backward pass. With DeepSpeed, as its own estimators count:
    16-bit weights and gradients, float32 weights, gradients and two moments. ZeRO stage 1 divides
    the moments and float32 copies among processes, stage 2 the gradients too, stage 3 everything
    (Rajbhandari et al. 2020, arXiv:1910.02054).
    """
    share = 1 / parallelism.processes
    if parallelism.zero == 0:
        size = SIZES[batch.trained]
        buckets = 4 * trainable if parallelism.processes > 1 else 0.0  # DistributedDataParallel's
        copied = (batch.frozen == "float32") * frozen + (batch.trained == "float32") * trainable
        copy = 2 * copied if batch.bf16 else 0.0
        weights = held_bytes(shape, frozen, batch.frozen) + size * trainable + copy
        return weights, size * trainable + buckets, 2 * size * trainable
    size = 2 if batch.bf16 else 4
    weights = size * (frozen + trainable) * (share if parallelism.zero == 3 else 1.0)
    gradients = size * trainable * (share if parallelism.zero >= 2 else 1.0) + 4 * trainable * share
    return weights, gradients, 12 * trainable * share


def gradient_bytes_at_peak(
    gradients: float, kept: float, batch: Batch, parallelism: Parallelism
) -> float:
    """Return bytes of gradients that exist beside `kept` bytes of activations.

    The backward pass frees activations while it fills gradients, so only the larger of the two
    counts, unless gradients of an earlier pass wait, or DDP or DeepSpeed holds buffers for them.
    """
    if batch.accumulates or parallelism.processes > 1 or parallelism.zero:
        return gradients
    return max(0.0, gradients - kept)


def frozen_bytes(
    shape: ModelShape, parameters: float, parallelism: Parallelism, batch: Batch, dtype: str
) -> float:
    """Return bytes of a model that is never trained: the reference, the reward model."""
    if parallelism.zero == 0:
        return held_bytes(shape, parameters, dtype)
    share = parallelism.processes if parallelism.zero == 3 else 1
    return (2 if batch.bf16 else 4) * parameters / share


def gathered_bytes(shape: ModelShape, parallelism: Parallelism, bf16: bool) -> float:
    """Return bytes of the full weights that ZeRO-3 gathers for the layers in use."""
    if parallelism.zero != 3:
        return 0.0
    live = min(shape.parameters, LIVE_PARAMETERS)
    return max(4.0 * shape.largest_matrix, (2 if bf16 else 4) * live)


ATTENTION_IN = {"q_proj", "k_proj", "v_proj", "query_key_value", "attn.c_attn"}
MLP_IN = {"gate_proj", "up_proj", "dense_h_to_4h", "mlp.c_fc"}
MLP_OUT = {"down_proj", "dense_4h_to_h", "mlp.c_proj"}


def saved_per_token(
    shape: ModelShape, adapter: Adapter | None, casts_inputs: bool = False
) -> tuple[int, int, int]:
    """Return how many numbers autograd keeps per token and layer.

    First those that are float32 whatever the products, within RMS norms; then those in the type of
    the residual stream; then those in the type of the products. A frozen weight needs no input for
    its gradient, so a layer with an adapter keeps less. `casts_inputs`: autocast casts a float32
    stream, so that matrices that read the same input keep a copy each.
    """
    h, q, k, i = shape.hidden, shape.queries, shape.keys, shape.intermediate
    targets = set(shape.matrices) if adapter is None else adapter.targets
    readers = [len(targets & names) for names in (ATTENTION_IN, MLP_IN)]
    inputs = h * sum(readers if casts_inputs else [min(1, count) for count in readers])
    inputs += i if targets & MLP_OUT else 0
    inputs += 0 if adapter is None else adapter.rank * len(targets)
    if shape.model_type in GATED:
        in_heads = q + k if shape.model_type in ("qwen3", "olmo2", "gemma3_text") else 0
        around = 4 * h if shape.model_type == "gemma3_text" else 2 * h
        norms, stream, rest = around + in_heads, 0, inputs + 2 * q + 2 * k + 3 * i
        if adapter is None and shape.model_type in ("olmo2", "gemma3_text"):
            norms *= 2  # a trained norm weight also keeps the normed value
        elif adapter is None:  # which the others have cast to the type of the norm's input
            stream, rest = 2 * h, rest + in_heads
        return norms, stream, rest
    if shape.model_type == "gpt_neox":
        return 0, h, inputs + 6 * h + (h if "dense" in targets else 0) + i
    return 0, 2 * h, inputs + 4 * h + 4 * i  # gpt2, whose GELU is five operations


def activation_bytes(
    shape: ModelShape, adapter: Adapter | None, batch: Batch, parallelism: Parallelism
) -> float:
    """Return bytes kept for the backward pass through one model's layers."""
    # Additions to float32 embeddings are float32, whatever the products.
    held = batch.trained if adapter is None else batch.frozen
    is_half = batch.bf16 and (parallelism.zero > 0 or held != "float32")
    stream, size = 2 if is_half else 4, 2 if batch.bf16 else 4
    norms, normed, rest = saved_per_token(shape, adapter, batch.bf16 and not is_half)
    layer = 4 * norms + stream * normed + size * rest
    outside = (4 * 2 + size) * shape.hidden
    if batch.checkpointing:
        return batch.tokens * (shape.layers * stream * shape.hidden + layer + outside)
    return batch.tokens * (shape.layers * layer + outside)


def forward_buffer_bytes(shape: ModelShape, batch: Batch) -> float:
    """Return bytes that live within one layer of a forward pass that keeps nothing."""
    return batch.tokens * (2 if batch.bf16 else 4) * (3 * shape.intermediate + 3 * shape.hidden)


def backward_buffer_bytes(shape: ModelShape, batch: Batch) -> float:
    """Return bytes of the activations' gradients, which live within one layer at a time."""
    return batch.tokens * (2 if batch.bf16 else 4) * (2 * shape.intermediate + 3 * shape.hidden)


def lm_head_bytes(
    shape: ModelShape, batch: Batch, parallelism: Parallelism, trains_head: bool
) -> float:
    """Return bytes of TRL's tiled LM head at `batch.scored` tokens, and of its gradient."""
    tile = min(batch.scored, TILE_TOKENS) * min(shape.vocabulary, TILE_WORDS)
    logits = tile * (2.0 if batch.bf16 else 4.0) if parallelism.gpu else 4.0 * tile * TILE_COPIES
    return logits + (4.0 * shape.embedding if trains_head else 0.0)


def kv_cache_bytes(shape: ModelShape, tokens: int, bf16: bool) -> float:
    """Return bytes of the key-value cache of `tokens` tokens."""
    return (2.0 if bf16 else 4.0) * tokens * 2 * shape.keys * shape.layers
