"""Random models and tokenizers of the benchmarks, and the files of their figures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def random_llama(
    tokenizer: Any,
    hidden: int,
    layers: int,
    dtype: str = "float32",
    intermediate: int | None = None,
) -> Any:
    """Return a Llama with tied embeddings over the tokenizer's vocabulary; heads of 64."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate or -(-hidden * 8 // 3 // 64) * 64,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


def word_tokenizer(words: Sequence[str], unknown: str, **special: str) -> Any:
    """Return a tokenizer with one token per word, in the order of the words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def save_figures(path: Path | None, figures: Any) -> None:
    """Write figures as JSON to the file that the user names, if any."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
