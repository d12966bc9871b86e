"""GPUs: their datasheets' rates, and the limits of a multiprocessor."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class GPU:
    """Datasheet rates.

    Attributes:
        name: as the driver reports it, or a part of that.
        bandwidth: of device memory, bytes per second.
        tf32: dense tf32 tensor-core operations per second.
        bf16: dense bf16 tensor-core operations per second.
        capability: compute capability.
        processors: streaming multiprocessors.
        launch_us: microseconds from one launch to the next where both are short; an
            assumption.
    """

    name: str
    bandwidth: float
    tf32: float
    bf16: float
    capability: int
    processors: int
    launch_us: float = 5.0


# NVIDIA's datasheets, dense rates: A100 80 GB SXM, H100 SXM, H200 SXM, B200 (HGX),
# RTX 4090.
GPUS = {
    "a100": GPU("A100", 2.039e12, 156e12, 312e12, 80, 108),
    "h100": GPU("H100", 3.35e12, 494e12, 989e12, 90, 132),
    "h200": GPU("H200", 4.8e12, 494e12, 989e12, 90, 132),
    "b200": GPU("B200", 8.0e12, 1.1e15, 2.25e15, 100, 148),
    "rtx4090": GPU("RTX 4090", 1.008e12, 82.6e12, 165e12, 89, 128),
}


_ASSUMED: ContextVar[GPU | None] = ContextVar("assumed", default=None)


@contextmanager
def assuming(gpu: GPU) -> Iterator[None]:
    """Let tensors without memory count as of a GPU."""
    token = _ASSUMED.set(gpu)
    try:
        yield
    finally:
        _ASSUMED.reset(token)


def detect(device: torch.device) -> GPU | None:
    """The GPU that a device is, or the one nearest to it; None for a CPU.

    A GPU that is not listed takes the rates of the newest listed one that is not
    newer, scaled by their numbers of processors.
    """
    if device.type == "meta":
        return _ASSUMED.get()
    return _detected(device) if device.type == "cuda" else None


@lru_cache(maxsize=64)
def _detected(device: torch.device) -> GPU:
    import torch  # not needed for the names alone

    found = torch.cuda.get_device_properties(device)
    for gpu in GPUS.values():
        if re.search(rf"\b{gpu.name}\b", found.name):
            return _part(gpu, found.multi_processor_count)
    capability = 10 * found.major + found.minor
    known = replace(nearest(capability), name=found.name)
    return _part(known, found.multi_processor_count)


def name_here() -> str:
    """The name in `GPUS` of the GPU here, or of the one most like it; else h200."""
    import torch

    found = detect(torch.device("cuda")) if torch.cuda.is_available() else None
    if found is None:
        return "h200"
    same = [name for name, gpu in GPUS.items() if gpu.name in found.name]
    near = sorted(GPUS, key=lambda name: abs(GPUS[name].bandwidth - found.bandwidth))
    return (same or near)[0]


def nearest(capability: int) -> GPU:
    """A listed GPU of a compute capability, or one with the limits of such."""
    older = [gpu for gpu in GPUS.values() if gpu.capability <= capability]
    near = max(older or GPUS.values(), key=lambda gpu: gpu.capability)
    return replace(near, capability=capability)


def _part(gpu: GPU, processors: int) -> GPU:
    """A GPU with fewer, or more, processors at the same rates each."""
    share = processors / gpu.processors
    if processors == gpu.processors:
        return gpu
    return replace(
        gpu,
        bandwidth=gpu.bandwidth * share,
        tf32=gpu.tf32 * share,
        bf16=gpu.bf16 * share,
        processors=processors,
    )


# A multiprocessor's limits from CUDA's guide: shared memory a block may have, threads.
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
THREADS = {80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 103: 2048, 120: 1536}
REGISTERS = 65536
"""32-bit registers of a multiprocessor."""


def shared_limit(capability: int) -> int:
    """Bytes of shared memory a block may have on a GPU."""
    return 1024 * _nearest(SHARED, capability)


def is_hopper(device: torch.device) -> bool:
    """Whether products take 64 rows at a time; so it is where there is no GPU."""
    gpu = detect(device)
    return gpu is None or gpu.capability == 90


def threads_limit(capability: int) -> int:
    """Threads that a multiprocessor holds at a time."""
    return _nearest(THREADS, capability)


def _nearest(table: Mapping[int, int], capability: int) -> int:
    known = [c for c in table if c <= capability] or [min(table)]
    return table[max(known)]
