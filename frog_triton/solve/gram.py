"""Conjugate gradients in Gram space: the same iterates in other coordinates.

With N samples well below D the solve costs ``2 N^2 D + 4 N D R + 2 k N^2 R`` operations
instead of ``(4 k - 2) N D R``, and reads the rows twice instead of ``2 k - 1`` times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..linalg.numbers import Numbers
from ..linalg.rows import Rows, SampleMap
from ..ops.backend import Backend
from .batch import Batch


@dataclass(frozen=True)
class GramSolution:
    """Directions in the coordinates ``z = s m + X^T u``.

    Attributes:
        ops: the backend.
        xs: samples of each layer, written out.
        ms: right-hand sides of each layer.
        scales: of their rows ``(L, R)``; m above is their product.
        s: ``(L, R)``.
        u: ``(L, groups, N, R / groups)``.
        status: how each row was solved ``(L, R)``; see `fisher.FISHER`.
        finite: rows whose gradient is finite ``(L, R)``.
        numbers: of the batch.
        formulation: ``"gram"``.
        has_anomalies: only the numbers themselves tell.
    """

    ops: Backend
    xs: Sequence[SampleMap]
    ms: Sequence[Rows]
    scales: Tensor
    s: Tensor
    u: Tensor
    status: Tensor
    finite: Tensor
    numbers: Numbers
    formulation: str = "gram"
    has_anomalies: bool = True

    def rows(self, narrow: bool = False) -> Rows:
        """The directions, ``(L, R, D)``; narrow ones are to be orthogonalized."""
        coordinates = (self.scales, self.s, self.u)
        moving = self.finite if narrow else None
        return self.ops.gram_rows(self.xs, self.ms, *coordinates, moving)

    def update_(self, params: Sequence[Rows], counts: Sequence[Tensor]) -> None:
        """Equation (5), in place, on the rows that are finite; the others are counted.

        Args:
            params: theta of each layer.
            counts: of each layer, int32 ``(2, R)``; see `torch_ops.gram_update_`.
        """
        self.ops.gram_update_(
            params,
            self.xs,
            self.ms,
            self.scales,
            self.s,
            self.u,
            self.status,
            self.finite,
            counts,
            self.numbers,
        )


def solve(ops: Backend, batch: Batch, iters: int) -> GramSolution:
    """Coordinates of ``z / sqrt(<z, m>)`` after `iters` iterations from zero."""
    numbers = batch.numbers
    xs, ys = ops.write_out(batch.xs, batch.ys)
    k = ops.gram(xs)
    ms, scales, finite, c, m_squared = ops.momentum_project_(
        xs, batch.ms, batch.grads, numbers, batch.nesterov
    )
    finite = finite if batch.finite is None else batch.finite
    s, u, status = ops.gram_cg(k, c, ys, m_squared, batch.row_length, numbers, iters)
    return GramSolution(ops, xs, ms, scales, s, u, status, finite, numbers)
