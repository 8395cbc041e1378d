"""A model's shape and parameter counts, from its configuration alone."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfcorrect.recipes.foundation.errors import InputError, is_from_outside, reason_of
from selfcorrect.recipes.schema import Model
from selfcorrect.train.planning.known_models import known_fields

GATED = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "smollm3", "gemma3_text")
MODEL_TYPES = (*GATED, "gpt_neox", "gpt2")

# transformers' defaults for fields that a configuration leaves out
_7B = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
       "tie_word_embeddings": False}  # fmt: skip
_LLAMA = {**_7B, "intermediate_size": 11008, "vocab_size": 32000}
_QWEN = {**_7B, "intermediate_size": 22016, "num_key_value_heads": 32, "vocab_size": 151936}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8},
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
    "olmo2": {**_LLAMA, "vocab_size": 50304},
    "smollm3": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
                "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 128256,
                "tie_word_embeddings": True},
    "gemma3_text": {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
                    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
                    "vocab_size": 262208, "tie_word_embeddings": True},
    "gpt_neox": {"hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 44,
                 "num_attention_heads": 64, "vocab_size": 50432, "tie_word_embeddings": False},
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None, "n_positions": 1024,
             "vocab_size": 50257, "tie_word_embeddings": True},
}  # fmt: skip
# transformers' attribute maps: other names for the same field
ATTRIBUTE_MAP = {
    "gpt2": {"hidden_size": "n_embd", "num_hidden_layers": "n_layer",
             "num_attention_heads": "n_head", "max_position_embeddings": "n_positions",
             "intermediate_size": "n_inner"},
}  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: its rank, and the matrices it adapts."""

    rank: int
    targets: frozenset[str]


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only transformer.

    `queries` is heads x head size, `keys` the same for key-value heads, `head` the size of one
    head; `positions` counts learned position embeddings (0: positions are rotary).
    """

    model_type: str
    hidden: int
    layers: int
    queries: int
    keys: int
    head: int
    intermediate: int
    vocabulary: int
    tied: bool
    positions: int = 0

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Input and output size of each linear map in a layer, by transformers' name."""
        h, q, k, i = self.hidden, self.queries, self.keys, self.intermediate
        if self.model_type == "gpt_neox":
            return {"query_key_value": (h, 3 * h), "dense": (h, h),
                    "dense_h_to_4h": (h, i), "dense_4h_to_h": (i, h)}  # fmt: skip
        if self.model_type == "gpt2":
            return {"attn.c_attn": (h, 3 * h), "attn.c_proj": (h, h),
                    "mlp.c_fc": (h, i), "mlp.c_proj": (i, h)}  # fmt: skip
        return {"q_proj": (h, q), "k_proj": (h, k), "v_proj": (h, k), "o_proj": (q, h),
                "gate_proj": (h, i), "up_proj": (h, i), "down_proj": (i, h)}  # fmt: skip

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        weights = sum(a * b for a, b in self.matrices.values())
        if self.model_type in ("gpt_neox", "gpt2"):  # biases everywhere, two layer norms
            return weights + sum(b for _, b in self.matrices.values()) + 4 * self.hidden
        vectors = 2 * self.hidden
        if self.model_type == "qwen2":
            vectors += self.queries + 2 * self.keys  # biases
        if self.model_type == "olmo2":
            vectors += self.queries + self.keys  # norms of queries and keys
        if self.model_type in ("qwen3", "gemma3_text"):
            vectors += 2 * self.head
        if self.model_type == "gemma3_text":
            vectors += 2 * self.hidden  # norms after attention and MLP too
        return weights + vectors

    @property
    def embedding(self) -> int:
        """Parameters of the token embedding."""
        return self.vocabulary * self.hidden

    @property
    def backbone(self) -> int:
        """Parameters without the LM head: the trunk of a critic or a reward model."""
        norm = self.hidden * (2 if self.model_type in ("gpt_neox", "gpt2") else 1)
        positions = self.positions * self.hidden
        return self.embedding + positions + self.layers * self.layer + norm

    @property
    def parameters(self) -> int:
        """All parameters of the causal language model."""
        return self.backbone + (0 if self.tied else self.embedding)

    @property
    def largest_matrix(self) -> int:
        """Size of the largest single weight."""
        return max(self.embedding, *(a * b for a, b in self.matrices.values()))

    def trainable(self, adapter: Adapter | None, parameters: int | None = None) -> int:
        """Return how many parameters training changes: the adapter's, or `parameters` (all)."""
        if adapter is None:
            return self.parameters if parameters is None else parameters
        sizes = [sum(size) for name, size in self.matrices.items() if name in adapter.targets]
        return self.layers * adapter.rank * sum(sizes)


def shape_of(fields: dict[str, Any], where: str, vocabulary: int | None = None) -> ModelShape:
    """Return the shape that a configuration describes; `vocabulary` is used where it has none.

    Raises InputError for a model type whose layers are not known here, and for a size that is not
    a positive integer.
    """
    model_type = fields.get("model_type")
    if model_type not in MODEL_TYPES:
        raise InputError(
            f"{where}: the memory of a {model_type!r} model cannot be estimated; "
            f"supported: {', '.join(MODEL_TYPES)}"
        )
    renamed = ATTRIBUTE_MAP.get(model_type, {})
    values = {**DEFAULTS[model_type], **({"vocab_size": vocabulary} if vocabulary else {})}
    values |= {renamed.get(key, key): value for key, value in fields.items()}

    def number(key: str, default: int | None = None) -> int:
        value = values.get(renamed.get(key, key))
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{where}: {key} is {value!r}; it must be a positive integer")
        return value

    hidden, heads = number("hidden_size"), number("num_attention_heads")
    head = number("head_dim", hidden // heads)
    return ModelShape(
        model_type,
        hidden,
        number("num_hidden_layers"),
        heads * head,
        number("num_key_value_heads", heads) * head if model_type in GATED else hidden,
        head,
        number("intermediate_size", 4 * hidden),
        number("vocab_size"),
        bool(values["tie_word_embeddings"]),
        number("max_position_embeddings") if model_type == "gpt2" else 0,
    )


def model_shape(model: Model, key: str, vocabulary: int | None = None) -> ModelShape:
    """Return the shape of a recipe's model, without reading weights.

    The configuration comes from `scratch`, a folder, the table of known models, or the hub.
    `vocabulary` is the size of the society's tokenizer, for models from scratch. Raises InputError
    that starts with `key`.
    """
    if model.scratch is not None:
        return shape_of(model.scratch, f"{key}.scratch", vocabulary)
    assert model.path is not None
    folder = Path(model.path).expanduser()
    config = folder / "config.json"
    if model.gguf_file is None and config.is_file():
        try:
            fields = json.loads(config.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise InputError(f"{key}.path: {config}: cannot be read ({error})") from None
        return shape_of(_text_fields(fields), f"{key}.path: {config}")
    if model.gguf_file is not None and (folder / model.gguf_file).is_file():
        return shape_of(_through_transformers(model, key), f"{key}.gguf_file: {model.gguf_file}")
    if (known := known_fields(model.path)) is not None:
        return shape_of(known, key)
    if folder.is_dir():
        missing = model.gguf_file or "config.json"
        raise InputError(f"{key}.path: {folder}: has no {missing}; give a complete model folder")
    if model.path.startswith((".", "/", "~")) or model.path.count("/") > 1:
        raise InputError(f"{key}.path: no model folder {model.path}")
    return shape_of(_through_transformers(model, key), f"{key}.path: {model.path}")


def _text_fields(fields: Any) -> dict[str, Any]:
    if not isinstance(fields, dict):
        return {}
    text = fields.get("text_config")
    return text if isinstance(text, dict) else fields


def _through_transformers(model: Model, key: str) -> dict[str, Any]:
    """Read a configuration from the hub, its cache, or the header of a GGUF file."""
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    options = {"revision": model.revision, "gguf_file": model.gguf_file}
    given = {key: value for key, value in options.items() if value}
    try:  # an estimate runs nobody's code
        config = AutoConfig.from_pretrained(model.path, trust_remote_code=False, **given)
    except (OSError, ValueError, ImportError, KeyError) as error:
        if is_from_outside(error):
            raise
        raise InputError(
            f"{key}.path: {model.path}: its configuration is neither on the hub nor in the cache "
            f"({reason_of(error)}); give a folder with its config.json"
        ) from None
    return config.get_text_config().to_dict()
