"""Score and sample with any `LM` of lm-eval (the evaluation harness); load engines by name."""

from collections.abc import Sequence
from typing import Any

from selfcorrect.evaluate.prompts.dialogue import BEGINNING
from selfcorrect.evaluate.prompts.tokenized import Request, continuations, token_ids
from selfcorrect.evaluate.scoring.engine import Engine, Sample, Sampling
from selfcorrect.evaluate.scoring.load_model import refuse_pickles
from selfcorrect.evaluate.scoring.vllm import load_vllm, request_seed
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.foundation.ranks import best_device


class LmEvalEngine(Engine):
    """An `Engine` on an lm-eval `LM`, for example `HFLM`.

    An LM that takes tokens gets ours, so the boundary between prompt and option is that of
    `continuations`. An LM that takes only strings (an API; pass a `tokenizer` to render chats)
    draws the boundary itself, and its scores may differ if tokens merge across it.
    """

    def __init__(self, lm: Any, tokenizer: Any = None) -> None:
        self.lm = lm
        lm_tokenizer = getattr(lm, "tokenizer", None)
        self.by_tokens = callable(lm_tokenizer) and hasattr(lm, "_loglikelihood_tokens")
        self.tokenizer = tokenizer if tokenizer is not None else lm_tokenizer
        if self.tokenizer is None:
            raise InputError(
                f"{type(lm).__name__}: no tokenizer to render dialogues with; pass `tokenizer`"
            )
        self.context = getattr(lm, "max_length", None)

    def score(self, requests: Sequence[Request]) -> list[list[float]]:
        if not requests:
            return []
        options = continuations(self.tokenizer, requests)
        for index, request in enumerate(options):
            # lm-eval would cut off the beginning of the prompt with no more than a warning.
            self._check_length(
                index, max(len(option.row) for option in request), requests[index][0]
            )
        pairs = [(prompt, option) for prompt, texts in requests for option in texts]
        if self.by_tokens:
            flat = [option for request in options for option in request]
            answers = self.lm._loglikelihood_tokens(
                [
                    (pair, list(option.tokens[: option.start]), list(option.tokens[option.start :]))
                    for pair, option in zip(pairs, flat, strict=True)
                ],
                disable_tqdm=True,
            )
        else:
            from lm_eval.api.instance import Instance

            answers = self.lm.loglikelihood(
                [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
            )
        return self._by_request(requests, (float(answer[0]) for answer in answers))

    def sample(
        self,
        prompts: Sequence[str],
        keys: Sequence[str],
        sampling: Sampling,
        stop: str | None = None,
    ) -> list[Sample]:
        """See `Engine.sample`; prompts go one by one, since lm-eval has no seeds for requests.

        The texts differ from those of `PackedEngine`. lm-eval returns text alone: if it has
        `max_new_tokens` tokens when tokenised again, it counts as truncated.
        """
        if not prompts:
            return []
        self.check_room(prompts, sampling.max_new_tokens)
        if any(prompt.startswith(BEGINNING) for prompt in prompts):
            raise InputError(
                "the tokenizer's first token cannot be written as text, and lm-eval samples from "
                "text; use --engine packed"
            )
        settings: dict[str, Any] = {
            "until": [stop] if stop else [],
            "max_gen_toks": sampling.max_new_tokens,
            "do_sample": sampling.temperature > 0,
        }
        if sampling.temperature == 0:
            texts = self._generate(prompts, settings)
        elif not self.by_tokens:
            raise InputError(
                f"{type(self.lm).__name__}: its samples cannot be seeded; use --temperature 0"
            )
        else:
            import torch

            settings |= {"temperature": sampling.temperature, "top_p": 1.0, "top_k": 0}
            texts = []
            for prompt, key in zip(prompts, keys, strict=True):
                with torch.random.fork_rng():
                    torch.manual_seed(request_seed(sampling.seed, key))
                    texts += self._generate([prompt], settings)
        lengths = [len(ids) for ids in token_ids(self.tokenizer, texts)]
        return [
            Sample(text, length >= sampling.max_new_tokens, length)
            for text, length in zip(texts, lengths, strict=True)
        ]

    def _generate(self, prompts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        from lm_eval.api.instance import Instance

        requests = [
            Instance("generate_until", {}, (prompt, dict(settings)), index)
            for index, prompt in enumerate(prompts)
        ]
        texts: list[str] = self.lm.generate_until(requests, disable_tqdm=True)
        return texts


def load_engine(name: str, model: str, revision: str | None = None) -> Engine:
    """Load the engine `vllm` or `lm-eval:<LM>` with a model folder or hub name."""
    if name == "vllm":
        return load_vllm(model, revision)
    kind, _, lm = name.partition(":")
    if kind != "lm-eval" or not lm:
        raise InputError(f"unknown engine {name!r}; use packed, vllm or lm-eval:hf")
    try:
        from lm_eval.api.registry import get_model
    except ImportError:
        raise InputError("lm-eval is not installed: pip install 'selfcorrect[lm-eval]'") from None
    options: dict[str, Any] = {"pretrained": model}
    if lm == "hf":
        # Prompts hold their special tokens as text. Without `device` HFLM asks for CUDA.
        options |= {"add_bos_token": False, "device": best_device(), "trust_remote_code": False}
    if revision is not None:
        options["revision"] = revision
    try:
        with refuse_pickles(model):
            return LmEvalEngine(get_model(lm).create_from_arg_obj(options))
    except (ValueError, KeyError, OSError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{model}: lm-eval's {lm} cannot load it: {reason}") from error
