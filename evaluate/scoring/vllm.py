"""Scores and samples from vLLM's offline `LLM`."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

from selfcorrect.evaluate.prompts.tokenized import Request, continuations
from selfcorrect.evaluate.scoring.engine import Engine, Sample
from selfcorrect.evaluate.scoring.load_model import refuse_pickles
from selfcorrect.recipes.foundation.errors import InputError


class VllmEngine(Engine):
    """An `Engine` on a `vllm.LLM` (load one with `load_vllm`).

    Options are scored from `prompt_logprobs` of our own token ids. Samples are reproducible per
    (seed, key) up to vLLM's own rounding in a batch, but come from another random number
    generator than the project's scorer: the two draw different texts.
    """

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.tokenizer = llm.get_tokenizer()
        self.context = int(llm.llm_engine.model_config.max_model_len)

    def score(self, requests: Sequence[Request]) -> list[list[float]]:
        """See `Engine.score`."""
        from vllm import SamplingParams

        if not requests:
            return []
        options = continuations(self.tokenizer, requests)
        for index, ones in enumerate(options):
            # vLLM always generates a token, which needs a place of its own.
            length = max(len(one.tokens) for one in ones) + 1
            self._check_length(index, length, requests[index][0])
        # 1, not 0: early v1 engines return nothing for 0 (v1/engine/logprobs.py). The prompt's own
        # token is in the answer, whatever its rank. A request with prompt_logprobs writes the
        # prefix cache but never reads it (SamplingParams.skip_reading_prefix_cache, vLLM PR 28194;
        # before that KVCacheManager.get_computed_blocks, PR 17251): caching helps samples only.
        # PR 42245 (open in May 2026) is about stale values where reading is forced; it is not here.
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
        flat = [one for ones in options for one in ones]
        outputs = self._generate([list(one.tokens) for one in flat], params)
        values = iter(
            math.fsum(
                output.prompt_logprobs[place][one.tokens[place]].logprob
                for place in range(one.start, len(one.tokens))
            )
            for one, output in zip(flat, outputs, strict=True)
        )
        scores = [[next(values) for _ in ones] for ones in options]
        self._refuse_nan(requests, scores)
        return scores

    def sample(
        self,
        prompts: Sequence[str],
        keys: Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        stop: str | None = None,
    ) -> list[Sample]:
        """See `Engine.sample`, and the class on how these differ from the project's own."""
        from vllm import SamplingParams

        if not prompts:
            return []
        tokens = self._tokens_with_room(prompts, max_new_tokens)
        params = [
            SamplingParams(
                temperature=temperature,
                max_tokens=max_new_tokens,
                seed=request_seed(seed, key),
                stop=stop,
            )
            for key in keys
        ]
        answers = [output.outputs[0] for output in self._generate(tokens, params)]
        return [
            Sample(one.text, one.finish_reason == "length", len(one.token_ids)) for one in answers
        ]

    def _generate(self, tokens: list[list[int]], params: Any) -> Any:
        from vllm import TokensPrompt

        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in tokens]
        return self.llm.generate(prompts, sampling_params=params, use_tqdm=False)


def load_vllm(model: str, revision: str | None = None) -> VllmEngine:
    """A model folder or hub name in vLLM; InputError where vLLM is missing or cannot load it."""
    try:
        from vllm import LLM
    except ImportError:
        raise InputError("vLLM is not installed: pip install 'selfcorrect[vllm]'") from None
    refuse_pickles(model)
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
    """A 63-bit seed of (seed, key): what torch's generators take."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{key}".encode()).digest()[:8]) >> 1
