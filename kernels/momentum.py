"""Momentum and its projection on the samples, in one pass over the rows."""

import triton
import triton.language as tl

from .common import (
    is_finite,
    layer_pointer,
    load_scalar,
    load_scale,
    power_of_two,
    problem_base,
)


@triton.jit
def _decayed(m, g, beta, M_DTYPE: tl.constexpr, NESTEROV: tl.constexpr):
    """``beta M + G`` as it is kept, and what is preconditioned."""
    kept = (beta * m + g).to(M_DTYPE)
    v = kept.to(tl.float32)
    if NESTEROV:
        v = g + beta * v
    return kept, v


@triton.jit
def _magnitude(v):
    """``|v|``, infinite where v is not a number."""
    return tl.where(is_finite(v), tl.abs(v), float("inf"))


@triton.jit
def _momentum_project_kernel(
    g_table_ptr,
    m_table_ptr,
    v_table_ptr,
    x_table_ptr,
    x_largest_table_ptr,
    g_bias_table_ptr,
    m_bias_table_ptr,
    v_bias_table_ptr,
    scalars_ptr,
    c_ptr,
    m_squared_ptr,
    m_scale_ptr,
    finite_ptr,
    N,
    R,
    D,
    GROUPS,
    first_block_n,
    stride_gr,
    stride_gd,
    stride_xn,
    ALIGN: tl.constexpr,
    G_DTYPE: tl.constexpr,
    M_DTYPE: tl.constexpr,
    X_DTYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UPDATE: tl.constexpr,
    MEASURE: tl.constexpr,
    NESTEROV: tl.constexpr,
    PROJECT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``M <- beta M + G``, ``C = X V^T`` and ``|v|^2`` for a block of rows.

    V is M, or with NESTEROV ``G + beta M``, which is then written out; in products it
    is scaled so that no square overflows or vanishes. A row that would not be finite
    stays as it is: beta and G become 1 and 0. To know both before anything is written,
    the block's rows are read once ahead (MEASURE); the second read comes from the
    cache. Without UPDATE, V is read as it is; without MEASURE, so is its scale.
    """
    problem = tl.program_id(1).to(tl.int64)
    layer, group = problem // GROUPS, problem % GROUPS
    block_n = first_block_n + tl.program_id(2)
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok = rows < R
    # Rows of the whole layer: its groups follow each other.
    layer_rows = group * R + rows.to(tl.int64)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    d_range = tl.arange(0, BLOCK_D)
    m_ptr = layer_pointer(m_table_ptr, layer, M_DTYPE, ALIGN)

    if UPDATE:
        beta = load_scalar(scalars_ptr, 0)
        g_ptr = layer_pointer(g_table_ptr, layer, G_DTYPE, ALIGN)
        if HAS_BIAS:
            g_bias_ptr = layer_pointer(g_bias_table_ptr, layer, G_DTYPE, ALIGN)
            g_bias = tl.load(g_bias_ptr + layer_rows, mask=row_ok, other=0.0)
            g_bias = g_bias.to(tl.float32)
    if HAS_BIAS:
        m_bias_ptr = layer_pointer(m_bias_table_ptr, layer, M_DTYPE, ALIGN)
        m_bias = tl.load(m_bias_ptr + layer_rows, mask=row_ok, other=0.0)
        m_bias = m_bias.to(tl.float32)

    scale_at = problem * R + rows
    if MEASURE:
        magnitudes = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + d_range
            mask = row_ok[:, None] & (d < D)[None, :]
            at = layer_rows[:, None] * D + d[None, :]
            v = tl.load(m_ptr + at, mask=mask, other=0.0).to(tl.float32)
            if UPDATE:
                at = layer_rows[:, None] * stride_gr
                at += d[None, :].to(tl.int64) * stride_gd
                g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
                _, v = _decayed(v, g, beta, M_DTYPE, NESTEROV)
            magnitudes = tl.maximum(magnitudes, _magnitude(v))
        largest = tl.max(magnitudes, axis=1)
        if HAS_BIAS:
            v_bias = m_bias
            if UPDATE:
                _, v_bias = _decayed(m_bias, g_bias, beta, M_DTYPE, NESTEROV)
            largest = tl.maximum(largest, _magnitude(v_bias))
        m_scale = tl.where(is_finite(largest), power_of_two(largest), 1.0)
        if block_n == 0:
            tl.store(m_scale_ptr + scale_at, m_scale, mask=row_ok)
    else:
        m_scale = tl.load(m_scale_ptr + scale_at, mask=row_ok, other=0.0)
    if UPDATE:
        finite = is_finite(largest)
        beta = tl.where(finite, beta, 1.0)
        tl.store(finite_ptr + scale_at, finite.to(tl.int8), mask=row_ok)
        if NESTEROV:
            v_ptr = layer_pointer(v_table_ptr, layer, tl.float32, ALIGN)

    c = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    squares = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    if PROJECT:
        x_ptr = layer_pointer(x_table_ptr, layer, X_DTYPE, ALIGN) + group * D
        x_scale = load_scale(x_largest_table_ptr, layer, group)
    for start in range(0, D, BLOCK_D):
        d = start + d_range
        mask = row_ok[:, None] & (d < D)[None, :]
        at = layer_rows[:, None] * D + d[None, :]
        v = tl.load(m_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if UPDATE:
            g_at = layer_rows[:, None] * stride_gr + d[None, :].to(tl.int64) * stride_gd
            g = tl.load(g_ptr + g_at, mask=mask, other=0.0).to(tl.float32)
            g = tl.where(finite[:, None], g, 0.0)
            m, v = _decayed(v, g, beta[:, None], M_DTYPE, NESTEROV)
            tl.store(m_ptr + at, m, mask=mask)
            if NESTEROV:
                tl.store(v_ptr + at, v, mask=mask)
        v *= m_scale[:, None]
        squares = tl.fma(v, v, squares)
        if PROJECT:
            x_mask = (n < N)[:, None] & (d < D)[None, :]
            x = tl.load(
                x_ptr + n[:, None] * stride_xn + d[None, :], mask=x_mask, other=0.0
            )
            x = x.to(tl.float32) * x_scale
            c = tl.dot(x, tl.trans(v), acc=c, input_precision=PRECISION)

    m_squared = tl.sum(squares, axis=1)
    if HAS_BIAS:
        v_bias = m_bias
        if UPDATE:
            g_bias = tl.where(finite, g_bias, 0.0)
            kept_bias, v_bias = _decayed(m_bias, g_bias, beta, M_DTYPE, NESTEROV)
            # Several threads may hold the same row: all must have read it first.
            tl.debug_barrier()
            tl.store(m_bias_ptr + layer_rows, kept_bias, mask=row_ok)
            if NESTEROV:
                v_bias_ptr = layer_pointer(v_bias_table_ptr, layer, tl.float32, ALIGN)
                tl.store(v_bias_ptr + layer_rows, v_bias, mask=row_ok)
        v_bias *= m_scale
        m_squared = tl.fma(v_bias, v_bias, m_squared)
        if PROJECT:
            c += v_bias[None, :] * x_scale

    if block_n == 0:
        tl.store(m_squared_ptr + problem * R + rows, m_squared, mask=row_ok)
    if PROJECT:
        c_ptr += problem_base(problem, GROUPS, N, R)
        c_at = n[:, None] * R * GROUPS + rows[None, :]
        tl.store(c_ptr + c_at, c, mask=(n < N)[:, None] & row_ok[None, :])
