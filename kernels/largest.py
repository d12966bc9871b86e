"""The largest entry of samples, from which kernels that read them find their scale."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..linalg.rows import SampleMap
from .common import PARTS, layer_pointer, programs
from .config import Config
from .kernel import Args, Kernel, Parts, Values
from .launchers import DTYPES
from .tables import Tables
from .work import Sizes


@triton.jit
def _largest_kernel(
    x_table_ptr,
    largest_ptr,
    ENTRIES,
    PROGRAMS,
    part_length,
    GROUPS,
    SIZE_0,
    SIZE_1,
    SIZE_2,
    stride_0,
    stride_1,
    stride_2,
    stride_3,
    stride_group,
    ALIGN: tl.constexpr,
    X_DTYPE: tl.constexpr,
    DENSE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    within=None,
):
    """Largest ``|x|`` of one of PARTS parts of a group: ``(layers, groups, PARTS)``.

    The 1 that stands for a bias is one of the entries. Sizes and strides are those of
    four dimensions, the innermost in memory first; DENSE samples need none.
    PROGRAMS see to a group.
    """
    program = programs(within)
    problem = program[1].to(tl.int64)
    layer, group = problem // GROUPS, problem % GROUPS
    part = program[0]
    x_ptr = layer_pointer(x_table_ptr, layer, X_DTYPE, ALIGN) + group * stride_group
    begin = part.to(tl.int64) * part_length
    end = tl.minimum(begin + part_length, ENTRIES)
    largest = tl.zeros((BLOCK,), tl.float32)
    if HAS_BIAS:
        largest += 1.0
    for start in range(begin, end, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        at = entry
        if not DENSE:
            at = entry % SIZE_0 * stride_0
            entry_1 = entry // SIZE_0
            at += entry_1 % SIZE_1 * stride_1
            entry_2 = entry_1 // SIZE_1
            at += entry_2 % SIZE_2 * stride_2 + entry_2 // SIZE_2 * stride_3
        x = tl.load(x_ptr + at, mask=entry < end, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    # Where there are fewer programs than parts, the first sees to the others.
    parts = tl.arange(0, PARTS)
    found = tl.where(parts == part, tl.max(largest, axis=0), 0.0)
    mine = (parts == part) | ((part == 0) & (parts >= PROGRAMS))
    tl.store(largest_ptr + problem * PARTS + parts, found, mask=mine)


@dataclass(frozen=True)
class LargestConfig(Config):
    """`LARGEST`."""

    num_warps: int = 8
    BLOCK: int = 4096


def _programs(entries: int, block: int) -> int:
    return max(1, min(int(PARTS.value), -(-entries // block)))


def _parts(args: Args, problems: int, values: Values) -> Parts:
    return [((args["PROGRAMS"], problems), {})]


def _count(s: Sizes) -> tuple[int, int]:
    found = s.args["largest_ptr"].numel()
    return 0, s.args["ENTRIES"] * s.problems * s.size("X_DTYPE") + 4 * found


LARGEST = Kernel(fn=_largest_kernel, config=LargestConfig, parts=_parts, count=_count)


def largest_of(xs: Sequence[SampleMap]) -> list[Tensor]:
    """What kernels find the scale of each layer's samples from; see `with_largest`.

    Samples that have not been prepared count as near one.
    """
    largest = [x.largest for x in xs if x.largest is not None]
    if len(largest) == len(xs):
        return largest
    return near_one(xs[0].x, len(xs), xs[0].groups)


def near_one(like: Tensor, layers: int, groups: int) -> list[Tensor]:
    """The same for samples that need no scale."""
    return [like.new_ones(groups, PARTS.value, dtype=torch.float32)] * layers


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
    config = LargestConfig()
    tables = Tables([samples])
    largest = first.new_empty(layers, groups, parts, dtype=torch.float32)
    count = _programs(entries, config.BLOCK)
    LARGEST.launch(
        config,
        layers * groups,
        x_table_ptr=tables[0],
        largest_ptr=largest,
        ENTRIES=entries,
        PROGRAMS=count,
        part_length=16 * -(-entries // (16 * count)),  # whole vectors of any type
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
