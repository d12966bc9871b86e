"""A small kernel to try launches with: partial sums added up in order."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from frog_triton.kernels.common import ordered_sum, programs
from frog_triton.kernels.config import Config
from frog_triton.kernels.kernel import Args, Kernel, Parts, Values, blocks
from frog_triton.kernels.work import Sizes


@triton.jit
def _sum_splits_kernel(
    partial_ptr,
    out_ptr,
    numel,
    split_stride,
    SPLITS,
    BLOCK: tl.constexpr,
    within=None,
):
    """Second stage of a split reduction: ``out = sum over splits``, in order."""
    program = programs(within)
    offsets = program[0].to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    total = ordered_sum(partial_ptr, SPLITS, split_stride, offsets, mask)
    tl.store(out_ptr + offsets, total, mask=mask)


@dataclass(frozen=True)
class SumConfig(Config):
    """`SUM_SPLITS` and other sums of partial results."""

    BLOCK: int = 1024


def _parts(args: Args, problems: int, values: Values) -> Parts:
    return [((blocks(args["numel"], values["BLOCK"]),), {})]


def _count(s: Sizes) -> tuple[int, int]:
    return 0, 4 * s.args["numel"] * (s.args["SPLITS"] + 1)


SUM_SPLITS = Kernel(fn=_sum_splits_kernel, config=SumConfig, parts=_parts, count=_count)


def sum_splits(partial: Tensor) -> Tensor:
    """``(splits, ...)`` added up; one launch, none where there is one split."""
    if len(partial) == 1:
        return partial[0]
    out = torch.empty_like(partial[0])
    SUM_SPLITS.launch(
        SumConfig(),
        partial_ptr=partial,
        out_ptr=out,
        numel=out.numel(),
        split_stride=out.numel(),
        SPLITS=len(partial),
    )
    return out
