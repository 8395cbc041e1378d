"""Tiny random models of every causal architecture that transformers builds without remote code.

    CAUSAL               the model types, such as "llama"
    members(CAUSAL)      the same as parameters of a test: REPRESENTATIVES always run, the others
                         carry the marker `matrix` (pytest --matrix)
    NOT_BUILT            model type -> why there is no tiny model of it; together they are all that
                         `AutoModelForCausalLM` knows (a test checks this)
    small_config(name, dropout=0.0, context=1024, **changes)
    small_model(name, dropout=0.0, context=1024, sharpness=4.0, **changes)

A model has two layers (one of each kind where layers differ), width 32, four heads, and the token
ids of `tiny_tokenizer`: 0 pads, 1 begins, 2 ends. It is built in some 20 ms, in float32 and eval
mode, always with the same weights. `changes` are keys of the config (of its text part), such as
`sliding_window=8`. `dropout` sets every dropout of the config but layerdrop. An architecture that
another model type shares (`gpt-sw3` is GPT-2) is listed once.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.support.tiny_models import tiny_tokenizer

_MULTIMODAL = "a vision or audio tower around a language model that is listed by itself"
_NOT_CAUSAL = "a token's logits depend on later tokens, so there is no log-probability of options"
NOT_BUILT = {
    "blt": "reads bytes through tables of 500,000 hashes",
    "cpmant": _NOT_CAUSAL,
    "fuyu": _MULTIMODAL,
    "gemma3": _MULTIMODAL,
    "gemma3n": _MULTIMODAL,
    "gemma4_assistant": "a drafter, which reads the cache of another model",
    "gemma4_unified_assistant": "a drafter, which reads the cache of another model",
    "got_ocr2": _MULTIMODAL,
    "moshi": _MULTIMODAL,
    "moss_transcribe_diarize": _MULTIMODAL,
    "musicgen": "predicts audio codebooks",
    "musicgen_melody": "predicts audio codebooks",
    "dots3_note": _MULTIMODAL,
    "qwen4_exp": _MULTIMODAL,
    "prophetnet": _NOT_CAUSAL,
    "xlnet": _NOT_CAUSAL,
}


def _of(names: str, value: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


_LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
    "num_blocks",
)  # fmt: skip
_SMALL = {
    **_of("hidden_size n_embd d_model emb_dim embedding_size input_embedding_size dim", 32),
    **_of("embedding_dim attention_hidden_size lru_width word_embed_proj_dim", 32),
    **_of("intermediate_size ffn_dim n_inner encoder_ffn_dim decoder_ffn_dim d_inner", 48),
    **_of("feed_forward_size dff intermediate_size_mlp shared_expert_intermediate_size", 48),
    **_of("shared_intermediate_size ffn_hidden_size", 48),
    **_of("moe_intermediate_size expert_ffn_hidden_size", 16),
    **_of("num_attention_heads n_head n_heads attention_heads encoder_attention_heads", 4),
    **_of("decoder_attention_heads num_heads", 4),
    **_of("num_key_value_heads", 2),
    **_of("head_dim d_head attention_head_size v_head_dim qk_nope_head_dim qk_rope_head_dim", 8),
    **_of("kv_channels rotary_dim mamba_d_head index_head_dim linear_key_head_dim", 8),
    **_of("linear_value_head_dim hidden_size_per_layer_input", 8),
    **_of("qk_head_dim attention_head_dim kv_lora_rank q_lora_rank o_lora_rank", 16),
    **_of("num_experts n_routed_experts num_local_experts moe_num_experts", 4),
    **_of("num_experts_per_tok moe_topk moe_k num_experts_per_token", 2),
    **_of("n_group topk_group num_expert_group n_shared_experts num_shared_experts", 1),
    **_of("moe_num_shared_experts", 1),
    **_of("mamba_n_heads", 8),
    **_of("mamba_d_state state_size ssm_state_size laurel_rank", 4),
    **_of("mamba_dt_rank time_step_rank index_n_heads linear_num_key_heads", 2),
    **_of("linear_num_value_heads", 4),
    **_of("index_topk", 256),
    **_of("logit_scale", 1.0),
}
_CONTEXT = (
    "max_position_embeddings n_positions n_ctx context_length max_seq_len model_max_length "
    "max_target_positions max_source_positions"
).split()
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
# What a config needs besides: sizes that must fit each other, and keys without a default.
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE}
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2
        },
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {
        "per_layer_config": {}, "shared_experts_intermediate_size": 16, "head_dim": 16
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0],
        "intermediate_size": [48, 48],
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "inkling_text": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "d_rel": 4,
        "logits_mup_width_multiplier": 1.0,
    },
    "inkling2_text": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "d_rel": 4,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"], "full_attn_idxs": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"ffn_hidden_size": 48, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {
        "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1,
        "moe_shared_expert_intermediate_size": 48,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64,
        "indexer_compress_ratio": 4, "hc_lowrank": 8,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [32, 32]},
    "roc_bert": {
        "pronunciation_embed_dim": 8, "pronunciation_vocab_size": 8,
        "shape_embed_dim": 8, "shape_vocab_size": 8,
    },
    "xlm": {"causal": True},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4,
        "attention_hidden_size": 64, "num_key_value_heads": 4,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4,
        "attention_hidden_size": 64, "num_key_value_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def _causal() -> tuple[str, ...]:
    first: dict[str, str] = {}
    for name, architecture in sorted(
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items(), key=lambda entry: (len(entry[0]), entry[0])
    ):
        if name not in NOT_BUILT:
            first.setdefault(architecture, name)
    return tuple(sorted(first.values()))


CAUSAL = _causal()
# A member for every mechanism that scoring, PPO or reward models meet.
REPRESENTATIVES = {
    "llama", "qwen3_moe", "mixtral", "phimoe", "deepseek_v3",  # rotary; experts; latent keys
    "gpt2", "opt", "xglm", "ctrl", "bert", "roberta",  # learned, sinusoidal, offset positions
    "bloom", "mpt", "gpt_neox", "falcon", "minicpm3",  # ALiBi; parallel residual; scaled head
    "mistral", "gemma2", "gemma3_text", "gpt_oss", "llama4",  # windows, caps, sinks, chunks
    "gemma3n_text", "deepseek_v32", "deepseek_v4", "modernbert-decoder",  # sparse attention
    "mamba", "mamba2", "jamba", "recurrent_gemma", "rwkv", "xlstm",  # states in place of keys
    "lfm2", "qwen3_next", "minimax", "bailing_hybrid",  # convolutions, linear attention
    "bart", "xlm", "git", "mllama", "emu3", "reformer", "diffllama",  # decoders, and refused ones
}  # fmt: skip


def members(names: Iterable[str]) -> list[Any]:
    """Return architectures as parameters of a test, the not representative ones marked `matrix`."""
    return [
        name if name in REPRESENTATIVES else pytest.param(name, marks=pytest.mark.matrix)
        for name in names
    ]


def small_config(name: str, *, dropout: float = 0.0, context: int = 1024, **changes: Any) -> Any:
    """Return the config of a tiny model of this type; see the head of this file."""
    size = len(tiny_tokenizer())
    keys = {
        "vocab_size": size,
        "vocab_size_per_layer_input": size,
        **_of(" ".join(_CONTEXT), context),
    }
    return _shrink(CONFIG_MAPPING[name], keys, dropout, {**_OWN.get(name, {}), **changes})


def _shrink(kind: Any, keys: dict[str, Any], dropout: float, changes: dict[str, Any]) -> Any:
    default = _default(kind)
    settings = {key: value for key, value in (_SMALL | keys).items() if default.get(key)}
    layers = [key for key in _LAYERS if default.get(key)]
    per_layer = {
        key: list(dict.fromkeys(map(_hashable, value)))
        for key, value in default.items()
        if layers and isinstance(value, list) and len(value) == default[layers[0]]
    }
    per_layer = {key: kinds for key, kinds in per_layer.items() if len(kinds) < default[layers[0]]}
    depth = max(2, *(len(kinds) for kinds in per_layer.values())) if per_layer else 2
    settings |= {key: (kinds * depth)[:depth] for key, kinds in per_layer.items()}
    settings |= dict.fromkeys(layers, depth)
    drops = [key for key, value in default.items() if "drop" in key and isinstance(value, float)]
    settings |= {key: 0.0 if "layerdrop" in key else dropout for key in drops}
    if "is_decoder" in default:
        settings["is_decoder"] = True
    if "kv_lora_rank" in settings and "num_key_value_heads" in settings:
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    settings |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    parts = {
        key: part
        for key, part in getattr(kind, "sub_configs", {}).items()
        if default.get(key) and hasattr(part, "model_type")
    }
    for key, part in parts.items():
        inside = changes if key == "text_config" else {}
        settings[key] = _shrink(part, keys, dropout, inside).to_dict()
    return kind(**(settings | ({} if "text_config" in parts else changes)))


@cache
def _default(kind: Any) -> dict[str, Any]:
    return kind().to_dict()


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def small_model(
    name: str, *, dropout: float = 0.0, context: int = 1024, sharpness: float = 4.0, **changes: Any
) -> Any:
    """Return a tiny causal LM of this type; see the head of this file.

    `sharpness` scales every matrix up, so that a wrong position or mask shows in the scores.
    """
    config = small_config(name, dropout=dropout, context=context, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.mul_(sharpness)
    return model.eval()
