"""Sampled-Fisher weights, equations (3) and (4), as solves in Gram space store them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    is_finite,
    layer_pointer,
    power_of_two,
    problem_base,
    programs,
    sum_of_products,
)
from .config import Config, tile_side
from .kernel import TILES, WARPS, Kernel, covering
from .launchers import DTYPES
from .outputs import OutputPlace, load_outputs
from .tables import Tables
from .work import Sizes


@triton.jit
def _fisher_weights_kernel(
    y_table_ptr,
    norms_table_ptr,
    weights_ptr,
    status_ptr,
    N,
    R,
    GROUPS,
    row_length,
    y_place,
    stride_norms_n,
    stride_norms_group,
    ALIGN: tl.constexpr,
    Y_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    within=None,
):
    """``Lambda = Y^2 / (trace / D)`` for a block of rows, and each row's status.

    Squares of a tiny Y underflow, so each row is first brought near one.
    Where N fits one block, Y is read from memory once; its later reads hit the cache.
    Status: 0 Fisher, 1 no sampled gradient, 2 samples that are not finite; the last two
    get weights of zero.
    """
    program = programs(within)
    y_place = OutputPlace(*y_place)
    problem = program[1].to(tl.int64)
    layer, group = problem // GROUPS, problem % GROUPS
    rows = program[0] * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok = rows < R
    y_ptr = layer_pointer(y_table_ptr, layer, Y_DTYPE, ALIGN)
    y_ptr += group * R * y_place.stride_r
    norms_ptr = layer_pointer(norms_table_ptr, layer, tl.float32, 4)
    norms_ptr += group * stride_norms_group
    weights_ptr += problem_base(problem, GROUPS, N, R)

    largest = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = (n < N)[:, None] & row_ok[None, :]
        y = load_outputs(y_ptr, n, rows, mask, y_place)
        largest = tl.maximum(largest, tl.max(tl.abs(y), axis=0))
    scale = power_of_two(largest)

    trace = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = (n < N)[:, None] & row_ok[None, :]
        y = load_outputs(y_ptr, n, rows, mask, y_place)
        norms = tl.load(norms_ptr + n * stride_norms_n, mask=n < N, other=0.0)
        scaled = y * scale[None, :]
        norms = tl.broadcast_to(norms[:, None], (BLOCK_N, BLOCK_R))
        trace += sum_of_products(scaled * scaled, norms, axis=0)

    factor = tl.div_rn(row_length * 1.0, trace)
    status = tl.where(is_finite(factor), 0, 1)
    status = tl.where(is_finite(trace), status, 2)
    tl.store(status_ptr + problem * R + rows, status, mask=row_ok)

    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = (n < N)[:, None] & row_ok[None, :]
        y = load_outputs(y_ptr, n, rows, mask, y_place)
        scaled = y * scale[None, :]
        weights = tl.where(
            (status == 0)[None, :], scaled * scaled * factor[None, :], 0.0
        )
        at = n[:, None] * R * GROUPS + rows[None, :]
        tl.store(weights_ptr + at, weights, mask=mask)


@dataclass(frozen=True)
class WeightsConfig(Config):
    """`FISHER_WEIGHTS`."""

    BLOCK_N: int = 64
    BLOCK_R: int = 32


def weights_config(n: int) -> WeightsConfig:
    """All samples in one block up to 256, so that Y is read once."""
    block_n = min(tile_side(n), 256)
    return WeightsConfig(BLOCK_N=block_n, BLOCK_R=max(16, 2048 // block_n))


def _count(s: Sizes) -> tuple[int, int]:
    y = s.nr * s.size("Y_DTYPE")
    return 0, y + 4 * s.nr + 4 * s.n * s.problems + 4 * s.rows


FISHER_WEIGHTS = Kernel(
    fn=_fisher_weights_kernel,
    config=WeightsConfig,
    parts=covering("R"),
    count=_count,
    values={"BLOCK_N": (*TILES, 256), "BLOCK_R": TILES, "num_warps": WARPS},
    loop="N",
)


def fisher_weights(
    ys: Sequence[Tensor], norms: Sequence[Tensor], row_length: int
) -> tuple[Tensor, Tensor]:
    """See `torch_ops.fisher_weights`; one launch. Weights are ``(L, n * P, R, 1)``."""
    y = ys[0]
    n, layers, groups = y.shape[0] * y.shape[2], len(ys), norms[0].shape[1]
    rows = y.shape[1]
    if len({y.stride() for y in ys}) > 1:
        ys = [y.contiguous() for y in ys]
    tables = Tables([ys, norms])
    weights = y.new_empty(layers, n, rows, 1, dtype=torch.float32)
    status = y.new_empty(layers, rows, dtype=torch.int32)
    config = FISHER_WEIGHTS.tuned(
        weights_config(n),
        {"n": n, "r": rows // groups, "p": layers * groups},
        (y.dtype,),
    )
    FISHER_WEIGHTS.launch(
        config,
        layers * groups,
        y_table_ptr=tables[0],
        norms_table_ptr=tables[1],
        weights_ptr=weights,
        status_ptr=status,
        N=n,
        R=rows // groups,
        GROUPS=groups,
        row_length=row_length,
        y_place=OutputPlace.of(ys[0]),
        stride_norms_n=norms[0].stride(0),
        stride_norms_group=norms[0].stride(1),
        ALIGN=tables.align,
        Y_DTYPE=DTYPES[y.dtype],
    )
    return weights, status
