"""What a recipe's `launch` asks of accelerate and DeepSpeed: checked, then written as their files.

A job's processes find <run>/launch/accelerate.yaml and, with DeepSpeed, deepspeed.json beside it.
"""

import importlib.util
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from selfcorrect.recipes.foundation.atomic_files import write_json, write_text
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.schema import Launch, Recipe

_log = logging.getLogger(__name__)

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
# Every stage of a job has batch sizes and a learning rate of its own: DeepSpeed takes theirs.
TAKEN_FROM_STAGES = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping",
)  # fmt: skip
# What another launch leaves in the environment; the job's own launch sets it anew.
OF_ANOTHER_LAUNCH = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "ACCELERATE_USE_CPU",
)  # fmt: skip


def check_launch(recipe: Recipe) -> None:
    """Raises InputError for what this machine or its environment cannot start as the recipe says.

    More processes than cores, where there is no GPU, are slow but no error: a warning says so.
    """
    import torch

    launch, gpus = recipe.launch, torch.cuda.device_count()
    _check_surroundings(launch, gpus)
    if not launch.starts_processes:
        return
    wanted = launch.jobs * launch.processes
    if gpus and launch.processes > gpus:
        raise InputError(
            f"launch.processes: {launch.processes} processes need as many GPUs, and there are "
            f"{gpus} here; lower it"
        )
    if gpus and wanted > gpus:
        raise InputError(
            f"launch.jobs: {launch.jobs} jobs of {launch.processes} processes need {wanted} GPUs, "
            f"and there are {gpus} here; lower launch.jobs"
        )
    if not gpus and wanted > (os.cpu_count() or 1):
        _log.warning("launch: %d processes share %d cores; fewer would be faster",
                     wanted, os.cpu_count() or 1)  # fmt: skip
    if launch.deepspeed is not None:
        _check_deepspeed(recipe, launch.deepspeed, bool(gpus))


def _check_surroundings(launch: Launch, gpus: int) -> None:
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1":
        raise InputError(
            f"WORLD_SIZE is {size}: this is inside accelerate launch or torchrun, but the recipe "
            f"starts its own processes (launch.processes: {launch.processes}); start selfcorrect "
            "by itself"
        )
    if _is_set("ACCELERATE_USE_FSDP"):
        raise InputError("ACCELERATE_USE_FSDP is set: a recipe cannot run under FSDP; unset it")
    if _is_set("ACCELERATE_USE_DEEPSPEED") and launch.deepspeed is None:
        raise InputError(
            "ACCELERATE_USE_DEEPSPEED is set, but the recipe does not ask for DeepSpeed; unset it, "
            "or set launch.deepspeed"
        )
    if _is_set("ACCELERATE_USE_CPU") and gpus and launch.starts_processes:
        raise InputError(
            "ACCELERATE_USE_CPU is set, but launch.processes go to the GPUs here; unset it, or "
            "hide the GPUs with CUDA_VISIBLE_DEVICES="
        )


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t")


def _check_deepspeed(recipe: Recipe, asked: str, on_gpu: bool) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise InputError(
            "launch.deepspeed: DeepSpeed is not installed; pip install 'selfcorrect[deepspeed]'"
        )
    settings = deepspeed_settings(asked, on_gpu)
    if asked not in STAGES:
        _check_zero(asked, settings["zero_optimization"], on_gpu)
    for rates in (recipe.of(model.name).policy.trainer for model in recipe.models):
        critics = rates.get("critic_learning_rate")
        if "optimizer" in settings and critics not in (None, rates.get("learning_rate")):
            raise InputError(
                f"launch.deepspeed: {asked}: an optimizer defined here has one learning rate, but "
                "policy.trainer.critic_learning_rate asks for a second; remove one of the two"
            )
    offload = settings["zero_optimization"].get("offload_optimizer") or {}
    if offload.get("device", "none") != "none":
        path = search_path()
        for tool in (os.environ.get("CXX", "c++"), "ninja"):
            if shutil.which(tool, path=path) is None:
                raise InputError(
                    f"launch.deepspeed: {asked}: DeepSpeed compiles an Adam for offload_optimizer, "
                    f"and {tool} is not on PATH; install g++ and ninja"
                )


def _check_zero(asked: str, zero: dict[str, Any], on_gpu: bool) -> None:
    """DeepSpeed's own check of its section, which it would come to after the models."""
    if not on_gpu:  # or it says that it found none
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**{key: value for key, value in zero.items() if value != "auto"})
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise InputError(
            f"launch.deepspeed: {asked}: zero_optimization.{key}: {problem['msg']}"
        ) from None
    if zero.get("offload_param") and zero["stage"] != 3:
        raise InputError(
            f"launch.deepspeed: {asked}: zero_optimization.offload_param needs stage 3, the only "
            "one that divides parameters"
        )


def deepspeed_settings(asked: str, on_gpu: bool) -> dict[str, Any]:
    """DeepSpeed's settings for zero1, zero2, zero3 or a JSON file, which is passed on as it is.

    Added are only what Hugging Face's trainers fill in, and that ZeRO-3 gathers weights to save.
    Raises InputError for a file that is missing, no JSON, or against how stages are run.
    """
    if asked in STAGES:
        settings: dict[str, Any] = {"zero_optimization": {"stage": STAGES[asked]}}
        if not on_gpu:
            settings["zero_optimization"]["overlap_comm"] = False
    else:
        settings = _read(asked)
    zero = settings.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in STAGES.values():
        raise InputError(
            f"launch.deepspeed: {asked}: zero_optimization.stage is {stage}; it must be 1, 2 or 3"
        )
    for key in TAKEN_FROM_STAGES:
        if settings.setdefault(key, "auto") != "auto":
            raise InputError(
                f'launch.deepspeed: {asked}: {key} must be "auto": the stages have their own, '
                "which the recipe's trainer: keys set"
            )
    for precision in ("bf16", "fp16"):
        settings.setdefault(precision, {"enabled": "auto"})
    if stage == 3:
        settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    return settings


def _read(asked: str) -> dict[str, Any]:
    path = Path(asked).expanduser()
    if not path.is_file():
        raise InputError(
            f"launch.deepspeed: {asked} is neither {', '.join(STAGES)} nor a DeepSpeed JSON file"
        )
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError too
        raise InputError(f"launch.deepspeed: {asked}: no JSON ({error})") from None
    if not isinstance(settings, dict):
        raise InputError(f"launch.deepspeed: {asked}: a DeepSpeed JSON is an object of settings")
    return settings


def write_settings(launch: Launch, folder: Path, on_gpu: bool) -> Path:
    """Write accelerate's configuration and DeepSpeed's into `folder`; returns the first one's path.

    Precision is each stage's own. How many machines there are is left to whoever launches: one,
    unless `accelerate launch` is told otherwise.
    """
    settings: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        # On CPUs too, where accelerate would start one process only for MULTI_CPU.
        "distributed_type": "MULTI_GPU",
        "num_processes": launch.processes,
        "use_cpu": not on_gpu,
    }
    if launch.deepspeed is not None:
        content = deepspeed_settings(launch.deepspeed, on_gpu)
        file = folder / "deepspeed.json"
        write_json(file, content)
        settings["distributed_type"] = "DEEPSPEED"
        settings["deepspeed_config"] = {
            "deepspeed_config_file": str(file.resolve()),
            "zero3_init_flag": content["zero_optimization"]["stage"] == 3,
        }
    path = folder / "accelerate.yaml"
    write_text(path, yaml.safe_dump(settings, sort_keys=False))
    return path


def environment(launch: Launch, threads: int, on_gpu: bool, slot: int) -> dict[str, str]:
    """The environment of a launch: what another one left is gone, and each slot has its own GPUs.

    `slot` counts the jobs that run side by side.
    """
    found = {name: value for name, value in os.environ.items() if name not in OF_ANOTHER_LAUNCH}
    found |= {
        "PATH": search_path(),
        "OMP_NUM_THREADS": str(threads),
        "PET_STANDALONE": "1",  # torchrun finds a free port itself: jobs run side by side
    }
    if on_gpu:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(_devices(launch.processes, slot))
    elif launch.deepspeed is None:
        found["ACCELERATE_USE_CPU"] = "true"
    return found


def _devices(count: int, slot: int) -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(count * (slot + 1))]
    return names[count * slot : count * (slot + 1)]


def search_path() -> str:
    """PATH with the folder of this Python in it, where pip puts ninja."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
