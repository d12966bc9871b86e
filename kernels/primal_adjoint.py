"""``z += alpha p`` and ``r -= alpha A p``, with ``A p = X^T T + tau p``.

More than 400 lines: one kernel for images, matrices and depthwise layers alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import triton
import triton.language as tl

from ..linalg.numbers import Numbers
from ..linalg.rows import SampleMap
from .common import (
    DAMPING,
    grouped_program,
    layer_pointer,
    load_scalar,
    load_scale,
    load_scales,
    ordered_sum,
    programs,
    sum_of_products,
)
from .config import SplitConfig, tile_side
from .kernel import FEW, PRODUCT, TILES, Args, Kernel, Parts, Values, blocks, pieces
from .launchers import DTYPES, biases
from .layouts import RowPlace, RowPointers, row_layout
from .primal import PrimalState, step_length
from .products import as_factor, outstanding, product, product_precision
from .samples import (
    Place,
    load_columns,
    load_window,
    native_entries,
)
from .tables import Tables, numbers_on
from .work import Sizes


@triton.jit
def _advance(
    ap,
    ap_bias,
    alpha,
    damping,
    m_table_ptr,
    m_bias_table_ptr,
    m_scale_ptr,
    p_rows,
    r_rows,
    z_rows,
    rho_partial_ptr,
    layer,
    layer_rows,
    row_ok,
    at,
    block_d,
    d,
    R,
    D,
    GROUPS,
    total,
    m_place,
    ALIGN: tl.constexpr,
    M_DTYPE: tl.constexpr,
    M_TAPS: tl.constexpr,
    STENCIL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FIRST: tl.constexpr,
):
    """``z += alpha p``, ``r -= alpha A p`` and ``|r|^2`` on one tile of rows."""
    mask = row_ok[:, None] & (d < D)[None, :]
    stored = (layer * GROUPS * R + layer_rows)[:, None] * D + d[None, :]
    writes = row_ok & (block_d == 0)
    p = tl.load(p_rows.weight + stored, mask=mask, other=0.0)
    z = alpha[:, None] * p
    if FIRST:
        m_scale = tl.load(m_scale_ptr + at, mask=row_ok, other=0.0)
        m_ptr = layer_pointer(m_table_ptr, layer, M_DTYPE, ALIGN)
        local = native_entries(
            layer_rows[:, None], d[None, :], D, m_place, M_TAPS, STENCIL
        )
        r = tl.load(m_ptr + local, mask=mask, other=0.0).to(tl.float32)
        r *= m_scale[:, None]
    else:
        r = tl.load(r_rows.weight + stored, mask=mask, other=0.0)
        z += tl.load(z_rows.weight + stored, mask=mask, other=0.0)
    r -= alpha[:, None] * (ap + damping * p)
    # Several threads may hold the same entry: all must have read it first.
    tl.debug_barrier()
    tl.store(z_rows.weight + stored, z, mask=mask)
    tl.store(r_rows.weight + stored, r, mask=mask)
    rho = tl.sum(tl.where(mask, r * r, 0.0), axis=1)
    if HAS_BIAS:
        p = tl.load(p_rows.bias + at, mask=writes, other=0.0)
        z = alpha * p
        if FIRST:
            m_bias_ptr = layer_pointer(m_bias_table_ptr, layer, M_DTYPE, ALIGN)
            r = tl.load(m_bias_ptr + layer_rows, mask=writes, other=0.0).to(tl.float32)
            r *= m_scale
        else:
            r = tl.load(r_rows.bias + at, mask=writes, other=0.0)
            z += tl.load(z_rows.bias + at, mask=writes, other=0.0)
        r -= alpha * (ap_bias + damping * p)
        tl.debug_barrier()
        tl.store(z_rows.bias + at, z, mask=writes)
        tl.store(r_rows.bias + at, r, mask=writes)
        rho += tl.where(writes, r * r, 0.0)
    tl.store(rho_partial_ptr + block_d.to(tl.int64) * total + at, rho, mask=row_ok)


@triton.jit
def _primal_adjoint_kernel(
    x_table_ptr,
    x_largest_table_ptr,
    m_table_ptr,
    m_bias_table_ptr,
    m_scale_ptr,
    scalars_ptr,
    t_ptr,
    p_rows,
    r_rows,
    z_rows,
    ap_rows,
    rho_partial_ptr,
    pap_partial_ptr,
    pp_ptr,
    rho_ptr,
    active_ptr,
    next_active_ptr,
    zm_ptr,
    N,
    R,
    D,
    GROUPS,
    total,
    entries,
    pap_blocks,
    split_length,
    SPLITS,
    group_channels,
    multiplier,
    m_place,
    place,
    ALIGN: tl.constexpr,
    M_DTYPE: tl.constexpr,
    X_DTYPE: tl.constexpr,
    M_TAPS: tl.constexpr,
    STENCIL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DEPTHWISE: tl.constexpr,
    FIRST: tl.constexpr,
    MULTIPLY: tl.constexpr,
    ADVANCE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    within=None,
):
    """``X^T T``; alpha is known already, so ``z += alpha p``, ``r -= alpha A p``.

    Where the positions are split, one launch multiplies (MULTIPLY) and leaves partial
    products behind; a second adds them up in order and advances (ADVANCE). Else one
    launch does both.
    """
    program = programs(within)
    p_rows = RowPointers(*p_rows)
    r_rows = RowPointers(*r_rows)
    z_rows = RowPointers(*z_rows)
    ap_rows = RowPointers(*ap_rows)
    m_place = RowPlace(*m_place)
    place = Place(*place)
    problem = program[1].to(tl.int64)
    split = program[2].to(tl.int64)
    layer, group = problem // GROUPS, problem % GROUPS
    blocks_d = tl.maximum(tl.cdiv(D, BLOCK_D), 1)
    block_r, block_d = grouped_program(
        program[0], tl.cdiv(R, BLOCK_R), blocks_d, GROUP_M
    )
    rows = block_r * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok = rows < R
    layer_rows = group * R + rows.to(tl.int64)
    at = problem * R + rows
    d = block_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = row_ok[:, None] & (d < D)[None, :]
    stored = (layer * GROUPS * R + layer_rows)[:, None] * D + d[None, :]
    writes = row_ok & (block_d == 0)

    ap = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    ap_bias = tl.zeros((BLOCK_R,), tl.float32)
    if MULTIPLY:
        x_ptr = layer_pointer(x_table_ptr, layer, X_DTYPE, ALIGN)
        x_ptr += group * group_channels * place.stride_c
        t_ptr += layer * N * GROUPS * R
        if DEPTHWISE:
            channel = rows // multiplier
            x_scale = load_scales(x_largest_table_ptr, layer, channel, row_ok)
        else:
            x_scale = load_scale(x_largest_table_ptr, layer, group)
        begin = program[2] * split_length  # 64 bits where N has so many
        end = tl.minimum(begin + split_length, N)
        for start in range(begin, end, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            if DEPTHWISE:
                t_mask = (n < end)[:, None] & row_ok[None, :]
                t_at = n[:, None].to(tl.int64) * GROUPS * R + layer_rows[None, :]
                t = tl.load(t_ptr + t_at, mask=t_mask, other=0.0).to(tl.float32)
                x = load_window(
                    x_ptr,
                    n[:, None],
                    channel[None, :],
                    block_d,
                    t_mask,
                    place,
                    STENCIL,
                )
                x = x.to(tl.float32) * x_scale[None, :]
                ap += sum_of_products(t, x, axis=0)[:, None]
                if HAS_BIAS:
                    ap_bias += tl.sum(t, axis=0)
            else:
                t_mask = row_ok[:, None] & (n < end)[None, :]
                t_at = n[None, :].to(tl.int64) * GROUPS * R + layer_rows[:, None]
                t = tl.load(t_ptr + t_at, mask=t_mask, other=0.0)
                first_d = block_d * BLOCK_D
                x = load_columns(x_ptr, n, first_d, end, D, place, STENCIL, BLOCK_D)
                ap = product(t, as_factor(x, x_scale, PRECISION), ap, PRECISION)
                if HAS_BIAS:
                    ap_bias += tl.sum(t.to(tl.float32), axis=1)
        ap_bias *= x_scale
        if not DEPTHWISE:
            ap *= outstanding(x_scale, PRECISION)
    if ADVANCE:
        if not MULTIPLY:
            ap = ordered_sum(ap_rows.weight, SPLITS, entries, stored, mask)
            if HAS_BIAS:
                ap_bias = ordered_sum(ap_rows.bias, SPLITS, total, at, writes)
        alpha, rho, active = step_length(
            scalars_ptr,
            pap_partial_ptr,
            pp_ptr,
            rho_ptr,
            active_ptr,
            pap_blocks,
            total,
            at,
            row_ok,
        )
        tl.store(next_active_ptr + at, active.to(tl.int8), mask=writes)
        # <z, m> is the sum of alpha rho: the search directions are conjugate.
        zm = alpha * rho
        if not FIRST:
            zm += tl.load(zm_ptr + at, mask=writes, other=0.0)
        tl.debug_barrier()
        tl.store(zm_ptr + at, zm, mask=writes)
        _advance(
            ap,
            ap_bias,
            alpha,
            load_scalar(scalars_ptr, DAMPING),
            m_table_ptr,
            m_bias_table_ptr,
            m_scale_ptr,
            p_rows,
            r_rows,
            z_rows,
            rho_partial_ptr,
            layer,
            layer_rows,
            row_ok,
            at,
            block_d,
            d,
            R,
            D,
            GROUPS,
            total,
            m_place,
            ALIGN,
            M_DTYPE,
            M_TAPS,
            STENCIL,
            HAS_BIAS,
            FIRST,
        )
    else:
        tl.store(ap_rows.weight + split * entries + stored, ap, mask=mask)
        if HAS_BIAS:
            tl.store(ap_rows.bias + split * total + at, ap_bias, mask=writes)


@dataclass(frozen=True)
class AdjointConfig(SplitConfig):
    """`PRIMAL_ADJOINT`."""

    BLOCK_N: int = 32
    BLOCK_R: int = 64
    BLOCK_D: int = 64
    GROUP_M: int = 1


def adjoint_config(
    n: int, depthwise: bool = False, rounded: bool = False
) -> AdjointConfig:
    """Tiles of rows by weights; of a depthwise layer, rows by one weight.

    Args:
        n: samples.
        depthwise: each row sees one channel.
        rounded: products are in bfloat16.
    """
    if depthwise:
        block_n = min(tile_side(n), 64)
        return AdjointConfig(BLOCK_N=block_n, BLOCK_R=32, BLOCK_D=1)
    if rounded:
        return AdjointConfig(BLOCK_N=min(tile_side(n), 64), num_stages=3)
    return AdjointConfig(BLOCK_N=min(tile_side(n), 32), num_warps=8)


def _parts(args: Args, problems: int, values: Values) -> Parts:
    """In pieces of the samples where that fills the GPU, which one more launch adds."""
    count = blocks(args["R"], values["BLOCK_R"]) * blocks(args["D"], values["BLOCK_D"])
    splits, length = adjoint_pieces(args, problems, values)
    split = {"SPLITS": splits, "split_length": length}
    if splits == 1:
        whole = {"MULTIPLY": True, "ADVANCE": True}
        return [((count, problems, 1), split | whole)]
    return [
        ((count, problems, splits), split | {"MULTIPLY": True, "ADVANCE": False}),
        ((count, problems, 1), split | {"MULTIPLY": False, "ADVANCE": True}),
    ]


def adjoint_pieces(args: Args, problems: int, values: Values) -> tuple[int, int]:
    """Pieces of the samples N for R rows of D weights, and their length."""
    count = blocks(args["R"], values["BLOCK_R"]) * blocks(args["D"], values["BLOCK_D"])
    return pieces(
        args["N"], count * problems, 8 * values["BLOCK_N"], values["programs"]
    )


def _count(s: Sizes) -> tuple[int, int]:
    operations = moved = 0
    partial = 4 * s.args["SPLITS"] * s.row_entries
    if s.args["MULTIPLY"]:
        operations = s.products
        moved = s.x_entries * s.size("X_DTYPE")
        moved += s.nr * s.args["t_ptr"].element_size()
    if s.args["ADVANCE"]:
        old = s.size("M_DTYPE") if s.args["FIRST"] else 2 * 4
        moved += (old + 3 * 4) * s.row_entries + (12 + 4 * s.args["FIRST"]) * s.rows
    if s.args["MULTIPLY"] != s.args["ADVANCE"]:
        moved += partial
    return operations, moved


def _again(s: Sizes, values: Values) -> float:
    if not s.args["MULTIPLY"]:
        return 0.0
    rows = blocks(s.args["R"], values["BLOCK_R"])
    columns = blocks(s.args["D"], values["BLOCK_D"])
    x: int = s.n * s.args["D"] * s.problems * s.size("X_DTYPE")
    t: int = s.nr * s.args["t_ptr"].element_size()
    return x * rows - s.x_entries * s.size("X_DTYPE") + t * (columns - 1)


def _rule(values: Values, sizes: Mapping[str, int], kind: str) -> str | None:
    if kind.startswith("depthwise") != (values["BLOCK_D"] == 1):
        return "a depthwise layer has one weight a tile, and others have more"
    return None


PRIMAL_ADJOINT = Kernel(
    fn=_primal_adjoint_kernel,
    config=AdjointConfig,
    parts=_parts,
    count=_count,
    again=_again,
    values={
        **PRODUCT,
        "BLOCK_D": (1, *TILES),
        "GROUP_M": (1, 4),
        "programs": (128, 256, 512),
    },
    accumulator=("BLOCK_R", "BLOCK_D"),
    tiles=(("BLOCK_N", "BLOCK_D"), ("BLOCK_N", "BLOCK_R")),
    loop="N",
    rule=_rule,
    most_programs=FEW,
)


def cg_adjoint_(xs: Sequence[SampleMap], state: PrimalState, numbers: Numbers) -> None:
    """See `torch_ops.cg_adjoint_`; one launch, two where the samples are split."""
    s, m = state.samples, state.ms[0]
    k = state.iteration - 1
    p, r, z = state.directions[k % 2], state.r, state.z
    ms = [m.weight for m in state.ms]
    tables = Tables([s.tensors, s.largest, ms, biases(state.ms)])
    partial = z if state.ap is None else state.ap

    PRIMAL_ADJOINT.launch(
        state.adjoint,
        len(state.ms) * s.groups,
        x_table_ptr=tables[0],
        x_largest_table_ptr=tables[1],
        m_table_ptr=tables[2],
        m_bias_table_ptr=tables[3],
        m_scale_ptr=state.scales,
        scalars_ptr=numbers_on(numbers, m.weight.device),
        t_ptr=state.t,
        p_rows=p,
        r_rows=r,
        z_rows=z,
        ap_rows=partial,
        rho_partial_ptr=state.rho_partial,
        pap_partial_ptr=state.pap,
        pp_ptr=state.pp,
        rho_ptr=state.rho[k],
        active_ptr=state.active[2 * k],
        next_active_ptr=state.active[2 * k + 1],
        zm_ptr=state.zm,
        **s.sizes,
        total=state.pp.numel(),
        entries=p.weight.numel(),
        pap_blocks=state.pap.shape[0],
        group_channels=s.group_channels,
        multiplier=max(1, s.depthwise),
        **row_layout("m", m.weight),
        place=s.place,
        STENCIL=s.stencil,
        ALIGN=tables.align,
        M_DTYPE=DTYPES[m.weight.dtype],
        X_DTYPE=DTYPES[s.tensors[0].dtype],
        HAS_BIAS=m.bias is not None,
        DEPTHWISE=s.depthwise > 0,
        FIRST=k == 0,
        PRECISION=product_precision(s.map, s.tensors[0].dtype),
    )
