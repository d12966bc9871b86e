"""What a solver is given, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from ..linalg.numbers import Numbers
from ..linalg.rows import Rows, SampleMap
from ..ops.backend import Backend


@dataclass(frozen=True)
class Batch:
    """Row systems ``(X^T Lambda_j X + tau I) z_j = m_j`` of layers of one geometry.

    Attributes:
        xs: sampled activations of each layer.
        ys: their output gradients ``(n, R, P)``.
        ms: momentum of each layer ``(R, D)``, the right-hand sides.
        grads: gradients to be added to the momentum first, in place; None for none.
        numbers: of the group.
        nesterov: whether ``G + beta M`` is the right-hand side instead.
        finite: without `grads`, rows that may move ``(L, R)``; None for all.
    """

    xs: Sequence[SampleMap]
    ys: Sequence[Tensor]
    ms: Sequence[Rows]
    grads: Sequence[Rows] | None = None
    numbers: Numbers = field(default_factory=Numbers)
    nesterov: bool = False
    finite: Tensor | None = None

    @property
    def row_length(self) -> int:
        """D of the paper, the bias included."""
        return self.xs[0].dim + self.xs[0].bias


def prepared(backend: Backend, batch: Batch) -> Batch:
    """The same systems, samples as the backend reads them.

    Args:
        backend: that is to solve them.
        batch: samples as captured.
    """
    dtype = torch.promote_types(batch.ms[0].weight.dtype, torch.float32)
    xs, ys = backend.prepare(batch.xs, batch.ys, dtype)
    return replace(batch, xs=xs, ys=ys)


class Solution(Protocol):
    """Normalized directions ``z / sqrt(<z, m>)`` of a batch.

    Attributes:
        formulation: ``"primal"`` or ``"gram"``.
        status: how each row was solved ``(L, R)``; see `fisher.FISHER`.
        finite: rows whose gradient is finite ``(L, R)``; the others do not move.
        numbers: of the batch.
        has_anomalies: whether any row may have met numbers that are not finite.
    """

    @property
    def formulation(self) -> str:
        """``"primal"`` or ``"gram"``."""

    @property
    def status(self) -> Tensor:
        """How each row was solved ``(L, R)``."""

    @property
    def finite(self) -> Tensor:
        """Rows whose gradient is finite ``(L, R)``."""

    @property
    def numbers(self) -> Numbers:
        """Of the batch."""

    @property
    def has_anomalies(self) -> bool:
        """Whether a row may have met numbers that are not finite, to be counted."""

    def rows(self, narrow: bool = False) -> Rows:
        """The directions written out, ``(L, R, D)``; narrow: to be orthogonalized."""

    def update_(self, params: Sequence[Rows], counts: Sequence[Tensor]) -> None:
        """Equation (5), in place, on the rows that are finite; the others are counted.

        Args:
            params: theta of each layer.
            counts: of each layer, int32 ``(2, R)``; see `torch_ops.gram_update_`.
        """
