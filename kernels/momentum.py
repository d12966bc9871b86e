"""Momentum and its projection on the samples, in one pass over the rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..linalg.numbers import Numbers
from ..linalg.rows import Rows, SampleMap
from .common import (
    MOMENTUM,
    is_finite,
    layer_pointer,
    load_scalar,
    load_scale,
    load_taken,
    power_of_two,
    problem_base,
    programs,
)
from .config import Config, tile_side
from .kernel import PRODUCT, TILES, Args, Kernel, Parts, Values, blocks
from .largest import largest_of
from .launchers import (
    DTYPES,
    PRECISION,
    biases,
    by_group,
    empty_rows,
    flat_samples,
    in_place,
    write_back,
)
from .layouts import RowPlace, entries, row_layout
from .tables import Tables, numbers_on
from .work import Sizes


@triton.jit
def _decayed(m, g, beta, M_DTYPE: tl.constexpr, NESTEROV: tl.constexpr):
    """``beta M + G`` as it is kept, and what is preconditioned."""
    kept = (beta * m + g).to(M_DTYPE)
    v = kept.to(tl.float32)
    if NESTEROV:
        v = g + beta * v
    return kept, v


@triton.jit
def _magnitude(v):
    """``|v|``, infinite where v is not a number."""
    return tl.where(is_finite(v), tl.abs(v), float("inf"))


@triton.jit
def _momentum_project_kernel(
    g_table_ptr,
    m_table_ptr,
    v_table_ptr,
    x_table_ptr,
    x_largest_table_ptr,
    g_bias_table_ptr,
    m_bias_table_ptr,
    v_bias_table_ptr,
    scalars_ptr,
    c_ptr,
    m_squared_ptr,
    m_scale_ptr,
    finite_ptr,
    N,
    R,
    D,
    GROUPS,
    first_block_n,
    g_place,
    m_place,
    stride_xn,
    ALIGN: tl.constexpr,
    G_DTYPE: tl.constexpr,
    M_DTYPE: tl.constexpr,
    X_DTYPE: tl.constexpr,
    G_TAPS: tl.constexpr,
    M_TAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UPDATE: tl.constexpr,
    MEASURE: tl.constexpr,
    NESTEROV: tl.constexpr,
    PROJECT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    within=None,
):
    """``M <- beta M + G``, ``C = X V^T`` and ``|v|^2`` for a block of rows.

    V is M, or with NESTEROV ``G + beta M``, which is then written out; in products it
    is scaled so that no square overflows or vanishes. A row that would not be finite
    stays as it is, as all do in a skipped step: beta and G become 1 and 0. To know both
    before anything is written, the block's rows are read once ahead (MEASURE); the
    second read comes from the cache. Without UPDATE, V is read as it is; without
    MEASURE, so is its scale.
    """
    program = programs(within)
    g_place = RowPlace(*g_place)
    m_place = RowPlace(*m_place)
    problem = program[1].to(tl.int64)
    layer, group = problem // GROUPS, problem % GROUPS
    block_n = first_block_n + program[2]
    rows = program[0] * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok = rows < R
    # Rows of the whole layer: its groups follow each other.
    layer_rows = group * R + rows.to(tl.int64)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    d_range = tl.arange(0, BLOCK_D)
    m_ptr = layer_pointer(m_table_ptr, layer, M_DTYPE, ALIGN)

    if UPDATE:
        beta = load_scalar(scalars_ptr, MOMENTUM)
        g_ptr = layer_pointer(g_table_ptr, layer, G_DTYPE, ALIGN)
        if HAS_BIAS:
            g_bias_ptr = layer_pointer(g_bias_table_ptr, layer, G_DTYPE, ALIGN)
            g_bias = tl.load(g_bias_ptr + layer_rows, mask=row_ok, other=0.0)
            g_bias = g_bias.to(tl.float32)
    if HAS_BIAS:
        m_bias_ptr = layer_pointer(m_bias_table_ptr, layer, M_DTYPE, ALIGN)
        m_bias = tl.load(m_bias_ptr + layer_rows, mask=row_ok, other=0.0)
        m_bias = m_bias.to(tl.float32)

    scale_at = problem * R + rows
    if MEASURE:
        magnitudes = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + d_range
            mask = row_ok[:, None] & (d < D)[None, :]
            at = entries(layer_rows[:, None], d[None, :], D, m_place, M_TAPS)
            v = tl.load(m_ptr + at, mask=mask, other=0.0).to(tl.float32)
            if UPDATE:
                at = entries(layer_rows[:, None], d[None, :], D, g_place, G_TAPS)
                g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
                _, v = _decayed(v, g, beta, M_DTYPE, NESTEROV)
            magnitudes = tl.maximum(magnitudes, _magnitude(v))
        largest = tl.max(magnitudes, axis=1)
        if HAS_BIAS:
            v_bias = m_bias
            if UPDATE:
                _, v_bias = _decayed(m_bias, g_bias, beta, M_DTYPE, NESTEROV)
            largest = tl.maximum(largest, _magnitude(v_bias))
        if UPDATE:
            largest = tl.where(load_taken(scalars_ptr), largest, float("inf"))
        m_scale = tl.where(is_finite(largest), power_of_two(largest), 1.0)
        if block_n == 0:
            tl.store(m_scale_ptr + scale_at, m_scale, mask=row_ok)
    else:
        m_scale = tl.load(m_scale_ptr + scale_at, mask=row_ok, other=0.0)
    if UPDATE:
        finite = is_finite(largest)
        beta = tl.where(finite, beta, 1.0)
        tl.store(finite_ptr + scale_at, finite.to(tl.int8), mask=row_ok)
        if NESTEROV:
            v_ptr = layer_pointer(v_table_ptr, layer, tl.float32, ALIGN)

    c = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    squares = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    if PROJECT:
        x_ptr = layer_pointer(x_table_ptr, layer, X_DTYPE, ALIGN) + group * D
        x_scale = load_scale(x_largest_table_ptr, layer, group)
    for start in range(0, D, BLOCK_D):
        d = start + d_range
        mask = row_ok[:, None] & (d < D)[None, :]
        at = entries(layer_rows[:, None], d[None, :], D, m_place, M_TAPS)
        v = tl.load(m_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if UPDATE:
            g_at = entries(layer_rows[:, None], d[None, :], D, g_place, G_TAPS)
            g = tl.load(g_ptr + g_at, mask=mask, other=0.0).to(tl.float32)
            g = tl.where(finite[:, None], g, 0.0)
            m, v = _decayed(v, g, beta[:, None], M_DTYPE, NESTEROV)
            tl.store(m_ptr + at, m, mask=mask)
            if NESTEROV:
                v_at = layer_rows[:, None] * D + d[None, :]
                tl.store(v_ptr + v_at, v, mask=mask)
        v *= m_scale[:, None]
        squares = tl.fma(v, v, squares)
        if PROJECT:
            x_mask = (n < N)[:, None] & (d < D)[None, :]
            x = tl.load(
                x_ptr + n[:, None] * stride_xn + d[None, :], mask=x_mask, other=0.0
            )
            x = x.to(tl.float32) * x_scale
            c = tl.dot(x, tl.trans(v), acc=c, input_precision=PRECISION)

    m_squared = tl.sum(squares, axis=1)
    if HAS_BIAS:
        v_bias = m_bias
        if UPDATE:
            g_bias = tl.where(finite, g_bias, 0.0)
            kept_bias, v_bias = _decayed(m_bias, g_bias, beta, M_DTYPE, NESTEROV)
            # Several threads may hold the same row: all must have read it first.
            tl.debug_barrier()
            tl.store(m_bias_ptr + layer_rows, kept_bias, mask=row_ok)
            if NESTEROV:
                v_bias_ptr = layer_pointer(v_bias_table_ptr, layer, tl.float32, ALIGN)
                tl.store(v_bias_ptr + layer_rows, v_bias, mask=row_ok)
        v_bias *= m_scale
        m_squared = tl.fma(v_bias, v_bias, m_squared)
        if PROJECT:
            c += v_bias[None, :] * x_scale

    if block_n == 0:
        tl.store(m_squared_ptr + problem * R + rows, m_squared, mask=row_ok)
    if PROJECT:
        c_ptr += problem_base(problem, GROUPS, N, R)
        c_at = n[:, None] * R * GROUPS + rows[None, :]
        tl.store(c_ptr + c_at, c, mask=(n < N)[:, None] & row_ok[None, :])


@dataclass(frozen=True)
class ProjectConfig(Config):
    """`MOMENTUM_PROJECT`."""

    BLOCK_N: int = 64
    BLOCK_R: int = 32
    BLOCK_D: int = 32


def project_config(n: int) -> ProjectConfig:
    """Up to 128 samples beside a block of rows; without any, long pieces of rows."""
    if n == 0:
        return ProjectConfig(BLOCK_N=16, BLOCK_R=8, BLOCK_D=64)
    block_n = min(tile_side(n), 128)
    if block_n <= 32:
        return ProjectConfig(BLOCK_N=block_n, BLOCK_R=16, num_stages=3)
    if block_n == 64:
        return ProjectConfig(num_warps=8)
    return ProjectConfig(BLOCK_N=block_n, BLOCK_D=16, num_warps=8)


def _parts(args: Args, problems: int, values: Values) -> Parts:
    """The first block of samples goes with the update, the others read what it left."""
    rows = blocks(args["R"], values["BLOCK_R"])
    samples = blocks(args["N"], values["BLOCK_N"])
    if not args["UPDATE"]:
        return [((rows, problems, samples), {})]
    found: Parts = [((rows, problems, 1), {})]
    if samples > 1:
        left = {
            "m_table_ptr": args["v_table_ptr"],
            "m_bias_table_ptr": args["v_bias_table_ptr"],
            "M_DTYPE": tl.float32 if args["NESTEROV"] else args["M_DTYPE"],
            "M_TAPS": 0 if args["NESTEROV"] else args["M_TAPS"],  # V is dense
        }
        rest = {"UPDATE": False, "MEASURE": False, "first_block_n": 1}
        found.append(((rows, problems, samples - 1), rest | left))
    return found


def _count(s: Sizes) -> tuple[int, int]:
    moved = s.row_entries * s.size("M_DTYPE")
    if s.args["first_block_n"] == 0:
        moved += 4 * s.rows  # |v|^2
    moved += 4 * s.rows  # their scales
    if s.args["UPDATE"]:
        moved += s.rows  # which of them are finite
        moved += s.row_entries * (s.size("G_DTYPE") + s.size("M_DTYPE"))
        moved += 4 * s.row_entries * s.args["NESTEROV"]
    if not s.args["PROJECT"]:
        return 0, moved
    return s.products, moved + s.x_entries * s.size("X_DTYPE") + 4 * s.nr


def _again(s: Sizes, values: Values) -> float:
    again = 0
    if s.args["MEASURE"]:  # the rows are read once ahead
        again = s.row_entries * s.size("M_DTYPE")
        again += s.row_entries * s.size("G_DTYPE") * s.args["UPDATE"]
    if not s.args["PROJECT"]:
        return again
    rows = blocks(s.args["R"], values["BLOCK_R"])
    again += s.x_entries * s.size("X_DTYPE") * (rows - 1)
    samples = blocks(s.n, values["BLOCK_N"])
    return again + s.row_entries * s.size("M_DTYPE") * (samples - 1)


MOMENTUM_PROJECT = Kernel(
    fn=_momentum_project_kernel,
    config=ProjectConfig,
    parts=_parts,
    count=_count,
    again=_again,
    values={**PRODUCT, "BLOCK_R": (4, 8, *TILES)},
    tiles=(("BLOCK_N", "BLOCK_D"), ("BLOCK_R", "BLOCK_D")),
    loop="D",
)


def momentum_(
    momenta: Sequence[Rows],
    grads: Sequence[Rows] | None,
    numbers: Numbers,
    nesterov: bool,
) -> tuple[Sequence[Rows], Tensor, Tensor]:
    """See `torch_ops.momentum_`; one launch."""
    ms, scales, finite, _, _ = momentum_project_(
        None, momenta, grads, numbers, nesterov
    )
    return ms, scales, finite


def momentum_project_(
    xs: Sequence[SampleMap] | None,
    momenta: Sequence[Rows],
    grads: Sequence[Rows] | None,
    numbers: Numbers,
    nesterov: bool,
) -> tuple[list[Rows], Tensor, Tensor, Tensor, Tensor]:
    """See `torch_ops.momentum_project_`; without samples nothing is projected.

    One launch, two beyond as many samples as a block holds.
    """
    ms = in_place(momenta)
    layers, m = len(ms), ms[0].weight
    rows, dim = m.shape[0], ms[0].dim
    n = 1 if xs is None else xs[0].samples
    groups = 1 if xs is None else xs[0].groups
    gs = [_dense_bias(g) for g in in_place(grads)] if grads else ms
    vs = empty_rows(ms)[1] if grads and nesterov else ms
    samples = largest = [m.weight for m in ms]  # not read without samples
    if xs is not None:
        samples, largest = flat_samples(xs)[1], largest_of(xs)
    tables = Tables(
        [
            [g.weight for g in gs],
            [m.weight for m in ms],
            [v.weight for v in vs],
            samples,
            largest,
            biases(gs),
            biases(ms),
            biases(vs),
        ]
    )
    c = m.new_empty(layers, n, rows if xs is not None else 0, dtype=torch.float32)
    m_squared = m.new_empty(layers, rows, dtype=torch.float32)
    scales = torch.empty_like(m_squared)
    make = m.new_ones if grads is None else m.new_empty
    finite = make(layers, rows, dtype=torch.bool)
    config = MOMENTUM_PROJECT.tuned(
        project_config(0 if xs is None else n),
        {"n": n, "r": rows // groups, "d": dim, "p": layers * groups},
        (gs[0].weight.dtype, m.dtype, samples[0].dtype),
        "alone" if xs is None else "",
    )
    MOMENTUM_PROJECT.launch(
        config,
        layers * groups,
        g_table_ptr=tables[0],
        m_table_ptr=tables[1],
        v_table_ptr=tables[2],
        x_table_ptr=tables[3],
        x_largest_table_ptr=tables[4],
        g_bias_table_ptr=tables[5],
        m_bias_table_ptr=tables[6],
        v_bias_table_ptr=tables[7],
        scalars_ptr=numbers_on(numbers, m.device),
        c_ptr=c,
        m_squared_ptr=m_squared,
        m_scale_ptr=scales,
        finite_ptr=finite.view(torch.int8),
        N=n,
        R=rows // groups,
        D=dim,
        GROUPS=groups,
        first_block_n=0,
        **row_layout("g", gs[0].weight),
        **row_layout("m", m),
        stride_xn=samples[0].stride(0),
        ALIGN=tables.align,
        G_DTYPE=DTYPES[gs[0].weight.dtype],
        M_DTYPE=DTYPES[m.dtype],
        X_DTYPE=DTYPES[samples[0].dtype],
        HAS_BIAS=ms[0].bias is not None,
        UPDATE=bool(grads),
        MEASURE=True,
        NESTEROV=nesterov,
        PROJECT=xs is not None,
        PRECISION=PRECISION,
    )
    write_back(momenta, ms)
    return vs, scales, finite, by_group(c, groups), m_squared


def _dense_bias(rows: Rows) -> Rows:
    if rows.bias is None or rows.bias.is_contiguous():
        return rows
    return Rows(rows.weight, rows.bias.contiguous())
