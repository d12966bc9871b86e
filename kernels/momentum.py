"""Momentum and its projection on the samples, in one pass over the rows."""

import triton
import triton.language as tl

from .common import is_finite, layer_pointer, load_scalar, problem_base


@triton.jit
def _momentum_project_kernel(
    g_table_ptr,
    m_table_ptr,
    v_table_ptr,
    x_table_ptr,
    g_bias_table_ptr,
    m_bias_table_ptr,
    v_bias_table_ptr,
    scalars_ptr,
    c_ptr,
    m_squared_ptr,
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
    NESTEROV: tl.constexpr,
    PROJECT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``M <- beta M + G``, ``C = X V^T`` and ``|v|^2`` for a block of rows.

    V is M, or with NESTEROV ``G + beta M``, which is then written out. A row with a
    gradient that is not finite stays as it is: beta and G become 1 and 0. To know that
    before anything is written, the block's gradient is read once ahead; the second read
    comes from the cache. Without UPDATE, V is read as it is.
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
        bad = tl.zeros((BLOCK_R,), tl.int32)
        for start in range(0, D, BLOCK_D):
            d = start + d_range
            mask = row_ok[:, None] & (d < D)[None, :]
            at = layer_rows[:, None] * stride_gr + d[None, :].to(tl.int64) * stride_gd
            g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
            bad = tl.maximum(bad, tl.max(tl.where(is_finite(g), 0, 1), axis=1))
        if HAS_BIAS:
            g_bias_ptr = layer_pointer(g_bias_table_ptr, layer, G_DTYPE, ALIGN)
            g_bias = tl.load(g_bias_ptr + layer_rows, mask=row_ok, other=0.0)
            g_bias = g_bias.to(tl.float32)
            bad = tl.maximum(bad, tl.where(is_finite(g_bias), 0, 1))
        finite = bad == 0
        beta = tl.where(finite, beta, 1.0)
        tl.store(finite_ptr + problem * R + rows, finite.to(tl.int8), mask=row_ok)
        if NESTEROV:
            v_ptr = layer_pointer(v_table_ptr, layer, tl.float32, ALIGN)

    c = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    m_squared = tl.zeros((BLOCK_R,), tl.float32)
    if PROJECT:
        x_ptr = layer_pointer(x_table_ptr, layer, X_DTYPE, ALIGN) + group * D
    for start in range(0, D, BLOCK_D):
        d = start + d_range
        mask = row_ok[:, None] & (d < D)[None, :]
        at = layer_rows[:, None] * D + d[None, :]
        v = tl.load(m_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if UPDATE:
            g_at = layer_rows[:, None] * stride_gr + d[None, :].to(tl.int64) * stride_gd
            g = tl.load(g_ptr + g_at, mask=mask, other=0.0).to(tl.float32)
            g = tl.where(finite[:, None], g, 0.0)
            m = (beta[:, None] * v + g).to(M_DTYPE)
            tl.store(m_ptr + at, m, mask=mask)
            v = m.to(tl.float32)
            if NESTEROV:
                v = g + beta[:, None] * v
                tl.store(v_ptr + at, v, mask=mask)
        m_squared += tl.sum(v * v, axis=1)
        if PROJECT:
            x_mask = (n < N)[:, None] & (d < D)[None, :]
            x = tl.load(
                x_ptr + n[:, None] * stride_xn + d[None, :], mask=x_mask, other=0.0
            )
            c = tl.dot(x.to(tl.float32), tl.trans(v), acc=c, input_precision=PRECISION)

    if HAS_BIAS:
        m_bias_ptr = layer_pointer(m_bias_table_ptr, layer, M_DTYPE, ALIGN)
        v = tl.load(m_bias_ptr + layer_rows, mask=row_ok, other=0.0).to(tl.float32)
        if UPDATE:
            g_bias = tl.where(finite, g_bias, 0.0)
            m = (beta * v + g_bias).to(M_DTYPE)
            # Several threads may hold the same row: all must have read it first.
            tl.debug_barrier()
            tl.store(m_bias_ptr + layer_rows, m, mask=row_ok)
            v = m.to(tl.float32)
            if NESTEROV:
                v = g_bias + beta * v
                v_bias_ptr = layer_pointer(v_bias_table_ptr, layer, tl.float32, ALIGN)
                tl.store(v_bias_ptr + layer_rows, v, mask=row_ok)
        m_squared += v * v
        c += v[None, :]

    if block_n == 0:
        tl.store(m_squared_ptr + problem * R + rows, m_squared, mask=row_ok)
    if PROJECT:
        c_ptr += problem_base(problem, GROUPS, N, R)
        c_at = n[:, None] * R * GROUPS + rows[None, :]
        tl.store(c_ptr + c_at, c, mask=(n < N)[:, None] & row_ok[None, :])
