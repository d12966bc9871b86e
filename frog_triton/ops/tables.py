"""Tables of addresses and scalars that kernels of several layers read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Tables:
    """Addresses of tensors, one row a kind and one column a layer, on the device.

    All rows, and the scalars, travel in one copy. The tensors must outlive the launch,
    which on one stream the caching allocator sees to.

    Args:
        rows: tensors by kind, each a list of one a layer.
        scalars: numbers, or 0-dimensional tensors, which are read on the device.

    Attributes:
        align: a power of two up to 16 that divides all addresses.
        scalars: float64, in the order given.
    """

    def __init__(
        self, rows: Sequence[Sequence[Tensor]], scalars: Sequence[float | Tensor] = ()
    ) -> None:
        layers = len(rows[0])
        width = layers + layers % 2  # rows begin at multiples of 16 bytes
        addresses = torch.zeros(len(rows), width, dtype=torch.int64)
        addresses[:, :layers] = torch.tensor(
            [[tensor.data_ptr() for tensor in row] for row in rows]
        )
        numbers = [0.0 if isinstance(s, Tensor) else s for s in scalars]
        bits = torch.tensor(numbers, dtype=torch.float64).view(torch.int64)
        packed = torch.cat([addresses.flatten(), bits])
        device = rows[0][0].device
        self._packed = packed.to(device, non_blocking=True)
        self._rows = self._packed[: addresses.numel()].view(len(rows), width)
        self.scalars = self._packed[addresses.numel() :].view(torch.float64)
        for i, scalar in enumerate(scalars):
            if isinstance(scalar, Tensor):
                self.scalars[i].copy_(scalar)
        every = 16
        for row in rows:
            for tensor in row:
                while tensor.data_ptr() % every:
                    every //= 2
        self.align = every

    def __getitem__(self, kind: int) -> Tensor:
        """The row of one kind."""
        return self._rows[kind]
