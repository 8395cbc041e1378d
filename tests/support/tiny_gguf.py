"""A tiny Llama with a byte-level tokenizer as a GGUF file, written on the spot."""

from pathlib import Path

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

HIDDEN, FFN, HEADS, LAYERS = 16, 32, 2, 1
SPECIAL = ["<unk>", "<s>", "<|endoftext|>"]  # the last is what GGUF's readers would add


def write_gguf(path: Path, seed: int = 0) -> None:
    """Write a model with random weights in float32; special tokens are not in its alphabet."""
    import gguf

    tokens = [*SPECIAL, *sorted(ByteLevel.alphabet()), "Ġs", "he"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(640)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["Ġ s", "h e"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    rng = np.random.default_rng(seed)
    shapes = {"token_embd": (len(tokens), HIDDEN), "output": (len(tokens), HIDDEN)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.attn_{part}": (HIDDEN, HIDDEN) for part in "qkv"}
        shapes |= {
            f"blk.{layer}.attn_output": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_gate": (FFN, HIDDEN),
            f"blk.{layer}.ffn_up": (FFN, HIDDEN),
            f"blk.{layer}.ffn_down": (HIDDEN, FFN),
        }
    for name, shape in shapes.items():
        values = rng.normal(0, 0.1, shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", values)
    norms = ["output_norm", *(f"blk.{i}.{n}_norm" for i in range(LAYERS) for n in ("attn", "ffn"))]
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
