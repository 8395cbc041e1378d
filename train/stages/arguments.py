"""Build the libraries' argument classes from a recipe's `trainer:` and `lora:` keys."""

import dataclasses
import difflib
import os
import warnings
from typing import Any

from selfcorrect.recipes.foundation.errors import InputError, machine_fault, reason_of
from selfcorrect.recipes.foundation.ranks import best_device

# Defaults of every stage.
QUIET = {
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "remove_unused_columns": False,
}

# Defaults of the stages that train on a fixed set of rows.
ONE_EPOCH = {
    **QUIET,
    "num_train_epochs": 1,
    "logging_strategy": "no",
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "steps",
}

# Keys by which TRL would change the tokenizer after the run has tokenised its texts with it.
TOKENIZER_KEYS = ("chat_template_path", "eos_token")

# The run loads the models and decides whether their code may run, not a key of TRL's.
NO_CODE = {"trust_remote_code": False, "model_init_kwargs": None}


def computed_in(frozen: str, has_adapter: bool, given: dict[str, Any]) -> dict[str, bool]:
    """Return the default of `bf16` and `fp16` for an adapter on a base of the type `frozen`.

    The adapter's products then have the base's type; its weights stay float32.
    """
    if not has_adapter or frozen == "float32" or {"bf16", "fp16"} & given.keys():
        return {}
    is_half = frozen == "float16"
    return {"bf16": not is_half, "fp16": is_half}


def check_keys(section: str, given: dict[str, Any], known: set[str], fixed: set[str]) -> None:
    """Raise InputError for a key that the library does not have, or that the run itself sets."""
    for key in given:
        if key == "chat_template_kwargs":
            raise InputError(
                f"{section}.{key}: write {key} at the top of the recipe, where it applies to all "
                "stages and to the evaluation"
            )
        if key in TOKENIZER_KEYS:
            raise InputError(
                f"{section}.{key}: the run tokenises with the model's own tokenizer; change it in "
                "the model's folder, and remove the key"
            )
        if key in fixed:
            raise InputError(f"{section}.{key}: this is set by the run itself; remove the key")
        if key not in known:
            close = difflib.get_close_matches(key, known - fixed, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise InputError(f"{section}.{key}: unknown key{hint}")


def build(
    kind: type, section: str, given: dict[str, Any], defaults: dict[str, Any], fixed: dict[str, Any]
) -> Any:
    """Return an instance of `kind` from `fixed`, else from `given`, else from `defaults`.

    Raises InputError, which begins with `section`, for unknown or fixed keys and refused values.
    """
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    check_keys(section, given, set(fields), set(fixed))
    for key, value in given.items():
        if isinstance(value, str) and isinstance(fields[key].default, int | float):
            raise InputError(f"{section}.{key}: {value!r} is not a number")
    half = {**defaults, **given, **fixed}.get("bf16")
    if "use_cpu" in fields and (_is_deepspeed_on_cpu() or (half and best_device() == "cpu")):
        defaults = {"use_cpu": True, **defaults}  # transformers asks for it
    try:
        with warnings.catch_warnings():  # TRL's own defaults use names that transformers renames
            warnings.simplefilter("ignore", FutureWarning)
            return kind(**{**defaults, **given, **fixed})
    except Exception as error:  # a value of the wrong type may fail anywhere in the libraries
        if machine_fault(error) is not None:
            raise
        raise InputError(f"{section}: {reason_of(error)}") from None


def _is_deepspeed_on_cpu() -> bool:
    """Return whether DeepSpeed runs on CPUs, where accelerate needs `use_cpu` to join processes."""
    from torch import cuda

    return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and not cuda.is_available()


def lora_config(section: str, given: dict[str, Any], task: str) -> Any:
    """Build peft's LoraConfig; `task` is CAUSAL_LM or SEQ_CLS."""
    from peft import LoraConfig

    return build(LoraConfig, section, given, {}, {"task_type": task})
