"""Conjugate gradients in Gram space for any N; see `gram_recurrence`."""

import triton
import triton.language as tl

from .common import (
    DAMPING,
    below,
    layer_pointer,
    load_scalar,
    power_of_two,
    problem_base,
    programs,
    reciprocal,
    sum_of_products,
)
from .gram_recurrence import (
    factor_of,
    fisher_weights,
    next_direction,
    normalizer,
    step_length,
    terms_of,
)
from .outputs import OutputPlace, load_outputs


@triton.jit
def _trace(y, scale, norms, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr):
    """The part of a tile in ``sum_i Y_ij^2 |x_i|^2``, equation (3)."""
    scaled = y * scale[None, :]
    norms = tl.broadcast_to(norms[:, None], (BLOCK_N, BLOCK_R))
    return sum_of_products(scaled * scaled, norms, axis=0)


@triton.jit
def _k_times(k_high, k_low, high, low, acc):
    """``acc + K u``: all products of terms but that of the two low ones."""
    acc = tl.dot(k_low, high, acc=acc)
    acc = tl.dot(k_high, low, acc=acc)
    return tl.dot(k_high, high, acc=acc)


@triton.jit
def _gram_cg_tiled_kernel(
    k_high_ptr,
    k_low_ptr,
    k_scale_ptr,
    norms_ptr,
    c_ptr,
    y_table_ptr,
    m_squared_ptr,
    scalars_ptr,
    s_ptr,
    u_ptr,
    status_ptr,
    u_r_ptr,
    u_p_ptr,
    x_r_ptr,
    x_p_ptr,
    N,
    R,
    GROUPS,
    ITERS,
    row_length,
    y_place,
    ALIGN: tl.constexpr,
    Y_DTYPE: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    within=None,
):
    """All iterations; vectors of length N live in scratch memory, tile by tile.

    A program touches only its own rows of the scratch, so it stays in the cache; the
    barriers order the program's own stores and loads.
    """
    program = programs(within)
    y_place = OutputPlace(*y_place)
    problem = program[1].to(tl.int64)
    layer, group = problem // GROUPS, problem % GROUPS
    damping = load_scalar(scalars_ptr, DAMPING)
    rows = program[0] * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok = below(rows, R, EVEN_R)
    wide_rows = rows.to(tl.int64)
    stride_n = R * GROUPS
    base = problem_base(problem, GROUPS, N, R)
    k_high_ptr += problem * N * N
    k_low_ptr += problem * N * N
    k_scale = tl.load(k_scale_ptr + problem)
    y_ptr = layer_pointer(y_table_ptr, layer, Y_DTYPE, ALIGN)
    y_ptr += group * R * y_place.stride_r
    norms_ptr += problem * N
    c_ptr += base
    u_ptr += base
    u_r_ptr += base
    u_p_ptr += base
    x_r_ptr += base
    x_p_ptr += base
    mm = tl.load(m_squared_ptr + problem * R + rows, mask=row_ok, other=0.0)

    zero = tl.zeros((BLOCK_R,), tl.float32)
    zero_n = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    largest = zero
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        at = n[:, None] * stride_n + rows[None, :]
        mask = below(n, N, EVEN_N)[:, None] & row_ok[None, :]
        c = tl.load(c_ptr + at, mask=mask, other=0.0)
        tl.store(x_r_ptr + at, c, mask=mask)
        tl.store(x_p_ptr + at, zero_n, mask=mask)
        tl.store(u_ptr + at, zero_n, mask=mask)
        tl.store(u_r_ptr + at, zero_n, mask=mask)
        tl.store(u_p_ptr + at, zero_n, mask=mask)
        y = load_outputs(y_ptr, n, wide_rows, mask, y_place)
        largest = tl.maximum(largest, tl.max(tl.abs(y), axis=0))
    # Squares of a tiny Y underflow, so each row is first brought near one.
    y_scale = power_of_two(largest)
    trace = zero
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = below(n, N, EVEN_N)[:, None] & row_ok[None, :]
        y = load_outputs(y_ptr, n, wide_rows, mask, y_place)
        norms = tl.load(norms_ptr + n, mask=below(n, N, EVEN_N), other=0.0)
        trace += _trace(y, y_scale, norms, BLOCK_N, BLOCK_R)
    factor, status = factor_of(trace, row_length)
    tl.store(status_ptr + problem * R + rows, status, mask=row_ok)
    tl.debug_barrier()

    s, s_r, s_p, beta = zero, zero + 1.0, zero, zero
    rho, pp, zm = mm, zero, zero
    active = rho > 0
    for iteration in range(ITERS):
        # p = r + beta p, and p^T A p.
        s_p = s_r + beta * s_p
        pp = rho + beta * beta * pp
        txp = zero
        for start in range(0, N, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N).to(tl.int64)
            at = n[:, None] * stride_n + rows[None, :]
            mask = below(n, N, EVEN_N)[:, None] & row_ok[None, :]
            u_p = tl.load(u_p_ptr + at, mask=mask, other=0.0)
            u_p = tl.load(u_r_ptr + at, mask=mask, other=0.0) + beta[None, :] * u_p
            x_p = tl.load(x_p_ptr + at, mask=mask, other=0.0)
            x_p = tl.load(x_r_ptr + at, mask=mask, other=0.0) + beta[None, :] * x_p
            tl.store(u_p_ptr + at, u_p, mask=mask)
            tl.store(x_p_ptr + at, x_p, mask=mask)
            y = load_outputs(y_ptr, n, wide_rows, mask, y_place)
            t = fisher_weights(y, y_scale[None, :], factor[None, :]) * x_p
            txp += sum_of_products(t, x_p, axis=0)
        tl.debug_barrier()
        pap = txp + damping * pp
        alpha, active = step_length(rho, pap, active)
        s += alpha * s_p
        zm += alpha * rho
        s_r -= alpha * damping * s_p
        # z += alpha p, r -= alpha A p.
        c_u = zero
        largest = zero
        for start in range(0, N, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N).to(tl.int64)
            at = n[:, None] * stride_n + rows[None, :]
            mask = below(n, N, EVEN_N)[:, None] & row_ok[None, :]
            u_p = tl.load(u_p_ptr + at, mask=mask, other=0.0)
            u = tl.load(u_ptr + at, mask=mask, other=0.0) + alpha[None, :] * u_p
            tl.store(u_ptr + at, u, mask=mask)
            y = load_outputs(y_ptr, n, wide_rows, mask, y_place)
            t = fisher_weights(y, y_scale[None, :], factor[None, :])
            t *= tl.load(x_p_ptr + at, mask=mask, other=0.0)
            u_r = tl.load(u_r_ptr + at, mask=mask, other=0.0)
            u_r -= alpha[None, :] * (t + damping * u_p)
            tl.store(u_r_ptr + at, u_r, mask=mask)
            largest = tl.maximum(largest, tl.max(tl.abs(u_r), axis=0))
            c = tl.load(c_ptr + at, mask=mask, other=0.0)
            c_u += sum_of_products(c, u_r, axis=0)
        u_scale = power_of_two(largest)
        tl.debug_barrier()
        if iteration < ITERS - 1:
            u_x = zero
            for start in range(0, N, BLOCK_N):
                n = start + tl.arange(0, BLOCK_N).to(tl.int64)
                at = n[:, None] * stride_n + rows[None, :]
                mask = below(n, N, EVEN_N)[:, None] & row_ok[None, :]
                product = zero_n
                for k_start in range(0, N, BLOCK_K):
                    kn = k_start + tl.arange(0, BLOCK_K).to(tl.int64)
                    k_at = n[:, None] * N + kn[None, :]
                    n_ok, kn_ok = below(n, N, EVEN_N), below(kn, N, EVEN_N)
                    k_mask = n_ok[:, None] & kn_ok[None, :]
                    part = tl.load(
                        u_r_ptr + kn[:, None] * stride_n + rows[None, :],
                        mask=kn_ok[:, None] & row_ok[None, :],
                        other=0.0,
                    )
                    high, low = terms_of(part, u_scale[None, :])
                    product = _k_times(
                        tl.load(k_high_ptr + k_at, mask=k_mask, other=0.0),
                        tl.load(k_low_ptr + k_at, mask=k_mask, other=0.0),
                        high,
                        low,
                        product,
                    )
                x_r = s_r[None, :] * tl.load(c_ptr + at, mask=mask, other=0.0)
                x_r += product * reciprocal(k_scale) * reciprocal(u_scale)[None, :]
                tl.store(x_r_ptr + at, x_r, mask=mask)
                u_r = tl.load(u_r_ptr + at, mask=mask, other=0.0)
                u_x += sum_of_products(u_r, x_r, axis=0)
            tl.debug_barrier()
            rho, beta, active = next_direction(rho, s_r, mm, c_u, u_x, active)

    scale, s = normalizer(s, zm, mm, status)
    tl.store(s_ptr + problem * R + rows, s * scale, mask=row_ok)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        at = n[:, None] * stride_n + rows[None, :]
        mask = below(n, N, EVEN_N)[:, None] & row_ok[None, :]
        u = tl.load(u_ptr + at, mask=mask, other=0.0)
        u = tl.where((status == 0)[None, :], u * scale[None, :], 0.0)
        tl.store(u_ptr + at, u, mask=mask)
