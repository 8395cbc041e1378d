"""vLLM in the training process (`vllm_mode: colocate`), in the type that the policy computes in."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from trl.generation import vllm_generation

from selfcorrect.evaluate.scoring.vllm import quiet_vllm, reason_of_vllm
from selfcorrect.evaluate.scoring.vllm_worker import keep_plain_weights
from selfcorrect.recipes.foundation.errors import RunFailure


@contextmanager
def colocated_vllm(args: Any, model: Any) -> Iterator[None]:
    """Let TRL start a vLLM that samples from the policy, while a trainer is made.

    TRL names no type, and vLLM would round float32 weights to 16 bits; on a CPU it would pack them,
    after which no new weights can be loaded. Raises RunFailure, in one line, if it cannot start.
    """
    start = getattr(vllm_generation, "LLM", None)  # None: vLLM is not installed
    if start is None or not args.use_vllm or args.vllm_mode != "colocate":
        yield
        return
    quiet_vllm()
    keep_plain_weights()
    settings: dict[str, Any] = {"dtype": _computed_in(args, model)}
    if not torch.cuda.is_available():
        settings["enforce_eager"] = True  # a CPU's compiler takes a minute

    def started(*given: Any, **options: Any) -> Any:
        try:
            return start(*given, **{**settings, **options})
        except Exception as error:
            raise RunFailure(
                f"policy.trainer.use_vllm: vLLM cannot start: {reason_of_vllm(error)}"
            ) from error

    vllm_generation.LLM = started
    try:
        yield
    finally:
        vllm_generation.LLM = start


def _computed_in(args: Any, model: Any) -> str:
    if args.bf16 or args.fp16:
        return "bfloat16" if args.bf16 else "float16"
    return str(getattr(model, "dtype", "float32")).removeprefix("torch.")
