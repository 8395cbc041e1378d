"""Check the recipe's `launch` section and write the files of accelerate and DeepSpeed from it.

A job's processes read <run>/launch/accelerate.yaml and, with DeepSpeed, deepspeed.json beside it.
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

logger = logging.getLogger(__name__)

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
# DeepSpeed settings that each stage of a job decides: they must be "auto".
DECIDED_BY_STAGES = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping",
)  # fmt: skip
# Environment variables of another launcher, which must not reach the job's processes.
LAUNCHER_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "ACCELERATE_USE_CPU",
)  # fmt: skip


def check_launch(recipe: Recipe) -> None:
    """Raise InputError if this machine cannot start the processes that the recipe asks for.

    More processes than cores, without a GPU, are slow: a warning says so.
    """
    import torch

    launch, gpus = recipe.launch, torch.cuda.device_count()
    _check_environment(launch, gpus)
    if not launch.starts_processes:
        return
    num_processes = launch.jobs * launch.processes
    if gpus and launch.processes > gpus:
        raise InputError(
            f"launch.processes: {launch.processes} processes need as many GPUs, and this machine "
            f"has {gpus}; lower it"
        )
    if gpus and num_processes > gpus:
        raise InputError(
            f"launch.jobs: {launch.jobs} jobs of {launch.processes} processes need "
            f"{num_processes} GPUs, and this machine has {gpus}; lower launch.jobs"
        )
    if not gpus and num_processes > (os.cpu_count() or 1):
        logger.warning("launch: %d processes share %d cores; fewer processes would be faster",
                     num_processes, os.cpu_count() or 1)  # fmt: skip
    if launch.deepspeed is not None:
        _check_deepspeed(recipe, launch.deepspeed, bool(gpus))


def _check_environment(launch: Launch, gpus: int) -> None:
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1":
        raise InputError(
            f"WORLD_SIZE is {size}: the recipe starts its own processes (launch.processes: "
            f"{launch.processes}); start selfcorrect without accelerate launch or torchrun"
        )
    if _is_set("ACCELERATE_USE_FSDP"):
        raise InputError("ACCELERATE_USE_FSDP is set: recipes do not support FSDP; unset it")
    if _is_set("ACCELERATE_USE_DEEPSPEED") and launch.deepspeed is None:
        raise InputError(
            "ACCELERATE_USE_DEEPSPEED is set, but the recipe does not ask for DeepSpeed; unset it, "
            "or set launch.deepspeed"
        )
    if _is_set("ACCELERATE_USE_CPU") and gpus and launch.starts_processes:
        raise InputError(
            "ACCELERATE_USE_CPU is set, but launch.processes would use this machine's GPUs; unset "
            "it, or hide the GPUs with CUDA_VISIBLE_DEVICES="
        )


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t")


def _check_deepspeed(recipe: Recipe, deepspeed: str, on_gpu: bool) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise InputError(
            "launch.deepspeed: DeepSpeed is not installed; pip install 'selfcorrect[deepspeed]'"
        )
    settings = deepspeed_settings(deepspeed, on_gpu)
    if deepspeed not in STAGES:
        _check_zero(deepspeed, settings["zero_optimization"], on_gpu)
    for trainer in (recipe.of(model.name).policy.trainer for model in recipe.models):
        critic_rate = trainer.get("critic_learning_rate")
        if "optimizer" in settings and critic_rate not in (None, trainer.get("learning_rate")):
            raise InputError(
                f"launch.deepspeed: {deepspeed}: an optimizer defined here has one learning rate, "
                "but policy.trainer.critic_learning_rate asks for a second; remove one of the two"
            )
    offload = settings["zero_optimization"].get("offload_optimizer") or {}
    if offload.get("device", "none") != "none":
        path = search_path()
        for tool in (os.environ.get("CXX", "c++"), "ninja"):
            if shutil.which(tool, path=path) is None:
                raise InputError(
                    f"launch.deepspeed: {deepspeed}: DeepSpeed compiles an Adam for "
                    f"offload_optimizer, and {tool} is not on PATH; install g++ and ninja"
                )


def _check_zero(deepspeed: str, zero: dict[str, Any], on_gpu: bool) -> None:
    """Run DeepSpeed's own check of its section now, instead of after the models are loaded."""
    if not on_gpu:  # or DeepSpeed warns that it found none
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**{key: value for key, value in zero.items() if value != "auto"})
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise InputError(
            f"launch.deepspeed: {deepspeed}: zero_optimization.{key}: {problem['msg']}"
        ) from None
    if zero.get("offload_param") and zero["stage"] != 3:
        raise InputError(
            f"launch.deepspeed: {deepspeed}: zero_optimization.offload_param needs stage 3, the "
            "only stage that partitions parameters"
        )


def deepspeed_settings(deepspeed: str, on_gpu: bool) -> dict[str, Any]:
    """Return DeepSpeed's settings for zero1, zero2, zero3 or a JSON file.

    A file's settings are kept; added are the values that Hugging Face's trainers fill in ("auto"),
    and gathering of weights on saving under ZeRO-3. Raises InputError for a file that is missing or
    not JSON, and for settings that the stages decide.
    """
    if deepspeed in STAGES:
        settings: dict[str, Any] = {"zero_optimization": {"stage": STAGES[deepspeed]}}
        if not on_gpu:
            settings["zero_optimization"]["overlap_comm"] = False
    else:
        settings = _read(deepspeed)
    zero = settings.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in STAGES.values():
        raise InputError(
            f"launch.deepspeed: {deepspeed}: zero_optimization.stage is {stage}, but must be 1, 2 "
            "or 3"
        )
    for key in DECIDED_BY_STAGES:
        if settings.setdefault(key, "auto") != "auto":
            raise InputError(
                f'launch.deepspeed: {deepspeed}: {key} must be "auto": it is set for each '
                "stage by the recipe's trainer: keys"
            )
    for precision in ("bf16", "fp16"):
        settings.setdefault(precision, {"enabled": "auto"})
    if stage == 3:
        settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    return settings


def _read(deepspeed: str) -> dict[str, Any]:
    path = Path(deepspeed).expanduser()
    if not path.is_file():
        raise InputError(
            f"launch.deepspeed: {deepspeed} is neither {', '.join(STAGES)} nor a DeepSpeed JSON "
            "file"
        )
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError too
        raise InputError(f"launch.deepspeed: {deepspeed}: not JSON ({error})") from None
    if not isinstance(settings, dict):
        raise InputError(
            f"launch.deepspeed: {deepspeed}: the file must contain one JSON object of settings"
        )
    return settings


def write_settings(launch: Launch, folder: Path, on_gpu: bool) -> Path:
    """Write the configurations of accelerate and DeepSpeed to `folder`; return accelerate's path.

    Each stage sets its own precision. The number of machines is one, unless `accelerate launch` is
    told otherwise.
    """
    settings: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        # On CPUs too: for MULTI_CPU accelerate would start a single process.
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


def process_environment(launch: Launch, threads: int, on_gpu: bool, slot: int) -> dict[str, str]:
    """Return the environment of a job's processes, without the variables of other launchers.

    `slot` numbers the jobs that run side by side: each gets GPUs of its own.
    """
    variables = {
        name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES
    }
    variables |= {
        "PATH": search_path(),
        "OMP_NUM_THREADS": str(threads),
        "PET_STANDALONE": "1",  # torchrun picks a free port: jobs run side by side
    }
    if on_gpu:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(_devices(launch.processes, slot))
    elif launch.deepspeed is None:
        variables["ACCELERATE_USE_CPU"] = "true"
    return variables


def _devices(count: int, slot: int) -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(count * (slot + 1))]
    return names[count * slot : count * (slot + 1)]


def search_path() -> str:
    """Return PATH with the folder of this Python in front, where pip installs ninja."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
