"""Conjugate gradients in Gram space, each row's coordinates side by side.

So torch's backend solves one layer, and layers of different sizes on top of each other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def cg_in_gram_space(
    k_times: Callable[[Tensor], Tensor],
    c: Tensor,
    weights: Tensor,
    mm: Tensor,
    plain: Tensor,
    damping: float | Tensor,
    iters: int,
) -> tuple[Tensor, Tensor]:
    """CG in the coordinates ``v = s m + X^T u``, of all rows at once.

    Every vector of CG from zero has that form, so D never appears:

        X v       = s c + K u
        A v       : s' = tau s,  u' = Lambda * (X v) + tau u
        <v, m>    = s |m|^2 + <c, u>
        <v, v>    = s <v, m> + <u, X v>

    Squares of p come from those of r, to which the p before is orthogonal.

    Args:
        k_times: ``u`` to ``K u``, for all rows; what it returns is written to.
        c: ``X m`` of each row, ``(..., R, N)``.
        weights: Lambda in the shape of `c`.
        mm: ``|m|^2`` ``(..., R)``.
        plain: rows that take the identity Fisher ``(..., R)``.
        damping: tau.
        iters: k of the paper.

    Returns:
        ``s`` ``(..., R)`` and ``u`` ``(..., R, N)`` of the normalized direction.
    """
    dot, rounding = torch.linalg.vecdot, 8 * torch.finfo(c.dtype).eps
    s, s_r, s_p = torch.zeros_like(mm), torch.ones_like(mm), torch.ones_like(mm)
    u, u_r, u_p, x_p = *(torch.zeros_like(c) for _ in range(3)), c
    rho = pp = mm
    active = rho > 0
    for iteration in range(iters):
        t = weights * x_p
        pap = dot(t, x_p) + damping * pp
        active = active & (pap > 0)
        alpha = torch.where(active, rho / pap, 0)
        s = s + alpha * s_p
        u.addcmul_(u_p, alpha.unsqueeze(-1))
        if iteration + 1 == iters:
            break
        s_r = s_r - alpha * damping * s_p
        u_r.addcmul_(t, alpha.unsqueeze(-1), value=-1)
        u_r.addcmul_(u_p, (alpha * damping).unsqueeze(-1), value=-1)
        x_r = k_times(u_r).addcmul_(c, s_r.unsqueeze(-1))
        c_u, u_x = dot(c, u_r), dot(u_r, x_r)
        rho_new = s_r * (s_r * mm + c_u) + u_x
        # The sum is all rounding once it is that much smaller than its terms.
        terms = s_r.abs() * (s_r.abs() * mm + c_u.abs()) + u_x.abs()
        active = active & (rho_new > rounding * terms)
        beta = torch.where(active, rho_new / rho, 0)
        s_p = s_r + beta * s_p
        u_p = torch.addcmul(u_r, u_p, beta.unsqueeze(-1))
        x_p = torch.addcmul(x_r, x_p, beta.unsqueeze(-1))
        rho, pp = rho_new, rho_new + beta.square() * pp
    s = torch.where(plain, 1, s)
    u = torch.where(plain.unsqueeze(-1), 0, u)
    scale = normalizer(s * mm + torch.where(plain, 0, dot(c, u)))
    return s * scale, u.mul_(scale.unsqueeze(-1))


def normalizer(zm: Tensor) -> Tensor:
    """``1 / sqrt(<z, m>)`` of equation (2); zero where there is no step to take."""
    return torch.where((zm > 0) & torch.isfinite(zm), zm.rsqrt(), 0)
