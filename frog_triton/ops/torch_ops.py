"""The backend in plain torch: runs anywhere, and says what the kernels compute.

All functions take lists of layers of one geometry (a list of one is the usual case
here) and return tensors with a leading dimension L for the layer. Sums are in the
dtype of the momentum: float32, or float64 for float64 models.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..layers import LinearMap, Rows, stack_rows

GROUPS_LAYERS = False  # one layer at a time: stacking would only copy

# Status of a row. All but FISHER take the identity in place of their Fisher matrix.
FISHER, NO_GRADIENT, NON_FINITE = 0, 1, 2


def momentum_(
    momenta: Sequence[Rows],
    grads: Sequence[Rows],
    momentum: float | Tensor,
    nesterov: bool,
) -> tuple[list[Rows], Tensor]:
    """``M <- beta M + G`` in place, but for rows with a non-finite gradient.

    Args:
        momenta: M of each layer, updated in place.
        grads: G of each layer, any floating dtype and strides.
        momentum: beta.
        nesterov: return ``G + beta M`` instead of ``M``.

    Returns:
        What to precondition, a layer each, and which rows are finite ``(L, R)``.
    """
    effective, finite_rows = [], []
    for m, g in zip(momenta, grads, strict=True):
        finite = torch.isfinite(g.weight).all(1)
        if g.bias is not None:
            finite = finite & torch.isfinite(g.bias)
        # 1 and 0 instead of beta and G: such a row stays as it is.
        beta = _by_row(finite, momentum, 1, m.weight.dtype)
        grad = g.to(m.weight.dtype)
        grad = grad.select(finite, grad.zeros_like())
        m.scale_(beta).add_(grad, torch.ones_like(beta))
        effective.append(grad.add_(m, beta) if nesterov else m)
        finite_rows.append(finite)
    return effective, torch.stack(finite_rows)


def fisher_weights(
    ys: Sequence[Tensor], row_norms: Sequence[Tensor], row_length: int
) -> tuple[Tensor, Tensor]:
    """Normalised Fisher weights, equation (4): ``Y^2 / (trace / D)``.

    Args:
        ys: output gradients ``(n, R, P)`` of each layer; any common scale cancels.
        row_norms: ``|x|^2`` of each layer, ``(n, groups, P)``.
        row_length: D of the paper, the bias included.

    Returns:
        ``Lambda`` ``(L, n, R, P)``, zero in rows that take the identity Fisher, and
        the status of each row ``(L, R)``: `FISHER`, or why it takes the identity.
    """
    weights, statuses = [], []
    for y, norms in zip(ys, row_norms, strict=True):
        # Squares of a tiny Y underflow: each row is scaled by its largest entry.
        largest = y.abs().amax((0, 2), keepdim=True).to(norms.dtype)
        scaled = y.to(norms.dtype) / torch.where(largest == 0, 1, largest)
        squares = scaled.square()
        grouped = squares.unflatten(1, (norms.shape[1], -1))
        trace = (grouped * norms.unsqueeze(2)).sum((0, 3)).flatten()
        factor = row_length / trace
        status = torch.where(torch.isfinite(factor), FISHER, NO_GRADIENT)
        status = torch.where(torch.isfinite(trace), status, NON_FINITE)
        squares *= factor[:, None]
        weights.append(torch.where((status == FISHER)[:, None], squares, 0))
        statuses.append(status)
    return torch.stack(weights), torch.stack(statuses)


def forward(
    xs: Sequence[LinearMap], p: Rows, weights: Tensor, damping: float | Tensor
) -> tuple[Tensor, Tensor]:
    """``T = Lambda * (X p)`` and, out of the same product, ``p^T A p``.

    Args:
        xs: samples of each layer.
        p: search directions ``(L, R, D)``.
        weights: Lambda ``(L, n, R, P)``.
        damping: tau.

    Returns:
        T ``(L, n, R, P)`` and ``p^T A p`` ``(L, R)``.
    """
    xp = torch.stack([x.apply(_layer(p, i)) for i, x in enumerate(xs)])
    t = weights * xp
    return t, (t * xp).sum((1, 3)) + damping * p.dot(p)


def adjoint_step_(
    xs: Sequence[LinearMap],
    t: Tensor,
    p: Rows,
    alpha: Tensor,
    r: Rows,
    damping: float | Tensor,
) -> Tensor:
    """``r -= alpha A p`` with ``A p = X^T T + tau p``; returns ``|r|^2`` ``(L, R)``."""
    for i, x in enumerate(xs):
        _layer(r, i).add_(x.apply_adjoint(t[i]), -alpha[i])
    r.add_(p, -alpha * damping)
    return r.dot(r)


def gram(xs: Sequence[LinearMap]) -> Tensor:
    """``K = X X^T``, one more everywhere with a bias: ``(L, groups, N, N)``."""
    grouped = [x.matrix().grouped() for x in xs]
    k = torch.stack([torch.matmul(g, g.mT) for g in grouped])
    return k + 1 if xs[0].bias else k


def project(xs: Sequence[LinearMap], ms: Sequence[Rows]) -> tuple[Tensor, Tensor]:
    """``C = X M^T`` ``(L, groups, N, R / groups)`` and ``|m|^2`` ``(L, R)``."""
    c = [
        x.apply(m).view(x.samples, x.groups, -1).transpose(0, 1)
        for x, m in zip(xs, ms, strict=True)
    ]
    return torch.stack(c), torch.stack([m.dot(m) for m in ms])


def gram_cg(
    k: Tensor,
    c: Tensor,
    weights: Tensor,
    m_squared: Tensor,
    status: Tensor,
    damping: float | Tensor,
    iters: int,
) -> tuple[Tensor, Tensor]:
    """CG in the coordinates ``v = s m + X^T u``, equation (2) of all rows at once.

    Every vector of CG from zero has that form, so D never appears:

        X v       = s c + K u
        A v       : s' = tau s,  u' = Lambda * (X v) + tau u
        <v, m>    = s |m|^2 + <c, u>
        <v, v>    = s <v, m> + <u, X v>

    Args:
        k: ``X X^T`` ``(L, groups, N, N)``.
        c: ``X M^T`` ``(L, groups, N, R / groups)``.
        weights: Lambda in the shape of ``c``.
        m_squared: ``|m|^2`` ``(L, R)``.
        status: of the rows, from `fisher_weights`, ``(L, R)``.
        damping: tau.
        iters: k of the paper.

    Returns:
        ``s`` ``(L, R)`` and ``u`` (the shape of ``c``) of the normalised direction
        ``z / sqrt(<z, m>)``.
    """
    groups = c.shape[1]
    mm = m_squared.unflatten(1, (groups, -1))
    epsilon = torch.finfo(c.dtype).eps
    s, u = torch.zeros_like(mm), torch.zeros_like(c)
    s_r, u_r, x_r = torch.ones_like(mm), torch.zeros_like(c), c
    s_p, u_p, x_p = s_r, u_r, x_r
    rho = mm
    active = rho > 0
    for iteration in range(iters):
        t = weights * x_p
        pp = s_p * (s_p * mm + _sum(c * u_p)) + _sum(u_p * x_p)
        pap = _sum(t * x_p) + damping * pp
        active = active & (pap > 0)
        alpha = torch.where(active, rho / pap, 0)
        s, u = s + alpha * s_p, u + alpha.unsqueeze(-2) * u_p
        if iteration + 1 == iters:
            break
        s_r = s_r - alpha * damping * s_p
        u_r = u_r - alpha.unsqueeze(-2) * (t + damping * u_p)
        x_r = s_r.unsqueeze(-2) * c + torch.matmul(k, u_r)
        along_m, along_x = s_r * (s_r * mm + _sum(c * u_r)), _sum(u_r * x_r)
        rho_new = along_m + along_x
        # The sum is all rounding once it is that much smaller than its terms.
        active = active & (rho_new > epsilon * (along_m.abs() + along_x.abs()))
        beta = torch.where(active, rho_new / rho, 0)
        s_p, u_p = s_r + beta * s_p, u_r + beta.unsqueeze(-2) * u_p
        x_p = x_r + beta.unsqueeze(-2) * x_p
        rho = rho_new
    plain = (status != FISHER).unflatten(1, (groups, -1))
    s = torch.where(plain, 1, s)
    u = torch.where(plain.unsqueeze(-2), 0, u)
    scale = normaliser(s * mm + torch.where(plain, 0, _sum(c * u)))
    return (s * scale).flatten(1), u * scale.unsqueeze(-2)


def combine(xs: Sequence[LinearMap], ms: Sequence[Rows], s: Tensor, u: Tensor) -> Rows:
    """``z = s m + X^T u``: rows ``(L, R, D)``."""
    layers = []
    for i, (x, m) in enumerate(zip(xs, ms, strict=True)):
        t = u[i].transpose(0, 1).reshape(x.samples * x.positions, -1, 1)
        z = x.matrix().apply_adjoint(t)
        # Rows with u = 0 must not see samples that are not finite.
        z = z.select((t != 0).any(0).squeeze(-1), z.zeros_like())
        layers.append(z.add_(m, s[i]))
    return stack_rows(layers)


def normaliser(zm: Tensor) -> Tensor:
    """``1 / sqrt(<z, m>)`` of equation (2); zero where there is no step to take."""
    return torch.where((zm > 0) & torch.isfinite(zm), zm.rsqrt(), 0)


def update_(
    params: Sequence[Rows],
    direction: Rows,
    finite: Tensor,
    lr: float | Tensor,
    weight_decay: float | Tensor,
) -> None:
    """Equation (5): ``theta <- (1 - rho eta) theta - eta z``, where rows are finite.

    Args:
        params: theta of each layer, in the parameter's own shape, updated in place.
        direction: z ``(L, R, D)``.
        finite: rows to update ``(L, R)``; the others stay as they are.
        lr: eta.
        weight_decay: rho.
    """
    dtype = direction.weight.dtype
    decay = _by_row(finite, 1 - lr * weight_decay, 1, dtype)
    step = _by_row(finite, -lr, 0, dtype)
    for i, param in enumerate(params):
        for theta, z in zip(param, _layer(direction, i), strict=True):
            if theta is None or z is None:
                continue
            wide = theta.to(dtype)  # theta itself unless it is a 16-bit type
            shape = (-1,) + (1,) * (theta.ndim - 1)
            wide.mul_(decay[i].view(shape))
            z = torch.where(finite[i].view(shape), z.view(theta.shape), 0)
            wide.addcmul_(z, step[i].view(shape))
            if wide is not theta:
                theta.copy_(wide)


def _by_row(
    condition: Tensor, value: float | Tensor, otherwise: float, dtype: torch.dtype
) -> Tensor:
    """One factor a row, exact in `dtype`, without asking the device anything."""
    return condition.to(dtype) * value + (~condition).to(dtype) * otherwise


def _layer(rows: Rows, i: int) -> Rows:
    return Rows(rows.weight[i], None if rows.bias is None else rows.bias[i])


def _sum(values: Tensor) -> Tensor:
    """Sum over the samples of ``(L, groups, N, R / groups)``."""
    return values.sum(-2)
