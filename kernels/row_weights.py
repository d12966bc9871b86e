"""Sampled-Fisher weights, equations (3) and (4), as solves on the rows form them.

There may be many samples: what turns Y into Lambda is stored, two numbers a row, from
the norms of the rows of X.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..linalg.rows import SampleMap
from .common import layer_pointer, load_scale, load_scales, power_of_two, programs
from .config import Config, SplitConfig, tile_side
from .kernel import (
    FEW,
    TILES,
    WARPS,
    Args,
    Kernel,
    Parts,
    Values,
    blocks,
    covering,
    pieces,
)
from .launchers import DTYPES
from .outputs import OutputPlace, load_outputs
from .samples import Place, load_window, samples
from .tables import Tables
from .work import Sizes


@triton.jit
def _row_norms_kernel(
    x_table_ptr,
    x_largest_table_ptr,
    norms_ptr,
    N,
    D,
    GROUPS,
    group_channels,
    place,
    ALIGN: tl.constexpr,
    X_DTYPE: tl.constexpr,
    STENCIL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    within=None,
):
    """``|x|^2`` of scaled samples, and of the 1 of a bias: ``(layers, N, groups)``."""
    program = programs(within)
    place = Place(*place)
    problem = program[1].to(tl.int64)
    layer, group = problem // GROUPS, problem % GROUPS
    n = program[0] * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    x_ptr = layer_pointer(x_table_ptr, layer, X_DTYPE, ALIGN)
    x_ptr += group * group_channels * place.stride_c
    scale = load_scale(x_largest_table_ptr, layer, group)
    squares = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = (n < N)[:, None] & (d < D)[None, :]
        channel, tap = d, d
        if not STENCIL.POINTWISE:
            channel, tap = d % STENCIL.CHANNELS, d // STENCIL.CHANNELS
        x = load_window(
            x_ptr,
            n[:, None],
            channel[None, :],
            tap[None, :],
            mask,
            place,
            STENCIL,
        )
        x = x.to(tl.float32) * scale
        squares = tl.fma(x, x, squares)
    total = tl.sum(squares, axis=1)
    if HAS_BIAS:
        total += scale * scale
    tl.store(norms_ptr + layer * N * GROUPS + n * GROUPS + group, total, mask=n < N)


@triton.jit
def _row_scale_kernel(
    x_table_ptr,
    x_largest_table_ptr,
    y_table_ptr,
    norms_ptr,
    largest_ptr,
    trace_ptr,
    N,
    R,
    GROUPS,
    total,
    split_length,
    multiplier,
    y_place,
    place,
    ALIGN: tl.constexpr,
    X_DTYPE: tl.constexpr,
    Y_DTYPE: tl.constexpr,
    STENCIL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DEPTHWISE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    within=None,
):
    """Largest ``|Y|`` of each row, and its trace at the scale of that, over one split.

    One pass over Y: when a larger entry turns up, the trace so far is rescaled.
    """
    program = programs(within)
    y_place = OutputPlace(*y_place)
    place = Place(*place)
    problem = program[1].to(tl.int64)
    split = program[2].to(tl.int64)
    layer, group = problem // GROUPS, problem % GROUPS
    rows = program[0] * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok = rows < R
    layer_rows = group * R + rows.to(tl.int64)
    y_ptr = layer_pointer(y_table_ptr, layer, Y_DTYPE, ALIGN)
    x_ptr = layer_pointer(x_table_ptr, layer, X_DTYPE, ALIGN)
    begin = split * split_length
    end = tl.minimum(begin + split_length, N)

    if DEPTHWISE:
        channel = rows // multiplier
        x_scale = load_scales(x_largest_table_ptr, layer, channel, row_ok)
    largest = tl.zeros((BLOCK_R,), tl.float32)
    trace = tl.zeros((BLOCK_R,), tl.float32)
    scale = power_of_two(largest)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = (n < end)[:, None] & row_ok[None, :]
        y = load_outputs(y_ptr, n, layer_rows, mask, y_place)
        if DEPTHWISE:
            norms = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
            for tap in range(STENCIL.TAPS):
                x = load_window(
                    x_ptr,
                    n[:, None],
                    channel[None, :],
                    tap,
                    mask,
                    place,
                    STENCIL,
                )
                x = x.to(tl.float32) * x_scale[None, :]
                norms += x * x
            if HAS_BIAS:
                norms += (x_scale * x_scale)[None, :]
        else:
            norms_at = layer * N * GROUPS + n * GROUPS + group
            norms = tl.load(norms_ptr + norms_at, mask=n < end, other=0.0)[:, None]
        largest = tl.maximum(largest, tl.max(tl.abs(y), axis=0))
        before, scale = scale, power_of_two(largest)
        scaled = y * scale[None, :]
        terms = tl.where(mask, scaled * scaled * norms, 0.0)
        ratio = tl.div_rn(scale, before)
        trace = trace * ratio * ratio + tl.sum(terms, axis=0)
    at = split * total + problem * R + rows
    tl.store(largest_ptr + at, largest, mask=row_ok)
    tl.store(trace_ptr + at, trace, mask=row_ok)


@triton.jit
def _row_scale_sum_kernel(
    largest_ptr,
    trace_ptr,
    y_scale_ptr,
    factor_ptr,
    status_ptr,
    total,
    row_length,
    SPLITS,
    BLOCK: tl.constexpr,
    within=None,
):
    """What turns Y into Lambda: ``(Y scale)^2 factor``; and the rows' status."""
    program = programs(within)
    at = program[0] * BLOCK + tl.arange(0, BLOCK)
    mask = at < total
    largest = tl.zeros((BLOCK,), tl.float32)
    for i in range(SPLITS):
        part = tl.load(largest_ptr + i * total + at, mask=mask, other=0.0)
        largest = tl.maximum(largest, part)
    scale = power_of_two(largest)
    trace = tl.zeros((BLOCK,), tl.float32)
    for i in range(SPLITS):
        part = tl.load(largest_ptr + i * total + at, mask=mask, other=0.0)
        ratio = tl.div_rn(scale, power_of_two(part))
        trace += (
            tl.load(trace_ptr + i * total + at, mask=mask, other=0.0) * ratio * ratio
        )
    factor = tl.div_rn(row_length * 1.0, trace)
    status = tl.where(tl.abs(factor) < float("inf"), 0, 1)
    status = tl.where(tl.abs(trace) < float("inf"), status, 2)
    tl.store(y_scale_ptr + at, scale, mask=mask)
    tl.store(factor_ptr + at, tl.where(status == 0, factor, 0.0), mask=mask)
    tl.store(status_ptr + at, status, mask=mask)


@dataclass(frozen=True)
class NormsConfig(Config):
    """`ROW_NORMS`."""

    BLOCK_N: int = 16
    BLOCK_D: int = 128


@dataclass(frozen=True)
class ScaleConfig(SplitConfig):
    """`ROW_SCALE`."""

    BLOCK_N: int = 64
    BLOCK_R: int = 16


@dataclass(frozen=True)
class SumConfig(Config):
    """`ROW_SCALE_SUM`."""

    BLOCK: int = 256


def scale_config(n: int) -> ScaleConfig:
    """Tiles of samples by rows, of which a program sees many."""
    return ScaleConfig(BLOCK_N=min(tile_side(n), 64), num_warps=8)


def _count_norms(s: Sizes) -> tuple[int, int]:
    return 0, s.x_entries * s.size("X_DTYPE") + 4 * s.n * s.problems


ROW_NORMS = Kernel(
    fn=_row_norms_kernel,
    config=NormsConfig,
    parts=covering("N"),
    count=_count_norms,
    values={
        "BLOCK_N": (4, 8, *TILES),
        "BLOCK_D": (32, 64, 128, 256),
        "num_warps": WARPS,
    },
    accumulator=("BLOCK_N", "BLOCK_D"),
    loop="D",
    most_programs=FEW,
)


def _scale_parts(args: Args, problems: int, values: Values) -> Parts:
    rows = blocks(args["R"], values["BLOCK_R"])
    least = 4 * values["BLOCK_N"]
    splits, length = pieces(args["N"], rows * problems, least, values["programs"])
    return [((rows, problems, splits), {"split_length": length})]


def _count_scale(s: Sizes) -> tuple[int, int]:
    x = s.x_entries * s.size("X_DTYPE") if s.args["DEPTHWISE"] else 4 * s.n * s.problems
    splits = -(-s.n // s.args["split_length"])
    return 0, x + s.nr * s.size("Y_DTYPE") + 8 * splits * s.rows


ROW_SCALE = Kernel(
    fn=_row_scale_kernel,
    config=ScaleConfig,
    parts=_scale_parts,
    count=_count_scale,
    values={
        "BLOCK_N": (32, 64, 128, 256),
        "BLOCK_R": (16, 32, 64),
        "num_warps": WARPS,
        "programs": (128, 256, 512),
    },
    loop="N",
    most_programs=FEW,
)


def _sum_parts(args: Args, problems: int, values: Values) -> Parts:
    return [((blocks(args["total"], values["BLOCK"]),), {})]


def _count_sum(s: Sizes) -> tuple[int, int]:
    return 0, 4 * s.args["total"] * (2 * s.args["SPLITS"] + 3)


ROW_SCALE_SUM = Kernel(
    fn=_row_scale_sum_kernel, config=SumConfig, parts=_sum_parts, count=_count_sum
)


@dataclass(frozen=True)
class RowWeights:
    """Lambda as ``(Y scale)^2 factor``, formed where it is needed.

    Attributes:
        ys: output gradients of each layer ``(n, R, P)``, all of the same strides.
        scale: ``(L, R)``, brings the largest ``|Y|`` of each row near one.
        factor: ``(L, R)``, zero in rows that take the identity Fisher.
    """

    ys: list[Tensor]
    scale: Tensor
    factor: Tensor


def row_weights(
    xs: Sequence[SampleMap], ys: Sequence[Tensor], row_length: int
) -> tuple[RowWeights, Tensor]:
    """Lambda, and the rows' status; three launches, two for depthwise layers."""
    rows, layers = ys[0].shape[1], len(xs)
    s = samples(xs, rows)
    if len({y.stride() for y in ys}) > 1:
        ys = [y.contiguous() for y in ys]
    y = ys[0]

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return y.new_empty(shape, dtype=dtype)

    norms = empty(layers, s.n, s.map.groups) if not s.depthwise else empty(1)
    tables = Tables([s.tensors, s.largest, ys])
    problems = layers * s.groups
    if not s.depthwise:
        config = ROW_NORMS.tuned(
            NormsConfig(),
            {"n": s.n, "d": s.map.dim, "p": problems},
            (s.tensors[0].dtype,),
            s.kind,
        )
        ROW_NORMS.launch(
            config,
            problems,
            x_table_ptr=tables[0],
            x_largest_table_ptr=tables[1],
            norms_ptr=norms,
            N=s.n,
            D=s.map.dim,
            GROUPS=s.groups,
            group_channels=s.group_channels,
            place=s.place,
            STENCIL=s.stencil,
            ALIGN=tables.align,
            X_DTYPE=DTYPES[s.tensors[0].dtype],
            HAS_BIAS=s.map.bias,
        )
    scaling = ROW_SCALE.tuned(
        scale_config(s.n),
        {"n": s.n, "r": s.problem_rows, "p": problems},
        (y.dtype,),
        s.kind,
    )
    sizes = {"N": s.n, "R": s.problem_rows}
    (((_, _, splits), _),) = _scale_parts(sizes, problems, scaling.values())
    largest, trace = empty(splits, layers, rows), empty(splits, layers, rows)
    weights = RowWeights(list(ys), empty(layers, rows), empty(layers, rows))
    status = empty(layers, rows, dtype=torch.int32)
    ROW_SCALE.launch(
        scaling,
        problems,
        x_table_ptr=tables[0],
        x_largest_table_ptr=tables[1],
        y_table_ptr=tables[2],
        norms_ptr=norms,
        largest_ptr=largest,
        trace_ptr=trace,
        N=s.n,
        R=s.problem_rows,
        GROUPS=s.groups,
        total=layers * rows,
        multiplier=max(1, s.depthwise),
        y_place=OutputPlace.of(y),
        place=s.place,
        STENCIL=s.stencil,
        ALIGN=tables.align,
        X_DTYPE=DTYPES[s.tensors[0].dtype],
        Y_DTYPE=DTYPES[y.dtype],
        HAS_BIAS=s.map.bias,
        DEPTHWISE=s.depthwise > 0,
    )
    ROW_SCALE_SUM.launch(
        SumConfig(),
        largest_ptr=largest,
        trace_ptr=trace,
        y_scale_ptr=weights.scale,
        factor_ptr=weights.factor,
        status_ptr=status,
        total=layers * rows,
        row_length=row_length,
        SPLITS=splits,
    )
    return weights, status
