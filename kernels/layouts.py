"""Rows of parameters where they lie: how an entry is found from its row and column.

A column is torch's own, channel first: weight ``(R, C, kh, kw)`` has the tap
``column % (kh kw)`` of the channel ``column // (kh kw)``. In a channels_last weight
channels and taps have strides of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..linalg.rows import Rows
from .launch import storage_of

APART: tl.constexpr = tl.constexpr(-1)
"""In place of taps: rows are dense, and lie further apart than they are long."""


class RowPlace(NamedTuple):
    """Where rows lie: strides in entries. Rows that are dense have no need of them."""

    stride_r: int
    stride_c: int
    stride_t: int


class BiasPlace(NamedTuple):
    """Where biases lie: the first from a table's address on, and the next."""

    first: int
    stride_r: int


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
    taps = 0
    if not weight.is_contiguous():
        flat = APART.value if weight.stride(1) == 1 else 1
        taps = weight.shape[2] if weight.ndim > 2 else flat
    strides = weight.stride() if taps else (0, 0)
    place = RowPlace(strides[0], strides[1], strides[2] if taps > 1 else 0)
    return {f"{name}_place": place, f"{name.upper()}_TAPS": taps}


def bias_layout(rows: Sequence[Rows]) -> tuple[list[Tensor], BiasPlace]:
    """What a table addresses to find the biases of rows, and where they are from there.

    A column of a matrix is found from where its rows begin, whose address more bytes
    divide. Weights stand in where there are no biases, and are not read.
    """
    weight, bias = rows[0]
    if bias is None:
        return [r.weight for r in rows], BiasPlace(0, 1)
    if bias.stride(0) == 1 or storage_of(bias) != storage_of(weight):
        biases = [r.bias.contiguous() for r in rows if r.bias is not None]
        return biases, BiasPlace(0, 1)
    first = int(bias.storage_offset() - weight.storage_offset())
    # A weight without entries has no address.
    tables = [r.weight if first or r.bias is None else r.bias for r in rows]
    return tables, BiasPlace(first, bias.stride(0))


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
    elif TAPS == APART:
        at = rows * place.stride_r + column
    elif TAPS == 1:
        at = rows.to(tl.int64) * place.stride_r
        at += column.to(tl.int64) * place.stride_c
    else:
        channel, tap = (column // TAPS).to(tl.int64), (column % TAPS).to(tl.int64)
        at = rows.to(tl.int64) * place.stride_r
        at += channel * place.stride_c + tap * place.stride_t
    return at
