"""Sampled-Fisher weights, equations (3) and (4).

Solves in Gram space have few samples and store Lambda (`_fisher_weights_kernel`).
Solves on the rows may have many: they store what turns Y into Lambda, two numbers a row
(`_row_scale_kernel`), from the norms of the rows of X (`_row_norms_kernel`).
"""

import triton
import triton.language as tl

from .common import (
    is_finite,
    layer_pointer,
    load_scale,
    load_scales,
    power_of_two,
    problem_base,
    sum_of_products,
)
from .samples import load_window


@triton.jit
def _fisher_weights_kernel(
    y_table_ptr,
    norms_table_ptr,
    weights_ptr,
    status_ptr,
    N,
    R,
    GROUPS,
    row_length,
    P,
    stride_yn,
    stride_yr,
    stride_yp,
    stride_norms_n,
    stride_norms_group,
    ALIGN: tl.constexpr,
    Y_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``Lambda = Y^2 / (trace / D)`` for a block of rows, and each row's status.

    Squares of a tiny Y underflow, so each row is first brought near one.
    Where N fits one block, Y is read from memory once; its later reads hit the cache.
    Status: 0 Fisher, 1 no sampled gradient, 2 samples that are not finite; the last two
    get weights of zero.
    """
    problem = tl.program_id(1).to(tl.int64)
    layer, group = problem // GROUPS, problem % GROUPS
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok = rows < R
    y_ptr = layer_pointer(y_table_ptr, layer, Y_DTYPE, ALIGN)
    y_ptr += group * R * stride_yr
    norms_ptr = layer_pointer(norms_table_ptr, layer, tl.float32, 4)
    norms_ptr += group * stride_norms_group
    weights_ptr += problem_base(problem, GROUPS, N, R)

    largest = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = (n < N)[:, None] & row_ok[None, :]
        y_at = (n // P * stride_yn + n % P * stride_yp)[:, None]
        y_at += rows[None, :].to(tl.int64) * stride_yr
        y = tl.load(y_ptr + y_at, mask=mask, other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(y.to(tl.float32)), axis=0))
    scale = power_of_two(largest)

    trace = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = (n < N)[:, None] & row_ok[None, :]
        y_at = (n // P * stride_yn + n % P * stride_yp)[:, None]
        y_at += rows[None, :].to(tl.int64) * stride_yr
        y = tl.load(y_ptr + y_at, mask=mask, other=0.0)
        norms = tl.load(norms_ptr + n * stride_norms_n, mask=n < N, other=0.0)
        scaled = y.to(tl.float32) * scale[None, :]
        norms = tl.broadcast_to(norms[:, None], (BLOCK_N, BLOCK_R))
        trace += sum_of_products(scaled * scaled, norms, axis=0)

    factor = tl.div_rn(row_length * 1.0, trace)
    status = tl.where(is_finite(factor), 0, 1)
    status = tl.where(is_finite(trace), status, 2)
    tl.store(status_ptr + problem * R + rows, status, mask=row_ok)

    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = (n < N)[:, None] & row_ok[None, :]
        y_at = (n // P * stride_yn + n % P * stride_yp)[:, None]
        y_at += rows[None, :].to(tl.int64) * stride_yr
        y = tl.load(y_ptr + y_at, mask=mask, other=0.0)
        scaled = y.to(tl.float32) * scale[None, :]
        weights = tl.where(
            (status == 0)[None, :], scaled * scaled * factor[None, :], 0.0
        )
        at = n[:, None] * R * GROUPS + rows[None, :]
        tl.store(weights_ptr + at, weights, mask=mask)


@triton.jit
def _row_norms_kernel(
    x_table_ptr,
    x_largest_table_ptr,
    norms_ptr,
    N,
    D,
    GROUPS,
    group_channels,
    HEIGHT,
    WIDTH,
    OUT_HEIGHT,
    OUT_WIDTH,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    ALIGN: tl.constexpr,
    X_DTYPE: tl.constexpr,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    POINTWISE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``|x|^2`` of scaled samples, and of the 1 of a bias: ``(layers, N, groups)``."""
    problem = tl.program_id(1).to(tl.int64)
    layer, group = problem // GROUPS, problem % GROUPS
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    x_ptr = layer_pointer(x_table_ptr, layer, X_DTYPE, ALIGN)
    x_ptr += group * group_channels * stride_xc
    scale = load_scale(x_largest_table_ptr, layer, group)
    squares = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = (n < N)[:, None] & (d < D)[None, :]
        channel, tap = d, d
        if not POINTWISE:
            channel, tap = d % CHANNELS, d // CHANNELS
        x = load_window(
            x_ptr,
            n[:, None],
            channel[None, :],
            tap[None, :],
            mask,
            HEIGHT,
            WIDTH,
            OUT_HEIGHT,
            OUT_WIDTH,
            stride_xn,
            stride_xc,
            stride_xh,
            stride_xw,
            KERNEL_W,
            STRIDE_H,
            STRIDE_W,
            PAD_H,
            PAD_W,
            DILATION_H,
            DILATION_W,
            POINTWISE,
        )
        x = x.to(tl.float32) * scale
        squares = tl.fma(x, x, squares)
    total = tl.sum(squares, axis=1)
    if HAS_BIAS:
        total += scale * scale
    tl.store(norms_ptr + layer * N * GROUPS + n * GROUPS + group, total, mask=n < N)


@triton.jit
def _row_scale_kernel(
    x_table_ptr,
    x_largest_table_ptr,
    y_table_ptr,
    norms_ptr,
    largest_ptr,
    trace_ptr,
    N,
    R,
    GROUPS,
    P,
    total,
    split_length,
    multiplier,
    stride_yn,
    stride_yr,
    stride_yp,
    HEIGHT,
    WIDTH,
    OUT_HEIGHT,
    OUT_WIDTH,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    ALIGN: tl.constexpr,
    X_DTYPE: tl.constexpr,
    Y_DTYPE: tl.constexpr,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    POINTWISE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DEPTHWISE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Largest ``|Y|`` of each row, and its trace at the scale of that, over one split.

    One pass over Y: when a larger entry turns up, the trace so far is rescaled.
    """
    problem = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2).to(tl.int64)
    layer, group = problem // GROUPS, problem % GROUPS
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok = rows < R
    layer_rows = group * R + rows.to(tl.int64)
    y_ptr = layer_pointer(y_table_ptr, layer, Y_DTYPE, ALIGN)
    x_ptr = layer_pointer(x_table_ptr, layer, X_DTYPE, ALIGN)
    begin = split * split_length
    end = tl.minimum(begin + split_length, N)

    if DEPTHWISE:
        channel = rows // multiplier
        x_scale = load_scales(x_largest_table_ptr, layer, channel, row_ok)
    largest = tl.zeros((BLOCK_R,), tl.float32)
    trace = tl.zeros((BLOCK_R,), tl.float32)
    scale = power_of_two(largest)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = (n < end)[:, None] & row_ok[None, :]
        y_at = (n // P * stride_yn + n % P * stride_yp)[:, None]
        y = tl.load(
            y_ptr + y_at + (layer_rows * stride_yr)[None, :], mask=mask, other=0.0
        )
        y = y.to(tl.float32)
        if DEPTHWISE:
            norms = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
            for tap in range(TAPS):
                x = load_window(
                    x_ptr,
                    n[:, None],
                    channel[None, :],
                    tap,
                    mask,
                    HEIGHT,
                    WIDTH,
                    OUT_HEIGHT,
                    OUT_WIDTH,
                    stride_xn,
                    stride_xc,
                    stride_xh,
                    stride_xw,
                    KERNEL_W,
                    STRIDE_H,
                    STRIDE_W,
                    PAD_H,
                    PAD_W,
                    DILATION_H,
                    DILATION_W,
                    POINTWISE,
                )
                x = x.to(tl.float32) * x_scale[None, :]
                norms += x * x
            if HAS_BIAS:
                norms += (x_scale * x_scale)[None, :]
        else:
            norms_at = layer * N * GROUPS + n * GROUPS + group
            norms = tl.load(norms_ptr + norms_at, mask=n < end, other=0.0)[:, None]
        largest = tl.maximum(largest, tl.max(tl.abs(y), axis=0))
        before, scale = scale, power_of_two(largest)
        scaled = y * scale[None, :]
        terms = tl.where(mask, scaled * scaled * norms, 0.0)
        ratio = tl.div_rn(scale, before)
        trace = trace * ratio * ratio + tl.sum(terms, axis=0)
    at = split * total + problem * R + rows
    tl.store(largest_ptr + at, largest, mask=row_ok)
    tl.store(trace_ptr + at, trace, mask=row_ok)


@triton.jit
def _row_scale_sum_kernel(
    largest_ptr,
    trace_ptr,
    y_scale_ptr,
    factor_ptr,
    status_ptr,
    total,
    row_length,
    SPLITS,
    BLOCK: tl.constexpr,
):
    """What turns Y into Lambda: ``(Y scale)^2 factor``; and the rows' status."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < total
    largest = tl.zeros((BLOCK,), tl.float32)
    for i in range(SPLITS):
        part = tl.load(largest_ptr + i * total + at, mask=mask, other=0.0)
        largest = tl.maximum(largest, part)
    scale = power_of_two(largest)
    trace = tl.zeros((BLOCK,), tl.float32)
    for i in range(SPLITS):
        part = tl.load(largest_ptr + i * total + at, mask=mask, other=0.0)
        ratio = tl.div_rn(scale, power_of_two(part))
        trace += (
            tl.load(trace_ptr + i * total + at, mask=mask, other=0.0) * ratio * ratio
        )
    factor = tl.div_rn(row_length * 1.0, trace)
    status = tl.where(tl.abs(factor) < float("inf"), 0, 1)
    status = tl.where(tl.abs(trace) < float("inf"), status, 2)
    tl.store(y_scale_ptr + at, scale, mask=mask)
    tl.store(factor_ptr + at, tl.where(status == 0, factor, 0.0), mask=mask)
    tl.store(status_ptr + at, status, mask=mask)
