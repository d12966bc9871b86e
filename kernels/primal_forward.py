"""``T = Lambda * (X p)``, with the sums that p^T A p takes."""

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
    programs,
)
from .config import Config, tile_side
from .kernel import FEW, PRODUCT, Kernel, Values, blocks, covering
from .launchers import DTYPES
from .outputs import OutputPlace, load_outputs
from .primal import PrimalState
from .primal_direction import next_direction
from .products import as_factor, product, product_precision
from .row_weights import RowWeights
from .samples import Place, load_columns, load_window
from .tables import Tables
from .work import Sizes


@triton.jit
def _primal_forward_kernel(
    x_table_ptr,
    x_largest_table_ptr,
    y_table_ptr,
    y_scale_ptr,
    factor_ptr,
    p_ptr,
    p_bias_ptr,
    t_ptr,
    pap_partial_ptr,
    N,
    R,
    D,
    GROUPS,
    total,
    p_row,
    group_channels,
    multiplier,
    y_place,
    place,
    ALIGN: tl.constexpr,
    X_DTYPE: tl.constexpr,
    Y_DTYPE: tl.constexpr,
    T_DTYPE: tl.constexpr,
    STENCIL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DEPTHWISE: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    within=None,
):
    """``T = Lambda * (X p)`` and what ``p^T A p`` is made of.

    Where products are in bfloat16, p is so, times the scale of the samples. Lambda is
    formed from Y and never stored. The last iteration needs no T.
    """
    program = programs(within)
    y_place = OutputPlace(*y_place)
    place = Place(*place)
    problem = program[1].to(tl.int64)
    layer, group = problem // GROUPS, problem % GROUPS
    blocks_n = tl.cdiv(N, BLOCK_N)
    block_r, block_n = grouped_program(
        program[0], tl.cdiv(R, BLOCK_R), blocks_n, GROUP_M
    )
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)  # 64 bits where N has so many
    rows = block_r * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok = rows < R
    layer_rows = group * R + rows.to(tl.int64)
    at = problem * R + rows
    p_rows = (layer * GROUPS * R + layer_rows) * p_row
    x_ptr = layer_pointer(x_table_ptr, layer, X_DTYPE, ALIGN)
    x_ptr += group * group_channels * place.stride_c

    xp = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    if DEPTHWISE:
        channel = (rows // multiplier)[None, :]
        x_scale = load_scales(x_largest_table_ptr, layer, rows // multiplier, row_ok)
        mask = (n < N)[:, None] & row_ok[None, :]
        for tap in range(STENCIL.TAPS):
            p = tl.load(p_ptr + p_rows + tap, mask=row_ok, other=0.0)
            x = load_window(x_ptr, n[:, None], channel, tap, mask, place, STENCIL)
            xp += (x.to(tl.float32) * x_scale[None, :]) * p[None, :]
    else:
        x_scale = load_scale(x_largest_table_ptr, layer, group)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            p = tl.load(
                p_ptr + p_rows[None, :] + d[:, None],
                mask=row_ok[None, :] & (d < p_row)[:, None],
                other=0.0,
            )
            x = load_columns(x_ptr, n, start, N, D, place, STENCIL, BLOCK_D)
            xp = product(as_factor(x, x_scale, PRECISION), p, xp, PRECISION)
    if HAS_BIAS:
        p = tl.load(p_bias_ptr + at, mask=row_ok, other=0.0)
        xp += (p * x_scale)[None, :]

    mask = (n < N)[:, None] & row_ok[None, :]
    n = n.to(tl.int64)
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


def forward_config(
    n: int, dim: int, kind: str, rounded: bool = False, channels: int = 1
) -> ForwardConfig:
    """Tiles of samples by rows; more rows where windows repeat each sample often.

    Args:
        n: samples.
        dim: weights in a row.
        kind: how samples are addressed: ``"matrix"``, ``"window"`` or ``"depthwise"``.
        rounded: products are in bfloat16.
        channels: of a sample; windows whose tiles fill those of a tap are found faster.
    """
    if kind == "depthwise":
        return ForwardConfig(BLOCK_N=min(tile_side(n), 64), BLOCK_D=16)
    if n <= 32:
        return ForwardConfig(BLOCK_N=tile_side(n), BLOCK_R=16)
    if rounded and (kind == "matrix" or channels % 32 == 0):
        block_d = 64 if kind == "matrix" or channels % 64 == 0 else 32
        return ForwardConfig(
            BLOCK_N=128, BLOCK_R=64, BLOCK_D=block_d, num_warps=8, num_stages=3
        )
    if rounded:
        return ForwardConfig(BLOCK_R=64)
    # Rows that do not begin at multiples of 16 bytes take more registers to load.
    if kind == "matrix":
        return ForwardConfig(BLOCK_N=32 if dim % 16 else 64, num_warps=8)
    stages, block_r = 2 if dim % 16 else 3, 32 if dim <= 64 else 64
    return ForwardConfig(num_warps=8, num_stages=stages, BLOCK_R=block_r)


def _count(s: Sizes) -> tuple[int, int]:
    moved = s.row_entries * _itemsize(s) + s.x_entries * s.size("X_DTYPE")
    moved += s.nr * s.size("Y_DTYPE") + 12 * s.rows
    return s.products, moved + s.nr * s.size("T_DTYPE") * (not s.args["LAST"])


def _itemsize(s: Sizes) -> int:
    """Bytes of an entry of p."""
    return 2 if s.args["PRECISION"].startswith("bf16") else 4


def _again(s: Sizes, values: Values) -> float:
    rows = blocks(s.args["R"], values["BLOCK_R"])
    samples = blocks(s.n, values["BLOCK_N"])
    x: int = s.n * s.args["D"] * s.problems * s.size("X_DTYPE")
    x = x * rows - s.x_entries * s.size("X_DTYPE")
    return x + _itemsize(s) * s.row_entries * (samples - 1)


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
    """See `torch_ops.cg_forward_`; two launches."""
    next_direction(state)
    s, k = state.samples, state.iteration
    p = state.directions[k % 2]
    factor = p.weight if state.factor is None else state.factor
    tables = Tables([s.tensors, s.largest, weights.ys])
    PRIMAL_FORWARD.launch(
        state.forward,
        len(state.ms) * s.groups,
        x_table_ptr=tables[0],
        x_largest_table_ptr=tables[1],
        y_table_ptr=tables[2],
        y_scale_ptr=weights.scale,
        factor_ptr=weights.factor,
        p_ptr=factor,
        p_bias_ptr=p.bias,
        t_ptr=state.t,
        pap_partial_ptr=state.pap,
        **s.sizes,
        y_place=OutputPlace.of(weights.ys[0]),
        total=state.pp.numel(),
        p_row=factor.shape[-1],
        group_channels=s.group_channels,
        multiplier=max(1, s.depthwise),
        place=s.place,
        STENCIL=s.stencil,
        ALIGN=tables.align,
        X_DTYPE=DTYPES[s.tensors[0].dtype],
        Y_DTYPE=DTYPES[weights.ys[0].dtype],
        T_DTYPE=DTYPES[state.t.dtype],
        HAS_BIAS=p.bias is not None,
        DEPTHWISE=s.depthwise > 0,
        LAST=last,
        PRECISION=product_precision(s.map, s.tensors[0].dtype),
    )
    state.iteration += 1
