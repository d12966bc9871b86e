"""Equation (5): ``theta <- (1 - rho eta) theta - eta (s m + X^T u)``."""

import triton
import triton.language as tl

from .common import (
    count_anomalies,
    grouped_program,
    is_finite,
    layer_pointer,
    load_scalar,
    load_scale,
    problem_base,
)


@triton.jit
def _update_kernel(
    theta_table_ptr,
    m_table_ptr,
    x_table_ptr,
    x_largest_table_ptr,
    theta_bias_table_ptr,
    m_bias_table_ptr,
    counts_table_ptr,
    scalars_ptr,
    m_scale_ptr,
    s_ptr,
    u_ptr,
    status_ptr,
    finite_ptr,
    N,
    R,
    D,
    GROUPS,
    stride_xn,
    stride_theta_r,
    stride_theta_d,
    ALIGN: tl.constexpr,
    THETA_DTYPE: tl.constexpr,
    M_DTYPE: tl.constexpr,
    X_DTYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DENSE: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of rows; the programs of the first columns see to the biases too.

    X and m are scaled. Without STEP the direction itself is written: ``theta = s m +
    X^T u``. Rows whose u is zero must not see samples that are not finite, so those
    samples count as zero.
    """
    problem = tl.program_id(1).to(tl.int64)
    layer, group = problem // GROUPS, problem % GROUPS
    blocks_d = tl.maximum(tl.cdiv(D, BLOCK_D), 1)
    block_r, block_d = grouped_program(tl.cdiv(R, BLOCK_R), blocks_d, GROUP_M)
    rows = block_r * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok = rows < R
    layer_rows = group * R + rows.to(tl.int64)
    d = block_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = row_ok[:, None] & (d < D)[None, :]
    x_ptr = layer_pointer(x_table_ptr, layer, X_DTYPE, ALIGN) + group * D
    x_scale = load_scale(x_largest_table_ptr, layer, group)
    u_ptr += problem_base(problem, GROUPS, N, R)

    z = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    z_bias = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        u = tl.load(
            u_ptr + n[None, :] * R * GROUPS + rows[:, None],
            mask=row_ok[:, None] & (n < N)[None, :],
            other=0.0,
        )
        x = tl.load(
            x_ptr + n[:, None] * stride_xn + d[None, :],
            mask=(n < N)[:, None] & (d < D)[None, :],
            other=0.0,
        ).to(tl.float32)
        x = tl.where(is_finite(x), x * x_scale, 0.0)
        z = tl.dot(u, x, acc=z, input_precision=PRECISION)
        if HAS_BIAS:
            z_bias += tl.sum(u, axis=1) * x_scale

    s = tl.load(s_ptr + problem * R + rows, mask=row_ok, other=0.0)
    m_scale = tl.load(m_scale_ptr + problem * R + rows, mask=row_ok, other=0.0)
    at = layer_rows[:, None] * D + d[None, :]
    m_ptr = layer_pointer(m_table_ptr, layer, M_DTYPE, ALIGN)
    m = tl.load(m_ptr + at, mask=mask, other=0.0).to(tl.float32)
    z += s[:, None] * (m * m_scale[:, None])
    theta_ptr = layer_pointer(theta_table_ptr, layer, THETA_DTYPE, ALIGN)
    if not DENSE:
        at = layer_rows[:, None] * stride_theta_r
        at += d[None, :].to(tl.int64) * stride_theta_d
    if STEP:
        finite = tl.load(finite_ptr + problem * R + rows, mask=row_ok, other=0)
        status = tl.load(status_ptr + problem * R + rows, mask=row_ok, other=0)
        count_anomalies(
            counts_table_ptr,
            layer,
            layer_rows,
            GROUPS * R,
            status,
            finite,
            row_ok & (block_d == 0),
        )
        row_ok = row_ok & (finite != 0)
        mask = mask & (finite != 0)[:, None]
        lr = load_scalar(scalars_ptr, 2)
        decay = 1.0 - lr * load_scalar(scalars_ptr, 3)
        theta = tl.load(theta_ptr + at, mask=mask, other=0.0).to(tl.float32)
        z = decay * theta - lr * z
    tl.store(theta_ptr + at, z.to(THETA_DTYPE), mask=mask)

    if HAS_BIAS:
        first = row_ok & (block_d == 0)
        m_bias_ptr = layer_pointer(m_bias_table_ptr, layer, M_DTYPE, ALIGN)
        bias_ptr = layer_pointer(theta_bias_table_ptr, layer, THETA_DTYPE, ALIGN)
        m = tl.load(m_bias_ptr + layer_rows, mask=first, other=0.0)
        z_bias += s * (m.to(tl.float32) * m_scale)
        if STEP:
            theta = tl.load(bias_ptr + layer_rows, mask=first, other=0.0)
            z_bias = decay * theta.to(tl.float32) - lr * z_bias
        # Several threads may hold the same row: all must have read it first.
        tl.debug_barrier()
        tl.store(bias_ptr + layer_rows, z_bias.to(THETA_DTYPE), mask=first)
