"""A kernel in a file of its own, as one would be added: ``y = a x`` row by row."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from frog_triton.autotune.offline import compile_launch
from frog_triton.kernels.config import Config
from frog_triton.kernels.kernel import Kernel, covering
from frog_triton.kernels.launch import recording


@triton.jit
def _toy_kernel(
    x_ptr, a_ptr, y_ptr, R, D, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    blocks_d = tl.cdiv(D, BLOCK_D)
    rows = tl.program_id(0) // blocks_d * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(0) % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    at = (tl.program_id(1) * R + rows)[:, None].to(tl.int64) * D + d[None, :]
    mask = (rows < R)[:, None] & (d < D)[None, :]
    a = tl.load(a_ptr + tl.program_id(1) * R + rows, mask=rows < R, other=0.0)
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    tl.store(y_ptr + at, x * a[:, None], mask=mask)


@dataclass(frozen=True)
class ToyConfig(Config):
    """`TOY`."""

    BLOCK_R: int = 16
    BLOCK_D: int = 64


TOY = Kernel(
    fn=_toy_kernel,
    config=ToyConfig,
    parts=covering("RD"),
    count=lambda s: (0, 8 * s.row_entries + 4 * s.rows),
    values={"BLOCK_R": (8, 16, 32), "BLOCK_D": (64, 128), "num_warps": (4, 8)},
    accumulator=("BLOCK_R", "BLOCK_D"),
)


def toy(x, a):
    """Rows ``(L, R, D)`` times one number each."""
    layers, rows, dim = x.shape
    y = torch.empty_like(x)
    sizes = {"r": rows, "d": dim, "p": layers}
    config = TOY.tuned(ToyConfig(), sizes, (x.dtype,))
    TOY.launch(config, layers, x_ptr=x, a_ptr=a, y_ptr=y, R=rows, D=dim)
    return y


if __name__ == "__main__":  # compiled, in a process without the interpreter
    with recording(run=False) as launches:
        toy(torch.empty(2, 40, 300, device="meta"), torch.empty(2, 40, device="meta"))
    for launch in launches:
        found = compile_launch(launch, 90)
        print(launch.name, found.registers > 0, found.spilled)
