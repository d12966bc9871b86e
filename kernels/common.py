"""Helpers that several kernels share.

Layers of one geometry share a launch: a *table* is an int64 array of addresses, one a
layer, and `layer_pointer` picks a program's own. A *problem* is a group of a layer, so
``problem = layer * groups + group``. Scalars that change from step to step (lr,
damping) are read from a float64 array on the device, so that no value causes a
recompile.
"""

import triton
import triton.language as tl

PARTS: tl.constexpr = tl.constexpr(64)
"""Parts of a group's samples whose largest entries are found side by side."""

REACH: tl.constexpr = tl.constexpr(40)
"""See `frog_triton.linalg.scales`, which has it for torch."""


@triton.jit
def layer_pointer(table_ptr, layer, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    """The layer's tensor; the launcher has checked that ALIGN divides its address."""
    address = tl.load(table_ptr + layer)
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE), bitcast=True), ALIGN)


@triton.jit
def problem_base(problem, GROUPS, N, R):
    """Where a problem's columns begin in a ``(layers, N, GROUPS * R)`` array."""
    return (problem // GROUPS) * N * GROUPS * R + (problem % GROUPS) * R


MOMENTUM: tl.constexpr = tl.constexpr(0)
DAMPING: tl.constexpr = tl.constexpr(1)
LR: tl.constexpr = tl.constexpr(2)
WEIGHT_DECAY: tl.constexpr = tl.constexpr(3)
SKIPPED: tl.constexpr = tl.constexpr(4)
"""Places of a group's numbers; see `frog_triton.linalg.numbers.Numbers`."""


@triton.jit
def load_scalar(scalars_ptr, index):
    """One float32 scalar out of the float64 array."""
    return tl.load(scalars_ptr + index).to(tl.float32)


@triton.jit
def load_taken(scalars_ptr):
    """Whether the step is taken, to float64's last bit."""
    # By way of integers: the interpreter's comparisons of float64 are no booleans.
    return tl.where(tl.load(scalars_ptr + SKIPPED) == 0.0, 1, 0) != 0


@triton.jit
def load_scale(table_ptr, layer, group):
    """What a group's samples are multiplied by, the 1 that stands for a bias, too."""
    largest_ptr = layer_pointer(table_ptr, layer, tl.float32, 16) + group * PARTS
    return scale_within_reach(
        tl.max(tl.load(largest_ptr + tl.arange(0, PARTS)), axis=0)
    )


@triton.jit
def load_scales(table_ptr, layer, groups, mask):
    """The same of several groups."""
    largest_ptr = layer_pointer(table_ptr, layer, tl.float32, 16)
    at = groups[:, None] * PARTS + tl.arange(0, PARTS)[None, :]
    largest = tl.load(largest_ptr + at, mask=mask[:, None], other=1.0)
    return scale_within_reach(tl.max(largest, axis=1))


@triton.jit
def scale_within_reach(largest):
    """The power of two that brings `largest` to between 2^-REACH and 2^(REACH + 1)."""
    exponent = ((largest.to(tl.int32, bitcast=True) >> 23) & 255) - 127
    near = tl.minimum(tl.maximum(exponent, -REACH), REACH)
    return ((127 - exponent + near) << 23).to(tl.float32, bitcast=True)


@triton.jit
def power_of_two(largest):
    """The power of two that brings `largest` to between 1 and 2, as far as it is exact.

    So zeros and subnormal numbers take 2^126, and the largest numbers 2^-126.
    """
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def reciprocal(power):
    """Of a power of two that `power_of_two` gave; exact."""
    return ((254 << 23) - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def is_finite(x):
    """False for NaN and infinities."""
    return tl.abs(x) < float("inf")


@triton.jit
def count_anomalies(table_ptr, layer, rows, total_rows, status, finite, mask):
    """Add to each row's two counters: bad samples, then bad gradients.

    A row belongs to one program, so no atomics are needed.
    """
    samples_ptr = layer_pointer(table_ptr, layer, tl.int32, 4)
    gradients_ptr = samples_ptr + total_rows
    samples = tl.load(samples_ptr + rows, mask=mask, other=0)
    gradients = tl.load(gradients_ptr + rows, mask=mask, other=0)
    # Several threads may hold the same row: all must have read it first.
    tl.debug_barrier()
    tl.store(samples_ptr + rows, samples + (status == 2).to(tl.int32), mask=mask)
    tl.store(gradients_ptr + rows, gradients + (finite == 0).to(tl.int32), mask=mask)


@triton.jit
def sum_of_products(a, b, axis: tl.constexpr):
    """``sum(a b)`` of which every thread has the same bits.

    A plain product may be fused with the first sum across threads; then each of two
    threads rounds the other's product and not its own, and they disagree. One that
    `tl.fma` has rounded cannot be fused again.
    """
    return tl.sum(tl.fma(a, b, tl.zeros_like(a)), axis=axis)


@triton.jit
def ordered_sum(partial_ptr, count, stride, offsets, mask):
    """Sum of `count` partial results, always in the same order."""
    total = tl.zeros(offsets.shape, tl.float32)
    for i in range(count):
        total += tl.load(partial_ptr + i * stride + offsets, mask=mask, other=0.0)
    return total


@triton.jit
def below(index, size, EVEN: tl.constexpr):
    """``index < size``; EVEN says that it is so for all, and nothing is compared."""
    ok = index < size
    if EVEN:
        ok = tl.full(index.shape, True, tl.int1)
    return ok


@triton.jit
def programs(within):
    """Where a program stands on the three axes of its launch's grid.

    Args:
        within: the same of a launch that is one of a `bundle`; else None.
    """
    if within is None:
        return (tl.program_id(0), tl.program_id(1), tl.program_id(2))
    else:
        return within


@triton.jit
def grouped_program(program, rows_blocks, other_blocks, GROUP_M: tl.constexpr):
    """Block of rows and block of the other axis that a program works on.

    GROUP_M blocks of rows advance together along the other axis, so that what they
    share is still in the cache.
    """
    first = program // (GROUP_M * other_blocks) * GROUP_M
    height = tl.minimum(rows_blocks - first, GROUP_M)
    within = program % (GROUP_M * other_blocks)
    return first + within % height, within // height
