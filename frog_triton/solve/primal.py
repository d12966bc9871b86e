"""Conjugate gradients on the rows themselves ("primal").

``p^T A p`` comes out of the forward product alone, so the last iteration needs no
adjoint: k forward and k - 1 adjoint products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..linalg.numbers import Numbers
from ..linalg.rows import Rows
from ..ops.backend import Backend
from .batch import Batch


@dataclass(frozen=True)
class PrimalSolution:
    """Directions as the backend's state after the last iteration.

    Attributes:
        ops: the backend.
        state: from its ``cg_start``.
        status: how each row was solved ``(L, R)``; see `fisher.FISHER`.
        finite: rows whose gradient is finite ``(L, R)``.
        numbers: of the batch.
        formulation: ``"primal"``.
        has_anomalies: only the numbers themselves tell.
    """

    ops: Backend
    state: Any
    status: Tensor
    finite: Tensor
    numbers: Numbers
    formulation: str = "primal"
    has_anomalies: bool = True

    def rows(self, narrow: bool = False) -> Rows:
        """The directions, ``(L, R, D)``; narrow ones are to be orthogonalized."""
        moving = self.finite if narrow else None
        return self.ops.cg_rows(self.state, self.numbers, moving)

    def update_(self, params: Sequence[Rows], counts: Sequence[Tensor]) -> None:
        """Equation (5), in place, on the rows that are finite; the others are counted.

        Args:
            params: theta of each layer.
            counts: of each layer, int32 ``(2, R)``; see `torch_ops.gram_update_`.
        """
        self.ops.cg_update_(params, self.state, self.finite, counts, self.numbers)


def solve(ops: Backend, batch: Batch, iters: int) -> PrimalSolution:
    """Directions ``z / sqrt(<z, m>)`` after `iters` iterations from zero."""
    numbers = batch.numbers
    ms, scales, finite = ops.momentum_(batch.ms, batch.grads, numbers, batch.nesterov)
    finite = finite if batch.finite is None else batch.finite
    ops = ops.on_rows(batch.xs)
    weights, status = ops.row_weights(batch.xs, batch.ys, batch.row_length)
    state = ops.cg_start(batch.xs, ms, scales, status, iters)
    for iteration in range(iters):
        last = iteration + 1 == iters
        ops.cg_forward_(batch.xs, weights, state, numbers, last)
        if not last:
            ops.cg_adjoint_(batch.xs, state, numbers)
    return PrimalSolution(ops, state, status, finite, numbers)
