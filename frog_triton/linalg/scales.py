"""Powers of two that bring samples and rows to a size whose squares float32 can hold.

A direction does not change when all samples of a system, or a row of M, are multiplied
by a number (equations 2 and 4), and a product with a power of two is exact. So the
solvers see neither gradients that overflow nor ones that vanish when they are squared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .rows import Rows, SampleMap

REACH = 40
"""Samples and rows are left as they are from 2^-40 to 2^40, which squares, and sums of
any length, can bear; so in ordinary training their scale is one."""

# Integer of the same size, bits of the mantissa, bias of the exponent.
_FORMATS = {
    torch.float32: (torch.int32, 23, 127),
    torch.float64: (torch.int64, 52, 1023),
}


def power_of_two(largest: Tensor, reach: int = 0) -> Tensor:
    """The power of two that brings `largest` to between 2^-reach and 2^(reach + 1).

    It is one where that is so already, and never so large or small that it is not
    exact: zeros, subnormal numbers and infinities take the last that is.

    Args:
        largest: float32 or float64, not negative.
        reach: see above.
    """
    integer, mantissa, bias = _FORMATS[largest.dtype]
    exponent = (largest.view(integer) >> mantissa) - bias
    excess = exponent - exponent.clamp(-reach, reach)
    return (bias - excess.clamp(1 - bias, bias - 1) << mantissa).view(largest.dtype)


def row_scales(rows: Rows) -> Tensor:
    """A scale for each row ``(..., R)``: one, but for very small or large entries."""
    parts = [] if rows.bias is None else [rows.bias.abs()]
    if rows.weight.shape[-1]:
        parts.append(rows.weight.abs().amax(-1))
    largest = parts[0] if len(parts) == 1 else torch.maximum(*parts)
    return power_of_two(largest, REACH)


def scaled(xs: Sequence[SampleMap], dtype: torch.dtype) -> list[SampleMap]:
    """The same samples, with their scales."""
    pairs = zip(xs, sample_scales(xs, dtype), strict=True)
    return [x.scaled(scale) for x, scale in pairs]


def sample_scales(xs: Sequence[SampleMap], dtype: torch.dtype) -> list[Tensor]:
    """A scale for each group of each layer, ``(groups,)``, its homogeneous 1 included.

    Args:
        xs: samples of layers of one geometry.
        dtype: of the scales, float32 or float64.
    """
    groups, bias = xs[0].groups, xs[0].bias
    samples = [x.x for x in xs]
    if samples[0].numel() == 0:
        largest = samples[0].new_ones(len(xs), groups)
    elif groups == 1:
        norms = list(torch._foreach_norm(samples, float("inf")))
        largest = torch.stack(norms).unsqueeze(1)
    else:
        split = [x.unflatten(1, (groups, -1)) for x in samples]
        others = [0, *range(2, split[0].ndim)]
        norms = [torch.linalg.vector_norm(x, float("inf"), others) for x in split]
        largest = torch.stack(norms)
    largest = largest.to(dtype)
    if bias:
        largest = largest.clamp(min=1)
    return list(power_of_two(largest, REACH))
