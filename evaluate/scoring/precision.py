"""Choose the type in which weights that do not learn are held and computed, and the device.

`auto` is bfloat16 where the device computes in it fast and the model is large enough to gain by it.
A GPU says so itself; on a CPU a matrix product of each kind is timed once, in a few milliseconds.
"""

import functools
import importlib.util
import logging
import time
from typing import Any

from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.foundation.ranks import best_device

logger = logging.getLogger(__name__)

# Smaller models stay float32: 16 bits would save them less than 20 MB and milliseconds a pass, and
# their runs have the same bytes on machines with and without fast bfloat16 products.
SMALL = 10_000_000
FASTER = 1.2  # times as fast as float32 is worth the rounding


def fast_dtype(device: str) -> str:
    """Return "bfloat16" if the device multiplies faster in it than in float32, else "float32"."""
    if device.startswith("cuda"):
        import torch

        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if has_bf16 else "float32"
    return "bfloat16" if device == "cpu" and cpu_speed_of_bf16() > FASTER else "float32"


@functools.cache
def cpu_speed_of_bf16() -> float:
    """Return how many times as fast as in float32 this CPU multiplies in bfloat16.

    A product of 256 x 512 x 512 is timed in both types; the best of three runs counts.
    """
    import torch

    seconds = {}
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            left, right = torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
            times = []
            for _ in range(4):  # the first one prepares the kernel
                started = time.perf_counter()
                torch.nn.functional.linear(left, right)
                times.append(time.perf_counter() - started)
            seconds[dtype] = min(times[1:])
    return seconds[torch.float32] / seconds[torch.bfloat16]


def resolved(wanted: str, parameters: int, fast: str) -> str:
    """Return the type that `wanted` stands for; `fast` is what `auto` means for large models."""
    if wanted != "auto":
        return wanted
    return fast if parameters >= SMALL else "float32"


def chosen(wanted: str, parameters: int, fast: str) -> str:
    """Return `resolved`, and say in a line of the log what `auto` has chosen for a large model."""
    dtype = resolved(wanted, parameters, fast)
    if wanted == "auto" and parameters >= SMALL:
        logger.info(
            "precision auto: %s, since this machine computes %s in bfloat16 than in float32",
            dtype,
            "faster" if fast == "bfloat16" else "no faster",
        )
    return dtype


def check_device(device: str | None, key: str = "--device") -> str:
    """Return the device that a choice stands for; InputError if the machine lacks it."""
    if device in (None, "auto"):
        return best_device()
    import torch

    kind = device.partition(":")[0]
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"{key} {device}: this machine has no GPU that torch can use; use cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"{key} {device}: this machine has no Apple GPU; use cpu")
    if kind not in ("cuda", "mps", "cpu"):
        raise InputError(f"{key} {device}: unknown; choose from auto, cpu, cuda, mps")
    return device


def check_dtype(dtype: str, device: str, key: str) -> None:
    """Raise InputError, which begins with `key`, for a type in which the device cannot compute.

    A CPU that computes in it slowly is named in a warning.
    """
    if dtype == "4bit":
        if not device.startswith("cuda"):
            raise InputError(f"{key}: 4bit needs a CUDA GPU; use bfloat16 or auto")
        if importlib.util.find_spec("bitsandbytes") is None:
            raise InputError(
                f"{key}: 4bit needs bitsandbytes: pip install 'selfcorrect[4bit]', or use bfloat16"
            )
    if dtype == "float16" and device == "cpu":
        raise InputError(f"{key}: a CPU does not compute in float16; use bfloat16 or float32")
    if dtype == "bfloat16" and device == "cpu":
        _warn_if_slow()
    if dtype in ("bfloat16", "4bit") and device.startswith("cuda"):
        import torch

        if not torch.cuda.is_bf16_supported(including_emulation=False):
            raise InputError(f"{key}: this GPU does not compute in bfloat16; use float32")


@functools.cache
def _warn_if_slow() -> None:
    """Warn once if bfloat16 costs time on this CPU; what it spares is memory alone."""
    slower = 1 / cpu_speed_of_bf16()
    if slower > FASTER:
        logger.warning(
            "bfloat16: this CPU takes %.1f times as long as in float32, which auto would choose",
            slower,
        )


def loading_options(dtype: str, device: str, skipped: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return `from_pretrained`'s arguments for weights of this type; "4bit" is NF4 (QLoRA's).

    `skipped` names modules that stay unquantised besides the LM head.
    """
    if dtype != "4bit":
        return {"dtype": dtype}
    import torch
    from transformers import BitsAndBytesConfig

    return {
        "dtype": torch.bfloat16,
        "device_map": {"": device},
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["lm_head", *skipped],
        ),
    }


def cast_weights(model: Any, dtype: str) -> Any:
    """Hold the parameters in another type; buffers, such as rotary frequencies, stay."""
    import torch

    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return model


def num_parameters(config: Any, trust_remote_code: bool) -> int:
    """Return the parameters of a causal language model with this configuration."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return int(model.num_parameters())


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a GPU, or a CPU, has refused memory."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, MemoryError) or (
        isinstance(error, Exception)
        and (should_reduce_batch_size(error) or "not enough memory" in str(error))
    )


def device_of(model: Any) -> Any:
    """Return the torch.device that a model's inputs go to.

    Weights of a model with a `device_map` may lie elsewhere, or on none until they are needed.
    """
    import torch

    embedding = model.get_input_embeddings()
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return next(model.parameters()).device if device is None else torch.device(device)


def held_in(model: Any) -> str:
    """Return the type in which a model's weights are held, for records.

    An adapter's weights stay float32 over any base, so the base counts.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(base, "is_loaded_in_4bit", False):
        return "4bit"
    layers = [p for n, p in base.named_parameters() if ".lora_" not in n and p.is_floating_point()]
    largest = max(layers, key=lambda p: p.numel())
    return str(largest.dtype).removeprefix("torch.")
