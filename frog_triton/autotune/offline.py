"""What a launch compiles to, on any machine: registers, spills, shared memory.

Triton's compiler and NVIDIA's assembler need no GPU. The launches come from
`frog_triton.kernels.launch.recording` and go through Triton's own binder, so what is
compiled is what a step would run, and Triton's cache on disk serves that step.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from ..kernels.launch import Made

# Instructions of the tensor cores, by generation; each becomes one of the machine's.
_WGMMA = re.compile(r"\bwgmma\.mma_async\b")
_TENSOR_CORE = re.compile(rf"\bmma\.sync\b|{_WGMMA.pattern}|\btcgen05\.mma\b")

_INEXACT = re.compile(
    r"\b(?:(?:sqrt|rsqrt|rcp|div|ex2|lg2|sin|cos|tanh)\.approx|div\.full)[.\w]*"
    r"|\b\w[.\w]*\.ftz\b[.\w]*"
)
"""Instructions of PTX that approximate, or take numbers below 1e-38 for zero."""


@dataclass(frozen=True)
class Resources:
    """What one program of a kernel takes.

    Attributes:
        registers: per thread.
        spilled: bytes of local memory per thread; 0 unless registers ran out.
        shared: bytes of shared memory per block.
        tensor_core: number of tensor-core instructions.
        wgmma: of those, Hopper's warp-group instructions.
    """

    registers: int
    spilled: int
    shared: int
    tensor_core: int
    wgmma: int


class _AbsentGPU:
    """As much of a GPU's driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> str:
        # Kernels are kept by device: no index, so that no GPU here is mistaken for it.
        return f"absent sm_{self.capability}"

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compiling_for(capability: int) -> Iterator[None]:
    """Triton compiles for such a GPU in this context, and cannot launch anything.

    Holds for the whole process, so no other thread may launch kernels meanwhile.
    """
    before = driver._active  # `active` would look for a GPU
    driver.set_active(_AbsentGPU(capability))
    try:
        yield
    finally:
        driver.set_active(before)


def compiled(launch: Made, capability: int) -> Any:
    """What Triton makes of a launch on such a GPU, a ``CompiledKernel``."""
    with compiling_for(capability):
        return launch.compile()


def compile_launch(launch: Made, capability: int) -> Resources:
    """Compile a launch for a GPU and read its resource usage.

    Args:
        launch: as recorded; its tensors need no memory.
        capability: of the GPU, 90 for 9.0.
    """
    return resources(compiled(launch, capability))


def disassembly(kernel: Any) -> str:
    """Machine code of what `compiled` gave, as text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        return _tool("nvdisasm", "-c", str(path))


def resources(kernel: Any) -> Resources:
    """Of what `compiled` gave."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", str(path))
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage[:200]}")
    registers, stack, local = map(int, found.groups())
    code = kernel.asm["ptx"]  # the disassembler takes as long as a compilation
    return Resources(
        registers,
        stack + local,
        kernel.metadata.shared,
        len(_TENSOR_CORE.findall(code)),
        len(_WGMMA.findall(code)),
    )


def inexact(kernel: Any) -> list[str]:
    """Instructions that approximate or flush, in what `compiled` gave; no repeats."""
    return sorted(set(_INEXACT.findall(kernel.asm["ptx"])))


def _tool(name: str, *arguments: str) -> str:
    """Run one of the assembler's tools that come with Triton."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    result = subprocess.run(
        [folder / name, *arguments], capture_output=True, text=True, check=True
    )
    return result.stdout
