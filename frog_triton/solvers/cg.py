"""Conjugate gradients on the rows themselves ("primal").

``p^T A p`` comes out of the forward product alone, so the last iteration needs no
adjoint: k forward and k - 1 adjoint products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ..layers import Rows, stack_rows
from .base import Batch


@dataclass(frozen=True)
class PrimalSolution:
    """Directions as rows.

    Attributes:
        ops: the backend.
        z: ``(L, R, D)``.
        status: how each row was solved ``(L, R)``; see `torch_ops.FISHER`.
    """

    ops: ModuleType
    z: Rows
    status: Tensor

    def rows(self) -> Rows:
        """The directions, ``(L, R, D)``."""
        return self.z

    def update_(
        self,
        params: Sequence[Rows],
        finite: Tensor,
        lr: float | Tensor,
        weight_decay: float | Tensor,
    ) -> None:
        """Equation (5) on the rows that are finite."""
        self.ops.update_(params, self.z, finite, lr, weight_decay)


def solve(
    ops: ModuleType, batch: Batch, damping: float | Tensor, iters: int
) -> PrimalSolution:
    """Directions ``z / sqrt(<z, m>)`` after `iters` iterations from zero.

    A row whose ``p^T A p`` is not positive, or whose residual has come down to
    rounding, keeps its last iterate.
    """
    weights, status = ops.fisher_weights(
        batch.ys, [x.row_norms() for x in batch.xs], batch.row_length
    )
    m = stack_rows(batch.ms)
    r, p, z = m.clone(), m.clone(), m.zeros_like()
    rho = r.dot(r)
    floor = rho * torch.finfo(rho.dtype).eps ** 2
    active = rho > 0
    for iteration in range(iters):
        t, pap = ops.forward(batch.xs, p, weights, damping)
        active = active & (pap > 0)
        alpha = torch.where(active, rho / pap, 0)
        z.add_(p, alpha)
        if iteration + 1 == iters:
            break
        rho_new = ops.adjoint_step_(batch.xs, t, p, alpha, r, damping)
        active = active & (rho_new > floor)
        beta = torch.where(active, rho_new / rho, 0)
        p.scale_(beta).add_(r, torch.ones_like(beta))
        rho = rho_new
    z = m.select(status != ops.FISHER, z)
    return PrimalSolution(ops, z.scale_(ops.normaliser(z.dot(m))), status)
