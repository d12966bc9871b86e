"""Launches of `kernels.primal`: conjugate gradients on the rows themselves.

Samples may be a matrix or whole images; see `triton_samples`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..autotune import config
from ..autotune.table import tuned
from ..kernels.primal import (
    _primal_adjoint_kernel,
    _primal_forward_kernel,
    _primal_update_kernel,
)
from ..kernels.weights import (
    _row_norms_kernel,
    _row_scale_kernel,
    _row_scale_sum_kernel,
)
from .launch import launch
from .tables import Tables
from .triton_common import DTYPES, biases, row_strides
from .triton_samples import Samples, product_precision, samples
from .types import Rows, SampleMap


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

    @property
    def strides(self) -> dict[str, int]:
        """Arguments that address Y."""
        n, r, p = self.ys[0].stride()
        return {
            "P": self.ys[0].shape[2],
            "stride_yn": n,
            "stride_yr": r,
            "stride_yp": p,
        }


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
        chosen = tuned(
            "_row_norms_kernel",
            config.NormsConfig(),
            {"n": s.n, "d": s.map.dim, "p": problems},
            (s.tensors[0].dtype,),
            s.kind,
        )
        launch(
            _row_norms_kernel,
            (triton.cdiv(s.n, chosen.BLOCK_N), problems),
            chosen,
            x_table_ptr=tables[0],
            x_largest_table_ptr=tables[1],
            norms_ptr=norms,
            N=s.n,
            D=s.map.dim,
            GROUPS=s.groups,
            group_channels=s.group_channels,
            **s.window,
            ALIGN=tables.align,
            X_DTYPE=DTYPES[s.tensors[0].dtype],
            HAS_BIAS=s.map.bias,
        )
    scaling = tuned(
        "_row_scale_kernel",
        config.scale_config(s.n),
        {"n": s.n, "r": s.problem_rows, "p": problems},
        (y.dtype,),
        s.kind,
    )
    blocks_r = triton.cdiv(s.problem_rows, scaling.BLOCK_R)
    programs = blocks_r * problems
    splits, length = _splits(s.n, programs, 4 * scaling.BLOCK_N, scaling.programs)
    largest, trace = empty(splits, layers, rows), empty(splits, layers, rows)
    weights = RowWeights(list(ys), empty(layers, rows), empty(layers, rows))
    status = empty(layers, rows, dtype=torch.int32)
    launch(
        _row_scale_kernel,
        (blocks_r, problems, splits),
        scaling,
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
        split_length=length,
        multiplier=max(1, s.depthwise),
        **weights.strides,
        **s.window,
        ALIGN=tables.align,
        X_DTYPE=DTYPES[s.tensors[0].dtype],
        Y_DTYPE=DTYPES[y.dtype],
        HAS_BIAS=s.map.bias,
        DEPTHWISE=s.depthwise > 0,
    )
    summing = config.SumConfig(BLOCK=256)
    launch(
        _row_scale_sum_kernel,
        (triton.cdiv(layers * rows, summing.BLOCK),),
        summing,
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


@dataclass
class PrimalState:
    """Scratch memory of a solve.

    Attributes:
        samples: of the layers.
        forward: configuration of the forward products.
        adjoint: configuration of the adjoint products.
        ms: right-hand sides of each layer.
        scales: of their rows ``(L, R)``.
        status: of the rows ``(L, R)``.
        iteration: how many forward products have been made.
        vectors: p of even and of odd iterations, r and z, each ``(L, R, D)``.
        t: ``Lambda * (X p)`` ``(L, N, R)``, in the type of its next product.
        pap: partial sums of ``p^T Lambda p`` ``(blocks, L, R)``.
        rho_partial: partial sums of ``|r|^2`` ``(blocks, L, R)``.
        rho: ``|r|^2`` before each iteration ``(iters, L, R)``.
        active: rows that move, before and after each step length ``(2 iters, L, R)``.
        pp: ``|p|^2`` ``(L, R)``.
        zm: ``<z, m>`` so far ``(L, R)``.
        ap: partial ``X^T T`` where the positions are split ``(splits, L, R, D)``.
        damping: tau of the last iteration, for the last step.
    """

    samples: Samples
    forward: config.ForwardConfig
    adjoint: config.AdjointConfig
    ms: Sequence[Rows]
    scales: Tensor
    status: Tensor
    iteration: int
    vectors: list[Rows]
    t: Tensor
    pap: Tensor
    rho_partial: Tensor
    rho: Tensor
    active: Tensor
    pp: Tensor
    zm: Tensor
    ap: Rows | None = None
    damping: float | Tensor = 0.0


def start(
    xs: Sequence[SampleMap],
    ms: Sequence[Rows],
    scales: Tensor,
    status: Tensor,
    iters: int,
) -> PrimalState:
    """Scratch for `iters` iterations; nothing is launched."""
    m = ms[0]
    layers, (rows, dim) = len(ms), m.weight.shape
    s = samples(xs, rows)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return m.weight.new_empty(shape, dtype=dtype)

    def vector(*leading: int) -> Rows:
        bias = None if m.bias is None else empty(*leading, layers, rows)
        return Rows(empty(*leading, layers, rows, dim), bias)

    precision = product_precision(s)
    dtypes, kind = (s.tensors[0].dtype,), f"{s.kind} {precision}"
    of_forward = tuned(
        "_primal_forward_kernel",
        config.forward_config(s.n, s.map.dim, s.kind),
        s.key,
        dtypes,
        kind,
    )
    of_adjoint = tuned(
        "_primal_adjoint_kernel",
        config.adjoint_config(s.n, s.depthwise > 0),
        s.key,
        dtypes,
        kind,
    )
    blocks_n = triton.cdiv(s.n, of_forward.BLOCK_N)
    blocks_d = max(1, triton.cdiv(dim, of_adjoint.BLOCK_D))
    splits, _ = _adjoint_splits(s, of_adjoint, blocks_d)
    rounded = precision.startswith("bf16") and not s.depthwise
    t_dtype = torch.bfloat16 if rounded else torch.float32
    return PrimalState(
        s,
        of_forward,
        of_adjoint,
        ms,
        scales,
        status,
        0,
        [vector() for _ in range(4)],
        empty(layers, s.n, rows, dtype=t_dtype),
        empty(blocks_n, layers, rows),
        empty(blocks_d, layers, rows),
        empty(iters, layers, rows),
        empty(2 * iters, layers, rows, dtype=torch.int8),
        empty(layers, rows),
        empty(layers, rows),
        vector(splits) if splits > 1 else None,
    )


def forward(
    weights: RowWeights, state: PrimalState, damping: float | Tensor, last: bool
) -> None:
    """``p = r + beta p`` and ``T = Lambda * (X p)``; one launch."""
    s, m = state.samples, state.ms[0]
    k = state.iteration
    before = max(k - 1, 0)
    p, old_p, (r, _) = state.vectors[k % 2], state.vectors[1 - k % 2], state.vectors[2:]
    chosen = state.forward
    blocks_r = triton.cdiv(s.problem_rows, chosen.BLOCK_R)
    ms = [m.weight for m in state.ms]
    tables = Tables([s.tensors, s.largest, weights.ys, ms, biases(state.ms)])
    launch(
        _primal_forward_kernel,
        (blocks_r * state.pap.shape[0], len(state.ms) * s.groups),
        chosen,
        x_table_ptr=tables[0],
        x_largest_table_ptr=tables[1],
        y_table_ptr=tables[2],
        m_table_ptr=tables[3],
        m_bias_table_ptr=tables[4],
        m_scale_ptr=state.scales,
        y_scale_ptr=weights.scale,
        factor_ptr=weights.factor,
        t_ptr=state.t,
        r_ptr=r.weight,
        r_bias_ptr=_bias(r),
        old_p_ptr=old_p.weight,
        old_p_bias_ptr=_bias(old_p),
        p_ptr=p.weight,
        p_bias_ptr=_bias(p),
        rho_partial_ptr=state.rho_partial,
        pap_partial_ptr=state.pap,
        pp_ptr=state.pp,
        first_rho_ptr=state.rho[0],
        old_rho_ptr=state.rho[before],
        rho_ptr=state.rho[k],
        old_active_ptr=state.active[2 * before + 1],
        active_ptr=state.active[2 * k],
        **s.sizes,
        **weights.strides,
        total=state.pp.numel(),
        rho_blocks=state.rho_partial.shape[0],
        group_channels=s.group_channels,
        multiplier=max(1, s.depthwise),
        **s.window,
        ALIGN=tables.align,
        M_DTYPE=DTYPES[m.weight.dtype],
        X_DTYPE=DTYPES[s.tensors[0].dtype],
        Y_DTYPE=DTYPES[weights.ys[0].dtype],
        T_DTYPE=DTYPES[state.t.dtype],
        HAS_BIAS=m.bias is not None,
        DEPTHWISE=s.depthwise > 0,
        FIRST=k == 0,
        LAST=last,
        PRECISION=product_precision(s),
    )
    state.iteration += 1
    state.damping = damping


def adjoint(state: PrimalState, damping: float | Tensor) -> None:
    """``z += alpha p`` and ``r -= alpha A p``; one launch, two where N is split."""
    s, m = state.samples, state.ms[0]
    k = state.iteration - 1
    p, (r, z) = state.vectors[k % 2], state.vectors[2:]
    chosen = state.adjoint
    blocks_d = state.rho_partial.shape[0]
    blocks = triton.cdiv(s.problem_rows, chosen.BLOCK_R) * blocks_d
    problems = len(state.ms) * s.groups
    splits, length = _adjoint_splits(s, chosen, blocks_d)
    ms = [m.weight for m in state.ms]
    tables = Tables([s.tensors, s.largest, ms, biases(state.ms)], [0.0, damping])
    partial = z if state.ap is None else state.ap

    def run(multiply: bool, advance: bool, count: int) -> None:
        launch(
            _primal_adjoint_kernel,
            (blocks, problems, count),
            chosen,
            x_table_ptr=tables[0],
            x_largest_table_ptr=tables[1],
            m_table_ptr=tables[2],
            m_bias_table_ptr=tables[3],
            m_scale_ptr=state.scales,
            scalars_ptr=tables.scalars,
            t_ptr=state.t,
            p_ptr=p.weight,
            p_bias_ptr=_bias(p),
            r_ptr=r.weight,
            r_bias_ptr=_bias(r),
            z_ptr=z.weight,
            z_bias_ptr=_bias(z),
            ap_partial_ptr=partial.weight,
            ap_bias_partial_ptr=_bias(partial),
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
            split_length=length,
            SPLITS=splits,
            group_channels=s.group_channels,
            multiplier=max(1, s.depthwise),
            **s.window,
            ALIGN=tables.align,
            M_DTYPE=DTYPES[m.weight.dtype],
            X_DTYPE=DTYPES[s.tensors[0].dtype],
            HAS_BIAS=m.bias is not None,
            DEPTHWISE=s.depthwise > 0,
            FIRST=k == 0,
            MULTIPLY=multiply,
            ADVANCE=advance,
            PRECISION=product_precision(s),
        )

    if state.ap is None:
        run(True, True, 1)
    else:
        run(True, False, splits)
        run(False, True, 1)


def finish(
    thetas: Sequence[Rows],
    state: PrimalState,
    finite: Tensor,
    counts: Sequence[Tensor],
    lr: float | Tensor,
    weight_decay: float | Tensor,
    step: bool,
) -> None:
    """The last ``z += alpha p`` and equation (5), or z written out; one launch."""
    s, m = state.samples, state.ms[0]
    dim = m.weight.shape[1]
    k = state.iteration - 1
    p, z = state.vectors[k % 2], state.vectors[3]
    chosen = tuned(
        "_primal_update_kernel",
        config.FinishConfig(),
        {"r": s.problem_rows, "d": dim, "p": len(thetas) * s.groups},
        (thetas[0].weight.dtype, m.weight.dtype),
    )
    blocks_r = triton.cdiv(s.problem_rows, chosen.BLOCK_R)
    blocks_d = max(1, triton.cdiv(dim, chosen.BLOCK_D))
    tables = Tables(
        [
            [theta.weight for theta in thetas],
            biases(thetas),
            [m.weight for m in state.ms],
            biases(state.ms),
            counts or [m.weight for m in state.ms],
        ],
        [0.0, state.damping, lr, weight_decay],
    )
    launch(
        _primal_update_kernel,
        (blocks_r * blocks_d, len(thetas) * s.groups),
        chosen,
        theta_table_ptr=tables[0],
        theta_bias_table_ptr=tables[1],
        m_table_ptr=tables[2],
        m_bias_table_ptr=tables[3],
        m_scale_ptr=state.scales,
        counts_table_ptr=tables[4],
        scalars_ptr=tables.scalars,
        p_ptr=p.weight,
        p_bias_ptr=_bias(p),
        z_ptr=z.weight,
        z_bias_ptr=_bias(z),
        pap_partial_ptr=state.pap,
        pp_ptr=state.pp,
        first_rho_ptr=state.rho[0],
        rho_ptr=state.rho[k],
        active_ptr=state.active[2 * k],
        zm_ptr=state.zm,
        status_ptr=state.status,
        finite_ptr=finite.view(torch.int8) if step else finite,
        R=s.problem_rows,
        D=dim,
        GROUPS=s.groups,
        total=state.pp.numel(),
        pap_blocks=state.pap.shape[0],
        **row_strides(thetas[0].weight),
        ALIGN=tables.align,
        THETA_DTYPE=DTYPES[thetas[0].weight.dtype],
        M_DTYPE=DTYPES[m.weight.dtype],
        **s.taps,
        HAS_BIAS=m.bias is not None,
        FIRST=k == 0,
        STEP=step,
    )


def _adjoint_splits(
    s: Samples, chosen: config.AdjointConfig, blocks_d: int
) -> tuple[int, int]:
    """Pieces of the positions in an adjoint product, and their length."""
    programs = triton.cdiv(s.problem_rows, chosen.BLOCK_R) * blocks_d
    programs *= len(s.tensors) * s.groups
    return _splits(s.n, programs, 8 * chosen.BLOCK_N, chosen.programs)


def _splits(n: int, programs: int, least: int, fill: int) -> tuple[int, int]:
    """How many pieces of at least `least` positions make `fill` programs."""
    splits = max(1, min(triton.cdiv(fill, programs), n // least))
    length = triton.cdiv(triton.cdiv(n, splits), 16) * 16
    return triton.cdiv(n, length), length


def _bias(rows: Rows) -> Any:
    return rows.weight if rows.bias is None else rows.bias
