"""The recurrences of conjugate gradients in Gram space, which both its kernels share.

    X v     = s c + K u
    A v     : s' = tau s,  u' = Lambda * (X v) + tau u
    <v, m>  = s |m|^2 + <c, u>
    <v, v>  = s <v, m> + <u, X v>

Lambda, equations (3) and (4), is formed from Y wherever it is used, from two numbers a
row. By conjugacy ``<z, m>`` is the sum of alpha rho. The last adjoint is never formed:
k - 1 products with K serve k iterations. Squares of p come from those of r, to which
the p before is orthogonal: ``|p|^2 = |r|^2 + beta^2 |p|^2``; as a sum of their own they
would be all rounding where p is short beside m.
"""

import triton
import triton.language as tl

from .common import is_finite

# Eight roundings of float32, 2^-20. A sum that much below its terms is all rounding.
ROUNDING: tl.constexpr = tl.constexpr(9.5367432e-07)


@triton.jit
def step_length(rho, pap, active):
    """Alpha, and which rows still move: ``p^T A p`` must be positive."""
    active = active & (pap > 0)
    return tl.where(active, tl.div_rn(rho, tl.where(active, pap, 1.0)), 0.0), active


@triton.jit
def next_direction(rho, s_r, mm, c_u, u_x, active):
    """``|r|^2``, beta, and which rows still move: the residual must exceed rounding."""
    rho_new = s_r * (s_r * mm + c_u) + u_x
    terms = tl.abs(s_r) * (tl.abs(s_r) * mm + tl.abs(c_u)) + tl.abs(u_x)
    active = active & (rho_new > terms * ROUNDING)
    beta = tl.div_rn(rho_new, tl.where(active, rho, 1.0))
    return rho_new, tl.where(active, beta, 0.0), active


@triton.jit
def normalizer(s, zm, mm, status):
    """``1 / sqrt(<z, m>)``, and s: one for rows on the identity Fisher."""
    s = tl.where(status == 0, s, 1.0)
    zm = tl.where(status == 0, zm, mm)
    usable = (zm > 0) & (zm < float("inf"))
    root = tl.sqrt_rn(tl.where(usable, zm, 1.0))
    return tl.where(usable, tl.div_rn(1.0, root), 0.0), s


@triton.jit
def fisher_weights(y, scale, factor):
    """Lambda, equation (4), of one tile."""
    scaled = y * scale
    return scaled * scaled * factor


@triton.jit
def factor_of(trace, row_length):
    """What turns ``(Y scale)^2`` into Lambda, and each row's status.

    Status: 0 Fisher, 1 no sampled gradient, 2 samples that are not finite; the last two
    get weights of zero.
    """
    factor = tl.div_rn(row_length * 1.0, trace)
    status = tl.where(is_finite(factor), 0, 1)
    status = tl.where(is_finite(trace), status, 2)
    return tl.where(status == 0, factor, 0.0), status


@triton.jit
def terms_of(u, scale):
    """``u scale`` in two terms."""
    scaled = u * scale
    high = scaled.to(tl.float16)
    return high, (scaled - high.to(tl.float32)).to(tl.float16)
