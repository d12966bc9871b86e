"""The numbers of a parameter group that a step computes with."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

Number = float | Tensor
"""A number, or a 0-dimensional tensor that only its device need know."""


@dataclass(frozen=True)
class Numbers:
    """Of one group, in one step.

    Attributes:
        momentum: beta.
        damping: tau.
        lr: eta.
        weight_decay: rho.
        skipped: where it is not 0 nothing may change, and nothing is counted. A tensor
            is the ``found_inf`` of a GradScaler, or of a look at the gradients.
        vectors: all of the above, in this order, float64 ``(5,)`` on each device that
            has asked for them; see `frog_triton.kernels.tables.numbers_on`. Other
            numbers need a dictionary of their own.
    """

    momentum: Number = 0.0
    damping: Number = 0.0
    lr: Number = 0.0
    weight_decay: Number = 0.0
    skipped: Number = 0.0
    vectors: dict[torch.device, Tensor] = field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def values(self) -> tuple[Number, ...]:
        """In the order of `vectors`."""
        return self.momentum, self.damping, self.lr, self.weight_decay, self.skipped

    def moving(self, rows: Tensor) -> Tensor:
        """Those of the rows that move: none where the step is skipped.

        Args:
            rows: bool, of any shape.
        """
        if isinstance(self.skipped, Tensor):
            return rows & moved_to(self.skipped == 0, rows.device)
        return rows if self.skipped == 0 else torch.zeros_like(rows)


def moved_to(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. Only a CPU is waited for: it would read too early."""
    return tensor.to(device, non_blocking=device.type != "cpu")
