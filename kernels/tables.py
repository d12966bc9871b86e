"""Tables of addresses, and of numbers, that kernels of several layers read."""

import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..linalg.numbers import Numbers
from .board import board_in_use
from .config import Config
from .kernel import Kernel
from .launch import hold, is_capturable

_WORDS = 16
"""Words that one launch of `_fill_table_kernel` writes."""


@triton.jit(do_not_specialize=range(1, 17))
def _fill_table_kernel(
    table_ptr,
    word_0: tl.int64,
    word_1: tl.int64,
    word_2: tl.int64,
    word_3: tl.int64,
    word_4: tl.int64,
    word_5: tl.int64,
    word_6: tl.int64,
    word_7: tl.int64,
    word_8: tl.int64,
    word_9: tl.int64,
    word_10: tl.int64,
    word_11: tl.int64,
    word_12: tl.int64,
    word_13: tl.int64,
    word_14: tl.int64,
    word_15: tl.int64,
):
    """Write sixteen words: in a captured CUDA graph they stay what they were."""
    tl.store(table_ptr + 0, word_0)
    tl.store(table_ptr + 1, word_1)
    tl.store(table_ptr + 2, word_2)
    tl.store(table_ptr + 3, word_3)
    tl.store(table_ptr + 4, word_4)
    tl.store(table_ptr + 5, word_5)
    tl.store(table_ptr + 6, word_6)
    tl.store(table_ptr + 7, word_7)
    tl.store(table_ptr + 8, word_8)
    tl.store(table_ptr + 9, word_9)
    tl.store(table_ptr + 10, word_10)
    tl.store(table_ptr + 11, word_11)
    tl.store(table_ptr + 12, word_12)
    tl.store(table_ptr + 13, word_13)
    tl.store(table_ptr + 14, word_14)
    tl.store(table_ptr + 15, word_15)


FILL_TABLE = Kernel(
    fn=_fill_table_kernel,
    parts=lambda args, problems, values: [((1,), {})],
    count=lambda sizes: (0, 8 * _WORDS),
)


class Tables:
    """Addresses of tensors, one row a kind and one column a layer, on the device.

    All rows travel together: in one copy from the host's memory, or where a CUDA graph
    must be able to capture that, as arguments of a kernel; or they are part of a
    board. The tensors live as long as these tables do; past the launch, the caching
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
            packed = _uploaded(words, rows[0][0].device)
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
        vector = _uploaded(words, device)[: len(values)].view(torch.float64)
        for i, value in enumerate(values):
            if isinstance(value, Tensor):
                vector[i].copy_(value)
        numbers.vectors[device] = vector
    return vector


def _uploaded(words: Sequence[int], device: torch.device) -> Tensor:
    """Words on a device, perhaps with zeros behind them."""
    return (_filled if is_capturable() else _copied)(words, device)


def _bits(number: float) -> int:
    """A float64's bits as a signed integer."""
    bits: int = struct.unpack("<q", struct.pack("<d", number))[0]
    return bits


def _copied(words: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(words, dtype=torch.int64).to(device, non_blocking=True)


def _filled(words: Sequence[int], device: torch.device) -> Tensor:
    padded = [*words, *[0] * (-len(words) % _WORDS)]
    table = torch.empty(len(padded), dtype=torch.int64, device=device)
    for first in range(0, len(padded), _WORDS):
        arguments = {
            f"word_{i}": padded[first + i] for i in range(_WORDS)
        }  # by value, hence part of a captured graph
        one = Config(num_warps=1, num_stages=1)
        FILL_TABLE.launch(one, table_ptr=table[first:], **arguments)
    return table
