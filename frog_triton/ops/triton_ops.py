"""The backend in Triton: the functions of `torch_ops` as launches of `kernels`.

Layers of one geometry share every launch. Samples may be float32, bfloat16 or float16,
parameters and gradients float32 or 16-bit, the momentum float32 or bfloat16; sums,
weights and the vectors of CG are float32. Arrays over samples and rows are stored as
``(L, N, R)``, whatever view of them a function returns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..autotune import config
from ..autotune.table import tuned
from ..kernels.common import _sum_splits_kernel
from ..kernels.gather import _gather_kernel
from ..kernels.gram import _gram_kernel
from ..kernels.gram_cg import _gram_cg_kernel, _gram_cg_tiled_kernel
from ..kernels.momentum import _momentum_project_kernel
from ..kernels.update import _update_kernel
from ..kernels.weights import _fisher_weights_kernel
from . import torch_ops, triton_primal
from .launch import launch
from .scales import scaled
from .tables import Tables
from .torch_ops import (  # the last two serve pieces of layers
    FISHER,
    NO_GRADIENT,
    NON_FINITE,
    CGState,
    count_,
    step_along_,
)
from .triton_common import (
    DTYPES,
    PRECISION,
    biases,
    empty_rows,
    flat,
    flat_samples,
    row_strides,
    write_back,
)
from .triton_primal import PrimalState
from .triton_samples import largest_of, matrix_view, near_one, serves, with_largest
from .types import Rows, SampleMap, Window, written_out

__all__ = [
    "FISHER",
    "GROUPS_LAYERS",
    "NON_FINITE",
    "NO_GRADIENT",
    "CGState",
    "cg_adjoint_",
    "cg_forward_",
    "cg_rows",
    "cg_start",
    "cg_update_",
    "count_",
    "direction_update_",
    "fisher_weights",
    "gather_patches",
    "gram",
    "gram_cg",
    "gram_rows",
    "gram_update_",
    "momentum_",
    "momentum_project_",
    "prepare",
    "row_weights",
    "step_along_",
    "write_out",
]

GROUPS_LAYERS = True


def prepare(
    xs: Sequence[SampleMap], ys: Sequence[Tensor], dtype: torch.dtype
) -> tuple[list[SampleMap], list[Tensor]]:
    """See `torch_ops.prepare`: 16-bit samples stay so, images where they lie.

    Samples are not multiplied by their scales: the kernels do that as they read, from
    what one launch finds. Windows in three dimensions go through torch's convolutions,
    unless they have one tap.
    """
    xs, ys = list(xs), list(ys)
    for i, x in enumerate(xs):
        if x.pointwise and x.window is None:
            x, ys[i] = x.matrix(), written_out(ys[i])
        if not serves(x) or x.dtype not in DTYPES:
            x = x.to(dtype)
        xs[i] = x
    if not all(map(serves, xs)):
        return scaled(xs, torch.float32), ys
    return with_largest(xs), ys


def momentum_(
    momenta: Sequence[Rows],
    grads: Sequence[Rows] | None,
    momentum: float | Tensor,
    nesterov: bool,
) -> tuple[Sequence[Rows], Tensor, Tensor]:
    """See `torch_ops.momentum_`; one launch."""
    ms, scales, finite, _, _ = _momentum(None, momenta, grads, momentum, nesterov)
    return ms, scales, finite


def momentum_project_(
    xs: Sequence[SampleMap],
    momenta: Sequence[Rows],
    grads: Sequence[Rows] | None,
    momentum: float | Tensor,
    nesterov: bool,
) -> tuple[Sequence[Rows], Tensor, Tensor, Tensor, Tensor]:
    """See `torch_ops.momentum_project_`; one launch, two beyond 128 samples."""
    return _momentum(xs, momenta, grads, momentum, nesterov)


def _momentum(
    xs: Sequence[SampleMap] | None,
    momenta: Sequence[Rows],
    grads: Sequence[Rows] | None,
    momentum: float | Tensor,
    nesterov: bool,
) -> tuple[list[Rows], Tensor, Tensor, Tensor, Tensor]:
    layers, m = len(momenta), momenta[0].weight
    rows, dim = m.shape
    n = 1 if xs is None else xs[0].samples
    groups = 1 if xs is None else xs[0].groups
    gs = [_dense_bias(_same_strides(g, grads)) for g in grads] if grads else momenta
    vs: Sequence[Rows] = momenta
    if grads and nesterov:
        vs = empty_rows(momenta)[1]
    samples = largest = [m.weight for m in momenta]  # not read without samples
    if xs is not None:
        samples, largest = flat_samples(xs)[1], largest_of(xs)
    tables = Tables(
        [
            [g.weight for g in gs],
            [m.weight for m in momenta],
            [v.weight for v in vs],
            samples,
            largest,
            biases(gs),
            biases(momenta),
            biases(vs),
        ],
        [momentum],
    )
    c = m.new_empty(layers, n, rows if xs is not None else 0, dtype=torch.float32)
    m_squared = m.new_empty(layers, rows, dtype=torch.float32)
    scales = torch.empty_like(m_squared)
    make = m.new_ones if grads is None else m.new_empty
    finite = make(layers, rows, dtype=torch.bool)
    chosen = tuned(
        "_momentum_project_kernel",
        config.project_config(0 if xs is None else n),
        {"n": n, "r": rows // groups, "d": dim, "p": layers * groups},
        (gs[0].weight.dtype, m.dtype, samples[0].dtype),
        "alone" if xs is None else "",
    )
    blocks_n = triton.cdiv(n, chosen.BLOCK_N)

    def run(row: int, update: bool, measure: bool, first: int, count: int) -> None:
        source = vs if row == 2 else momenta
        launch(
            _momentum_project_kernel,
            (triton.cdiv(rows // groups, chosen.BLOCK_R), layers * groups, count),
            chosen,
            g_table_ptr=tables[0],
            m_table_ptr=tables[row],
            v_table_ptr=tables[2],
            x_table_ptr=tables[3],
            x_largest_table_ptr=tables[4],
            g_bias_table_ptr=tables[5],
            m_bias_table_ptr=tables[row + 5],
            v_bias_table_ptr=tables[7],
            scalars_ptr=tables.scalars,
            c_ptr=c,
            m_squared_ptr=m_squared,
            m_scale_ptr=scales,
            finite_ptr=finite.view(torch.int8),
            N=n,
            R=rows // groups,
            D=dim,
            GROUPS=groups,
            first_block_n=first,
            stride_gr=gs[0].weight.stride(0),
            stride_gd=gs[0].weight.stride(1),
            stride_xn=samples[0].stride(0),
            ALIGN=tables.align,
            G_DTYPE=DTYPES[gs[0].weight.dtype],
            M_DTYPE=DTYPES[source[0].weight.dtype],
            X_DTYPE=DTYPES[samples[0].dtype],
            HAS_BIAS=m_bias,
            UPDATE=update,
            MEASURE=measure,
            NESTEROV=nesterov,
            PROJECT=xs is not None,
            PRECISION=PRECISION,
        )

    m_bias = momenta[0].bias is not None
    if grads:
        run(1, True, True, 0, 1)
        if blocks_n > 1:
            run(2, False, False, 1, blocks_n - 1)
    else:
        run(1, False, True, 0, blocks_n)
    return list(vs), scales, finite, _by_group(c, groups), m_squared


def write_out(
    xs: Sequence[SampleMap], ys: Sequence[Tensor]
) -> tuple[list[SampleMap], list[Tensor]]:
    """See `torch_ops.write_out`; a launch for each layer that is not a matrix yet."""
    maps: list[SampleMap] = []
    for x in xs:
        rows = matrix_view(x)
        if rows is None and x.window is not None:
            rows = _gather(x.x, None, x.output_shape, x.window)
        maps.append(x.matrix() if rows is None else x.explicit(rows))
    return maps, list(ys)


def row_weights(
    xs: Sequence[SampleMap], ys: Sequence[Tensor], row_length: int
) -> tuple[Any, Tensor]:
    """See `torch_ops.row_weights`; three launches, two for depthwise layers."""
    if all(map(serves, xs)):
        return triton_primal.row_weights(xs, ys, row_length)
    return torch_ops.row_weights(xs, ys, row_length)


def fisher_weights(
    ys: Sequence[Tensor], norms: Sequence[Tensor], row_length: int
) -> tuple[Tensor, Tensor]:
    """See `torch_ops.fisher_weights`; one launch. Weights are ``(L, n * P, R, 1)``."""
    y = ys[0]
    if y.dtype not in DTYPES:
        ys = [written_out(y) for y in ys]
        return torch_ops.fisher_weights(ys, norms, row_length)
    n, layers, groups = y.shape[0] * y.shape[2], len(ys), norms[0].shape[1]
    rows = y.shape[1]
    if len({y.stride() for y in ys}) > 1:
        ys = [y.contiguous() for y in ys]
    tables = Tables([ys, norms])
    weights = y.new_empty(layers, n, rows, 1, dtype=torch.float32)
    status = y.new_empty(layers, rows, dtype=torch.int32)
    chosen = tuned(
        "_fisher_weights_kernel",
        config.weights_config(n),
        {"n": n, "r": rows // groups, "p": layers * groups},
        (y.dtype,),
    )
    launch(
        _fisher_weights_kernel,
        (triton.cdiv(rows // groups, chosen.BLOCK_R), layers * groups),
        chosen,
        y_table_ptr=tables[0],
        norms_table_ptr=tables[1],
        weights_ptr=weights,
        status_ptr=status,
        N=n,
        R=rows // groups,
        GROUPS=groups,
        row_length=row_length,
        P=y.shape[2],
        stride_yn=ys[0].stride(0),
        stride_yr=ys[0].stride(1),
        stride_yp=ys[0].stride(2),
        stride_norms_n=norms[0].stride(0),
        stride_norms_group=norms[0].stride(1),
        ALIGN=tables.align,
        Y_DTYPE=DTYPES[y.dtype],
    )
    return weights, status


def gram(xs: Sequence[SampleMap]) -> Tensor:
    """See `torch_ops.gram`; one launch, two where D is split."""
    x, samples = flat_samples(xs)
    layers, n, problems = len(xs), x.samples, len(xs) * x.groups
    chosen = tuned(
        "_gram_kernel",
        config.gram_config(n),
        {"n": n, "d": x.dim, "p": problems},
        (samples[0].dtype,),
    )
    tiles = triton.cdiv(n, chosen.BLOCK_N) ** 2
    splits = max(1, min(chosen.programs // (tiles * problems), x.dim // 256))
    length = triton.cdiv(triton.cdiv(x.dim, splits), chosen.BLOCK_D) * chosen.BLOCK_D
    splits = triton.cdiv(x.dim, max(length, 1)) or 1
    tables = Tables([samples, largest_of(xs)])
    partial = samples[0].new_empty(splits, layers, x.groups, n, n, dtype=torch.float32)
    launch(
        _gram_kernel,
        (tiles, problems, splits),
        chosen,
        x_table_ptr=tables[0],
        x_largest_table_ptr=tables[1],
        k_ptr=partial,
        N=n,
        D=x.dim,
        GROUPS=x.groups,
        PROBLEMS=problems,
        split_length=length,
        stride_xn=samples[0].stride(0),
        ALIGN=tables.align,
        X_DTYPE=DTYPES[samples[0].dtype],
        HAS_BIAS=x.bias,
        PRECISION=PRECISION if samples[0].dtype == torch.float32 else "tf32",
    )
    if splits == 1:
        return partial[0]
    k = torch.empty_like(partial[0])
    summing = config.SumConfig()
    launch(
        _sum_splits_kernel,
        (triton.cdiv(k.numel(), summing.BLOCK),),
        summing,
        partial_ptr=partial,
        out_ptr=k,
        numel=k.numel(),
        split_stride=k.numel(),
        SPLITS=splits,
    )
    return k


def gram_cg(
    k: Tensor,
    c: Tensor,
    weights: Tensor,
    m_squared: Tensor,
    status: Tensor,
    damping: float | Tensor,
    iters: int,
) -> tuple[Tensor, Tensor]:
    """See `torch_ops.gram_cg`; all iterations in one launch."""
    layers, groups, n, rows = c.shape
    c, weights = _stored(c), _stored(weights)
    s = torch.empty_like(m_squared)
    u = torch.empty_like(c)
    tables = Tables([[c]], [0.0, damping])
    chosen = tuned(
        "_gram_cg_kernel",
        config.gram_cg_config(n),
        {"n": n, "r": rows, "p": layers * groups, "k": iters},
    )
    kernel: Any = _gram_cg_kernel
    scratch = {}
    if n > chosen.BLOCK_N:
        kernel = _gram_cg_tiled_kernel
        names = ("u_r_ptr", "u_p_ptr", "x_r_ptr", "x_p_ptr")
        scratch = {name: torch.empty_like(c) for name in names}
    launch(
        kernel,
        (triton.cdiv(rows, chosen.BLOCK_R), layers * groups),
        chosen,
        k_ptr=k,
        c_ptr=c,
        weights_ptr=weights,
        m_squared_ptr=m_squared,
        status_ptr=status,
        scalars_ptr=tables.scalars,
        s_ptr=s,
        u_ptr=u,
        **scratch,
        N=n,
        R=rows,
        GROUPS=groups,
        ITERS=iters,
        PRECISION=PRECISION,
    )
    return s, _by_group(u, groups)


def gram_rows(
    xs: Sequence[SampleMap], ms: Sequence[Rows], scales: Tensor, s: Tensor, u: Tensor
) -> Rows:
    """See `torch_ops.gram_rows`; one launch."""
    z, layers = empty_rows(ms)
    x = _Explicit.of(xs)
    _gram_step(layers, x, ms, scales, s, u, s, s, [], 0.0, 0.0, step=False)
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
    lr: float | Tensor,
    weight_decay: float | Tensor,
) -> None:
    """See `torch_ops.gram_update_`; one launch."""
    rows = [flat(p) for p in params]
    rest = (status, finite, counts, lr, weight_decay)
    _gram_step(rows, _Explicit.of(xs), ms, scales, s, u, *rest, step=True)
    write_back(params, rows)


def direction_update_(
    params: Sequence[Rows],
    direction: Rows,
    status: Tensor,
    finite: Tensor,
    counts: Sequence[Tensor],
    lr: float | Tensor,
    weight_decay: float | Tensor,
) -> None:
    """See `torch_ops.direction_update_`; one launch: the update ``s z``, no samples."""
    z = direction.weight.contiguous()
    bias = None if direction.bias is None else direction.bias.contiguous()
    layers, rows, dim = z.shape
    zs = [Rows(z[i], None if bias is None else bias[i]) for i in range(layers)]
    one = z.new_ones(layers, rows)
    none = _Explicit([z.new_empty(0, dim)] * layers, near_one(z, layers, 1), 1)
    thetas = [flat(p) for p in params]
    rest = (status, finite, counts, lr, weight_decay)
    u = z.new_empty(layers, 1, 0, rows)
    _gram_step(thetas, none, zs, one, one, u, *rest, step=True)
    write_back(params, thetas)


class _Explicit(NamedTuple):
    """Samples of each layer as matrices, and what their scales are found from."""

    samples: list[Tensor]
    largest: list[Tensor]
    groups: int

    @classmethod
    def of(cls, xs: Sequence[SampleMap]) -> _Explicit:
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
    lr: float | Tensor,
    weight_decay: float | Tensor,
    step: bool,
) -> None:
    (samples, largest, groups), m = xs, ms[0].weight
    (rows, dim), n = m.shape, samples[0].shape[0]
    tables = Tables(
        [
            [theta.weight for theta in thetas],
            [m.weight for m in ms],
            samples,
            largest,
            biases(thetas),
            biases(ms),
            counts or samples,
        ],
        [0.0, 0.0, lr, weight_decay],
    )
    chosen = config.update_config(n)
    if n:  # without samples there is nothing to tune
        chosen = tuned(
            "_update_kernel",
            chosen,
            {"n": n, "r": rows // groups, "d": dim, "p": len(ms) * groups},
            (thetas[0].weight.dtype, m.dtype, samples[0].dtype),
        )
    blocks = triton.cdiv(rows // groups, chosen.BLOCK_R)
    launch(
        _update_kernel,
        (blocks * max(1, triton.cdiv(dim, chosen.BLOCK_D)), len(ms) * groups),
        chosen,
        theta_table_ptr=tables[0],
        m_table_ptr=tables[1],
        x_table_ptr=tables[2],
        x_largest_table_ptr=tables[3],
        theta_bias_table_ptr=tables[4],
        m_bias_table_ptr=tables[5],
        counts_table_ptr=tables[6],
        scalars_ptr=tables.scalars,
        m_scale_ptr=scales,
        s_ptr=s,
        u_ptr=_stored(u),
        status_ptr=status,
        finite_ptr=finite.view(torch.int8) if step else finite,
        N=n,
        R=rows // groups,
        D=dim,
        GROUPS=groups,
        stride_xn=samples[0].stride(0),
        **row_strides(thetas[0].weight),
        ALIGN=tables.align,
        THETA_DTYPE=DTYPES[thetas[0].weight.dtype],
        M_DTYPE=DTYPES[m.dtype],
        X_DTYPE=DTYPES[samples[0].dtype],
        HAS_BIAS=ms[0].bias is not None,
        STEP=step,
        PRECISION=PRECISION,
    )


def cg_start(
    xs: Sequence[SampleMap],
    ms: Sequence[Rows],
    scales: Tensor,
    status: Tensor,
    iters: int,
) -> CGState | PrimalState:
    """See `torch_ops.cg_start`."""
    if all(map(serves, xs)):
        return triton_primal.start(xs, ms, scales, status, iters)
    # Three dimensions: torch's convolutions.
    ms = [m.to(torch.float32) for m in ms]
    return torch_ops.cg_start(xs, ms, scales, status, iters)


def cg_forward_(
    xs: Sequence[SampleMap],
    weights: Any,
    state: CGState | PrimalState,
    damping: float | Tensor,
    last: bool,
) -> None:
    """See `torch_ops.cg_forward_`; one launch."""
    if isinstance(state, CGState):
        torch_ops.cg_forward_(xs, weights, state, damping, last)
    else:
        triton_primal.forward(weights, state, damping, last)


def cg_adjoint_(
    xs: Sequence[SampleMap], state: CGState | PrimalState, damping: float | Tensor
) -> None:
    """See `torch_ops.cg_adjoint_`; one launch."""
    if isinstance(state, CGState):
        torch_ops.cg_adjoint_(xs, state, damping)
    else:
        triton_primal.adjoint(state, damping)


def cg_rows(state: CGState | PrimalState) -> Rows:
    """See `torch_ops.cg_rows`; one launch."""
    if isinstance(state, CGState):
        return torch_ops.cg_rows(state)
    z, layers = empty_rows(state.ms)
    triton_primal.finish(layers, state, state.status, [], 0.0, 0.0, step=False)
    return z


def cg_update_(
    params: Sequence[Rows],
    state: CGState | PrimalState,
    finite: Tensor,
    counts: Sequence[Tensor],
    lr: float | Tensor,
    weight_decay: float | Tensor,
) -> None:
    """See `torch_ops.cg_update_`; one launch."""
    if isinstance(state, CGState):
        torch_ops.cg_update_(params, state, finite, counts, lr, weight_decay)
        return
    rows = [flat(p) for p in params]
    triton_primal.finish(rows, state, finite, counts, lr, weight_decay, step=True)
    write_back(params, rows)


def gather_patches(
    x: Tensor, index: Tensor, output_shape: Sequence[int], window: Window
) -> Tensor:
    """See `torch_ops.gather_patches`; one launch for zero padding in 1 or 2 axes."""
    if x.ndim > 4 or window.padding_mode != "zeros":
        return torch_ops.gather_patches(x, index, output_shape, window)
    return _gather(x, index, output_shape, window)


def _gather(
    x: Tensor, index: Tensor | None, output_shape: Sequence[int], window: Window
) -> Tensor:
    """Patch rows at drawn positions, or at all of them."""
    spatial = x.ndim - 2
    count = x.shape[0] * math.prod(output_shape) if index is None else index.numel()
    ones, zeros = (1,) * (2 - spatial), (0,) * (2 - spatial)
    kernel_h, kernel_w = (*ones, *window.kernel)
    stride_h, stride_w = (*ones, *window.stride)
    dilation_h, dilation_w = (*ones, *window.dilation)
    pad_h, pad_w = (*zeros, *window.pads)
    upsample_h, upsample_w = (*ones, *(window.upsample or (1,) * spatial))
    height, width = (*ones, *x.shape[2:])
    out_height, out_width = (*ones, *output_shape)
    stride_xh, stride_xw = (*zeros, *x.stride()[2:])
    row = x.shape[1] * kernel_h * kernel_w
    out = x.new_empty(count, row)
    chosen = tuned(
        "_gather_kernel", config.gather_config(row), {"n": count, "d": row}, (x.dtype,)
    )
    launch(
        _gather_kernel,
        (count, triton.cdiv(row, chosen.BLOCK_D)),
        chosen,
        x_ptr=x,
        index_ptr=x if index is None else index,
        out_ptr=out,
        N=count,
        ROW=row,
        HEIGHT=height,
        WIDTH=width,
        OUT_HEIGHT=out_height,
        OUT_WIDTH=out_width,
        stride_xn=x.stride(0),
        stride_xc=x.stride(1),
        stride_xh=stride_xh,
        stride_xw=stride_xw,
        KERNEL_H=kernel_h,
        KERNEL_W=kernel_w,
        STRIDE_H=stride_h,
        STRIDE_W=stride_w,
        PAD_H=pad_h,
        PAD_W=pad_w,
        DILATION_H=dilation_h,
        DILATION_W=dilation_w,
        UPSAMPLE_H=upsample_h,
        UPSAMPLE_W=upsample_w,
        INDEXED=index is not None,
    )
    return out


def _dense_bias(rows: Rows) -> Rows:
    if rows.bias is None or rows.bias.is_contiguous():
        return rows
    return Rows(rows.weight, rows.bias.contiguous())


def _same_strides(rows: Rows, all_rows: Sequence[Rows]) -> Rows:
    """The rows as they are if all layers' have the same strides, else dense."""
    if len({r.weight.stride() for r in all_rows}) == 1:
        return rows
    return Rows(rows.weight.contiguous(), rows.bias)


def _by_group(values: Tensor, groups: int) -> Tensor:
    """``(L, N, R)`` as ``(L, groups, N, R / groups)``."""
    return values.unflatten(2, (groups, -1)).transpose(1, 2)


def _stored(values: Tensor) -> Tensor:
    """``(L, groups, N, R / groups)`` as it is stored, ``(L, N, R)``."""
    return values.transpose(1, 2).flatten(2).contiguous()
