"""VllmEngine and its loader against a recorded interface: the names and arguments of vLLM 0.30's
LLM, SamplingParams, TokensPrompt and LoRARequest. test_vllm.py (marker vllm) runs vLLM itself."""

import copy
import os
import sys
import types
from dataclasses import dataclass, field

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from selfcorrect.evaluate.prompts.tokenized import PromptTooLong
from selfcorrect.evaluate.scoring.engine import Sampling
from selfcorrect.evaluate.scoring.load_model import load_model, saved_dtype
from selfcorrect.evaluate.scoring.packed import PackedEngine
from selfcorrect.evaluate.scoring.vllm import VllmLoader, problem_of_adapter
from selfcorrect.evaluate.scoring.weights import files_digest, weights_digest
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
    stop_token_ids: list[int] = field(default_factory=list)
    max_tokens: int | None = 16
    prompt_logprobs: int | None = None
    detokenize: bool = True


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


def tokens_prompt(*, prompt_token_ids):
    return {"prompt_token_ids": prompt_token_ids}


class LLM:
    """A vLLM engine: one model, exchanged in place (`exchange` says how well), and adapters."""

    started, closed, exchange = [], [], "exact"

    def __init__(
        self, model, *, dtype, load_format, trust_remote_code, worker_extension_cls,
        enable_prefix_caching, max_model_len=256, enable_lora=False, max_lora_rank=16,
        lora_target_modules=None, tokenizer=None, gpu_memory_utilization=0.9, enforce_eager=False,
    ):  # fmt: skip
        assert enable_prefix_caching and load_format == "safetensors" and not trust_remote_code
        self.model, self.dtype, self.ranks = self._read(model), dtype, max_lora_rank
        self.loras = {}
        config = types.SimpleNamespace(max_model_len=max_model_len)
        core = types.SimpleNamespace(shutdown=lambda: self.closed.append(model))
        self.llm_engine = types.SimpleNamespace(model_config=config, engine_core=core)
        self.started.append(model)

    def _read(self, folder):
        return AutoModelForCausalLM.from_pretrained(folder).eval()

    def collective_rpc(self, method, kwargs=None):
        if method == "digest_of_weights":
            return [weights_digest(self.model)]
        assert method == "reload_weights"
        if self.exchange == "none":
            raise RuntimeError("no weights")
        head = copy.deepcopy(self.model.lm_head)
        self.model = self._read(kwargs["weights_path"])
        if self.exchange == "old head":  # vLLM 0.30 on a CPU with tied embeddings
            self.model.lm_head = head

    def reset_prefix_cache(self):
        return True

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None):
        many = sampling_params if isinstance(sampling_params, list) else None
        every = many or [sampling_params] * len(prompts)
        model = self.model
        if lora_request is not None:  # as vLLM: what a name or number stood for once, it stands for
            key = (lora_request.lora_name, lora_request.lora_int_id)
            fresh = lambda: load_model(lora_request.lora_path, device="cpu")[0]  # noqa: E731
            model = self.loras.setdefault(key[0], self.loras.get(key[1]) or fresh())
            self.loras[key[1]] = model
        return [
            self._one(model, p["prompt_token_ids"], s) for p, s in zip(prompts, every, strict=True)
        ]

    @torch.no_grad()
    def _one(self, model, ids, params):
        limit = self.llm_engine.model_config.max_model_len
        assert len(ids) + 1 <= limit  # vLLM refuses a prompt that leaves no room for one token
        answer = types.SimpleNamespace(prompt_logprobs=None)
        if params.prompt_logprobs:
            rows = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            answer.prompt_logprobs = [None]
            for row, token in zip(rows, ids[1:], strict=False):
                top = int(row.argmax())
                answer.prompt_logprobs.append(
                    {top: Logprob(float(row[top]), 1), token: Logprob(float(row[token]))}
                )
        new, reason = [], "length"
        noise = torch.Generator().manual_seed(params.seed or 0)
        end = tiny_tokenizer().eos_token_id
        while len(new) < params.max_tokens:
            row = model(torch.tensor([ids + new])).logits[0, -1]
            greedy = params.temperature == 0
            chances = (row / (params.temperature or 1)).softmax(-1)
            new.append(int(row.argmax() if greedy else chances.multinomial(1, generator=noise)))
            if new[-1] == end:
                reason = "stop"
                break
        text = tiny_tokenizer().decode(new, skip_special_tokens=True)
        done = types.SimpleNamespace(
            text=text, token_ids=new, finish_reason=reason, stop_reason=None
        )
        answer.outputs = [done]
        return answer


def save(folder, seed, tied=True):
    model = tiny_model(seed=seed)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three full checkpoints with tied embeddings, and two adapters on the first of them."""
    root = tmp_path_factory.mktemp("models")
    full = [save(root / f"full-{seed}", seed) for seed in range(3)]
    adapters = []
    for seed in range(2):
        base = load_model(full[0], device="cpu")[0]
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        get_peft_model(base, config).save_pretrained(root / f"lora-{seed}")
        adapters.append(root / f"lora-{seed}")
    return full, adapters


@pytest.fixture
def vllm(monkeypatch):
    fake, requests = types.ModuleType("vllm"), types.ModuleType("vllm.lora.request")
    fake.LLM, fake.SamplingParams, fake.TokensPrompt = LLM, SamplingParams, tokens_prompt
    requests.LoRARequest = LoRARequest
    modules = {"vllm": fake, "vllm.lora": requests, "vllm.lora.request": requests}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(LLM, "started", [])
    monkeypatch.setattr(LLM, "closed", [])
    return LLM


@pytest.fixture
def engine(vllm, folders):
    return VllmLoader().load(str(folders[0][0]))


def test_scores_equal_those_of_the_packed_engine(engine, folders):
    expected = PackedEngine(*load_model(folders[0][0], device="cpu")).score(REQUESTS)
    for scores, exact in zip(engine.score(REQUESTS), expected, strict=True):
        assert scores == pytest.approx(exact, abs=1e-4)


def test_greedy_samples_agree_and_random_ones_depend_on_the_key_alone(engine, folders):
    prompts = [prompt for prompt, _ in REQUESTS]
    likeliest, random = Sampling(6, temperature=0.0, seed=3), Sampling(6, temperature=1.0, seed=3)
    packed = PackedEngine(*load_model(folders[0][0], device="cpu"))
    greedy = engine.sample(prompts, ["a", "b"], likeliest)
    assert greedy == packed.sample(prompts, ["a", "b"], likeliest)
    both = engine.sample(prompts, ["a", "b"], random)
    assert both[1:] == engine.sample(prompts[1:], ["b"], random)
    assert both[1:] != engine.sample(prompts[1:], ["c"], random)


@pytest.mark.parametrize(
    ("exchange", "starts"), [("exact", 2), ("old head", 4), ("none", 4)], ids=str
)
def test_checkpoints_are_exchanged_in_one_engine_or_loaded_afresh(
    vllm, folders, monkeypatch, caplog, exchange, starts
):
    """A wrong exchange is noticed at the first one, by comparison with a fresh load."""
    monkeypatch.setattr(vllm, "exchange", exchange)
    loader, full = VllmLoader(), folders[0]
    for folder in (*full, full[0]):
        engine = loader.load(str(folder), room=lambda tokenizer: 40)
        assert (engine.dtype, engine.context) == ("float32", 128)
        exact = PackedEngine(*load_model(folder, device="cpu")).score(REQUESTS)
        for scores, expected in zip(engine.score(REQUESTS), exact, strict=True):
            assert scores == pytest.approx(expected, abs=1e-4)
    assert len(vllm.started) == starts
    assert ("differ" in caplog.text) == (exchange == "old head")
    assert ("cannot exchange" in caplog.text) == (exchange == "none")
    loader.close()
    assert vllm.closed == vllm.started


def test_adapters_are_applied_under_names_and_numbers_of_their_own(vllm, folders, tmp_path):
    """An adapter that is written again in the same place is another adapter."""
    loader, (full, adapters) = VllmLoader(), folders
    place = tmp_path / "adapter"
    names = []
    for folder in (adapters[0], adapters[1], adapters[0]):
        place.mkdir(exist_ok=True)
        for file in folder.iterdir():
            if file.is_file():
                (place / file.name).write_bytes(file.read_bytes())
        engine = loader.load(str(place))
        names.append(engine._adapter.lora_name)
        exact = PackedEngine(*load_model(folder, device="cpu")).score(REQUESTS)
        for scores, expected in zip(engine.score(REQUESTS), exact, strict=True):
            assert scores == pytest.approx(expected, abs=1e-4)
    assert names == [files_digest(adapters[i]) for i in (0, 1, 0)]
    assert vllm.started == [str(full[0])]  # the base, once


def test_what_vllm_would_ignore_in_an_adapter_is_refused():
    assert problem_of_adapter({"r": 8, "target_modules": ["q_proj"], "lora_alpha": 16}) is None
    assert problem_of_adapter(LoraConfig(r=4, use_rslora=True).to_dict()) is None
    for key, value in {
        "use_dora": True, "modules_to_save": ["lm_head"], "bias": "all", "r": 1024,
        "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 2}, "init_lora_weights": "pissa",
        "peft_type": "LOHA", "trainable_token_indices": [1], "lora_bias": True,
    }.items():  # fmt: skip
        assert str(key if key not in ("r", "peft_type") else value) in problem_of_adapter(
            {"r": 8, key: value}
        )


def test_types_are_those_that_were_saved(folders, tmp_path):
    full, adapters = folders
    assert saved_dtype(str(full[0])) == saved_dtype(str(adapters[0])) == "float32"
    AutoModelForCausalLM.from_pretrained(full[0], dtype="bfloat16").save_pretrained(tmp_path)
    assert saved_dtype(str(tmp_path)) == "bfloat16"


def test_prompt_beyond_the_context_is_refused(engine):
    with pytest.raises(PromptTooLong):
        engine.score([("<s>" + " the" * 254, (" yes", " no"))])


def test_errors_are_one_line(vllm, folders, monkeypatch):
    monkeypatch.setattr(vllm, "_read", lambda self, folder: 1 / 0)
    with pytest.raises(InputError, match=r"full-0: vLLM .* cannot start: division by zero; "):
        VllmLoader().load(str(folders[0][0]))
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match=r"selfcorrect\[vllm\]"):
        VllmLoader()


def test_reason_of_a_failed_process_is_shown(vllm, folders, monkeypatch):
    """vLLM's own process prints the reason; the parent knows only that there is one."""

    def fail(self, folder):
        os.write(2, b"(EngineCore pid=9) ERROR 1 [core.py:1] ValueError: no room for the cache\n")
        os.write(2, b"RuntimeError: Engine core initialization failed. See root cause above.\n")
        raise RuntimeError("Engine core initialization failed. See root cause above.")

    monkeypatch.setattr(vllm, "_read", fail)
    with pytest.raises(InputError, match="ValueError: no room for the cache"):
        VllmLoader().load(str(folders[0][0]))
