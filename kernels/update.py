"""Equation (5): ``theta <- (1 - rho eta) theta - eta (s m + X^T u)``.

More than 400 lines: one kernel, and the three ops that launch it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..linalg.numbers import Numbers
from ..linalg.rows import Rows, SampleMap
from .common import (
    LR,
    WEIGHT_DECAY,
    below,
    count_anomalies,
    is_finite,
    layer_pointer,
    load_scalar,
    load_scale,
    load_taken,
    problem_base,
    programs,
)
from .config import SplitConfig, tile_side
from .gpu import is_hopper
from .kernel import PRODUCT, Args, Kernel, Parts, Values, blocks, ceil_div
from .largest import largest_of
from .launchers import (
    ALIGNMENT,
    DTYPES,
    biases,
    empty_directions,
    empty_rows,
    flat_samples,
    in_place,
    padded,
    room_of,
    stored,
    write_back,
)
from .layouts import (
    BiasPlace,
    RowPlace,
    bias_layout,
    entries,
    from_row,
    row_layout,
)
from .products import high_term, low_term, sample_precision, terms_times_samples
from .tables import Tables, numbers_on
from .work import Sizes


@triton.jit
def _coordinates(
    u_ptr,
    rows,
    row_ok,
    n,
    N,
    stride_n,
    EVEN_N: tl.constexpr,
):
    """A tile of u."""
    return tl.load(
        u_ptr + n[None, :].to(tl.int64) * stride_n + rows[:, None],
        mask=row_ok[:, None] & below(n, N, EVEN_N)[None, :],
        other=0.0,
    )


@triton.jit
def _update_kernel(
    theta_table_ptr,
    m_table_ptr,
    x_table_ptr,
    x_largest_table_ptr,
    theta_bias_table_ptr,
    m_bias_table_ptr,
    counts_table_ptr,
    scalars_ptr,
    m_scale_ptr,
    s_ptr,
    u_ptr,
    status_ptr,
    finite_ptr,
    N,
    R,
    D,
    GROUPS,
    piece_length,
    stride_xn,
    m_bias_place,
    theta_row,
    theta_place,
    m_place,
    ALIGN: tl.constexpr,
    THETA_DTYPE: tl.constexpr,
    M_DTYPE: tl.constexpr,
    X_DTYPE: tl.constexpr,
    THETA_TAPS: tl.constexpr,
    M_TAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STEP: tl.constexpr,
    NARROW: tl.constexpr,
    ALONG: tl.constexpr,
    SAMPLES: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_R: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    within=None,
):
    """A block of rows, one piece of their columns; the first sees to the biases too.

    X and m are scaled. Without STEP the direction itself is written: ``theta = s m +
    X^T u``; with NARROW as products take it: a bias as the last column, zeros up to the
    end of a row, and in rows that are not to move. With ALONG m is the direction.
    SAMPLES is 0 where there are none, 1 where one block holds all, whose u is then read
    once, and else 2. Rows whose u is zero must not see samples that are not finite.
    """
    program = programs(within)
    theta_place = RowPlace(*theta_place)
    m_place = RowPlace(*m_place)
    m_bias_place = BiasPlace(*m_bias_place)
    problem = program[1].to(tl.int64)
    layer, group = problem // GROUPS, problem % GROUPS
    piece = program[2]
    block_rows = tl.arange(0, BLOCK_R)
    rows = program[0] * BLOCK_R + block_rows
    row_ok = below(rows, R, EVEN_R)
    if STEP:  # none of a skipped step
        row_ok = row_ok & load_taken(scalars_ptr)
    first_row = group * R + program[0] * BLOCK_R
    layer_rows = first_row + block_rows
    s = tl.full((BLOCK_R,), 1.0, tl.float32)
    m_scale = s
    if not ALONG:
        s = tl.load(s_ptr + problem * R + rows, mask=row_ok, other=0.0)
        m_scale = tl.load(m_scale_ptr + problem * R + rows, mask=row_ok, other=0.0)

    n = tl.arange(0, BLOCK_N)
    stride_n = R * GROUPS
    largest = tl.zeros((BLOCK_R,), tl.float32)
    z_bias = tl.zeros((BLOCK_R,), tl.float32)
    if SAMPLES > 0:
        x_ptr = layer_pointer(x_table_ptr, layer, X_DTYPE, ALIGN) + group * D
        x_scale = load_scale(x_largest_table_ptr, layer, group)
        u_ptr += problem_base(problem, GROUPS, N, R)
    if SAMPLES == 1:
        u = _coordinates(u_ptr, rows, row_ok, n, N, stride_n, EVEN_N)
        largest = tl.max(tl.abs(u), axis=1)
        z_bias = tl.sum(u, axis=1)
        high = high_term(u, PRECISION)
        low = low_term(u, high, PRECISION)
    if SAMPLES == 2:
        for start in range(0, N, BLOCK_N):
            u = _coordinates(u_ptr, rows, row_ok, start + n, N, stride_n, EVEN_N)
            largest = tl.maximum(largest, tl.max(tl.abs(u), axis=1))
            z_bias += tl.sum(u, axis=1)
    if SAMPLES > 0:
        z_bias *= x_scale
    sees = largest > 0

    theta_ptr = layer_pointer(theta_table_ptr, layer, THETA_DTYPE, ALIGN)
    theta_ptr = from_row(theta_ptr, first_row, D, theta_place, THETA_TAPS)
    m_ptr = layer_pointer(m_table_ptr, layer, M_DTYPE, ALIGN)
    m_ptr = from_row(m_ptr, first_row, D, m_place, M_TAPS)
    if STEP:
        finite = tl.load(finite_ptr + problem * R + rows, mask=row_ok, other=0)
        status = tl.load(status_ptr + problem * R + rows, mask=row_ok, other=0)
        count_anomalies(
            counts_table_ptr,
            layer,
            layer_rows,
            GROUPS * R,
            status,
            finite,
            row_ok & (piece == 0),
        )
        row_ok = row_ok & (finite != 0)
        lr = load_scalar(scalars_ptr, LR)
        decay = 1.0 - lr * load_scalar(scalars_ptr, WEIGHT_DECAY)

    if NARROW:
        moves = tl.load(finite_ptr + problem * R + rows, mask=row_ok, other=0) != 0
    end = tl.minimum((piece + 1) * piece_length, D)
    for begin in range(piece * piece_length, end, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        d_ok = below(d, end, EVEN_D)
        mask = row_ok[:, None] & d_ok[None, :]
        m_at = entries(block_rows[:, None], d[None, :], D, m_place, M_TAPS)
        m = tl.load(m_ptr + m_at, mask=mask, other=0.0).to(tl.float32)
        at = entries(block_rows[:, None], d[None, :], D, theta_place, THETA_TAPS)
        if STEP:
            theta = tl.load(theta_ptr + at, mask=mask, other=0.0).to(tl.float32)
        z = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        if SAMPLES == 1:
            x = tl.load(
                x_ptr + n[:, None] * stride_xn + d[None, :],
                mask=below(n, N, EVEN_N)[:, None] & d_ok[None, :],
                other=0.0,
            )
            z = terms_times_samples(u, high, low, x, z, PRECISION)
        if SAMPLES == 2:
            for start in range(0, N, BLOCK_N):
                u = _coordinates(u_ptr, rows, row_ok, start + n, N, stride_n, EVEN_N)
                x = tl.load(
                    x_ptr + (start + n)[:, None].to(tl.int64) * stride_xn + d[None, :],
                    mask=below(start + n, N, EVEN_N)[:, None] & d_ok[None, :],
                    other=0.0,
                )
                high = high_term(u, PRECISION)
                low = low_term(u, high, PRECISION)
                z = terms_times_samples(u, high, low, x, z, PRECISION)
        if SAMPLES > 0:
            z = tl.where(sees[:, None], z * x_scale, 0.0)
        if ALONG:
            z = m
        else:
            z += s[:, None] * (m * m_scale[:, None])
        if STEP:
            z = decay * theta - lr * z
        if NARROW:
            z = tl.where(moves[:, None] & is_finite(z), z, 0.0)
        tl.store(theta_ptr + at, z.to(THETA_DTYPE), mask=mask)

    first = row_ok & (piece == 0)
    if HAS_BIAS:
        m_bias_ptr = layer_pointer(m_bias_table_ptr, layer, M_DTYPE, ALIGN)
        bias_ptr = layer_pointer(theta_bias_table_ptr, layer, THETA_DTYPE, ALIGN)
        m_bias_ptr += m_bias_place.first + layer_rows * m_bias_place.stride_r
        m_bias = tl.load(m_bias_ptr, mask=first, other=0.0)
        z_bias += s * (m_bias.to(tl.float32) * m_scale)
        if STEP:
            bias = tl.load(bias_ptr + layer_rows, mask=first, other=0.0)
            z_bias = decay * bias.to(tl.float32) - lr * z_bias
        if not NARROW:
            # Several threads may hold the same row: all must have read it first.
            tl.debug_barrier()
            tl.store(bias_ptr + layer_rows, z_bias.to(THETA_DTYPE), mask=first)
    if NARROW:
        last = D + tl.arange(0, ALIGNMENT)
        z = tl.zeros((BLOCK_R, ALIGNMENT), tl.float32)
        if HAS_BIAS:
            z_bias = tl.where(moves & is_finite(z_bias), z_bias, 0.0)
            z = tl.where((last == D)[None, :], z_bias[:, None], z)
        at = block_rows[:, None] * theta_row + last[None, :]
        mask = first[:, None] & (last < theta_row)[None, :]
        tl.store(theta_ptr + at, z.to(THETA_DTYPE), mask=mask)


@dataclass(frozen=True)
class UpdateConfig(SplitConfig):
    """`UPDATE`.

    Attributes:
        programs: how many to cut rows into pieces for.
    """

    num_warps: int = 8
    BLOCK_N: int = 64
    BLOCK_R: int = 64
    BLOCK_D: int = 32


def update_config(
    n: int, dtype: torch.dtype = torch.bfloat16, hopper: bool = True
) -> UpdateConfig:
    """All samples in one block up to 256 in bfloat16, else a piece at a time.

    Args:
        n: samples.
        dtype: of the samples.
        hopper: see `gpu.is_hopper`.
    """
    block_n = tile_side(n)
    if dtype != torch.bfloat16 and block_n > 64:
        return UpdateConfig(BLOCK_N=32, num_stages=3)
    if block_n > 256:
        return UpdateConfig(BLOCK_N=64, num_stages=3)
    if block_n < 256:
        return UpdateConfig(BLOCK_N=block_n)
    return UpdateConfig(BLOCK_N=block_n, BLOCK_R=64 if hopper else 32, BLOCK_D=64)


def _parts(args: Args, problems: int, values: Values) -> Parts:
    """Rows in pieces of at least four tiles where that fills the GPU."""
    rows, block = blocks(args["R"], values["BLOCK_R"]), values["BLOCK_D"]
    columns = blocks(args["D"], block)
    pieces = max(1, min(values["programs"] // (rows * problems), columns // 4))
    length = ceil_div(columns, pieces) * block
    fits = values["BLOCK_N"] >= args["N"]
    more = {
        "piece_length": length,
        "SAMPLES": 0 if args["N"] == 0 else 1 if fits else 2,
        "EVEN_N": args["N"] % values["BLOCK_N"] == 0,
        "EVEN_R": args["R"] % values["BLOCK_R"] == 0,
        "EVEN_D": args["D"] % block == 0,
    }
    return [((rows, problems, blocks(args["D"], length)), more)]


def _count(s: Sizes) -> tuple[int, int]:
    theta = (1 + s.args["STEP"]) * s.size("THETA_DTYPE")
    moved = s.row_entries * (s.size("M_DTYPE") + theta)
    moved += s.x_entries * s.size("X_DTYPE") + 4 * s.nr + 9 * s.rows
    return s.products, moved


def _again(s: Sizes, values: Values) -> float:
    ((rows, _, pieces), _) = _parts(s.args, s.problems, values)[0]
    reads = pieces
    if s.n > values["BLOCK_N"]:  # all of u for each tile, and once more ahead
        reads += blocks(s.args["D"], values["BLOCK_D"])
    u: int = 4 * s.nr * (reads - 1)
    return s.x_entries * s.size("X_DTYPE") * (rows - 1) + u


UPDATE = Kernel(
    fn=_update_kernel,
    config=UpdateConfig,
    parts=_parts,
    count=_count,
    again=_again,
    values={**PRODUCT, "programs": (128, 256, 512)},
    accumulator=("BLOCK_R", "BLOCK_D"),
    tiles=(("BLOCK_N", "BLOCK_D"),),
    loop="D",
)


def gram_rows(
    xs: Sequence[SampleMap],
    ms: Sequence[Rows],
    scales: Tensor,
    s: Tensor,
    u: Tensor,
    moving: Tensor | None,
) -> Rows:
    """See `torch_ops.gram_rows`; one launch. With `moving` they are bfloat16."""
    z, layers = empty_rows(ms) if moving is None else empty_directions(ms)
    x, finite = _Explicit.of(xs), s if moving is None else moving
    _gram_step(layers, x, ms, scales, s, u, s, finite, [], None)
    return z


def gram_update_(
    params: Sequence[Rows],
    xs: Sequence[SampleMap],
    ms: Sequence[Rows],
    scales: Tensor,
    s: Tensor,
    u: Tensor,
    status: Tensor,
    finite: Tensor,
    counts: Sequence[Tensor],
    numbers: Numbers,
) -> None:
    """See `torch_ops.gram_update_`; one launch."""
    rows = in_place(params)
    rest = (status, finite, counts, numbers)
    _gram_step(rows, _Explicit.of(xs), ms, scales, s, u, *rest)
    write_back(params, rows)


def direction_update_(
    params: Sequence[Rows],
    direction: Rows,
    status: Tensor,
    finite: Tensor,
    counts: Sequence[Tensor],
    numbers: Numbers,
) -> None:
    """See `torch_ops.direction_update_`; one launch: the update ``s z``, no samples."""
    z = direction.weight
    if z.dtype not in DTYPES:
        z = z.float()
    bias = direction.bias
    bias = None if bias is None else bias.to(z.dtype)
    layers, _, dim = z.shape
    zs = [Rows(z[i], None if bias is None else bias[i]) for i in range(layers)]
    none = _Explicit([z.new_empty(0, dim)] * layers, [z] * layers, 1)
    thetas = in_place(params)
    rest = (status, finite, counts, numbers)
    u = z.new_empty(layers, 1, 0, status.shape[-1])
    _gram_step(thetas, none, zs, None, status, u, *rest)
    write_back(params, thetas)


class _Explicit(NamedTuple):
    """Samples of each layer as matrices, and what their scales are found from."""

    samples: list[Tensor]
    largest: list[Tensor]
    groups: int

    @classmethod
    def of(cls, xs: Sequence[SampleMap]) -> Self:
        x, samples = flat_samples(xs)
        return cls(samples, largest_of(xs), x.groups)


def _gram_step(
    thetas: Sequence[Rows],
    xs: _Explicit,
    ms: Sequence[Rows],
    scales: Tensor | None,
    s: Tensor,
    u: Tensor,
    status: Tensor,
    finite: Tensor,
    counts: Sequence[Tensor],
    numbers: Numbers | None,
) -> None:
    """Equation (5), or without numbers directions written out.

    Without scales the rows of `ms` are directions, and s is not read.
    """
    ms = in_place(ms)
    (samples, largest, groups), m = xs, ms[0].weight
    rows, dim, n = m.shape[0], ms[0].dim, samples[0].shape[0]
    narrow = numbers is None and thetas[0].weight.dtype == torch.bfloat16
    m_biases, m_bias_place = bias_layout(ms)
    tables = Tables(
        [
            [room_of(theta) if narrow else theta.weight for theta in thetas],
            [m.weight for m in ms],
            samples,
            largest,
            biases(thetas),
            m_biases,
            counts or samples,
        ]
    )
    config = update_config(n, samples[0].dtype, is_hopper(m.device))
    if n:  # without samples there is nothing to tune
        config = UPDATE.tuned(
            config,
            {"n": n, "r": rows // groups, "d": dim, "p": len(ms) * groups},
            # Narrow rows are written with the configuration of a plain step.
            (m.dtype if narrow else thetas[0].weight.dtype, m.dtype, samples[0].dtype),
        )
    UPDATE.launch(
        config,
        len(ms) * groups,
        theta_table_ptr=tables[0],
        m_table_ptr=tables[1],
        x_table_ptr=tables[2],
        x_largest_table_ptr=tables[3],
        theta_bias_table_ptr=tables[4],
        m_bias_table_ptr=tables[5],
        counts_table_ptr=tables[6],
        scalars_ptr=s if numbers is None else numbers_on(numbers, m.device),
        m_scale_ptr=s if scales is None else scales,
        s_ptr=s,
        u_ptr=stored(u),
        status_ptr=status,
        finite_ptr=finite.view(torch.int8) if finite.dtype == torch.bool else finite,
        N=n,
        R=rows // groups,
        D=dim,
        GROUPS=groups,
        stride_xn=samples[0].stride(0),
        m_bias_place=m_bias_place,
        theta_row=padded(dim + (ms[0].bias is not None)),
        **row_layout("theta", thetas[0].weight),
        **row_layout("m", m),
        ALIGN=tables.align,
        THETA_DTYPE=DTYPES[thetas[0].weight.dtype],
        M_DTYPE=DTYPES[m.dtype],
        X_DTYPE=DTYPES[samples[0].dtype],
        HAS_BIAS=ms[0].bias is not None,
        STEP=numbers is not None,
        NARROW=narrow,
        ALONG=scales is None,
        PRECISION=sample_precision(samples[0].dtype),
    )
