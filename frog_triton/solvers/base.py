"""What a solver is given, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..layers import LinearMap, Rows


@dataclass(frozen=True)
class Batch:
    """Row systems ``(X^T Lambda_j X + tau I) z_j = m_j`` of layers of one geometry.

    Attributes:
        xs: sampled activations of each layer.
        ys: their output gradients ``(n, R, P)``.
        ms: right-hand sides ``(R, D)``, the momentum.
    """

    xs: Sequence[LinearMap]
    ys: Sequence[Tensor]
    ms: Sequence[Rows]

    @property
    def row_length(self) -> int:
        """D of the paper, the bias included."""
        return self.xs[0].dim + self.xs[0].bias


class Solution(Protocol):
    """Normalised directions ``z / sqrt(<z, m>)`` of a batch.

    Attributes:
        status: how each row was solved ``(L, R)``; see `torch_ops.FISHER`.
    """

    @property
    def status(self) -> Tensor:
        """How each row was solved ``(L, R)``; see `torch_ops.FISHER`."""

    def rows(self) -> Rows:
        """The directions written out, ``(L, R, D)``."""

    def update_(
        self,
        params: Sequence[Rows],
        finite: Tensor,
        lr: float | Tensor,
        weight_decay: float | Tensor,
    ) -> None:
        """Equation (5) on the rows that are finite ``(L, R)``."""
