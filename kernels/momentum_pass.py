"""A pass over rows that brings the momentum up to date and projects it on samples."""

import triton
import triton.language as tl

from .common import below, is_finite
from .layouts import entries
from .products import samples_times

HUGE: tl.constexpr = tl.constexpr(2.0**100)
"""Of an entry of G, without which ``beta M + G`` is finite where M is."""

MOST: tl.constexpr = tl.constexpr(2.0**80)
"""That scaled rows can be multiplied by: what samples need beyond it, C gets."""


@triton.jit
def decayed_by(m, g, beta, M_DTYPE: tl.constexpr, NESTEROV: tl.constexpr):
    """``beta M + G`` as it is kept, and what is preconditioned."""
    kept = (beta * m + g).to(M_DTYPE)
    v = kept.to(tl.float32)
    if NESTEROV:
        v = g + beta * v
    return kept, v


@triton.jit
def or_larger(largest, v):
    """The larger of it and ``|v|``; no number once v has been none."""
    return tl.maximum(largest, tl.abs(v), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest_of_rows(largest):
    """Of a tile that `or_larger` gave; infinite where an entry was not finite."""
    return tl.max(tl.where(is_finite(largest), largest, float("inf")), axis=1)


@triton.jit
def with_bias(largest, bias):
    """The largest entry of rows with their biases; infinite where one is not finite."""
    return tl.maximum(largest, tl.where(is_finite(bias), tl.abs(bias), float("inf")))


@triton.jit
def largest_entries(
    g_ptr,
    m_ptr,
    rows,
    row_ok,
    beta,
    D,
    g_place,
    m_place,
    M_DTYPE: tl.constexpr,
    G_TAPS: tl.constexpr,
    M_TAPS: tl.constexpr,
    DECAYED: tl.constexpr,
    NESTEROV: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Of each row of G, or with DECAYED of V; infinite where one is not finite."""
    largest = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = row_ok[:, None] & below(d, D, EVEN_D)[None, :]
        at = entries(rows[:, None], d[None, :], D, g_place, G_TAPS)
        v = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if DECAYED:
            at = entries(rows[:, None], d[None, :], D, m_place, M_TAPS)
            m = tl.load(m_ptr + at, mask=mask, other=0.0).to(tl.float32)
            _, v = decayed_by(m, v, beta, M_DTYPE, NESTEROV)
        largest = or_larger(largest, v)
    return largest_of_rows(largest)


@triton.jit
def foreseen(
    g_ptr,
    m_ptr,
    rows,
    row_ok,
    beta,
    D,
    g_place,
    m_place,
    M_DTYPE: tl.constexpr,
    G_TAPS: tl.constexpr,
    M_TAPS: tl.constexpr,
    NESTEROV: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """The largest entry of each row of G, or where one is huge of V; or infinite."""
    largest = largest_entries(
        g_ptr,
        m_ptr,
        rows,
        row_ok,
        beta,
        D,
        g_place,
        m_place,
        M_DTYPE,
        G_TAPS,
        M_TAPS,
        False,
        NESTEROV,
        EVEN_D,
        BLOCK_R,
        BLOCK_G,
    )
    if tl.max(largest, axis=0) > HUGE:
        largest = largest_entries(
            g_ptr,
            m_ptr,
            rows,
            row_ok,
            beta,
            D,
            g_place,
            m_place,
            M_DTYPE,
            G_TAPS,
            M_TAPS,
            True,
            NESTEROV,
            EVEN_D,
            BLOCK_R,
            BLOCK_D,
        )
    return largest


@triton.jit
def pass_over_rows(
    g_ptr,
    m_ptr,
    v_ptr,
    x_ptr,
    rows,
    row_ok,
    n,
    samples,
    D,
    g_place,
    m_place,
    stride_xn,
    takes,
    beta,
    m_scale,
    x_scale,
    M_DTYPE: tl.constexpr,
    G_TAPS: tl.constexpr,
    M_TAPS: tl.constexpr,
    UPDATE: tl.constexpr,
    NESTEROV: tl.constexpr,
    PROJECT: tl.constexpr,
    SCALED: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One pass over the rows: C and |v|^2, with SCALED at a scale; the largest |v|.

    With UPDATE, M becomes ``beta M + G`` as it goes. Rows that take no gradient have a
    beta of one.
    """
    c = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    squares = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    largest = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        d_ok = below(d, D, EVEN_D)
        mask = row_ok[:, None] & d_ok[None, :]
        at = entries(rows[:, None], d[None, :], D, m_place, M_TAPS)
        v = tl.load(m_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if UPDATE:
            g_at = entries(rows[:, None], d[None, :], D, g_place, G_TAPS)
            g_mask = mask & takes[:, None]
            g = tl.load(g_ptr + g_at, mask=g_mask, other=0.0).to(tl.float32)
            kept, v = decayed_by(v, g, beta[:, None], M_DTYPE, NESTEROV)
            tl.store(m_ptr + at, kept, mask=mask)
            if NESTEROV:
                v_at = rows[:, None] * D + d[None, :]
                tl.store(v_ptr + v_at, v, mask=mask)
        largest = or_larger(largest, v)
        if SCALED:
            v *= m_scale[:, None]
        squares = tl.fma(v, v, squares)
        if PROJECT:
            x = tl.load(
                x_ptr + n[:, None] * stride_xn + d[None, :],
                mask=below(n, samples, EVEN_N)[:, None] & d_ok[None, :],
                other=0.0,
            )
            v *= tl.minimum(x_scale, MOST)
            c = samples_times(x, tl.trans(v), c, PRECISION)
    if PROJECT:
        c *= tl.maximum(x_scale * (1.0 / MOST), 1.0)
    return c, tl.sum(squares, axis=1), largest_of_rows(largest)
