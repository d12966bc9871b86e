"""What the launchers share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from ..linalg.rows import Rows, SampleMap, rows_in_place
from .interpreter import bear_new_numpy, interpreted
from .launch import settle

DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
if interpreted():
    bear_new_numpy()


def flat_samples(xs: Sequence[SampleMap]) -> tuple[SampleMap, list[Tensor]]:
    """Sizes, and the written-out samples, dense in D and with equal strides."""
    maps = [x.matrix() for x in xs]
    samples = [m.x for m in maps]
    if len({x.stride() for x in samples}) > 1 or samples[0].stride(1) != 1:
        samples = [x.contiguous() for x in samples]
    return maps[0], samples


def biases(rows: Sequence[Rows]) -> list[Tensor]:
    """Biases; the weights stand in where there are none, and are not read."""
    return [r.weight if r.bias is None else r.bias for r in rows]


def in_place(params: Sequence[Rows]) -> list[Rows]:
    """Rows of parameters, gradients or momentum as `row_layout` can describe them.

    They lie where the parameters do, if their layout allows; else they are copies, as
    they are, dense, where layers differ in strides.
    """
    rows = [Rows(rows_in_place(p.weight), p.bias) for p in params]
    if len({r.weight.stride() for r in rows}) > 1:
        rows = [Rows(r.weight.flatten(1).contiguous(), r.bias) for r in rows]
    return rows


def write_back(params: Sequence[Rows], rows: Sequence[Rows]) -> None:
    """Copy rows into the parameters that `in_place` could not serve so."""
    for param, row in zip(params, rows, strict=True):
        if row.weight.data_ptr() != param.weight.data_ptr():
            settle()
            param.weight.copy_(row.weight.view(param.weight.shape))


def empty_rows(ms: Sequence[Rows]) -> tuple[Rows, list[Rows]]:
    """Unwritten float32 rows ``(L, R, D)``, and a view of each layer's."""
    m = ms[0]
    shape = (len(ms), m.weight.shape[0], m.dim)
    rows = Rows(
        m.weight.new_empty(shape, dtype=torch.float32),
        None if m.bias is None else m.bias.new_empty(shape[:2], dtype=torch.float32),
    )
    layers = [
        Rows(rows.weight[i], None if rows.bias is None else rows.bias[i])
        for i in range(len(ms))
    ]
    return rows, layers


ALIGNMENT: tl.constexpr = tl.constexpr(16)
"""Numbers in bfloat16 that rows of products begin at multiples of: with fewer bytes
than 16 in common, Triton would read them number by number."""


def padded(length: int) -> int:
    """The length of a row with zeros behind it."""
    return int(-(-length // ALIGNMENT.value) * ALIGNMENT.value)


def empty_directions(ms: Sequence[Rows]) -> tuple[Rows, list[Rows]]:
    """Unwritten bfloat16 rows ``(L, R, D)``, and each layer's; see `room_of`."""
    m = ms[0]
    length = padded(m.dim + (m.bias is not None))
    room = m.weight.new_empty(
        (len(ms), m.weight.shape[0], length), dtype=torch.bfloat16
    )
    bias = None if m.bias is None else room[..., m.dim]
    rows = Rows(room[..., : m.dim], bias)
    return rows, [rows.layer(i) for i in range(len(ms))]


def room_of(rows: Rows) -> Tensor:
    """Where `empty_directions` lie, or a layer's: a bias as the last column, zeros."""
    weight = rows.weight
    length = padded(weight.shape[-1] + (rows.bias is not None))
    *layers, height = weight.shape[:-1]
    strides = (*(height * length for _ in layers), length, 1)
    return weight.as_strided((*layers, height, length), strides)


def by_group(values: Tensor, groups: int) -> Tensor:
    """``(L, N, R)`` as ``(L, groups, N, R / groups)``."""
    split: Tensor = values.unflatten(2, (groups, -1))
    return split.transpose(1, 2)


def stored(values: Tensor) -> Tensor:
    """``(L, groups, N, R / groups)`` as it is stored, ``(L, N, R)``."""
    return values.transpose(1, 2).flatten(2).contiguous()
