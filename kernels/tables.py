"""Tables of addresses, and of numbers, that kernels of several layers read."""

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from ..linalg.numbers import Numbers
from .board import board_in_use, uploaded
from .launch import hold


class Tables:
    """Addresses of tensors, one row a kind and one column a layer, on the device.

    All rows travel together, in one copy from the host's memory, or as part of a page
    or board. The tensors live as long as these tables do; past the launch, the caching
    allocator sees to what one stream still reads.

    Args:
        rows: tensors by kind, each a list of one a layer.

    Attributes:
        align: a power of two up to 16 that divides all addresses.
    """

    def __init__(self, rows: Sequence[Sequence[Tensor]]) -> None:
        hold(rows)
        self._tensors = rows
        layers = len(rows[0])
        width = layers + layers % 2  # rows begin at multiples of 16 bytes
        words: list[int] = []
        tensors: list[Tensor | None] = []
        for row in rows:
            words += [tensor.data_ptr() for tensor in row] + [0] * (width - layers)
            tensors += [*row, *[None] * (width - layers)]
        count = len(words)
        self.align = min(
            (address & -address for address in words if address), default=16
        )
        self.align = min(self.align, 16)
        board = board_in_use()
        if board is None:
            packed = uploaded(words, rows[0][0].device)
        else:
            packed = board.place(words, tensors)
        self._rows = packed[:count].view(len(rows), width)

    def __getitem__(self, kind: int) -> Tensor:
        """The row of one kind."""
        return self._rows[kind]


def numbers_on(numbers: Numbers, device: torch.device) -> Tensor:
    """A group's numbers as kernels read them: `Numbers.vectors` of a device.

    They travel there once, as addresses do; those that are tensors are copied on the
    device.
    """
    vector = numbers.vectors.get(device)
    if vector is None:
        values = numbers.values
        words = [0 if isinstance(value, Tensor) else _bits(value) for value in values]
        vector = uploaded(words, device)[: len(values)].view(torch.float64)
        for i, value in enumerate(values):
            if isinstance(value, Tensor):
                vector[i].copy_(value)
        numbers.vectors[device] = vector
    return vector


def _bits(number: float) -> int:
    """A float64's bits as a signed integer."""
    bits: int = struct.unpack("<q", struct.pack("<d", number))[0]
    return bits
