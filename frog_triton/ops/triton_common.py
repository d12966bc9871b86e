"""What the launchers share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

import torch
import triton.language as tl
from torch import Tensor

from ..autotune import config
from ..kernels.common import PARTS
from ..kernels.largest import _largest_kernel
from .interpreter import bear_new_numpy, interpreted
from .launch import launch
from .tables import Tables
from .types import Rows, SampleMap

DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

if interpreted():
    bear_new_numpy()

PRECISION = "tf32x3"
"""Of products with float32 operands: three tensor-core products, float32's accuracy."""


def largest_of(xs: Sequence[SampleMap]) -> list[Tensor]:
    """What kernels find the scale of each layer's samples from; see `with_largest`.

    Samples that have not been prepared count as near one.
    """
    largest = [x.largest for x in xs if x.largest is not None]
    if len(largest) == len(xs):
        return largest
    return [xs[0].x.new_ones(xs[0].groups, PARTS.value, dtype=torch.float32)] * len(xs)


def with_largest(xs: Sequence[SampleMap]) -> list[SampleMap]:
    """The same samples, with the largest entries of parts of each group; one launch."""
    x, samples = xs[0], [m.x for m in xs]
    if len({t.stride() for t in samples}) > 1:
        samples = [t.contiguous() for t in samples]
    first = samples[0]
    layers, groups, parts = len(xs), x.groups, int(PARTS.value)
    channels, entries = first.shape[1] // groups, first.numel() // groups
    sizes = [first.shape[0], channels, *first.shape[2:]]
    order = sorted(range(len(sizes)), key=first.stride)
    filler = 4 - len(sizes)
    strides = [first.stride(i) for i in order] + [0] * filler
    ordered = [sizes[i] for i in order] + [1] * filler
    # In one piece, whatever the order of its dimensions?
    steps = accumulate([1, *ordered], mul)
    dense = groups == 1 and all(
        size == 1 or stride == step
        for size, stride, step in zip(ordered, strides, steps, strict=False)
    )
    chosen = config.LargestConfig()
    tables = Tables([samples])
    largest = first.new_empty(layers, groups, parts, dtype=torch.float32)
    programs = max(1, min(parts, -(-entries // chosen.BLOCK)))
    launch(
        _largest_kernel,
        (programs, layers * groups),
        chosen,
        x_table_ptr=tables[0],
        largest_ptr=largest,
        ENTRIES=entries,
        part_length=-(-entries // programs),
        GROUPS=groups,
        SIZE_0=ordered[0],
        SIZE_1=ordered[1],
        SIZE_2=ordered[2],
        stride_0=strides[0],
        stride_1=strides[1],
        stride_2=strides[2],
        stride_3=strides[3],
        stride_group=channels * first.stride(1),
        ALIGN=tables.align,
        X_DTYPE=DTYPES[first.dtype],
        DENSE=dense,
        HAS_BIAS=x.bias,
    )
    return [m.with_largest(parts) for m, parts in zip(xs, largest, strict=True)]


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


def flat(param: Rows) -> Rows:
    """A parameter as dense rows ``(R, D)``, in place where its layout allows it."""
    weight = param.weight.reshape(param.weight.shape[0], -1)
    return Rows(weight.contiguous(), param.bias)


def write_back(params: Sequence[Rows], rows: Sequence[Rows]) -> None:
    """Copy rows into the parameters that `flat` could not serve in place."""
    for param, row in zip(params, rows, strict=True):
        if row.weight.data_ptr() != param.weight.data_ptr():
            param.weight.copy_(row.weight.view(param.weight.shape))


def empty_rows(ms: Sequence[Rows]) -> tuple[Rows, list[Rows]]:
    """Unwritten float32 rows ``(L, R, D)``, and a view of each layer's."""
    m = ms[0]
    shape = (len(ms), *m.weight.shape)
    rows = Rows(
        m.weight.new_empty(shape, dtype=torch.float32),
        None if m.bias is None else m.bias.new_empty(shape[:2], dtype=torch.float32),
    )
    layers = [
        Rows(rows.weight[i], None if rows.bias is None else rows.bias[i])
        for i in range(len(ms))
    ]
    return rows, layers
