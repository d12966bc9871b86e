"""Rows of parameters where they lie: how an entry is found from its row and column.

A column is torch's own, channel first: weight ``(R, C, kh, kw)`` has the tap
``column % (kh kw)`` of the channel ``column // (kh kw)``. In a channels_last weight
channels and taps have strides of their own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class RowPlace(NamedTuple):
    """Where rows lie: strides in entries. Rows that are dense have no need of them."""

    stride_r: int
    stride_c: int
    stride_t: int


class RowPointers(NamedTuple):
    """Dense rows, and their biases, which are not read where there are none."""

    weight: Any
    bias: Any


def row_layout(name: str, weight: Tensor) -> dict[str, Any]:
    """Arguments that address rows: their place, and how many taps a channel has.

    Args:
        name: of the rows in the kernel.
        weight: ``(R, D)``, or ``(R, C, taps)``, as `rows_in_place` gives it. Dense rows
            have 0 taps: their kernels multiply by no stride but D.
    """
    taps = 0 if weight.is_contiguous() else weight.shape[2] if weight.ndim > 2 else 1
    strides = weight.stride() if taps else (0, 0)
    place = RowPlace(strides[0], strides[1], strides[2] if taps > 1 else 0)
    return {f"{name}_place": place, f"{name.upper()}_TAPS": taps}


@triton.jit
def from_row(ptr, row, D, place, TAPS: tl.constexpr):
    """Rows from this one on, so that offsets of a block of dense rows fit 32 bits."""
    if TAPS == 0:
        ptr += row.to(tl.int64) * D
    else:
        ptr += row.to(tl.int64) * place.stride_r
    return ptr


@triton.jit
def entries(rows, column, D, place, TAPS: tl.constexpr):
    """Where entries lie; rows and columns broadcast against each other."""
    if TAPS == 0:
        at = rows * D + column
    elif TAPS == 1:
        at = rows.to(tl.int64) * place.stride_r
        at += column.to(tl.int64) * place.stride_c
    else:
        channel, tap = (column // TAPS).to(tl.int64), (column % TAPS).to(tl.int64)
        at = rows.to(tl.int64) * place.stride_r
        at += channel * place.stride_c + tap * place.stride_t
    return at
