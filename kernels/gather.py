"""Patch rows of drawn positions, straight from the activations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ..linalg.rows import Window
from .common import programs
from .config import Config, tile_side
from .kernel import Args, Kernel, Parts, Values, blocks
from .samples import Place, load_window, windowed
from .work import Sizes


@triton.jit
def _gather_kernel(
    x_ptr,
    index_ptr,
    out_ptr,
    N,
    ROW,
    place,
    STENCIL: tl.constexpr,
    INDEXED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    within=None,
):
    """One piece of one row: channel, then kernel row, then kernel column.

    Positions are flat indices over (example, output row, output column). Without
    INDEXED, every position is wanted.
    """
    program = programs(within)
    place = Place(*place)
    position = program[0].to(tl.int64)
    if INDEXED:
        position = tl.load(index_ptr + position)
    d = program[1] * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    tap, channel = d % STENCIL.TAPS, d // STENCIL.TAPS
    x = load_window(x_ptr, position, channel, tap, d < ROW, place, STENCIL)
    out_at = program[0].to(tl.int64) * ROW + d
    tl.store(out_ptr + out_at, x, mask=d < ROW)


@dataclass(frozen=True)
class GatherConfig(Config):
    """`GATHER`."""

    BLOCK_D: int = 512


def gather_config(row: int) -> GatherConfig:
    """A row at a time, up to 1024 entries."""
    return GatherConfig(BLOCK_D=min(tile_side(row), 1024))


def _parts(args: Args, problems: int, values: Values) -> Parts:
    return [((args["N"], blocks(args["ROW"], values["BLOCK_D"])), {})]


def _count(s: Sizes) -> tuple[int, int]:
    size = s.args["out_ptr"].element_size()
    return 0, s.n * (2 * s.args["ROW"] * size + 8)


GATHER = Kernel(
    fn=_gather_kernel,
    config=GatherConfig,
    parts=_parts,
    count=_count,
    values={"BLOCK_D": (128, 256, 512, 1024, 2048), "num_warps": (1, 2, 4, 8)},
    accumulator=("BLOCK_D",),
)


def gather(
    x: Tensor, index: Tensor | None, output_shape: Sequence[int], window: Window
) -> Tensor:
    """Patch rows at drawn positions, or at all of them."""
    count = x.shape[0] * math.prod(output_shape) if index is None else index.numel()
    row = x.shape[1] * math.prod(window.kernel)
    out = x.new_empty(count, row)
    place, stencil = windowed(x, window, output_shape, row)
    config = GATHER.tuned(gather_config(row), {"n": count, "d": row}, (x.dtype,))
    GATHER.launch(
        config,
        x_ptr=x,
        index_ptr=x if index is None else index,
        out_ptr=out,
        N=count,
        ROW=row,
        place=place,
        STENCIL=stencil._replace(CHANNELS=1),  # the same kernel for any
        INDEXED=index is not None,
    )
    return out
