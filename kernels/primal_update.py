"""The last ``z += alpha p`` and equation (5)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..linalg.numbers import Numbers
from ..linalg.rows import Rows
from .common import (
    LR,
    WEIGHT_DECAY,
    count_anomalies,
    is_finite,
    layer_pointer,
    load_scalar,
    load_taken,
    programs,
)
from .config import Config
from .kernel import FEW, WARPS, Kernel, covering
from .launchers import (
    ALIGNMENT,
    DTYPES,
    biases,
    empty_directions,
    empty_rows,
    in_place,
    padded,
    room_of,
    write_back,
)
from .layouts import RowPlace, RowPointers, row_layout
from .primal import PrimalState, step_length
from .samples import Stencil, native_entries
from .tables import Tables, numbers_on
from .work import Sizes


@triton.jit
def _primal_update_kernel(
    theta_table_ptr,
    theta_bias_table_ptr,
    m_table_ptr,
    m_bias_table_ptr,
    m_scale_ptr,
    counts_table_ptr,
    scalars_ptr,
    p_rows,
    z_rows,
    pap_partial_ptr,
    pp_ptr,
    first_rho_ptr,
    rho_ptr,
    active_ptr,
    zm_ptr,
    status_ptr,
    finite_ptr,
    R,
    D,
    GROUPS,
    total,
    pap_blocks,
    theta_row,
    theta_place,
    m_place,
    ALIGN: tl.constexpr,
    THETA_DTYPE: tl.constexpr,
    M_DTYPE: tl.constexpr,
    STENCIL: tl.constexpr,
    THETA_TAPS: tl.constexpr,
    M_TAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    within=None,
):
    """The last ``z += alpha p``, normalized, and equation (5); not STEP: z itself.

    With NARROW a bias is the last column, zeros follow up to the end of a row, and rows
    that are not to move are zeros.
    """
    program = programs(within)
    p_rows = RowPointers(*p_rows)
    z_rows = RowPointers(*z_rows)
    theta_place = RowPlace(*theta_place)
    m_place = RowPlace(*m_place)
    problem = program[1].to(tl.int64)
    layer, group = problem // GROUPS, problem % GROUPS
    blocks_d = tl.maximum(tl.cdiv(D, BLOCK_D), 1)
    block_d = program[0] % blocks_d
    rows = (program[0] // blocks_d) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok = rows < R
    layer_rows = group * R + rows.to(tl.int64)
    at = problem * R + rows
    d = block_d * BLOCK_D + tl.arange(0, BLOCK_D)
    local = native_entries(layer_rows[:, None], d[None, :], D, m_place, M_TAPS, STENCIL)
    stored = (layer * GROUPS * R + layer_rows)[:, None] * D + d[None, :]

    alpha, rho, _ = step_length(
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
    zm = alpha * rho
    if not FIRST:
        zm += tl.load(zm_ptr + at, mask=row_ok, other=0.0)
    # Rows on the identity Fisher step along m, whose square is the first rho.
    status = tl.load(status_ptr + at, mask=row_ok, other=1)
    plain = status != 0
    zm = tl.where(plain, tl.load(first_rho_ptr + at, mask=row_ok, other=0.0), zm)
    usable = (zm > 0) & (zm < float("inf"))
    root = tl.sqrt_rn(tl.where(usable, zm, 1.0))
    scale = tl.where(usable, tl.div_rn(1.0, root), 0.0)

    if STEP:
        # In a skipped step no row moves, and none is counted.
        taken = load_taken(scalars_ptr)
        finite = tl.load(finite_ptr + at, mask=row_ok & taken, other=0)
        count_anomalies(
            counts_table_ptr,
            layer,
            layer_rows,
            GROUPS * R,
            status,
            finite,
            row_ok & (block_d == 0) & taken,
        )
        row_ok = row_ok & (finite != 0)
        lr = load_scalar(scalars_ptr, LR)
        decay = 1.0 - lr * load_scalar(scalars_ptr, WEIGHT_DECAY)
    mask = row_ok[:, None] & (d < D)[None, :]
    z = alpha[:, None] * tl.load(p_rows.weight + stored, mask=mask, other=0.0)
    if not FIRST:
        z += tl.load(z_rows.weight + stored, mask=mask, other=0.0)
    m_ptr = layer_pointer(m_table_ptr, layer, M_DTYPE, ALIGN)
    m = tl.load(m_ptr + local, mask=mask & plain[:, None], other=0.0)
    m_scale = tl.load(m_scale_ptr + at, mask=row_ok, other=0.0)
    m = m.to(tl.float32) * m_scale[:, None]
    z = tl.where(plain[:, None], m, z) * scale[:, None]
    theta_ptr = layer_pointer(theta_table_ptr, layer, THETA_DTYPE, ALIGN)
    local = native_entries(
        layer_rows[:, None], d[None, :], D, theta_place, THETA_TAPS, STENCIL
    )
    if STEP:
        theta = tl.load(theta_ptr + local, mask=mask, other=0.0).to(tl.float32)
        z = decay * theta - lr * z
    if NARROW:
        moves = tl.load(finite_ptr + at, mask=row_ok, other=0) != 0
        z = tl.where(moves[:, None] & is_finite(z), z, 0.0)
    tl.debug_barrier()
    tl.store(theta_ptr + local, z.to(THETA_DTYPE), mask=mask)
    first = row_ok & (block_d == 0)
    if HAS_BIAS:
        z = alpha * tl.load(p_rows.bias + at, mask=first, other=0.0)
        if not FIRST:
            z += tl.load(z_rows.bias + at, mask=first, other=0.0)
        m_bias_ptr = layer_pointer(m_bias_table_ptr, layer, M_DTYPE, ALIGN)
        m = tl.load(m_bias_ptr + layer_rows, mask=first & plain, other=0.0)
        z = tl.where(plain, m.to(tl.float32) * m_scale, z) * scale
        bias_ptr = layer_pointer(theta_bias_table_ptr, layer, THETA_DTYPE, ALIGN)
        if STEP:
            theta = tl.load(bias_ptr + layer_rows, mask=first, other=0.0)
            z = decay * theta.to(tl.float32) - lr * z
        if not NARROW:
            tl.debug_barrier()
            tl.store(bias_ptr + layer_rows, z.to(THETA_DTYPE), mask=first)
    if NARROW:
        last = D + tl.arange(0, ALIGNMENT)
        tail = tl.zeros((BLOCK_R, ALIGNMENT), tl.float32)
        if HAS_BIAS:
            z = tl.where(moves & is_finite(z), z, 0.0)
            tail = tl.where((last == D)[None, :], z[:, None], tail)
        at_last = layer_rows[:, None] * theta_row + last[None, :]
        mask = first[:, None] & (last < theta_row)[None, :]
        tl.store(theta_ptr + at_last, tail.to(THETA_DTYPE), mask=mask)


@dataclass(frozen=True)
class FinishConfig(Config):
    """`PRIMAL_UPDATE`."""

    num_warps: int = 8
    BLOCK_R: int = 16
    BLOCK_D: int = 128


def _count(s: Sizes) -> tuple[int, int]:
    theta = (1 + s.args["STEP"]) * s.size("THETA_DTYPE")
    vectors = 4 if s.args["FIRST"] else 2 * 4
    return 0, (theta + vectors) * s.row_entries + 28 * s.rows


PRIMAL_UPDATE = Kernel(
    fn=_primal_update_kernel,
    config=FinishConfig,
    parts=covering("RD"),
    count=_count,
    values={
        "BLOCK_R": (4, 8, 16, 32),
        "BLOCK_D": (64, 128, 256),
        "num_warps": WARPS,
    },
    accumulator=("BLOCK_R", "BLOCK_D"),
    most_programs=FEW,
)


def cg_rows(state: PrimalState, numbers: Numbers, moving: Tensor | None) -> Rows:
    """See `torch_ops.cg_rows`; one launch. With `moving` they are bfloat16."""
    z, layers = empty_rows(state.ms) if moving is None else empty_directions(state.ms)
    finite = state.status if moving is None else moving
    _finish(layers, state, finite, [], numbers, step=False)
    return z


def cg_update_(
    params: Sequence[Rows],
    state: PrimalState,
    finite: Tensor,
    counts: Sequence[Tensor],
    numbers: Numbers,
) -> None:
    """See `torch_ops.cg_update_`; one launch."""
    rows = in_place(params)
    _finish(rows, state, finite, counts, numbers, step=True)
    write_back(params, rows)


def _finish(
    thetas: Sequence[Rows],
    state: PrimalState,
    finite: Tensor,
    counts: Sequence[Tensor],
    numbers: Numbers,
    step: bool,
) -> None:
    """Equation (5), or directions written out."""
    s, m = state.samples, state.ms[0]
    narrow = not step and thetas[0].weight.dtype == torch.bfloat16
    dim = m.dim
    k = state.iteration - 1
    p, z = state.directions[k % 2], state.z
    config = PRIMAL_UPDATE.tuned(
        FinishConfig(),
        {"r": s.problem_rows, "d": dim, "p": len(thetas) * s.groups},
        # Narrow rows are written with the configuration of a plain step.
        (m.weight.dtype if narrow else thetas[0].weight.dtype, m.weight.dtype),
    )
    tables = Tables(
        [
            [room_of(theta) if narrow else theta.weight for theta in thetas],
            biases(thetas),
            [m.weight for m in state.ms],
            biases(state.ms),
            counts or [m.weight for m in state.ms],
        ]
    )
    PRIMAL_UPDATE.launch(
        config,
        len(thetas) * s.groups,
        theta_table_ptr=tables[0],
        theta_bias_table_ptr=tables[1],
        m_table_ptr=tables[2],
        m_bias_table_ptr=tables[3],
        m_scale_ptr=state.scales,
        counts_table_ptr=tables[4],
        scalars_ptr=numbers_on(numbers, m.weight.device),
        p_rows=p,
        z_rows=z,
        pap_partial_ptr=state.pap,
        pp_ptr=state.pp,
        first_rho_ptr=state.rho[0],
        rho_ptr=state.rho[k],
        active_ptr=state.active[2 * k],
        zm_ptr=state.zm,
        status_ptr=state.status,
        finite_ptr=finite.view(torch.int8) if finite.dtype == torch.bool else finite,
        R=s.problem_rows,
        D=dim,
        GROUPS=s.groups,
        total=state.pp.numel(),
        pap_blocks=state.pap.shape[0],
        theta_row=padded(dim + (m.bias is not None)),
        **row_layout("theta", thetas[0].weight),
        **row_layout("m", m.weight),
        ALIGN=tables.align,
        THETA_DTYPE=DTYPES[thetas[0].weight.dtype],
        M_DTYPE=DTYPES[m.weight.dtype],
        STENCIL=Stencil(s.stencil.TAPS, s.stencil.CHANNELS),
        HAS_BIAS=m.bias is not None,
        FIRST=k == 0,
        STEP=step,
        NARROW=narrow,
    )
