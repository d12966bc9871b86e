"""What a launch must compute and move, counted from its arguments.

Bytes are the least that device memory must deliver: each input read once, each output
written once, whatever a kernel finds in its caches when it reads again. Operations
count a multiply-add as two.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ..ops.launch import Launch


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
        launch_us: microseconds from one launch to the next where both are short. An
            assumption: none has been measured.
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


@lru_cache(maxsize=64)
def detect(device: torch.device) -> GPU | None:
    """The GPU that a device is, or the one nearest to it; None for a CPU.

    A GPU that is not listed takes the rates of the newest listed one that is not
    newer, scaled by their numbers of processors.
    """
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    for gpu in GPUS.values():
        if re.search(rf"\b{gpu.name}\b", found.name):
            return _part(gpu, found.multi_processor_count)
    capability = 10 * found.major + found.minor
    older = [gpu for gpu in GPUS.values() if gpu.capability <= capability]
    near = max(older or GPUS.values(), key=lambda gpu: gpu.capability)
    known = replace(near, name=found.name, capability=capability)
    return _part(known, found.multi_processor_count)


def name_here() -> str:
    """The name in `GPUS` of the GPU here, or of the one most like it; else h200."""
    found = detect(torch.device("cuda")) if torch.cuda.is_available() else None
    if found is None:
        return "h200"
    same = [name for name, gpu in GPUS.items() if gpu.name in found.name]
    near = sorted(GPUS, key=lambda name: abs(GPUS[name].bandwidth - found.bandwidth))
    return (same or near)[0]


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


PRICES = {"tf32x3": 3.0, "tf32": 1.0, "bf16": 0.5, "bf16_tf32": 0.5}
"""tf32 products that one product takes, by precision."""

_SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Work:
    """What one or several launches do.

    Attributes:
        operations: floating-point operations of matrix products.
        tf32_operations: the same in units of one tf32 tensor-core operation: a bfloat16
            product counts half, one with float32's accuracy (tf32x3) three times.
        bytes: through device memory.
        launches: how many.
    """

    operations: int = 0
    tf32_operations: float = 0.0
    bytes: int = 0
    launches: int = 0

    def __add__(self, other: Work) -> Work:
        """Both, one after the other."""
        return Work(
            self.operations + other.operations,
            self.tf32_operations + other.tf32_operations,
            self.bytes + other.bytes,
            self.launches + other.launches,
        )

    def floor(self, gpu: GPU) -> float:
        """Microseconds below which no GPU of this kind can do it."""
        compute = self.tf32_operations / gpu.tf32
        return 1e6 * max(compute, self.bytes / gpu.bandwidth)


def work(launch: Launch) -> Work:
    """Operations and bytes of one launch."""
    operations, moved = _COUNTS[launch.name](Sizes(launch))
    price = PRICES[launch.args.get("PRECISION", "tf32")]
    return Work(operations, price * operations, moved, 1)


class Sizes:
    """Sizes of a launch under the symbols of the formulas below."""

    def __init__(self, launch: Launch) -> None:
        self.args = args = launch.args
        self.n = _samples(launch)
        self.g = args.get("GROUPS", 1)
        self.problems = launch.grid[1] if len(launch.grid) > 1 else 1
        self.layers = self.problems // self.g
        # Totals over all problems of the launch.
        self.rows = args.get("R", 0) * self.problems
        self.row_entries = (args.get("D", 0) + args.get("HAS_BIAS", 0)) * self.rows
        self.x_entries = self._activations()
        self.products = 2 * self.n * args.get("D", 0) * self.rows
        self.nr = self.n * self.rows
        self.nn = self.n * self.n * self.problems

    def _activations(self) -> int:
        """Entries of the activations: of a matrix, or of images behind windows."""
        args = self.args
        if args.get("POINTWISE", True):
            return self.n * int(args.get("D", 0)) * self.problems
        examples = self.n // (args["OUT_HEIGHT"] * args["OUT_WIDTH"])
        channels = args.get("group_channels", 0) * self.g
        if args.get("DEPTHWISE"):
            channels = args["R"] // args["multiplier"]
        # A stride beyond the kernel skips positions.
        read = args["OUT_HEIGHT"] * args["OUT_WIDTH"] * args["TAPS"]
        read = min(read, args["HEIGHT"] * args["WIDTH"])
        return int(examples * read * channels * self.layers)

    def size(self, name: str) -> int:
        """Bytes of an entry of the tensor with this dtype argument."""
        return _SIZES[str(self.args[name])]


def _samples(launch: Launch) -> int:
    """Samples that a launch looks at: of a projection, those of its own blocks."""
    n: int = launch.args.get("N", 1)
    if "first_block_n" not in launch.args:
        return n
    block = launch.config.values()["BLOCK_N"]
    first = launch.args["first_block_n"] * block
    return min(n, first + launch.grid[2] * block) - first


def _weights(s: Sizes) -> tuple[int, int]:
    y = s.nr * s.size("Y_DTYPE")
    return 0, y + 4 * s.nr + 4 * s.n * s.problems + 4 * s.rows


def _project(s: Sizes) -> tuple[int, int]:
    moved = s.row_entries * s.size("M_DTYPE")
    if s.args["first_block_n"] == 0:
        moved += 4 * s.rows  # |v|^2
    moved += 4 * s.rows  # their scales
    if s.args["UPDATE"]:
        moved += s.rows  # which of them are finite
        moved += s.row_entries * (s.size("G_DTYPE") + s.size("M_DTYPE"))
        moved += 4 * s.row_entries * s.args["NESTEROV"]
    if not s.args["PROJECT"]:
        return 0, moved
    return s.products, moved + s.x_entries * s.size("X_DTYPE") + 4 * s.nr


def _largest(s: Sizes) -> tuple[int, int]:
    found = s.args["largest_ptr"].numel()
    return 0, s.args["ENTRIES"] * s.problems * s.size("X_DTYPE") + 4 * found


def _gram(s: Sizes) -> tuple[int, int]:
    splits = -(-s.args["D"] // max(1, s.args["split_length"])) or 1
    operations = 2 * s.n * s.n * s.args["D"] * s.problems
    return operations, s.x_entries * s.size("X_DTYPE") + 4 * splits * s.nn


def _sum(s: Sizes) -> tuple[int, int]:
    return 0, 4 * s.args["numel"] * (s.args["SPLITS"] + 1)


def _cg(s: Sizes) -> tuple[int, int]:
    operations = 2 * (s.args["ITERS"] - 1) * s.n * s.nr
    return operations, 4 * (s.nn + 3 * s.nr + 3 * s.rows)


def _cg_tiled(s: Sizes) -> tuple[int, int]:
    operations, moved = _cg(s)
    return operations, moved + 4 * 4 * s.nr  # scratch, written back once


def _update(s: Sizes) -> tuple[int, int]:
    theta = (1 + s.args["STEP"]) * s.size("THETA_DTYPE")
    moved = s.row_entries * (s.size("M_DTYPE") + theta)
    moved += s.x_entries * s.size("X_DTYPE") + 4 * s.nr + 9 * s.rows
    return s.products, moved


def _gather(s: Sizes) -> tuple[int, int]:
    size = s.args["out_ptr"].element_size()
    return 0, s.n * (2 * s.args["ROW"] * size + 8)


def _norms(s: Sizes) -> tuple[int, int]:
    return 0, s.x_entries * s.size("X_DTYPE") + 4 * s.n * s.problems


def _scale(s: Sizes) -> tuple[int, int]:
    x = s.x_entries * s.size("X_DTYPE") if s.args["DEPTHWISE"] else 4 * s.n * s.problems
    splits = -(-s.n // s.args["split_length"])
    return 0, x + s.nr * s.size("Y_DTYPE") + 8 * splits * s.rows


def _scale_sum(s: Sizes) -> tuple[int, int]:
    return 0, 4 * s.args["total"] * (2 * s.args["SPLITS"] + 3)


def _forward(s: Sizes) -> tuple[int, int]:
    vectors = 4 + s.size("M_DTYPE") if s.args["FIRST"] else 3 * 4
    moved = vectors * s.row_entries + s.x_entries * s.size("X_DTYPE")
    moved += s.nr * s.size("Y_DTYPE") + (16 + 4 * s.args["FIRST"]) * s.rows
    return s.products, moved + s.nr * s.size("T_DTYPE") * (not s.args["LAST"])


def _adjoint(s: Sizes) -> tuple[int, int]:
    operations = moved = 0
    partial = 4 * s.args["SPLITS"] * s.row_entries
    if s.args["MULTIPLY"]:
        operations = s.products
        moved = s.x_entries * s.size("X_DTYPE")
        moved += s.nr * s.args["t_ptr"].element_size()
    if s.args["ADVANCE"]:
        old = s.size("M_DTYPE") if s.args["FIRST"] else 2 * 4
        moved += (old + 3 * 4) * s.row_entries + (12 + 4 * s.args["FIRST"]) * s.rows
    if s.args["MULTIPLY"] != s.args["ADVANCE"]:
        moved += partial
    return operations, moved


def _finish(s: Sizes) -> tuple[int, int]:
    theta = (1 + s.args["STEP"]) * s.size("THETA_DTYPE")
    vectors = 4 if s.args["FIRST"] else 2 * 4
    return 0, (theta + vectors) * s.row_entries + 28 * s.rows


_COUNTS: dict[str, Callable[[Sizes], tuple[int, int]]] = {
    "_fisher_weights_kernel": _weights,
    "_largest_kernel": _largest,
    "_momentum_project_kernel": _project,
    "_gram_kernel": _gram,
    "_sum_splits_kernel": _sum,
    "_gram_cg_kernel": _cg,
    "_gram_cg_tiled_kernel": _cg_tiled,
    "_update_kernel": _update,
    "_gather_kernel": _gather,
    "_row_norms_kernel": _norms,
    "_row_scale_kernel": _scale,
    "_row_scale_sum_kernel": _scale_sum,
    "_primal_forward_kernel": _forward,
    "_primal_adjoint_kernel": _adjoint,
    "_primal_update_kernel": _finish,
}
