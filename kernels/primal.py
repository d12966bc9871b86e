"""Conjugate gradients on the rows themselves.

Two launches an iteration (three where the positions are split), with nothing between
them: partial sums that one launch leaves behind are added up, in order, by whoever
needs them in the next. Scalars of rows have one slot an iteration: no program writes
what another may still read. Vectors are stored in the column order of `samples`.

With DEPTHWISE a row sees one channel, and no matrix product serves one channel: all
groups of a layer count as one problem, and taps are summed one by one.
"""

import triton
import triton.language as tl

from .common import (
    count_anomalies,
    grouped_program,
    layer_pointer,
    load_scalar,
    load_scale,
    load_scales,
    ordered_sum,
    sum_of_products,
)
from .samples import as_factor, load_window, native_column, outstanding, product

# (4 * 2^-23)^2: what is left of an exactly solved row is a few roundings of m.
FLOOR: tl.constexpr = tl.constexpr(2.2737368e-13)


@triton.jit
def _step_length(
    scalars_ptr, pap_partial_ptr, pp_ptr, rho_ptr, active_ptr, blocks_n, total, at, mask
):
    """Alpha of the current iteration, ``rho`` and which rows still move."""
    damping = load_scalar(scalars_ptr, 1)
    pap = ordered_sum(pap_partial_ptr, blocks_n, total, at, mask)
    pap += damping * tl.load(pp_ptr + at, mask=mask, other=0.0)
    rho = tl.load(rho_ptr + at, mask=mask, other=0.0)
    active = tl.load(active_ptr + at, mask=mask, other=0) != 0
    active = active & (pap > 0)
    alpha = tl.div_rn(rho, tl.where(active, pap, 1.0))
    return tl.where(active, alpha, 0.0), rho, active


@triton.jit
def _primal_forward_kernel(
    x_table_ptr,
    x_largest_table_ptr,
    y_table_ptr,
    m_table_ptr,
    m_bias_table_ptr,
    m_scale_ptr,
    y_scale_ptr,
    factor_ptr,
    t_ptr,
    r_ptr,
    r_bias_ptr,
    old_p_ptr,
    old_p_bias_ptr,
    p_ptr,
    p_bias_ptr,
    rho_partial_ptr,
    pap_partial_ptr,
    pp_ptr,
    first_rho_ptr,
    old_rho_ptr,
    rho_ptr,
    old_active_ptr,
    active_ptr,
    N,
    R,
    D,
    GROUPS,
    P,
    total,
    rho_blocks,
    group_channels,
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
    M_DTYPE: tl.constexpr,
    X_DTYPE: tl.constexpr,
    Y_DTYPE: tl.constexpr,
    T_DTYPE: tl.constexpr,
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
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``p = r + beta p``, then ``T = Lambda * (X p)`` and what ``p^T A p`` is made of.

    Every program forms the p it needs; those of the first samples write it down. Lambda
    is formed from Y and never stored. The last iteration needs no T.
    """
    problem = tl.program_id(1).to(tl.int64)
    layer, group = problem // GROUPS, problem % GROUPS
    blocks_n = tl.cdiv(N, BLOCK_N)
    block_r, block_n = grouped_program(tl.cdiv(R, BLOCK_R), blocks_n, GROUP_M)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    rows = block_r * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok = rows < R
    layer_rows = group * R + rows.to(tl.int64)
    at = problem * R + rows
    writes = row_ok & (block_n == 0)
    x_ptr = layer_pointer(x_table_ptr, layer, X_DTYPE, ALIGN)
    x_ptr += group * group_channels * stride_xc
    m_ptr = layer_pointer(m_table_ptr, layer, M_DTYPE, ALIGN)

    beta = tl.zeros((BLOCK_R,), tl.float32)
    if FIRST:
        m_scale = tl.load(m_scale_ptr + at, mask=row_ok, other=0.0)
    else:
        rho = ordered_sum(rho_partial_ptr, rho_blocks, total, at, row_ok)
        old_rho = tl.load(old_rho_ptr + at, mask=row_ok, other=1.0)
        floor = tl.load(first_rho_ptr + at, mask=row_ok, other=0.0) * FLOOR
        active = tl.load(old_active_ptr + at, mask=row_ok, other=0) != 0
        active = active & (rho > floor)
        beta = tl.div_rn(rho, tl.where(active, old_rho, 1.0))
        beta = tl.where(active, beta, 0.0)
        tl.store(rho_ptr + at, rho, mask=writes)
        tl.store(active_ptr + at, active.to(tl.int8), mask=writes)

    xp = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    pp = tl.zeros((BLOCK_R,), tl.float32)
    stored_rows = (layer * GROUPS * R + layer_rows) * D
    if DEPTHWISE:
        channel = (rows // multiplier)[None, :]
        x_scale = load_scales(x_largest_table_ptr, layer, rows // multiplier, row_ok)
        for tap in range(TAPS):
            if FIRST:
                p = tl.load(m_ptr + layer_rows * D + tap, mask=row_ok, other=0.0)
                p = p.to(tl.float32) * m_scale
            else:
                p = tl.load(r_ptr + stored_rows + tap, mask=row_ok, other=0.0)
                old_p = tl.load(old_p_ptr + stored_rows + tap, mask=row_ok, other=0.0)
                p += beta * old_p
            tl.store(p_ptr + stored_rows + tap, p, mask=writes)
            pp += p * p
            mask = (n < N)[:, None] & row_ok[None, :]
            x = load_window(
                x_ptr,
                n[:, None],
                channel,
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
            xp += (x.to(tl.float32) * x_scale[None, :]) * p[None, :]
    else:
        x_scale = load_scale(x_largest_table_ptr, layer, group)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            mask = row_ok[:, None] & (d < D)[None, :]
            stored = stored_rows[:, None] + d[None, :]
            if FIRST:
                local = (
                    layer_rows[:, None] * D + native_column(d, CHANNELS, TAPS)[None, :]
                )
                p = tl.load(m_ptr + local, mask=mask, other=0.0).to(tl.float32)
                p *= m_scale[:, None]
            else:
                p = tl.load(r_ptr + stored, mask=mask, other=0.0)
                p += beta[:, None] * tl.load(old_p_ptr + stored, mask=mask, other=0.0)
            tl.store(p_ptr + stored, p, mask=mask & (block_n == 0))
            pp += sum_of_products(p, p, axis=1)
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
            x = as_factor(x, x_scale, PRECISION)
            p *= outstanding(x_scale, PRECISION)
            xp = product(x, tl.trans(p), xp, PRECISION)
    if HAS_BIAS:
        if FIRST:
            m_bias_ptr = layer_pointer(m_bias_table_ptr, layer, M_DTYPE, ALIGN)
            p = tl.load(m_bias_ptr + layer_rows, mask=row_ok, other=0.0).to(tl.float32)
            p *= m_scale
        else:
            p = tl.load(r_bias_ptr + at, mask=row_ok, other=0.0)
            p += beta * tl.load(old_p_bias_ptr + at, mask=row_ok, other=0.0)
        tl.store(p_bias_ptr + at, p, mask=writes)
        pp += p * p
        xp += (p * x_scale)[None, :]

    tl.store(pp_ptr + at, pp, mask=writes)
    if FIRST:
        tl.store(rho_ptr + at, pp, mask=writes)
        tl.store(active_ptr + at, (pp > 0).to(tl.int8), mask=writes)
    mask = (n < N)[:, None] & row_ok[None, :]
    y_ptr = layer_pointer(y_table_ptr, layer, Y_DTYPE, ALIGN)
    y_at = (n // P * stride_yn + n % P * stride_yp)[:, None]
    y = tl.load(y_ptr + y_at + (layer_rows * stride_yr)[None, :], mask=mask, other=0.0)
    y = y.to(tl.float32) * tl.load(y_scale_ptr + at, mask=row_ok, other=0.0)[None, :]
    factor = tl.load(factor_ptr + at, mask=row_ok, other=0.0)[None, :]
    t = tl.where(factor > 0, y * y * factor, 0.0) * xp
    if not LAST:
        t_at = layer * N * GROUPS * R + n[:, None] * GROUPS * R + layer_rows[None, :]
        tl.store(t_ptr + t_at, t.to(T_DTYPE), mask=mask)
    pap = tl.sum(tl.where(mask, t * xp, 0.0), axis=0)
    tl.store(pap_partial_ptr + block_n.to(tl.int64) * total + at, pap, mask=row_ok)


@triton.jit
def _advance(
    ap,
    ap_bias,
    alpha,
    damping,
    m_table_ptr,
    m_bias_table_ptr,
    m_scale_ptr,
    p_ptr,
    p_bias_ptr,
    r_ptr,
    r_bias_ptr,
    z_ptr,
    z_bias_ptr,
    rho_partial_ptr,
    layer,
    layer_rows,
    row_ok,
    at,
    block_d,
    d,
    R,
    D,
    GROUPS,
    total,
    ALIGN: tl.constexpr,
    M_DTYPE: tl.constexpr,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FIRST: tl.constexpr,
):
    """``z += alpha p``, ``r -= alpha A p`` and ``|r|^2`` on one tile of rows."""
    mask = row_ok[:, None] & (d < D)[None, :]
    stored = (layer * GROUPS * R + layer_rows)[:, None] * D + d[None, :]
    writes = row_ok & (block_d == 0)
    p = tl.load(p_ptr + stored, mask=mask, other=0.0)
    z = alpha[:, None] * p
    if FIRST:
        m_scale = tl.load(m_scale_ptr + at, mask=row_ok, other=0.0)
        m_ptr = layer_pointer(m_table_ptr, layer, M_DTYPE, ALIGN)
        local = layer_rows[:, None] * D + native_column(d, CHANNELS, TAPS)[None, :]
        r = tl.load(m_ptr + local, mask=mask, other=0.0).to(tl.float32)
        r *= m_scale[:, None]
    else:
        r = tl.load(r_ptr + stored, mask=mask, other=0.0)
        z += tl.load(z_ptr + stored, mask=mask, other=0.0)
    r -= alpha[:, None] * (ap + damping * p)
    # Several threads may hold the same entry: all must have read it first.
    tl.debug_barrier()
    tl.store(z_ptr + stored, z, mask=mask)
    tl.store(r_ptr + stored, r, mask=mask)
    rho = tl.sum(tl.where(mask, r * r, 0.0), axis=1)
    if HAS_BIAS:
        p = tl.load(p_bias_ptr + at, mask=writes, other=0.0)
        z = alpha * p
        if FIRST:
            m_bias_ptr = layer_pointer(m_bias_table_ptr, layer, M_DTYPE, ALIGN)
            r = tl.load(m_bias_ptr + layer_rows, mask=writes, other=0.0).to(tl.float32)
            r *= m_scale
        else:
            r = tl.load(r_bias_ptr + at, mask=writes, other=0.0)
            z += tl.load(z_bias_ptr + at, mask=writes, other=0.0)
        r -= alpha * (ap_bias + damping * p)
        tl.debug_barrier()
        tl.store(z_bias_ptr + at, z, mask=writes)
        tl.store(r_bias_ptr + at, r, mask=writes)
        rho += tl.where(writes, r * r, 0.0)
    tl.store(rho_partial_ptr + block_d.to(tl.int64) * total + at, rho, mask=row_ok)


@triton.jit
def _primal_adjoint_kernel(
    x_table_ptr,
    x_largest_table_ptr,
    m_table_ptr,
    m_bias_table_ptr,
    m_scale_ptr,
    scalars_ptr,
    t_ptr,
    p_ptr,
    p_bias_ptr,
    r_ptr,
    r_bias_ptr,
    z_ptr,
    z_bias_ptr,
    ap_partial_ptr,
    ap_bias_partial_ptr,
    rho_partial_ptr,
    pap_partial_ptr,
    pp_ptr,
    rho_ptr,
    active_ptr,
    next_active_ptr,
    zm_ptr,
    N,
    R,
    D,
    GROUPS,
    total,
    entries,
    pap_blocks,
    split_length,
    SPLITS,
    group_channels,
    multiplier,
    HEIGHT,
    WIDTH,
    OUT_HEIGHT,
    OUT_WIDTH,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    ALIGN: tl.constexpr,
    M_DTYPE: tl.constexpr,
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
    DEPTHWISE: tl.constexpr,
    FIRST: tl.constexpr,
    MULTIPLY: tl.constexpr,
    ADVANCE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``X^T T``; alpha is known already, so ``z += alpha p``, ``r -= alpha A p``.

    Where the positions are split, one launch multiplies (MULTIPLY) and leaves partial
    products behind; a second adds them up in order and advances (ADVANCE). Else one
    launch does both.
    """
    problem = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2).to(tl.int64)
    layer, group = problem // GROUPS, problem % GROUPS
    blocks_d = tl.maximum(tl.cdiv(D, BLOCK_D), 1)
    block_r, block_d = grouped_program(tl.cdiv(R, BLOCK_R), blocks_d, GROUP_M)
    rows = block_r * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok = rows < R
    layer_rows = group * R + rows.to(tl.int64)
    at = problem * R + rows
    d = block_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = row_ok[:, None] & (d < D)[None, :]
    stored = (layer * GROUPS * R + layer_rows)[:, None] * D + d[None, :]
    writes = row_ok & (block_d == 0)

    ap = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    ap_bias = tl.zeros((BLOCK_R,), tl.float32)
    if MULTIPLY:
        x_ptr = layer_pointer(x_table_ptr, layer, X_DTYPE, ALIGN)
        x_ptr += group * group_channels * stride_xc
        t_ptr += layer * N * GROUPS * R
        if DEPTHWISE:
            channel = rows // multiplier
            x_scale = load_scales(x_largest_table_ptr, layer, channel, row_ok)
        else:
            x_scale = load_scale(x_largest_table_ptr, layer, group)
        begin = split * split_length
        end = tl.minimum(begin + split_length, N)
        for start in range(begin, end, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N).to(tl.int64)
            if DEPTHWISE:
                t_mask = (n < end)[:, None] & row_ok[None, :]
                t_at = n[:, None] * GROUPS * R + layer_rows[None, :]
                t = tl.load(t_ptr + t_at, mask=t_mask, other=0.0).to(tl.float32)
                x = load_window(
                    x_ptr,
                    n[:, None],
                    channel[None, :],
                    block_d,
                    t_mask,
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
                ap += sum_of_products(t, x, axis=0)[:, None]
                if HAS_BIAS:
                    ap_bias += tl.sum(t, axis=0)
            else:
                t_mask = row_ok[:, None] & (n < end)[None, :]
                t_at = n[None, :] * GROUPS * R + layer_rows[:, None]
                t = tl.load(t_ptr + t_at, mask=t_mask, other=0.0)
                x_mask = (n < end)[:, None] & (d < D)[None, :]
                channel, tap = d, d
                if not POINTWISE:
                    channel, tap = d % CHANNELS, d // CHANNELS
                x = load_window(
                    x_ptr,
                    n[:, None],
                    channel[None, :],
                    tap[None, :],
                    x_mask,
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
                ap = product(t, as_factor(x, x_scale, PRECISION), ap, PRECISION)
                if HAS_BIAS:
                    ap_bias += tl.sum(t.to(tl.float32), axis=1)
        ap_bias *= x_scale
        if not DEPTHWISE:
            ap *= outstanding(x_scale, PRECISION)
    if ADVANCE:
        if not MULTIPLY:
            ap = ordered_sum(ap_partial_ptr, SPLITS, entries, stored, mask)
            if HAS_BIAS:
                ap_bias = ordered_sum(ap_bias_partial_ptr, SPLITS, total, at, writes)
        alpha, rho, active = _step_length(
            scalars_ptr,
            pap_partial_ptr,
            pp_ptr,
            rho_ptr,
            active_ptr,
            pap_blocks,
            total,
            at,
            row_ok,
        )
        tl.store(next_active_ptr + at, active.to(tl.int8), mask=writes)
        # <z, m> is the sum of alpha rho: the search directions are conjugate.
        zm = alpha * rho
        if not FIRST:
            zm += tl.load(zm_ptr + at, mask=writes, other=0.0)
        tl.debug_barrier()
        tl.store(zm_ptr + at, zm, mask=writes)
        _advance(
            ap,
            ap_bias,
            alpha,
            load_scalar(scalars_ptr, 1),
            m_table_ptr,
            m_bias_table_ptr,
            m_scale_ptr,
            p_ptr,
            p_bias_ptr,
            r_ptr,
            r_bias_ptr,
            z_ptr,
            z_bias_ptr,
            rho_partial_ptr,
            layer,
            layer_rows,
            row_ok,
            at,
            block_d,
            d,
            R,
            D,
            GROUPS,
            total,
            ALIGN,
            M_DTYPE,
            CHANNELS,
            TAPS,
            HAS_BIAS,
            FIRST,
        )
    else:
        tl.store(ap_partial_ptr + split * entries + stored, ap, mask=mask)
        if HAS_BIAS:
            tl.store(ap_bias_partial_ptr + split * total + at, ap_bias, mask=writes)


@triton.jit
def _primal_update_kernel(
    theta_table_ptr,
    theta_bias_table_ptr,
    m_table_ptr,
    m_bias_table_ptr,
    m_scale_ptr,
    counts_table_ptr,
    scalars_ptr,
    p_ptr,
    p_bias_ptr,
    z_ptr,
    z_bias_ptr,
    pap_partial_ptr,
    pp_ptr,
    first_rho_ptr,
    rho_ptr,
    active_ptr,
    zm_ptr,
    status_ptr,
    finite_ptr,
    R,
    D,
    GROUPS,
    total,
    pap_blocks,
    stride_theta_r,
    stride_theta_d,
    ALIGN: tl.constexpr,
    THETA_DTYPE: tl.constexpr,
    M_DTYPE: tl.constexpr,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DENSE: tl.constexpr,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The last ``z += alpha p``, normalised, and equation (5); not STEP: z itself."""
    problem = tl.program_id(1).to(tl.int64)
    layer, group = problem // GROUPS, problem % GROUPS
    blocks_d = tl.maximum(tl.cdiv(D, BLOCK_D), 1)
    block_d = tl.program_id(0) % blocks_d
    rows = (tl.program_id(0) // blocks_d) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok = rows < R
    layer_rows = group * R + rows.to(tl.int64)
    at = problem * R + rows
    d = block_d * BLOCK_D + tl.arange(0, BLOCK_D)
    column = native_column(d, CHANNELS, TAPS)[None, :]
    local = layer_rows[:, None] * D + column
    stored = (layer * GROUPS * R + layer_rows)[:, None] * D + d[None, :]

    alpha, rho, _ = _step_length(
        scalars_ptr,
        pap_partial_ptr,
        pp_ptr,
        rho_ptr,
        active_ptr,
        pap_blocks,
        total,
        at,
        row_ok,
    )
    zm = alpha * rho
    if not FIRST:
        zm += tl.load(zm_ptr + at, mask=row_ok, other=0.0)
    # Rows on the identity Fisher step along m, whose square is the first rho.
    status = tl.load(status_ptr + at, mask=row_ok, other=1)
    plain = status != 0
    zm = tl.where(plain, tl.load(first_rho_ptr + at, mask=row_ok, other=0.0), zm)
    usable = (zm > 0) & (zm < float("inf"))
    root = tl.sqrt_rn(tl.where(usable, zm, 1.0))
    scale = tl.where(usable, tl.div_rn(1.0, root), 0.0)

    if STEP:
        finite = tl.load(finite_ptr + at, mask=row_ok, other=0)
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
        lr = load_scalar(scalars_ptr, 2)
        decay = 1.0 - lr * load_scalar(scalars_ptr, 3)
    mask = row_ok[:, None] & (d < D)[None, :]
    z = alpha[:, None] * tl.load(p_ptr + stored, mask=mask, other=0.0)
    if not FIRST:
        z += tl.load(z_ptr + stored, mask=mask, other=0.0)
    m_ptr = layer_pointer(m_table_ptr, layer, M_DTYPE, ALIGN)
    m = tl.load(m_ptr + local, mask=mask & plain[:, None], other=0.0)
    m_scale = tl.load(m_scale_ptr + at, mask=row_ok, other=0.0)
    m = m.to(tl.float32) * m_scale[:, None]
    z = tl.where(plain[:, None], m, z) * scale[:, None]
    theta_ptr = layer_pointer(theta_table_ptr, layer, THETA_DTYPE, ALIGN)
    if not DENSE:
        local = layer_rows[:, None] * stride_theta_r
        local += column.to(tl.int64) * stride_theta_d
    if STEP:
        theta = tl.load(theta_ptr + local, mask=mask, other=0.0).to(tl.float32)
        z = decay * theta - lr * z
    tl.debug_barrier()
    tl.store(theta_ptr + local, z.to(THETA_DTYPE), mask=mask)
    if HAS_BIAS:
        first = row_ok & (block_d == 0)
        z = alpha * tl.load(p_bias_ptr + at, mask=first, other=0.0)
        if not FIRST:
            z += tl.load(z_bias_ptr + at, mask=first, other=0.0)
        m_bias_ptr = layer_pointer(m_bias_table_ptr, layer, M_DTYPE, ALIGN)
        m = tl.load(m_bias_ptr + layer_rows, mask=first & plain, other=0.0)
        z = tl.where(plain, m.to(tl.float32) * m_scale, z) * scale
        bias_ptr = layer_pointer(theta_bias_table_ptr, layer, THETA_DTYPE, ALIGN)
        if STEP:
            theta = tl.load(bias_ptr + layer_rows, mask=first, other=0.0)
            z = decay * theta.to(tl.float32) - lr * z
        tl.debug_barrier()
        tl.store(bias_ptr + layer_rows, z.to(THETA_DTYPE), mask=first)
