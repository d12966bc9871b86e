"""``p = r + beta p``, with ``|r|^2``, ``|p|^2`` and which rows still move."""

from dataclasses import dataclass

import triton
import triton.language as tl

from .common import (
    layer_pointer,
    load_scale,
    ordered_sum,
    programs,
    sum_of_products,
)
from .config import Config
from .kernel import Args, Kernel, Parts, Values, blocks
from .launchers import DTYPES, biases, padded
from .layouts import RowPlace, RowPointers, row_layout
from .primal import FLOOR, PrimalState
from .samples import Stencil, native_entries
from .tables import Tables
from .work import Sizes


@triton.jit
def _primal_direction_kernel(
    m_table_ptr,
    m_bias_table_ptr,
    x_largest_table_ptr,
    m_scale_ptr,
    r_rows,
    old_p_rows,
    p_rows,
    factor_ptr,
    rho_partial_ptr,
    pp_ptr,
    first_rho_ptr,
    old_rho_ptr,
    rho_ptr,
    old_active_ptr,
    active_ptr,
    R,
    D,
    GROUPS,
    total,
    rho_blocks,
    factor_row,
    m_place,
    ALIGN: tl.constexpr,
    M_DTYPE: tl.constexpr,
    STENCIL: tl.constexpr,
    M_TAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FIRST: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    within=None,
):
    """A block of rows. The first r is m.

    With NARROW p is written in bfloat16, too, as the factor of `X p`: times the scale
    of the samples, with zeros up to the end of a row.
    """
    program = programs(within)
    r_rows = RowPointers(*r_rows)
    old_p_rows = RowPointers(*old_p_rows)
    p_rows = RowPointers(*p_rows)
    m_place = RowPlace(*m_place)
    problem = program[1].to(tl.int64)
    layer, group = problem // GROUPS, problem % GROUPS
    rows = program[0] * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok = rows < R
    layer_rows = group * R + rows.to(tl.int64)
    at = problem * R + rows
    beta = tl.zeros((BLOCK_R,), tl.float32)
    m_scale = beta
    m_ptr = layer_pointer(m_table_ptr, layer, M_DTYPE, ALIGN)
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
        tl.store(rho_ptr + at, rho, mask=row_ok)
        tl.store(active_ptr + at, active.to(tl.int8), mask=row_ok)
    x_scale = 1.0
    if NARROW:
        x_scale = load_scale(x_largest_table_ptr, layer, group)

    pp = tl.zeros((BLOCK_R,), tl.float32)
    stored_rows = (layer * GROUPS * R + layer_rows) * D
    factor_rows = (layer * GROUPS * R + layer_rows) * factor_row
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
        tl.store(p_rows.weight + stored, p, mask=mask)
        pp += sum_of_products(p, p, axis=1)
        if NARROW:
            tl.store(
                factor_ptr + factor_rows[:, None] + d[None, :],
                (p * x_scale).to(tl.bfloat16),
                mask=row_ok[:, None] & (d < factor_row)[None, :],
            )
    if HAS_BIAS:
        if FIRST:
            m_bias_ptr = layer_pointer(m_bias_table_ptr, layer, M_DTYPE, ALIGN)
            p = tl.load(m_bias_ptr + layer_rows, mask=row_ok, other=0.0).to(tl.float32)
            p *= m_scale
        else:
            p = tl.load(r_rows.bias + at, mask=row_ok, other=0.0)
            p += beta * tl.load(old_p_rows.bias + at, mask=row_ok, other=0.0)
        tl.store(p_rows.bias + at, p, mask=row_ok)
        pp += p * p
    tl.store(pp_ptr + at, pp, mask=row_ok)
    if FIRST:
        tl.store(rho_ptr + at, pp, mask=row_ok)
        tl.store(active_ptr + at, (pp > 0).to(tl.int8), mask=row_ok)


@dataclass(frozen=True)
class DirectionConfig(Config):
    """`PRIMAL_DIRECTION`."""

    BLOCK_R: int = 4
    BLOCK_D: int = 256


def _parts(args: Args, problems: int, values: Values) -> Parts:
    return [((blocks(args["R"], values["BLOCK_R"]), problems), {})]


def _count(s: Sizes) -> tuple[int, int]:
    vectors = 4 + s.size("M_DTYPE") if s.args["FIRST"] else 3 * 4
    moved = vectors * s.row_entries + (12 + 4 * s.args["FIRST"]) * s.rows
    return 0, moved + 2 * s.args["factor_row"] * s.rows * s.args["NARROW"]


PRIMAL_DIRECTION = Kernel(
    fn=_primal_direction_kernel,
    config=DirectionConfig,
    parts=_parts,
    count=_count,
    loop="D",
)


def next_direction(state: PrimalState) -> None:
    """The next p; one launch."""
    s, m = state.samples, state.ms[0]
    k = state.iteration
    before = max(k - 1, 0)
    # Where m lies matters once; later on layers of all windows share launches.
    first_r, stencil = state.r.weight[0], Stencil()
    if k == 0:
        first_r = m.weight
        if s.stencil.TAPS > 1:
            stencil = Stencil(s.stencil.TAPS, s.stencil.CHANNELS)
    tables = Tables([[m.weight for m in state.ms], biases(state.ms), s.largest])
    PRIMAL_DIRECTION.launch(
        DirectionConfig(),
        len(state.ms) * s.groups,
        m_table_ptr=tables[0],
        m_bias_table_ptr=tables[1],
        x_largest_table_ptr=tables[2],
        m_scale_ptr=state.scales,
        r_rows=state.r,
        old_p_rows=state.directions[1 - k % 2],
        p_rows=state.directions[k % 2],
        factor_ptr=state.pp if state.factor is None else state.factor,
        rho_partial_ptr=state.rho_partial,
        pp_ptr=state.pp,
        first_rho_ptr=state.rho[0],
        old_rho_ptr=state.rho[before],
        rho_ptr=state.rho[k],
        old_active_ptr=state.active[2 * before + 1],
        active_ptr=state.active[2 * k],
        R=s.problem_rows,
        D=m.dim,
        GROUPS=s.groups,
        total=state.pp.numel(),
        rho_blocks=state.rho_partial.shape[0],
        factor_row=padded(m.dim),
        **row_layout("m", first_r),
        ALIGN=tables.align,
        M_DTYPE=DTYPES[m.weight.dtype],
        STENCIL=stencil,
        HAS_BIAS=m.bias is not None,
        FIRST=k == 0,
        NARROW=state.factor is not None,
    )
