"""Score and sample with vLLM's offline `LLM`."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfcorrect.evaluate.prompts.tokenized import Request, continuations
from selfcorrect.evaluate.scoring.engine import Engine, Sample, Sampling
from selfcorrect.evaluate.scoring.load_model import ADAPTER, check_no_pickles
from selfcorrect.recipes.foundation.errors import InputError


class VllmEngine(Engine):
    """An `Engine` on a `vllm.LLM` (load one with `load_vllm`).

    Options are scored from `prompt_logprobs` of our own token ids. Samples are reproducible per
    (seed, key) up to vLLM's own rounding in a batch. vLLM has another random number generator than
    `PackedEngine`, so the two draw different texts.
    """

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.tokenizer = llm.get_tokenizer()
        self.context = int(llm.llm_engine.model_config.max_model_len)

    def score(self, requests: Sequence[Request]) -> list[list[float]]:
        from vllm import SamplingParams

        if not requests:
            return []
        options = continuations(self.tokenizer, requests)
        for index, request in enumerate(options):
            # vLLM always generates a token, which needs a position of its own.
            length = max(len(option.tokens) for option in request) + 1
            self._check_length(index, length, requests[index][0])
        # 1, not 0: early v1 engines return nothing for 0 (v1/engine/logprobs.py). The answer holds
        # the prompt's own token, whatever its rank. A request with prompt_logprobs writes the
        # prefix cache but never reads it (SamplingParams.skip_reading_prefix_cache, vLLM PR 28194;
        # before that KVCacheManager.get_computed_blocks, PR 17251): caching helps samples only.
        # PR 42245 (open in May 2026) is about stale values if reading is forced, which it is not.
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
        flat = [option for request in options for option in request]
        outputs = self._generate([list(option.tokens) for option in flat], params)
        values = (
            math.fsum(
                output.prompt_logprobs[position][option.tokens[position]].logprob
                for position in range(option.start, len(option.tokens))
            )
            for option, output in zip(flat, outputs, strict=True)
        )
        return self._by_request(requests, values)

    def sample(
        self,
        prompts: Sequence[str],
        keys: Sequence[str],
        sampling: Sampling,
        stop: str | None = None,
    ) -> list[Sample]:
        from vllm import SamplingParams

        if not prompts:
            return []
        tokens = self.check_room(prompts, sampling.max_new_tokens)
        params = [
            SamplingParams(
                temperature=sampling.temperature,
                max_tokens=sampling.max_new_tokens,
                seed=request_seed(sampling.seed, key),
                stop=stop,
            )
            for key in keys
        ]
        answers = [output.outputs[0] for output in self._generate(tokens, params)]
        return [
            Sample(answer.text, answer.finish_reason == "length", len(answer.token_ids))
            for answer in answers
        ]

    def _generate(self, tokens: list[list[int]], params: Any) -> Any:
        from vllm import TokensPrompt

        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in tokens]
        return self.llm.generate(prompts, sampling_params=params, use_tqdm=False)


def load_vllm(model: str, revision: str | None = None) -> VllmEngine:
    """Load a model folder or hub name; InputError if vLLM is missing or cannot load it."""
    try:
        from vllm import LLM
    except ImportError:
        raise InputError("vLLM is not installed: pip install 'selfcorrect[vllm]'") from None
    if (Path(model) / ADAPTER).is_file():
        raise InputError(
            f"{model}: an adapter, but vLLM reads whole models here; leave out --engine vllm, or "
            "merge it into its base first"
        )
    check_no_pickles(model)
    weights = "auto" if model.endswith(".gguf") else "safetensors"
    try:
        return VllmEngine(
            LLM(
                model=model,
                revision=revision,
                enable_prefix_caching=True,
                load_format=weights,
                trust_remote_code=False,
            )
        )
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{model}: vLLM cannot load it: {reason}; give a model folder") from error


def request_seed(seed: int, key: str) -> int:
    """Return a 63-bit seed from (seed, key), as torch's generators take it."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{key}".encode()).digest()[:8]) >> 1
