"""Equation (5): ``theta <- (1 - rho eta) theta - eta (s m + X^T u)``."""

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
    count_anomalies,
    grouped_program,
    is_finite,
    layer_pointer,
    load_scalar,
    load_scale,
    load_taken,
    problem_base,
    programs,
)
from .config import Config, tile_side
from .kernel import PRODUCT, Kernel, Values, blocks, covering
from .largest import largest_of, near_one
from .launchers import (
    DTYPES,
    PRECISION,
    biases,
    empty_rows,
    flat_samples,
    in_place,
    stored,
    write_back,
)
from .layouts import RowPlace, entries, row_layout
from .tables import Tables, numbers_on
from .work import Sizes


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
    stride_xn,
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
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    within=None,
):
    """One tile of rows; the programs of the first columns see to the biases too.

    X and m are scaled. Without STEP the direction itself is written: ``theta = s m +
    X^T u``. Rows whose u is zero must not see samples that are not finite, so those
    samples count as zero.
    """
    program = programs(within)
    theta_place = RowPlace(*theta_place)
    m_place = RowPlace(*m_place)
    problem = program[1].to(tl.int64)
    layer, group = problem // GROUPS, problem % GROUPS
    blocks_d = tl.maximum(tl.cdiv(D, BLOCK_D), 1)
    block_r, block_d = grouped_program(
        program[0], tl.cdiv(R, BLOCK_R), blocks_d, GROUP_M
    )
    rows = block_r * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok = rows < R
    if STEP:  # none of a skipped step
        row_ok = row_ok & load_taken(scalars_ptr)
    layer_rows = group * R + rows.to(tl.int64)
    d = block_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = row_ok[:, None] & (d < D)[None, :]
    x_ptr = layer_pointer(x_table_ptr, layer, X_DTYPE, ALIGN) + group * D
    x_scale = load_scale(x_largest_table_ptr, layer, group)
    u_ptr += problem_base(problem, GROUPS, N, R)

    z = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    z_bias = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        u = tl.load(
            u_ptr + n[None, :] * R * GROUPS + rows[:, None],
            mask=row_ok[:, None] & (n < N)[None, :],
            other=0.0,
        )
        x = tl.load(
            x_ptr + n[:, None] * stride_xn + d[None, :],
            mask=(n < N)[:, None] & (d < D)[None, :],
            other=0.0,
        ).to(tl.float32)
        x = tl.where(is_finite(x), x * x_scale, 0.0)
        z = tl.dot(u, x, acc=z, input_precision=PRECISION)
        if HAS_BIAS:
            z_bias += tl.sum(u, axis=1) * x_scale

    s = tl.load(s_ptr + problem * R + rows, mask=row_ok, other=0.0)
    m_scale = tl.load(m_scale_ptr + problem * R + rows, mask=row_ok, other=0.0)
    at = entries(layer_rows[:, None], d[None, :], D, m_place, M_TAPS)
    m_ptr = layer_pointer(m_table_ptr, layer, M_DTYPE, ALIGN)
    m = tl.load(m_ptr + at, mask=mask, other=0.0).to(tl.float32)
    z += s[:, None] * (m * m_scale[:, None])
    theta_ptr = layer_pointer(theta_table_ptr, layer, THETA_DTYPE, ALIGN)
    at = entries(layer_rows[:, None], d[None, :], D, theta_place, THETA_TAPS)
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
            row_ok & (block_d == 0),
        )
        row_ok = row_ok & (finite != 0)
        mask = mask & (finite != 0)[:, None]
        lr = load_scalar(scalars_ptr, LR)
        decay = 1.0 - lr * load_scalar(scalars_ptr, WEIGHT_DECAY)
        theta = tl.load(theta_ptr + at, mask=mask, other=0.0).to(tl.float32)
        z = decay * theta - lr * z
    tl.store(theta_ptr + at, z.to(THETA_DTYPE), mask=mask)

    if HAS_BIAS:
        first = row_ok & (block_d == 0)
        m_bias_ptr = layer_pointer(m_bias_table_ptr, layer, M_DTYPE, ALIGN)
        bias_ptr = layer_pointer(theta_bias_table_ptr, layer, THETA_DTYPE, ALIGN)
        m = tl.load(m_bias_ptr + layer_rows, mask=first, other=0.0)
        z_bias += s * (m.to(tl.float32) * m_scale)
        if STEP:
            theta = tl.load(bias_ptr + layer_rows, mask=first, other=0.0)
            z_bias = decay * theta.to(tl.float32) - lr * z_bias
        # Several threads may hold the same row: all must have read it first.
        tl.debug_barrier()
        tl.store(bias_ptr + layer_rows, z_bias.to(THETA_DTYPE), mask=first)


@dataclass(frozen=True)
class UpdateConfig(Config):
    """`UPDATE`."""

    BLOCK_N: int = 32
    BLOCK_R: int = 64
    BLOCK_D: int = 64
    GROUP_M: int = 1


def update_config(n: int) -> UpdateConfig:
    """Samples a piece at a time, to pipeline their loads."""
    return UpdateConfig(BLOCK_N=min(tile_side(n), 32), num_stages=3)


def _count(s: Sizes) -> tuple[int, int]:
    theta = (1 + s.args["STEP"]) * s.size("THETA_DTYPE")
    moved = s.row_entries * (s.size("M_DTYPE") + theta)
    moved += s.x_entries * s.size("X_DTYPE") + 4 * s.nr + 9 * s.rows
    return s.products, moved


def _again(s: Sizes, values: Values) -> float:
    rows = blocks(s.args["R"], values["BLOCK_R"])
    columns = blocks(s.args["D"], values["BLOCK_D"])
    u: int = 4 * s.nr * (columns - 1)
    return s.x_entries * s.size("X_DTYPE") * (rows - 1) + u


UPDATE = Kernel(
    fn=_update_kernel,
    config=UpdateConfig,
    parts=covering("RD"),
    count=_count,
    again=_again,
    values={**PRODUCT, "GROUP_M": (1, 4)},
    accumulator=("BLOCK_R", "BLOCK_D"),
    tiles=(("BLOCK_N", "BLOCK_D"), ("BLOCK_N", "BLOCK_R")),
    loop="N",
)


def gram_rows(
    xs: Sequence[SampleMap], ms: Sequence[Rows], scales: Tensor, s: Tensor, u: Tensor
) -> Rows:
    """See `torch_ops.gram_rows`; one launch."""
    z, layers = empty_rows(ms)
    x = _Explicit.of(xs)
    _gram_step(layers, x, ms, scales, s, u, s, s, [], None)
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
    z = direction.weight.contiguous()
    bias = None if direction.bias is None else direction.bias.contiguous()
    layers, rows, dim = z.shape
    zs = [Rows(z[i], None if bias is None else bias[i]) for i in range(layers)]
    one = z.new_ones(layers, rows)
    none = _Explicit([z.new_empty(0, dim)] * layers, near_one(z, layers, 1), 1)
    thetas = in_place(params)
    rest = (status, finite, counts, numbers)
    u = z.new_empty(layers, 1, 0, rows)
    _gram_step(thetas, none, zs, one, one, u, *rest)
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
    scales: Tensor,
    s: Tensor,
    u: Tensor,
    status: Tensor,
    finite: Tensor,
    counts: Sequence[Tensor],
    numbers: Numbers | None,
) -> None:
    """Equation (5), or without numbers directions written out."""
    ms = in_place(ms)
    (samples, largest, groups), m = xs, ms[0].weight
    rows, dim, n = m.shape[0], ms[0].dim, samples[0].shape[0]
    tables = Tables(
        [
            [theta.weight for theta in thetas],
            [m.weight for m in ms],
            samples,
            largest,
            biases(thetas),
            biases(ms),
            counts or samples,
        ]
    )
    config = update_config(n)
    if n:  # without samples there is nothing to tune
        config = UPDATE.tuned(
            config,
            {"n": n, "r": rows // groups, "d": dim, "p": len(ms) * groups},
            (thetas[0].weight.dtype, m.dtype, samples[0].dtype),
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
        scalars_ptr=scales if numbers is None else numbers_on(numbers, m.device),
        m_scale_ptr=scales,
        s_ptr=s,
        u_ptr=stored(u),
        status_ptr=status,
        finite_ptr=finite if numbers is None else finite.view(torch.int8),
        N=n,
        R=rows // groups,
        D=dim,
        GROUPS=groups,
        stride_xn=samples[0].stride(0),
        **row_layout("theta", thetas[0].weight),
        **row_layout("m", m),
        ALIGN=tables.align,
        THETA_DTYPE=DTYPES[thetas[0].weight.dtype],
        M_DTYPE=DTYPES[m.dtype],
        X_DTYPE=DTYPES[samples[0].dtype],
        HAS_BIAS=ms[0].bias is not None,
        STEP=numbers is not None,
        PRECISION=PRECISION,
    )
