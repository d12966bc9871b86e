"""What a launch compiles to, on any machine: registers, spills, shared memory.

Triton's compiler and NVIDIA's assembler need no GPU. The launches come from
`frog_triton.ops.launch.recording`, so what is compiled is what a step would run.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Instructions of the tensor cores, by generation.
_TENSOR_CORE = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA|QGMMA|OMMA)\b")
_WGMMA = re.compile(r"\bHGMMA\b")

SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Shared memory a block may have, in bytes, by compute capability (CUDA's guide)."""

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.bool: "i1",
}


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


def compile_launch(
    kernel: Any, args: Mapping[str, Any], options: Mapping[str, Any], capability: int
) -> Resources:
    """Compile a kernel for a GPU and read its resource usage.

    Args:
        kernel: the Triton function.
        args: arguments of a launch by name, constants included.
        options: block sizes, ``num_warps`` and ``num_stages``.
        capability: of the GPU, 80, 90 or 100.
    """
    launch_options = {key: options[key] for key in ("num_warps", "num_stages")}
    values = {**args, **options}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, param in enumerate(kernel.params):
        value = values[param.name]
        if param.is_constexpr or (isinstance(value, int) and value == 1):
            signature[param.name] = "constexpr"
            constants[param.name] = value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = "*" + _TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[param.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "fp32"
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options=launch_options,
    )
    return _read(compiled.asm["cubin"], compiled.metadata.shared)


def _read(cubin: bytes, shared: int) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _tool("cuobjdump", "--dump-resource-usage", str(path))
        code = _tool("nvdisasm", "-c", str(path))
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage[:200]}")
    registers, stack, local = map(int, found.groups())
    return Resources(
        registers,
        stack + local,
        shared,
        len(_TENSOR_CORE.findall(code)),
        len(_WGMMA.findall(code)),
    )


def _tool(name: str, *arguments: str) -> str:
    """Run one of the assembler's tools that come with Triton."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    result = subprocess.run(
        [folder / name, *arguments], capture_output=True, text=True, check=True
    )
    return result.stdout
