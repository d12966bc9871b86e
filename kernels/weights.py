"""Sampled-Fisher weights, equations (3) and (4)."""

import triton
import triton.language as tl

from .common import is_finite, layer_pointer, problem_base


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

    Squares of a tiny Y underflow, so each row is scaled by its largest entry first.
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
    largest = tl.where(largest == 0, 1.0, largest)

    trace = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = (n < N)[:, None] & row_ok[None, :]
        y_at = (n // P * stride_yn + n % P * stride_yp)[:, None]
        y_at += rows[None, :].to(tl.int64) * stride_yr
        y = tl.load(y_ptr + y_at, mask=mask, other=0.0)
        norms = tl.load(norms_ptr + n * stride_norms_n, mask=n < N, other=0.0)
        scaled = y.to(tl.float32) / largest[None, :]
        trace += tl.sum(scaled * scaled * norms[:, None], axis=0)

    factor = row_length / trace
    status = tl.where(is_finite(factor), 0, 1)
    status = tl.where(is_finite(trace), status, 2)
    tl.store(status_ptr + problem * R + rows, status, mask=row_ok)

    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = (n < N)[:, None] & row_ok[None, :]
        y_at = (n // P * stride_yn + n % P * stride_yp)[:, None]
        y_at += rows[None, :].to(tl.int64) * stride_yr
        y = tl.load(y_ptr + y_at, mask=mask, other=0.0)
        scaled = y.to(tl.float32) / largest[None, :]
        weights = tl.where(
            (status == 0)[None, :], scaled * scaled * factor[None, :], 0.0
        )
        at = n[:, None] * R * GROUPS + rows[None, :]
        tl.store(weights_ptr + at, weights, mask=mask)
