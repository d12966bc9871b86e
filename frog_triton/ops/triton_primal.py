"""Launches of `kernels.primal`: conjugate gradients on the rows themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..autotune import config
from ..kernels.primal import (
    _primal_adjoint_kernel,
    _primal_forward_kernel,
    _primal_update_kernel,
    _row_norms_kernel,
)
from .launch import launch
from .tables import Tables
from .triton_common import DTYPES, PRECISION, biases, flat_samples
from .types import Rows, SampleMap


def row_norms(xs: Sequence[SampleMap]) -> list[Tensor]:
    """``|x|^2`` of each layer; one launch."""
    x, samples = flat_samples(xs)
    norms = samples[0].new_empty(len(xs), x.samples, x.groups, 1, dtype=torch.float32)
    chosen = config.NormsConfig()
    tables = Tables([samples])
    launch(
        _row_norms_kernel,
        (triton.cdiv(x.samples, chosen.BLOCK_N), len(xs) * x.groups),
        chosen,
        x_table_ptr=tables[0],
        norms_ptr=norms,
        N=x.samples,
        D=x.dim,
        GROUPS=x.groups,
        stride_xn=samples[0].stride(0),
        ALIGN=tables.align,
        X_DTYPE=DTYPES[samples[0].dtype],
        HAS_BIAS=x.bias,
    )
    return list(norms)


@dataclass
class PrimalState:
    """Scratch memory of a solve.

    Attributes:
        ms: right-hand sides of each layer.
        status: of the rows ``(L, R)``.
        groups: of the layers.
        iteration: how many forward products have been made.
        vectors: p of even and of odd iterations, r and z, each ``(L, R, D)``.
        t: ``Lambda * (X p)`` ``(L, N, R)``.
        pap: partial sums of ``p^T Lambda p`` ``(blocks, L, R)``.
        rho_partial: partial sums of ``|r|^2`` ``(blocks, L, R)``.
        rho: ``|r|^2`` before each iteration ``(iters, L, R)``.
        active: rows that move, before and after each step length ``(2 iters, L, R)``.
        pp: ``|p|^2`` ``(L, R)``.
        zm: ``<z, m>`` so far ``(L, R)``.
        damping: tau of the last iteration, for the last step.
    """

    ms: Sequence[Rows]
    status: Tensor
    groups: int
    iteration: int
    vectors: list[Rows]
    t: Tensor
    pap: Tensor
    rho_partial: Tensor
    rho: Tensor
    active: Tensor
    pp: Tensor
    zm: Tensor
    damping: float | Tensor = 0.0


def start(
    xs: Sequence[SampleMap], ms: Sequence[Rows], status: Tensor, iters: int
) -> PrimalState:
    """Scratch for `iters` iterations; nothing is launched."""
    x, m = xs[0], ms[0]
    layers, (rows, dim) = len(ms), m.weight.shape

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return m.weight.new_empty(shape, dtype=dtype)

    blocks_n = triton.cdiv(x.samples, config.forward_config(x.samples).BLOCK_N)
    blocks_d = max(1, triton.cdiv(dim, config.adjoint_config(x.samples).BLOCK_D))
    vectors = [
        Rows(empty(layers, rows, dim), None if m.bias is None else empty(layers, rows))
        for _ in range(4)
    ]
    return PrimalState(
        ms,
        status,
        x.groups,
        0,
        vectors,
        empty(layers, x.samples, rows),
        empty(blocks_n, layers, rows),
        empty(blocks_d, layers, rows),
        empty(iters, layers, rows),
        empty(2 * iters, layers, rows, dtype=torch.int8),
        empty(layers, rows),
        empty(layers, rows),
    )


def forward(
    xs: Sequence[SampleMap],
    weights: Tensor,
    state: PrimalState,
    damping: float | Tensor,
    last: bool,
) -> None:
    """``p = r + beta p`` and ``T = Lambda * (X p)``; one launch."""
    x, samples = flat_samples(xs)
    m = state.ms[0]
    rows, dim = m.weight.shape
    k = state.iteration
    before = max(k - 1, 0)
    p, old_p, (r, _) = state.vectors[k % 2], state.vectors[1 - k % 2], state.vectors[2:]
    chosen = config.forward_config(x.samples)
    blocks_r = triton.cdiv(rows // x.groups, chosen.BLOCK_R)
    tables = Tables([samples, [m.weight for m in state.ms], biases(state.ms)])
    launch(
        _primal_forward_kernel,
        (blocks_r * state.pap.shape[0], len(xs) * x.groups),
        chosen,
        x_table_ptr=tables[0],
        m_table_ptr=tables[1],
        m_bias_table_ptr=tables[2],
        weights_ptr=weights,
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
        N=x.samples,
        R=rows // x.groups,
        D=dim,
        GROUPS=x.groups,
        total=state.pp.numel(),
        rho_blocks=state.rho_partial.shape[0],
        stride_xn=samples[0].stride(0),
        ALIGN=tables.align,
        M_DTYPE=DTYPES[m.weight.dtype],
        X_DTYPE=DTYPES[samples[0].dtype],
        HAS_BIAS=m.bias is not None,
        FIRST=k == 0,
        LAST=last,
        PRECISION=PRECISION,
    )
    state.iteration += 1
    state.damping = damping


def adjoint(
    xs: Sequence[SampleMap], state: PrimalState, damping: float | Tensor
) -> None:
    """``z += alpha p`` and ``r -= alpha A p``; one launch."""
    x, samples = flat_samples(xs)
    m = state.ms[0]
    rows, dim = m.weight.shape
    k = state.iteration - 1
    p, (r, z) = state.vectors[k % 2], state.vectors[2:]
    chosen = config.adjoint_config(x.samples)
    blocks_r = triton.cdiv(rows // x.groups, chosen.BLOCK_R)
    tables = Tables(
        [samples, [m.weight for m in state.ms], biases(state.ms)], [0.0, damping]
    )
    launch(
        _primal_adjoint_kernel,
        (blocks_r * state.rho_partial.shape[0], len(xs) * x.groups),
        chosen,
        x_table_ptr=tables[0],
        m_table_ptr=tables[1],
        m_bias_table_ptr=tables[2],
        scalars_ptr=tables.scalars,
        t_ptr=state.t,
        p_ptr=p.weight,
        p_bias_ptr=_bias(p),
        r_ptr=r.weight,
        r_bias_ptr=_bias(r),
        z_ptr=z.weight,
        z_bias_ptr=_bias(z),
        rho_partial_ptr=state.rho_partial,
        pap_partial_ptr=state.pap,
        pp_ptr=state.pp,
        rho_ptr=state.rho[k],
        active_ptr=state.active[2 * k],
        next_active_ptr=state.active[2 * k + 1],
        zm_ptr=state.zm,
        N=x.samples,
        R=rows // x.groups,
        D=dim,
        GROUPS=x.groups,
        total=state.pp.numel(),
        pap_blocks=state.pap.shape[0],
        stride_xn=samples[0].stride(0),
        ALIGN=tables.align,
        M_DTYPE=DTYPES[m.weight.dtype],
        X_DTYPE=DTYPES[samples[0].dtype],
        HAS_BIAS=m.bias is not None,
        FIRST=k == 0,
        PRECISION=PRECISION,
    )


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
    m = state.ms[0]
    rows, dim = m.weight.shape
    k = state.iteration - 1
    p, z = state.vectors[k % 2], state.vectors[3]
    chosen = config.FinishConfig()
    blocks_r = triton.cdiv(rows // state.groups, chosen.BLOCK_R)
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
        (blocks_r * blocks_d, len(thetas) * state.groups),
        chosen,
        theta_table_ptr=tables[0],
        theta_bias_table_ptr=tables[1],
        m_table_ptr=tables[2],
        m_bias_table_ptr=tables[3],
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
        R=rows // state.groups,
        D=dim,
        GROUPS=state.groups,
        total=state.pp.numel(),
        pap_blocks=state.pap.shape[0],
        ALIGN=tables.align,
        THETA_DTYPE=DTYPES[thetas[0].weight.dtype],
        M_DTYPE=DTYPES[m.weight.dtype],
        HAS_BIAS=m.bias is not None,
        FIRST=k == 0,
        STEP=step,
    )


def _bias(rows: Rows) -> Any:
    return rows.weight if rows.bias is None else rows.bias
