"""``p = r + beta p`` and ``T = Lambda * (X p)``, with the sums that p^T A p takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import triton
import triton.language as tl

from ..linalg.numbers import Numbers
from ..linalg.rows import SampleMap
from .common import (
    grouped_program,
    layer_pointer,
    load_scale,
    load_scales,
    ordered_sum,
    programs,
    sum_of_products,
)
from .config import Config, tile_side
from .kernel import FEW, PRODUCT, Kernel, Values, blocks, covering
from .launchers import DTYPES, biases
from .layouts import RowPlace, RowPointers, row_layout
from .outputs import OutputPlace, load_outputs
from .primal import FLOOR, PrimalState
from .products import as_factor, outstanding, product, product_precision
from .row_weights import RowWeights
from .samples import (
    Place,
    load_window,
    native_entries,
)
from .tables import Tables
from .work import Sizes


@triton.jit
def _primal_forward_kernel(
    x_table_ptr,
    x_largest_table_ptr,
    y_table_ptr,
    m_table_ptr,
    m_bias_table_ptr,
    m_scale_ptr,
    y_scale_ptr,
    factor_ptr,
    t_ptr,
    r_rows,
    old_p_rows,
    p_rows,
    rho_partial_ptr,
    pap_partial_ptr,
    pp_ptr,
    first_rho_ptr,
    old_rho_ptr,
    rho_ptr,
    old_active_ptr,
    active_ptr,
    N,
    R,
    D,
    GROUPS,
    total,
    rho_blocks,
    group_channels,
    multiplier,
    m_place,
    y_place,
    place,
    ALIGN: tl.constexpr,
    M_DTYPE: tl.constexpr,
    X_DTYPE: tl.constexpr,
    Y_DTYPE: tl.constexpr,
    T_DTYPE: tl.constexpr,
    STENCIL: tl.constexpr,
    M_TAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DEPTHWISE: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    within=None,
):
    """``p = r + beta p``, then ``T = Lambda * (X p)`` and what ``p^T A p`` is made of.

    Every program forms the p it needs; those of the first samples write it down. Lambda
    is formed from Y and never stored. The last iteration needs no T.
    """
    program = programs(within)
    r_rows = RowPointers(*r_rows)
    old_p_rows = RowPointers(*old_p_rows)
    p_rows = RowPointers(*p_rows)
    m_place = RowPlace(*m_place)
    y_place = OutputPlace(*y_place)
    place = Place(*place)
    problem = program[1].to(tl.int64)
    layer, group = problem // GROUPS, problem % GROUPS
    blocks_n = tl.cdiv(N, BLOCK_N)
    block_r, block_n = grouped_program(
        program[0], tl.cdiv(R, BLOCK_R), blocks_n, GROUP_M
    )
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    rows = block_r * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok = rows < R
    layer_rows = group * R + rows.to(tl.int64)
    at = problem * R + rows
    writes = row_ok & (block_n == 0)
    x_ptr = layer_pointer(x_table_ptr, layer, X_DTYPE, ALIGN)
    x_ptr += group * group_channels * place.stride_c
    m_ptr = layer_pointer(m_table_ptr, layer, M_DTYPE, ALIGN)

    beta = tl.zeros((BLOCK_R,), tl.float32)
    if FIRST:
        m_scale = tl.load(m_scale_ptr + at, mask=row_ok, other=0.0)
    else:
        rho = ordered_sum(rho_partial_ptr, rho_blocks, total, at, row_ok)
        old_rho = tl.load(old_rho_ptr + at, mask=row_ok, other=1.0)
        floor = tl.load(first_rho_ptr + at, mask=row_ok, other=0.0) * FLOOR
        active = tl.load(old_active_ptr + at, mask=row_ok, other=0) != 0
        active = active & (rho > floor)
        beta = tl.div_rn(rho, tl.where(active, old_rho, 1.0))
        beta = tl.where(active, beta, 0.0)
        tl.store(rho_ptr + at, rho, mask=writes)
        tl.store(active_ptr + at, active.to(tl.int8), mask=writes)

    xp = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    pp = tl.zeros((BLOCK_R,), tl.float32)
    stored_rows = (layer * GROUPS * R + layer_rows) * D
    if DEPTHWISE:
        channel = (rows // multiplier)[None, :]
        x_scale = load_scales(x_largest_table_ptr, layer, rows // multiplier, row_ok)
        for tap in range(STENCIL.TAPS):
            if FIRST:
                local = layer_rows * D + tap
                if M_TAPS != 0:  # one channel
                    local = layer_rows * m_place.stride_r + tap * m_place.stride_c
                p = tl.load(m_ptr + local, mask=row_ok, other=0.0)
                p = p.to(tl.float32) * m_scale
            else:
                p = tl.load(r_rows.weight + stored_rows + tap, mask=row_ok, other=0.0)
                old_p_ptr = old_p_rows.weight + stored_rows + tap
                old_p = tl.load(old_p_ptr, mask=row_ok, other=0.0)
                p += beta * old_p
            tl.store(p_rows.weight + stored_rows + tap, p, mask=writes)
            pp += p * p
            mask = (n < N)[:, None] & row_ok[None, :]
            x = load_window(
                x_ptr,
                n[:, None],
                channel,
                tap,
                mask,
                place,
                STENCIL,
            )
            xp += (x.to(tl.float32) * x_scale[None, :]) * p[None, :]
    else:
        x_scale = load_scale(x_largest_table_ptr, layer, group)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            mask = row_ok[:, None] & (d < D)[None, :]
            stored = stored_rows[:, None] + d[None, :]
            if FIRST:
                local = native_entries(
                    layer_rows[:, None], d[None, :], D, m_place, M_TAPS, STENCIL
                )
                p = tl.load(m_ptr + local, mask=mask, other=0.0).to(tl.float32)
                p *= m_scale[:, None]
            else:
                p = tl.load(r_rows.weight + stored, mask=mask, other=0.0)
                old_p = tl.load(old_p_rows.weight + stored, mask=mask, other=0.0)
                p += beta[:, None] * old_p
            tl.store(p_rows.weight + stored, p, mask=mask & (block_n == 0))
            pp += sum_of_products(p, p, axis=1)
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
            x = as_factor(x, x_scale, PRECISION)
            p *= outstanding(x_scale, PRECISION)
            xp = product(x, tl.trans(p), xp, PRECISION)
    if HAS_BIAS:
        if FIRST:
            m_bias_ptr = layer_pointer(m_bias_table_ptr, layer, M_DTYPE, ALIGN)
            p = tl.load(m_bias_ptr + layer_rows, mask=row_ok, other=0.0).to(tl.float32)
            p *= m_scale
        else:
            p = tl.load(r_rows.bias + at, mask=row_ok, other=0.0)
            p += beta * tl.load(old_p_rows.bias + at, mask=row_ok, other=0.0)
        tl.store(p_rows.bias + at, p, mask=writes)
        pp += p * p
        xp += (p * x_scale)[None, :]

    tl.store(pp_ptr + at, pp, mask=writes)
    if FIRST:
        tl.store(rho_ptr + at, pp, mask=writes)
        tl.store(active_ptr + at, (pp > 0).to(tl.int8), mask=writes)
    mask = (n < N)[:, None] & row_ok[None, :]
    y_ptr = layer_pointer(y_table_ptr, layer, Y_DTYPE, ALIGN)
    y_scale = tl.load(y_scale_ptr + at, mask=row_ok, other=0.0)
    y = load_outputs(y_ptr, n, layer_rows, mask, y_place) * y_scale[None, :]
    factor = tl.load(factor_ptr + at, mask=row_ok, other=0.0)[None, :]
    t = tl.where(factor > 0, y * y * factor, 0.0) * xp
    if not LAST:
        t_at = layer * N * GROUPS * R + n[:, None] * GROUPS * R + layer_rows[None, :]
        tl.store(t_ptr + t_at, t.to(T_DTYPE), mask=mask)
    pap = tl.sum(tl.where(mask, t * xp, 0.0), axis=0)
    tl.store(pap_partial_ptr + block_n.to(tl.int64) * total + at, pap, mask=row_ok)


@dataclass(frozen=True)
class ForwardConfig(Config):
    """`PRIMAL_FORWARD`."""

    BLOCK_N: int = 64
    BLOCK_R: int = 32
    BLOCK_D: int = 32
    GROUP_M: int = 1


def forward_config(n: int, dim: int, kind: str) -> ForwardConfig:
    """Tiles of samples by rows; more rows where windows repeat each sample often.

    Args:
        n: samples.
        dim: weights in a row.
        kind: how samples are addressed: ``"matrix"``, ``"window"`` or ``"depthwise"``.
    """
    if kind == "depthwise":
        return ForwardConfig(BLOCK_N=min(tile_side(n), 64), BLOCK_D=16)
    if n <= 32:
        return ForwardConfig(BLOCK_N=tile_side(n), BLOCK_R=16)
    # Rows that do not begin at multiples of 16 bytes take more registers to load.
    if kind == "matrix":
        return ForwardConfig(BLOCK_N=32 if dim % 16 else 64, num_warps=8)
    stages, block_r = 2 if dim % 16 else 3, 32 if dim <= 64 else 64
    return ForwardConfig(num_warps=8, num_stages=stages, BLOCK_R=block_r)


def _count(s: Sizes) -> tuple[int, int]:
    vectors = 4 + s.size("M_DTYPE") if s.args["FIRST"] else 3 * 4
    moved = vectors * s.row_entries + s.x_entries * s.size("X_DTYPE")
    moved += s.nr * s.size("Y_DTYPE") + (16 + 4 * s.args["FIRST"]) * s.rows
    return s.products, moved + s.nr * s.size("T_DTYPE") * (not s.args["LAST"])


def _again(s: Sizes, values: Values) -> float:
    rows = blocks(s.args["R"], values["BLOCK_R"])
    samples = blocks(s.n, values["BLOCK_N"])
    vectors = (s.size("M_DTYPE") if s.args["FIRST"] else 8) * s.row_entries
    x: int = s.n * s.args["D"] * s.problems * s.size("X_DTYPE")
    return x * rows - s.x_entries * s.size("X_DTYPE") + vectors * (samples - 1)


def _rule(values: Values, sizes: Mapping[str, int], kind: str) -> str | None:
    if kind.startswith("depthwise") and values["BLOCK_D"] > 16:
        return "a depthwise layer does not use BLOCK_D"
    return None


PRIMAL_FORWARD = Kernel(
    fn=_primal_forward_kernel,
    config=ForwardConfig,
    parts=covering("NR"),
    count=_count,
    again=_again,
    values={**PRODUCT, "GROUP_M": (1, 4)},
    tiles=(("BLOCK_N", "BLOCK_D"), ("BLOCK_R", "BLOCK_D")),
    loop="D",
    rule=_rule,
    most_programs=FEW,
)


def cg_forward_(
    xs: Sequence[SampleMap],
    weights: RowWeights,
    state: PrimalState,
    numbers: Numbers,
    last: bool,
) -> None:
    """See `torch_ops.cg_forward_`; one launch."""
    s, m = state.samples, state.ms[0]
    k = state.iteration
    before = max(k - 1, 0)
    p, old_p = state.directions[k % 2], state.directions[1 - k % 2]
    ms = [m.weight for m in state.ms]
    tables = Tables([s.tensors, s.largest, weights.ys, ms, biases(state.ms)])
    PRIMAL_FORWARD.launch(
        state.forward,
        len(state.ms) * s.groups,
        x_table_ptr=tables[0],
        x_largest_table_ptr=tables[1],
        y_table_ptr=tables[2],
        m_table_ptr=tables[3],
        m_bias_table_ptr=tables[4],
        m_scale_ptr=state.scales,
        y_scale_ptr=weights.scale,
        factor_ptr=weights.factor,
        t_ptr=state.t,
        r_rows=state.r,
        old_p_rows=old_p,
        p_rows=p,
        rho_partial_ptr=state.rho_partial,
        pap_partial_ptr=state.pap,
        pp_ptr=state.pp,
        first_rho_ptr=state.rho[0],
        old_rho_ptr=state.rho[before],
        rho_ptr=state.rho[k],
        old_active_ptr=state.active[2 * before + 1],
        active_ptr=state.active[2 * k],
        **s.sizes,
        **row_layout("m", m.weight),
        y_place=OutputPlace.of(weights.ys[0]),
        total=state.pp.numel(),
        rho_blocks=state.rho_partial.shape[0],
        group_channels=s.group_channels,
        multiplier=max(1, s.depthwise),
        place=s.place,
        STENCIL=s.stencil,
        ALIGN=tables.align,
        M_DTYPE=DTYPES[m.weight.dtype],
        X_DTYPE=DTYPES[s.tensors[0].dtype],
        Y_DTYPE=DTYPES[weights.ys[0].dtype],
        T_DTYPE=DTYPES[state.t.dtype],
        HAS_BIAS=m.bias is not None,
        DEPTHWISE=s.depthwise > 0,
        FIRST=k == 0,
        LAST=last,
        PRECISION=product_precision(s.map, s.tensors[0].dtype),
    )
    state.iteration += 1
