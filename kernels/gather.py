"""Patch rows of drawn positions, straight from the activations."""

import triton
import triton.language as tl


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
