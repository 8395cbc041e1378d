"""VllmEngine against a recorded interface: the names and arguments of vLLM's SamplingParams
(commit 00388f65), TokensPrompt and LLM.generate as lm-eval 0.4.13 calls them."""

import sys
import types
from dataclasses import dataclass

import pytest
import torch

from selfcorrect.evaluate.prompts.tokenized import PromptTooLong
from selfcorrect.evaluate.scoring.engine import Sampling
from selfcorrect.evaluate.scoring.packed import PackedEngine
from selfcorrect.evaluate.scoring.vllm import load_vllm
from selfcorrect.recipes.foundation.errors import InputError
from tests.support.tiny_models import tiny_model, tiny_tokenizer

REQUESTS = [
    ("<s>Human : who went ?", (" doctor", " the nurse told", " student")),
    ("<s>the man said", (" yes", " no")),
]


@dataclass
class SamplingParams:
    temperature: float = 1.0
    seed: int | None = None
    stop: str | None = None
    max_tokens: int | None = 16
    prompt_logprobs: int | None = None
    detokenize: bool = True


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


def tokens_prompt(*, prompt_token_ids):
    return {"prompt_token_ids": prompt_token_ids}


class LLM:
    def __init__(
        self, model, *, revision=None, enable_prefix_caching=None, load_format, trust_remote_code
    ):
        assert enable_prefix_caching
        assert load_format == "safetensors" and trust_remote_code is False
        self.model, self.tokenizer = tiny_model(), tiny_tokenizer()
        config = types.SimpleNamespace(max_model_len=256)
        self.llm_engine = types.SimpleNamespace(model_config=config)

    def get_tokenizer(self):
        return self.tokenizer

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        many = sampling_params if isinstance(sampling_params, list) else None
        every = many or [sampling_params] * len(prompts)
        return [self._one(p["prompt_token_ids"], s) for p, s in zip(prompts, every, strict=True)]

    @torch.no_grad()
    def _one(self, ids, params):
        assert len(ids) + 1 <= 256  # vLLM refuses a prompt that leaves no room for one token
        answer = types.SimpleNamespace(prompt_logprobs=None)
        if params.prompt_logprobs:
            rows = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            answer.prompt_logprobs = [None]
            for row, token in zip(rows, ids[1:], strict=False):
                top = int(row.argmax())
                answer.prompt_logprobs.append(
                    {top: Logprob(float(row[top]), 1), token: Logprob(float(row[token]))}
                )
        new, reason = [], "length"
        noise = torch.Generator().manual_seed(params.seed or 0)
        while len(new) < params.max_tokens:
            row = self.model(torch.tensor([ids + new])).logits[0, -1]
            greedy = params.temperature == 0
            chances = (row / (params.temperature or 1)).softmax(-1)
            new.append(int(row.argmax() if greedy else chances.multinomial(1, generator=noise)))
            if new[-1] == self.tokenizer.eos_token_id:
                reason = "stop"
                break
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        done = types.SimpleNamespace(text=text, token_ids=new, finish_reason=reason)
        answer.outputs = [done]
        return answer


@pytest.fixture
def engine(monkeypatch):
    fake = types.ModuleType("vllm")
    fake.LLM, fake.SamplingParams, fake.TokensPrompt = LLM, SamplingParams, tokens_prompt
    monkeypatch.setitem(sys.modules, "vllm", fake)
    return load_vllm("tiny")


def test_scores_equal_those_of_the_packed_engine(engine):
    expected = PackedEngine(tiny_model(), tiny_tokenizer()).score(REQUESTS)
    for scores, exact in zip(engine.score(REQUESTS), expected, strict=True):
        assert scores == pytest.approx(exact, abs=1e-4)


def test_greedy_samples_agree_and_random_ones_depend_on_the_key_alone(engine):
    prompts = [prompt for prompt, _ in REQUESTS]
    likeliest, random = Sampling(6, temperature=0.0, seed=3), Sampling(6, temperature=1.0, seed=3)
    packed = PackedEngine(tiny_model(), tiny_tokenizer())
    greedy = engine.sample(prompts, ["a", "b"], likeliest)
    assert greedy == packed.sample(prompts, ["a", "b"], likeliest)
    both = engine.sample(prompts, ["a", "b"], random)
    assert both[1:] == engine.sample(prompts[1:], ["b"], random)
    assert both[1:] != engine.sample(prompts[1:], ["c"], random)


def test_prompt_beyond_the_context_is_refused(engine):
    with pytest.raises(PromptTooLong):
        engine.score([("<s>" + " the" * 254, (" yes", " no"))])


def test_missing_vllm_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match=r"selfcorrect\[vllm\]"):
        load_vllm("tiny")
