"""What a launch must compute and move, counted from its arguments.

Bytes are the least that device memory must deliver: each input read once, each output
written once, whatever a kernel finds in its caches when it reads again. Operations
count a multiply-add as two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .gpu import GPU
from .launch import Launch, Made

PRICES = {
    "tf32x3": 3.0,
    "tf32x2": 2.0,
    "fp16x2": 1.5,
    "tf32": 1.0,
    "bf16x2": 1.0,
    "bf16x2_tf32": 1.0,
    "bf16": 0.5,
    "bf16_tf32": 0.5,
}
"""tf32 products that one product takes, by precision."""

ITEMSIZES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of an entry, by Triton's names of dtypes."""


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


def work(launch: Made) -> Work:
    """Operations and bytes of one launch, of a bundle those of all its parts."""
    return replace(sum(map(_work, launch.parts), Work()), launches=1)


def _work(launch: Launch) -> Work:
    operations, moved = launch.kernel.count(Sizes(launch))
    price = PRICES[launch.args.get("PRECISION", "tf32")]
    return Work(operations, price * operations, moved, 1)


class Sizes:
    """Sizes of a launch under the symbols of the formulas below."""

    def __init__(self, launch: Launch) -> None:
        self.args = args = launch.args
        self.n = _samples(launch)
        self.g: int = args.get("GROUPS", 1)
        self.problems = launch.grid[1] if len(launch.grid) > 1 else 1
        self.layers = self.problems // self.g
        # Totals over all problems of the launch.
        self.rows: int = args.get("R", 0) * self.problems
        self.row_entries: int = (args.get("D", 0) + args.get("HAS_BIAS", 0)) * self.rows
        self.x_entries = self._activations()
        self.products: int = 2 * self.n * args.get("D", 0) * self.rows
        self.nr = self.n * self.rows
        self.nn = self.n * self.n * self.problems

    def _activations(self) -> int:
        """Entries of the activations: of a matrix, or of images behind windows."""
        args, place = self.args, self.args.get("place")
        if place is None or args["STENCIL"].POINTWISE:
            return self.n * int(args.get("D", 0)) * self.problems
        stencil = args["STENCIL"]
        examples = self.n // (place.OUT_HEIGHT * place.OUT_WIDTH)
        channels = args.get("group_channels", 0) * self.g
        if args.get("DEPTHWISE"):
            channels = args["R"] // args["multiplier"]
        # A stride beyond the kernel skips positions.
        read = place.OUT_HEIGHT * place.OUT_WIDTH * stencil.TAPS
        read = min(read, place.HEIGHT * place.WIDTH)
        return int(examples * read * channels * self.layers)

    def size(self, name: str) -> int:
        """Bytes of an entry of the tensor with this dtype argument."""
        return ITEMSIZES[str(self.args[name])]


def _samples(launch: Launch) -> int:
    """Samples that a launch looks at: of a projection, those of its own blocks."""
    n: int = launch.args.get("N", 1)
    if "first_block_n" not in launch.args:
        return n
    block = launch.config.values()["BLOCK_N"]
    first: int = launch.args["first_block_n"] * block
    return min(n, first + launch.grid[2] * block) - first
