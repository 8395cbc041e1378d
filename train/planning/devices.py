"""Devices and what they offer: memory, arithmetic, bandwidth."""

import os
import time
from dataclasses import dataclass, replace

import numpy as np
from threadpoolctl import threadpool_limits

from selfcorrect.recipes.foundation.errors import InputError


@dataclass(frozen=True)
class Device:
    """Memory (bytes), peak (dense FLOP/s), and memory and link bandwidth (bytes/s) of a device.

    Of a GPU `flops` are bfloat16's; of a CPU float32's, and bfloat16 is `bf16_speed` times as fast.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    gpu: bool = True
    bf16_speed: float = 1.0


# bfloat16 without sparsity, and one direction of NVLink: NVIDIA's data sheets of the A100 80GB SXM,
# H100 SXM and H200 SXM.
GPUS = {
    "a100": Device("a100", 80e9, 312e12, 2.039e12, 300e9),
    "h100": Device("h100", 80e9, 989e12, 3.35e12, 450e9),
    "h200": Device("h200", 141e9, 989e12, 4.8e12, 450e9),
}
# One core of the machine of docs/results/ppo-speed.md, where its matrix-multiply peak is measured.
CPU_CORE = Device("cpu", 24e9, 87e9, 10e9, 10e9, gpu=False)


def measure_cpu(threads: int | None = None) -> Device:
    """Measure this machine: its memory, and the speed of a 1024 x 1024 float32 product.

    `threads` are those of the recipe; None: as many as the environment allows.
    """
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    square = np.ones((1024, 1024), dtype=np.float32)
    seconds = []
    with threadpool_limits(threads):
        for _ in range(4):  # the first one starts the threads
            started = time.perf_counter()
            square @ square
            seconds.append(time.perf_counter() - started)
    return replace(CPU_CORE, memory=memory, flops=2 * 1024**3 / min(seconds))


def device_named(name: str, threads: int | None = None) -> Device:
    """Return a GPU by name, or this machine's CPU; raises InputError for another name.

    `threads` are those of one process on a CPU.
    """
    if name == "cpu":
        return measure_cpu(threads)
    if name not in GPUS:
        raise InputError(f"--device {name}: unknown; choose from {', '.join(GPUS)}, cpu")
    return GPUS[name]
