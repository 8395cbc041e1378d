"""Scores and samples are those of rows read alone, for every causal architecture of transformers.

The models are tiny and random. Requests have very different lengths, and share prefixes or not.
"""

import random

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from selfcorrect.evaluate.scoring import packed
from selfcorrect.evaluate.scoring.engine import Sampling
from selfcorrect.evaluate.scoring.packed import PackedEngine
from tests.support.architectures import CAUSAL, NOT_BUILT, REPRESENTATIVES, members, small_model
from tests.support.tiny_models import WORDS, tiny_tokenizer

torch.set_num_threads(1)

TOKENIZER = tiny_tokenizer()
WINDOW = 24
_FOUR = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}


def rope(kind, **settings):
    return {
        "rope_parameters": {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, **settings},
    }


# Settings that act beyond a number of tokens, here less than the longest prompt has.
VARIANTS = {
    "gpt_neo, window within a pack": ("gpt_neo", {"window_size": 200}),
    "gpt_neo, narrow window": ("gpt_neo", {"window_size": WINDOW}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "ministral": ("ministral", {"sliding_window": WINDOW}),
    "gemma2": ("gemma2", {"sliding_window": WINDOW}),
    "gemma3": ("gemma3_text", {"sliding_window": WINDOW}),
    "cohere2": ("cohere2", {"sliding_window": WINDOW}),
    "gpt_oss": ("gpt_oss", {"sliding_window": WINDOW}),
    "olmo3": ("olmo3", {"sliding_window": WINDOW}),
    "exaone4": ("exaone4", {"sliding_window": WINDOW}),
    "starcoder2": ("starcoder2", {"sliding_window": WINDOW}),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "qwen2": (
        "qwen2",
        {
            "sliding_window": WINDOW,
            "use_sliding_window": True,
            "max_window_layers": 1,
            "layer_types": None,
        },
    ),
    "llama4, chunks": ("llama4", {"attention_chunk_size": WINDOW}),
    "modernbert": ("modernbert-decoder", {"local_attention": WINDOW}),
    "recurrent_gemma": ("recurrent_gemma", {"attention_window_size": WINDOW}),
    "deepseek_v32, sparse": ("deepseek_v32", {"index_topk": WINDOW}),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "longrope": ("llama", rope("longrope", original_max_position_embeddings=64, **_FOUR)),
    "phi3, longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 64,
            **rope("longrope", original_max_position_embeddings=64, **_FOUR),
        },
    ),
    "dynamic": ("llama", {"context": 64, **rope("dynamic")}),
    "yarn": ("llama", rope("yarn", original_max_position_embeddings=64)),
    "llama3": (
        "llama",
        rope(
            "llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
        ),
    ),
}
# Each computes as one of the others does.
SIMILAR = {
    "ministral", "cohere2", "olmo3", "exaone4", "starcoder2", "phi3", "gemma3", "phi3, longrope",
    "yarn", "llama3",
}  # fmt: skip
# Models whose own `generate` is wrong beside others, or with its cache, and some that it serves.
SAMPLED = ["bart", "camembert", "deepseek_v32", "gpt_neo", "llama", "mamba", "opt"]


def requests(count, longest):
    """Prompts of 2 to `longest` tokens, with options of one and two tokens."""
    chance = random.Random(0)
    words = [word for word in WORDS if word.strip()]
    stems = [chance.choices(words, k=longest) for _ in range(3)]
    made = []
    for index in range(count):
        length = round(longest ** chance.random())
        shared = chance.randint(0, length)
        prompt = stems[index % 3][:shared] + chance.choices(words, k=length - shared)
        first, second, third = chance.sample(words, 3)
        made.append(("<s> " + " ".join(prompt), (f" {first}", f" {second} {third}")))
    return made


def plain_scores(model, request):
    """Scores by definition: each option alone, and nothing but its tokens.

    A row of one token goes before, to which dynamic rotary embeddings adapt, as in a new model.
    """
    prompt, options = request
    start = len(TOKENIZER(prompt)["input_ids"])
    scores = []
    with torch.no_grad():
        for option in options:
            tokens = torch.tensor([TOKENIZER(prompt + option)["input_ids"]])
            model(tokens[:, :1])
            logs = model(tokens[:, :-1]).logits[0, start - 1 :].double().log_softmax(dim=-1)
            scores.append(float(logs.gather(1, tokens[0, start:, None]).sum()))
    return scores


def assert_plain_scores(model, asked, within=1e-4):
    for request, scores in zip(asked, PackedEngine(model, TOKENIZER).score(asked), strict=True):
        assert scores == pytest.approx(plain_scores(model, request), abs=within)


def test_matrix_holds_every_causal_architecture():
    built = {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] for name in CAUSAL}
    missing = [
        name
        for name, architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
        if architecture not in built and name not in NOT_BUILT
    ]
    assert not missing and len(CAUSAL) == len(built) > 150
    assert set(CAUSAL) >= REPRESENTATIVES


@pytest.mark.parametrize("name", members(CAUSAL))
def test_scores_are_those_of_rows_read_alone(name):
    assert_plain_scores(small_model(name), requests(8, 80))


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.matrix] if n in SIMILAR else []) for n in VARIANTS],
)
def test_scores_beyond_windows_and_switches(name, monkeypatch):
    architecture, settings = VARIANTS[name]
    if name == "dynamic":  # acts beyond the context of the config
        monkeypatch.setattr(packed, "context_length", lambda model: None)
    asked = requests(60, 300)
    assert len(PackedEngine(small_model("llama"), TOKENIZER).prepare(asked).packs) > 1
    # Rounding decides which of two tied keys a sparse layer keeps, and so moves a score.
    within = 2e-3 if "sparse" in name else 1e-4
    assert_plain_scores(small_model(architecture, **settings), asked, within)


@pytest.mark.parametrize("name", [*SAMPLED, "longrope", "mistral", "phi3, longrope", "dynamic"])
def test_samples_are_those_that_a_model_writes_alone(name, monkeypatch):
    architecture, settings = VARIANTS.get(name, (name, {}))
    if name == "dynamic":
        monkeypatch.setattr(packed, "context_length", lambda model: None)
    model = small_model(architecture, **settings)
    prompts = [prompt for prompt, _ in requests(10, 100)]
    engine = PackedEngine(model, TOKENIZER)
    for prompt, sample in zip(
        prompts, engine.sample(prompts, prompts, Sampling(6, 0.0, seed=0)), strict=True
    ):
        tokens = TOKENIZER(prompt)["input_ids"]
        with torch.no_grad():
            for _ in range(sample.num_tokens):
                model(torch.tensor([tokens[:1]]))
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        written = tokens[-sample.num_tokens :]
        assert TOKENIZER.decode(written, skip_special_tokens=True) == sample.text
        assert sample.truncated or written[-1] == TOKENIZER.eos_token_id
    drawn = engine.sample(prompts, prompts, Sampling(6, 1.0, seed=0))
    alone = [engine.sample([prompt], [prompt], Sampling(6, 1.0, seed=0))[0] for prompt in prompts]
    assert drawn == alone
