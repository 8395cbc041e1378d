"""Score and sample with any `LM` of lm-eval (the evaluation harness); load engines by name."""

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from selfcorrect.evaluate.prompts.dialogue import BEGINNING
from selfcorrect.evaluate.prompts.tokenized import Request, continuations, token_ids
from selfcorrect.evaluate.scoring.engine import Engine, EngineLoader, Sample, Sampling
from selfcorrect.evaluate.scoring.load_model import ADAPTER, load_model, refuse_pickles
from selfcorrect.evaluate.scoring.precision import held_in
from selfcorrect.evaluate.scoring.vllm import VllmLoader, request_seed, vllm_version
from selfcorrect.recipes.foundation.errors import InputError, is_from_outside, reason_of


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
        `max_new_tokens` tokens when tokenised again, it counts as truncated, and else as stopped.
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
            Sample(text, (cut := length >= sampling.max_new_tokens), length, stopped=not cut)
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


class LmEvalLoader(EngineLoader):
    """Load models into an LM of lm-eval, `hf` for example; `arguments` are the LM's own.

    `hf` gets the model that `load_model` loads: adapters of all kinds, in the type asked for. (By
    its own `peft=` lm-eval cuts the embeddings to the tokenizer's size, which changes the scores of
    models with more.)
    """

    def __init__(self, lm: str, arguments: Mapping[str, Any] | None = None) -> None:
        self.lm, self.arguments = lm, dict(arguments or {})
        if importlib.util.find_spec("lm_eval") is None:
            raise InputError("lm-eval is not installed: pip install 'selfcorrect[lm-eval]'")

    def load(
        self,
        model: str,
        revision: str | None = None,
        dtype: str | None = None,
        room: Callable[[Any], int] | None = None,
    ) -> LmEvalEngine:
        """See `EngineLoader.load`; other LMs than `hf` choose the type of weights themselves."""
        from lm_eval.api.registry import get_model

        options: dict[str, Any] = {"pretrained": model}
        if self.lm == "hf":
            loaded, tokenizer = load_model(model, revision=revision, dtype=dtype or "auto")
            # Prompts hold their special tokens as text.
            options = {"pretrained": loaded, "tokenizer": tokenizer, "add_bos_token": False}
        elif (Path(model) / ADAPTER).is_file():
            raise InputError(
                f"{model}: an adapter, but lm-eval's {self.lm} reads whole models here; use "
                "--engine lm-eval:hf or packed"
            )
        elif revision is not None:
            options["revision"] = revision
        try:
            with refuse_pickles(model):
                lm = get_model(self.lm).create_from_arg_obj(options | self.arguments)
                engine = LmEvalEngine(lm)
        except Exception as error:  # an LM may raise anything
            if isinstance(error, InputError) or is_from_outside(error):
                raise
            raise InputError(
                f"{model}: lm-eval's {self.lm} cannot load it: {reason_of(error)}"
            ) from error
        if self.lm == "hf":
            engine.dtype = held_in(loaded)
        return engine

    def close(self) -> None:
        """Keep nothing: an LM is freed with its engine."""


def engine_version(name: str) -> str | None:
    """Return the version of an engine's library; None for the packed engine, or without it."""
    if name == "vllm":
        return vllm_version()
    if name == "packed":
        return None
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("lm_eval")
    return None


def engine_loader(name: str, arguments: Mapping[str, Any] | None = None) -> EngineLoader:
    """Return the loader of the engine `vllm` or `lm-eval:<LM>`; `arguments` are the library's."""
    if name == "vllm":
        return VllmLoader(arguments)
    kind, _, lm = name.partition(":")
    if kind != "lm-eval" or not lm:
        raise InputError(f"unknown engine {name!r}; use packed, vllm or lm-eval:hf")
    return LmEvalLoader(lm, arguments)
