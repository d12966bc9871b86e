"""Patch rows of drawn positions, straight from the activations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ..linalg.rows import Window
from .config import Config, power_of_two
from .kernel import Args, Kernel, Parts, Values, blocks
from .work import Sizes


@triton.jit
def _gather_kernel(
    x_ptr,
    index_ptr,
    out_ptr,
    N,
    ROW,
    HEIGHT,
    WIDTH,
    OUT_HEIGHT,
    OUT_WIDTH,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    UPSAMPLE_H: tl.constexpr,
    UPSAMPLE_W: tl.constexpr,
    INDEXED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One piece of one row: channel, then kernel row, then kernel column.

    Positions are flat indices over (example, output row, output column); what the
    padding adds is zero, and so is what UPSAMPLE puts between input positions. Without
    INDEXED, every position is wanted.
    """
    position = tl.program_id(0).to(tl.int64)
    if INDEXED:
        position = tl.load(index_ptr + position)
    out_w = position % OUT_WIDTH
    out_h = (position // OUT_WIDTH) % OUT_HEIGHT
    example = position // (OUT_WIDTH * OUT_HEIGHT)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    tap = d % (KERNEL_H * KERNEL_W)
    channel = d // (KERNEL_H * KERNEL_W)
    h = out_h * STRIDE_H - PAD_H + (tap // KERNEL_W) * DILATION_H
    w = out_w * STRIDE_W - PAD_W + (tap % KERNEL_W) * DILATION_W
    # Only whole quotients stay, so it is the same however division rounds.
    if UPSAMPLE_H > 1:
        h = tl.where(h % UPSAMPLE_H == 0, h // UPSAMPLE_H, -1)
    if UPSAMPLE_W > 1:
        w = tl.where(w % UPSAMPLE_W == 0, w // UPSAMPLE_W, -1)
    inside = (h >= 0) & (h < HEIGHT) & (w >= 0) & (w < WIDTH)
    at = example * stride_xn + channel * stride_xc + h * stride_xh + w * stride_xw
    x = tl.load(x_ptr + at, mask=inside & (d < ROW), other=0.0)
    out_at = tl.program_id(0).to(tl.int64) * ROW + d
    tl.store(out_ptr + out_at, x, mask=d < ROW)


@dataclass(frozen=True)
class GatherConfig(Config):
    """`GATHER`."""

    BLOCK_D: int = 512


def gather_config(row: int) -> GatherConfig:
    """A row at a time, up to 1024 entries."""
    return GatherConfig(BLOCK_D=min(power_of_two(row), 1024))


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
    spatial = x.ndim - 2
    count = x.shape[0] * math.prod(output_shape) if index is None else index.numel()
    ones, zeros = (1,) * (2 - spatial), (0,) * (2 - spatial)
    kernel_h, kernel_w = (*ones, *window.kernel)
    stride_h, stride_w = (*ones, *window.stride)
    dilation_h, dilation_w = (*ones, *window.dilation)
    pad_h, pad_w = (*zeros, *window.pads)
    upsample_h, upsample_w = (*ones, *(window.upsample or (1,) * spatial))
    height, width = (*ones, *x.shape[2:])
    out_height, out_width = (*ones, *output_shape)
    stride_xh, stride_xw = (*zeros, *x.stride()[2:])
    row = x.shape[1] * kernel_h * kernel_w
    out = x.new_empty(count, row)
    config = GATHER.tuned(gather_config(row), {"n": count, "d": row}, (x.dtype,))
    GATHER.launch(
        config,
        x_ptr=x,
        index_ptr=x if index is None else index,
        out_ptr=out,
        N=count,
        ROW=row,
        HEIGHT=height,
        WIDTH=width,
        OUT_HEIGHT=out_height,
        OUT_WIDTH=out_width,
        stride_xn=x.stride(0),
        stride_xc=x.stride(1),
        stride_xh=stride_xh,
        stride_xw=stride_xw,
        KERNEL_H=kernel_h,
        KERNEL_W=kernel_w,
        STRIDE_H=stride_h,
        STRIDE_W=stride_w,
        PAD_H=pad_h,
        PAD_W=pad_w,
        DILATION_H=dilation_h,
        DILATION_W=dilation_w,
        UPSAMPLE_H=upsample_h,
        UPSAMPLE_W=upsample_w,
        INDEXED=index is not None,
    )
    return out
