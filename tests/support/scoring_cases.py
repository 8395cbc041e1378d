"""Requests, models and tokenizers on which all ways of scoring must agree."""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    MambaConfig,
    MistralConfig,
    MptConfig,
    PreTrainedTokenizerFast,
)

from tests.support.tiny_models import tiny_tokenizer

REQUESTS = [
    ("<s> the doctor told her", (" that he", " that she", " that they")),
    ("<s> who is fair ?", (" the man", " yes", " the old woman at home")),
    ("<s> the doctor told her", (" that", " yes")),  # a prompt again, an option inside another
    ("<s> the", (" answer is ( a )", " answer is ( b )", " answer is ( c )")),
    ("<s> " + "north south east west " * 20 + "please", (" admit", " fair , not early")),
    ("<s>", (" no", " no reason")),
]
PROMPTS = [prompt for prompt, _ in REQUESTS] + ["<s> group one", "<s> please"]
KEYS = [f"item-{i}" for i in range(len(PROMPTS))]

TOKENS = {"vocab_size": len(tiny_tokenizer()), "pad_token_id": 0, "eos_token_id": 2}
# Models that build their masks themselves, and the forward that scores them.
UNPACKABLE = {
    "bloom": (BloomConfig(**TOKENS, hidden_size=32, n_layer=2, n_head=4), "prefixed"),
    "mpt": (MptConfig(**TOKENS, d_model=32, n_layers=2, n_heads=4), "prefixed"),
    "falcon with alibi": (
        FalconConfig(
            **TOKENS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True
        ),
        "prefixed",
    ),
    "mamba": (MambaConfig(**TOKENS, hidden_size=32, num_hidden_layers=2, state_size=4), "plain"),
}


def random_model(config: Any) -> Any:
    """Return a random causal LM in float32 and eval mode, sharpened as in `tiny_model`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(8)
    return model


def sliding_window_model(window: int) -> Any:
    """Return a tiny Mistral whose layers attend to the last `window` tokens."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return random_model(MistralConfig(**TOKENS, **shape, **heads, sliding_window=window))


def plain_log_probability(model: Any, tokenizer: Any, prompt: str, option: str) -> float:
    """Return log p(option | prompt) by definition: one string, no padding, no mask, every logit."""
    start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    tokens = tokenizer(prompt + option, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].double()
    logs = torch.log_softmax(logits, dim=-1)
    return sum(float(logs[at - 1, tokens[at]]) for at in range(start, len(tokens)))


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-pair tokenizer whose only merge crosses the quotation mark."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "x", '"', "y", "e", "s", "n", '"y'])}
    core = Tokenizer(BPE(vocabulary, [('"', "y")]))
    core.pre_tokenizer = pre_tokenizers.Split("z", "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>")
