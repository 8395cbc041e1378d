"""Scores and samples on a GPU against the definition, and against those of a CPU."""

import numpy as np
import pytest
import torch

from selfcorrect.evaluate.scoring.engine import Sampling
from selfcorrect.evaluate.scoring.packed import PackedEngine
from tests.support.scoring_cases import KEYS, PROMPTS, REQUESTS, plain_log_probability
from tests.support.tiny_models import ARCHITECTURES, tiny_model, tiny_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DEVICE = "cuda"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.3)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_are_those_of_the_definition(architecture, dtype, tolerance):
    """The float32 model on a CPU defines them; bfloat16 rounds to three digits in every layer."""
    model, tokenizer = tiny_model(architecture, sharpness=4.0), tiny_tokenizer()
    expected = [
        [plain_log_probability(model, tokenizer, prompt, option) for option in options]
        for prompt, options in REQUESTS
    ]
    scores = PackedEngine(model.to(DEVICE, dtype), tokenizer).score(REQUESTS)
    for row, expected_row in zip(scores, expected, strict=True):
        assert row == pytest.approx(expected_row, abs=tolerance, rel=tolerance)


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_samples_are_those_of_the_cpu_and_of_any_batch(temperature):
    tokenizer, sampling = tiny_tokenizer(), Sampling(24, temperature, seed=3)
    on_cpu = PackedEngine(tiny_model(), tokenizer).sample(PROMPTS, KEYS, sampling)
    engine = PackedEngine(tiny_model().to(DEVICE), tokenizer)
    assert engine.sample(PROMPTS, KEYS, sampling) == on_cpu
    alone = [
        sample
        for prompt, key in zip(PROMPTS, KEYS, strict=True)
        for sample in engine.sample([prompt], [key], sampling)
    ]
    assert alone == on_cpu


def test_scores_after_samples_continue_from_the_cache():
    tokenizer, sampling = tiny_tokenizer(), Sampling(16, 1.0, seed=0)
    engine = PackedEngine(tiny_model().to(DEVICE), tokenizer)

    def then(index, sample):
        return f"{PROMPTS[index]} {sample.text} so", (" yes", " no")

    answers = engine.sample_then_score(PROMPTS, KEYS, then, sampling)
    requests = [then(index, sample) for index, (sample, _) in enumerate(answers)]
    np.testing.assert_allclose([scores for _, scores in answers], engine.score(requests), atol=1e-3)
