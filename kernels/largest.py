"""The largest entry of samples, from which kernels that read them find their scale."""

import triton
import triton.language as tl

from .common import PARTS, layer_pointer


@triton.jit
def _largest_kernel(
    x_table_ptr,
    largest_ptr,
    ENTRIES,
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
):
    """Largest ``|x|`` of one of PARTS parts of a group: ``(layers, groups, PARTS)``.

    The 1 that stands for a bias is one of the entries. Sizes and strides are those of
    four dimensions, the innermost in memory first; DENSE samples need none.
    """
    problem = tl.program_id(1).to(tl.int64)
    layer, group = problem // GROUPS, problem % GROUPS
    part = tl.program_id(0)
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
    mine = (parts == part) | ((part == 0) & (parts >= tl.num_programs(0)))
    tl.store(largest_ptr + problem * PARTS + parts, found, mask=mine)
