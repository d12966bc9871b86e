"""Momentum and its projection on the samples, in one pass over the rows.

More than 400 lines: a kernel that is told all of a layer, and the two ops it serves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..linalg.numbers import Numbers
from ..linalg.rows import Rows, SampleMap
from .common import (
    MOMENTUM,
    below,
    is_finite,
    layer_pointer,
    load_scalar,
    load_scale,
    load_taken,
    problem_base,
    programs,
    scale_within_reach,
)
from .config import Config, tile_side
from .gpu import is_hopper
from .kernel import PRODUCT, TILES, Args, Kernel, Parts, Values, blocks
from .largest import largest_of
from .launchers import (
    DTYPES,
    biases,
    by_group,
    empty_rows,
    flat_samples,
    in_place,
    write_back,
)
from .layouts import RowPlace, from_row, row_layout
from .momentum_pass import (
    decayed_by,
    foreseen,
    pass_over_rows,
    with_bias,
)
from .products import sample_precision
from .tables import Tables, numbers_on
from .work import Sizes


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
    EVEN_N: tl.constexpr,
    EVEN_R: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PRECISION: tl.constexpr,
    within=None,
):
    """``M <- beta M + G``, ``C = X V^T`` and ``|v|^2`` for a block of rows.

    V is M, or with NESTEROV ``G + beta M``, which is then written out; in products it
    is scaled so that no square overflows or vanishes. A row that would not be finite
    stays as it is, as all do in a skipped step. To know it before anything is written,
    G is read once ahead, and M where G is huge: a decaying momentum alone cannot
    overflow. The second read comes from the cache. In ordinary
    training the scale is one, so the pass takes it for that, and makes itself again,
    over V as it left it, where it turns out to be another. Without UPDATE, V is read as
    it is; without MEASURE, so is its scale.
    """
    program = programs(within)
    g_place = RowPlace(*g_place)
    m_place = RowPlace(*m_place)
    problem = program[1].to(tl.int64)
    layer, group = problem // GROUPS, problem % GROUPS
    block_n = first_block_n + program[2]
    block_rows = tl.arange(0, BLOCK_R)
    rows = program[0] * BLOCK_R + block_rows
    row_ok = below(rows, R, EVEN_R)
    # Rows of the whole layer: its groups follow each other.
    first_row = group * R + program[0] * BLOCK_R
    layer_rows = first_row + block_rows
    first_n = block_n * BLOCK_N
    block_samples = tl.arange(0, BLOCK_N)
    n = first_n + block_samples
    scale_at = problem * R + rows
    m_ptr = layer_pointer(m_table_ptr, layer, M_DTYPE, ALIGN)
    m_ptr = from_row(m_ptr, first_row, D, m_place, M_TAPS)
    g_ptr, v_ptr, x_ptr = m_ptr, m_ptr, m_ptr  # where there are none
    x_scale = 1.0
    if PROJECT:
        x_ptr = layer_pointer(x_table_ptr, layer, X_DTYPE, ALIGN) + group * D
        x_ptr += first_n.to(tl.int64) * stride_xn
        x_scale = load_scale(x_largest_table_ptr, layer, group)
    if HAS_BIAS:
        m_bias_ptr = layer_pointer(m_bias_table_ptr, layer, M_DTYPE, ALIGN)
        m_bias = tl.load(m_bias_ptr + layer_rows, mask=row_ok, other=0.0)
        v_bias = m_bias.to(tl.float32)

    takes, beta = row_ok, tl.full((BLOCK_R,), 1.0, tl.float32)
    if UPDATE:
        decay = load_scalar(scalars_ptr, MOMENTUM)
        g_ptr = layer_pointer(g_table_ptr, layer, G_DTYPE, ALIGN)
        g_ptr = from_row(g_ptr, first_row, D, g_place, G_TAPS)
        if HAS_BIAS:
            g_bias_ptr = layer_pointer(g_bias_table_ptr, layer, G_DTYPE, ALIGN)
            g_bias = tl.load(g_bias_ptr + layer_rows, mask=row_ok, other=0.0)
            g_bias = g_bias.to(tl.float32)
        largest = foreseen(
            g_ptr,
            m_ptr,
            block_rows,
            row_ok,
            decay,
            D,
            g_place,
            m_place,
            M_DTYPE,
            G_TAPS,
            M_TAPS,
            NESTEROV,
            EVEN_D,
            BLOCK_R,
            BLOCK_D,
            BLOCK_G,
        )
        if HAS_BIAS:
            kept, decayed = decayed_by(v_bias, g_bias, decay, M_DTYPE, NESTEROV)
            largest = with_bias(largest, decayed)
        takes = is_finite(largest) & load_taken(scalars_ptr)
        beta = tl.where(takes, decay, 1.0)
        if NESTEROV:
            v_ptr = layer_pointer(v_table_ptr, layer, tl.float32, ALIGN)
            v_ptr += first_row * D
    m_scale = tl.full((BLOCK_R,), 1.0, tl.float32)
    if not MEASURE:
        m_scale = tl.load(m_scale_ptr + scale_at, mask=row_ok, other=0.0)

    c, m_squared, largest = pass_over_rows(
        g_ptr,
        m_ptr,
        v_ptr,
        x_ptr,
        block_rows,
        row_ok,
        block_samples,
        N - first_n,
        D,
        g_place,
        m_place,
        stride_xn,
        takes,
        beta,
        m_scale,
        x_scale,
        M_DTYPE,
        G_TAPS,
        M_TAPS,
        UPDATE,
        NESTEROV,
        PROJECT,
        not MEASURE,
        EVEN_N,
        EVEN_D,
        BLOCK_N,
        BLOCK_R,
        BLOCK_D,
        PRECISION,
    )
    if UPDATE and HAS_BIAS:
        g_bias = tl.where(takes, g_bias, 0.0)
        kept, v_bias = decayed_by(v_bias, g_bias, beta, M_DTYPE, NESTEROV)
        # Several threads may hold the same row: all must have read it first.
        tl.debug_barrier()
        tl.store(m_bias_ptr + layer_rows, kept, mask=row_ok)
        if NESTEROV:
            v_bias_ptr = layer_pointer(v_bias_table_ptr, layer, tl.float32, ALIGN)
            tl.store(v_bias_ptr + layer_rows, v_bias, mask=row_ok)
    if MEASURE:
        if HAS_BIAS:
            largest = with_bias(largest, v_bias)
        m_scale = tl.where(is_finite(largest), scale_within_reach(largest), 1.0)
        if block_n == 0:
            tl.store(m_scale_ptr + scale_at, m_scale, mask=row_ok)
        if tl.min((m_scale == 1.0).to(tl.int32), axis=0) == 0:
            tl.debug_barrier()  # V is there for all threads
            c, m_squared, _same = pass_over_rows(
                g_ptr,
                v_ptr if UPDATE and NESTEROV else m_ptr,
                v_ptr,
                x_ptr,
                block_rows,
                row_ok,
                block_samples,
                N - first_n,
                D,
                g_place,
                m_place,
                stride_xn,
                takes,
                beta,
                m_scale,
                x_scale,
                M_DTYPE,
                G_TAPS,
                0 if UPDATE and NESTEROV else M_TAPS,  # V is dense
                False,
                NESTEROV,
                PROJECT,
                True,
                EVEN_N,
                EVEN_D,
                BLOCK_N,
                BLOCK_R,
                BLOCK_D,
                PRECISION,
            )
    if UPDATE:
        finite = takes & is_finite(largest)
        tl.store(finite_ptr + scale_at, finite.to(tl.int8), mask=row_ok)
    if HAS_BIAS:
        v_bias *= m_scale
        m_squared = tl.fma(v_bias, v_bias, m_squared)
        if PROJECT:
            c += v_bias[None, :] * x_scale

    if block_n == 0:
        tl.store(m_squared_ptr + problem * R + rows, m_squared, mask=row_ok)
    if PROJECT:
        c_ptr += problem_base(problem, GROUPS, N, R)
        c_at = n[:, None].to(tl.int64) * R * GROUPS + rows[None, :]
        tl.store(c_ptr + c_at, c, mask=(n < N)[:, None] & row_ok[None, :])


@dataclass(frozen=True)
class ProjectConfig(Config):
    """`MOMENTUM_PROJECT`.

    Attributes:
        BLOCK_G: columns of G that are looked at together, ahead of the pass.
    """

    BLOCK_N: int = 64
    BLOCK_R: int = 64
    BLOCK_D: int = 32
    BLOCK_G: int = 32


def project_config(
    n: int, dtype: torch.dtype = torch.bfloat16, hopper: bool = True
) -> ProjectConfig:
    """All samples beside a block of rows, up to 256; without any, long pieces of rows.

    Up to 128 samples in bfloat16 leave registers for two programs a processor.

    Args:
        n: samples.
        dtype: of the samples.
        hopper: see `gpu.is_hopper`.
    """
    if n == 0:
        return ProjectConfig(BLOCK_N=16, BLOCK_R=8, BLOCK_D=64)
    config = ProjectConfig(BLOCK_N=min(tile_side(n), 256), num_warps=8, num_stages=3)
    if config.BLOCK_N <= 32:
        return replace(config, BLOCK_R=32)
    if config.BLOCK_N < 256:
        return config
    if dtype != torch.bfloat16:
        return replace(config, BLOCK_R=32, BLOCK_D=16, num_stages=2)
    return replace(config, BLOCK_R=64 if hopper else 32, num_stages=2)


def _parts(args: Args, problems: int, values: Values) -> Parts:
    """The first block of samples goes with the update, the others read what it left."""
    rows = blocks(args["R"], values["BLOCK_R"])
    samples = blocks(args["N"], values["BLOCK_N"])
    sides = max(values["BLOCK_D"], values["BLOCK_G"])  # powers of two
    even = {
        "EVEN_N": args["N"] % values["BLOCK_N"] == 0,
        "EVEN_R": args["R"] % values["BLOCK_R"] == 0,
        "EVEN_D": args["D"] % sides == 0,
    }
    if not args["UPDATE"]:
        return [((rows, problems, samples), even)]
    found: Parts = [((rows, problems, 1), even)]
    if samples > 1:
        left = {
            "m_table_ptr": args["v_table_ptr"],
            "m_bias_table_ptr": args["v_bias_table_ptr"],
            "M_DTYPE": tl.float32 if args["NESTEROV"] else args["M_DTYPE"],
            "M_TAPS": 0 if args["NESTEROV"] else args["M_TAPS"],  # V is dense
        }
        rest = {"UPDATE": False, "MEASURE": False, "first_block_n": 1}
        found.append(((rows, problems, samples - 1), even | rest | left))
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
    if s.args["UPDATE"]:  # G is read once ahead
        again = s.row_entries * s.size("G_DTYPE")
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
    values={**PRODUCT, "BLOCK_R": (4, 8, *TILES), "BLOCK_G": (32, 64, 128)},
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
        project_config(0 if xs is None else n, samples[0].dtype, is_hopper(m.device)),
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
        PRECISION=sample_precision(samples[0].dtype),
    )
    write_back(momenta, ms)
    return vs, scales, finite, by_group(c, groups), m_squared


def _dense_bias(rows: Rows) -> Rows:
    if rows.bias is None or rows.bias.is_contiguous():
        return rows
    return Rows(rows.weight, rows.bias.contiguous())
