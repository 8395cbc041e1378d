"""What decides a run's bits besides its recipe: kept in run.json, and said where it changes."""

import importlib.metadata
import logging
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from selfcorrect.recipes.foundation.checksums import flatten, read_record, write_record
from selfcorrect.recipes.schema import Recipe

logger = logging.getLogger(__name__)

PACKAGES = (
    *("torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed"),
    *("tokenizers", "numpy"),
)
# Settings of the mathematical libraries; numbers of threads among them give way to the recipe's.
SETTINGS = ("ATEN_", "CUBLAS_", "DNNL_", "KMP_", "MKL_", "NVIDIA_TF32", "OMP_", "ONEDNN_", "TORCH_")
# What may be otherwise without a bit being otherwise.
FREE = ("name", "seeds", "models", "platform", "cores", "jobs", "begun", "changes", "taken")


def record_start(recipe: Recipe, run: Path) -> None:
    """Write run.json: where and with what the run was begun, and what has changed since.

    Facts are the newest; `changes` lists, for each start at which some were not those of the start
    before, the time and [before, now] by key. Where bits may differ from those of the beginning,
    one line on stderr says why. Call it while the run's folder is claimed.

    Raises InputError where run.json cannot be read.
    """
    path, now = run / "run.json", run_facts(recipe)
    time = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    try:
        before = read_record(path, "mend it or move it away")
    except FileNotFoundError:
        write_record(path, {**now, "begun": time, "changes": []})
        return
    changes = list(before.get("changes", []))
    if changed := _differences(before, now):
        changes.append({"at": time, **changed})
    taken = {"taken": before["taken"]} if "taken" in before else {}  # see train/stages/reuse.py
    write_record(path, {**now, "begun": before.get("begun"), "changes": changes, **taken})
    if matters := _since_begun(changes, now):
        said = ", ".join(f"{key} was {_shown(old)}, is {_shown(new)}" for key, old, new in matters)
        logger.warning("%s: since this run was begun, %s: bits may differ", run, said)


def run_facts(recipe: Recipe) -> dict[str, Any]:
    """Versions, hardware, threads, seeds, and the code's commit where it is a checkout."""
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
        "versions": versions(),
        "math": [line for line in kernels if "Math Kernel Library" in line or "MKL-DNN" in line],
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(SETTINGS) and not name.endswith("NUM_THREADS")
        },
        "commit": _commit(),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that decide a run's numbers, those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def threads_per_job(recipe: Recipe) -> int:
    """CPU threads of each process of a job.

    The recipe's; or an even share of what SLURM gives the job, or of the cores.
    """
    cores, at_once = os.cpu_count() or 1, recipe.launch.jobs
    if os.environ.get("SUBMITIT_EXECUTOR") == "slurm":  # `selfcorrect launch`: one model and seed
        cores, at_once = int(os.environ["SLURM_CPUS_ON_NODE"]), 1
    return recipe.launch.threads or max(1, cores // (at_once * recipe.launch.processes))


def _processor() -> str:
    """The CPU's own name; two of the same instruction set may still round differently."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def _differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, list[str | None]]:
    """[before, now] of each key that both know of and that is not the same."""
    old, new = _flat(before), _flat(now)
    return {
        key: [old.get(key), new.get(key)]
        for key in {**old, **new}
        # What an older version did not write is no news.
        if key.partition(".")[0] in before and old.get(key) != new.get(key)
    }


def _flat(facts: dict[str, Any]) -> dict[str, str]:
    kept = ("jobs", "cores", "platform")
    return {
        key: value
        for key, value in flatten(facts)
        if value != "{}" and (key.partition("[")[0] not in FREE or key in kept)
    }


def _since_begun(
    changes: list[dict[str, Any]], now: dict[str, Any]
) -> list[tuple[str, str | None, str | None]]:
    """(key, at the beginning, now) of what bits depend on and is not as it was."""
    first: dict[str, str | None] = {}
    for change in changes:
        for key, pair in change.items():
            if key != "at":
                first.setdefault(key, pair[0])
    current = _flat(now)
    return [
        (key.removeprefix("versions."), old, current.get(key))
        for key, old in first.items()
        if key not in FREE and old != current.get(key)
    ]


def _shown(value: str | None) -> str:
    return "none" if value in (None, "", "–") else str(value)
