"""The backend in Triton: the functions of `torch_ops` as launches of `kernels`.

Layers of one geometry share every launch. Samples may be float32, bfloat16 or float16,
parameters and gradients float32 or 16-bit, the momentum float32 or bfloat16; sums,
weights and the vectors of CG are float32. Arrays over samples and rows are stored as
``(L, N, R)``, whatever view of them a function returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import primal_adjoint, primal_forward, primal_update, weights
from ..kernels import row_weights as row_weights_
from ..kernels.gather import gather
from ..kernels.gram import gram
from ..kernels.gram_cg import gram_cg
from ..kernels.largest import with_largest
from ..kernels.launchers import DTYPES, empty_rows, flat, write_back
from ..kernels.momentum import momentum_project_
from ..kernels.primal import PrimalState
from ..kernels.primal_start import start
from ..kernels.samples import matrix_view, serves
from ..kernels.update import direction_update_, gram_rows, gram_update_
from . import torch_ops
from .scales import scaled
from .torch_ops import (  # the last two serve pieces of layers
    FISHER,
    NO_GRADIENT,
    NON_FINITE,
    CGState,
    count_,
    step_along_,
)
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
    ms, scales, finite, _, _ = momentum_project_(
        None, momenta, grads, momentum, nesterov
    )
    return ms, scales, finite


def write_out(
    xs: Sequence[SampleMap], ys: Sequence[Tensor]
) -> tuple[list[SampleMap], list[Tensor]]:
    """See `torch_ops.write_out`; a launch for each layer that is not a matrix yet."""
    maps: list[SampleMap] = []
    for x in xs:
        rows = matrix_view(x)
        if rows is None and x.window is not None:
            rows = gather(x.x, None, x.output_shape, x.window)
        maps.append(x.matrix() if rows is None else x.explicit(rows))
    return maps, list(ys)


def row_weights(
    xs: Sequence[SampleMap], ys: Sequence[Tensor], row_length: int
) -> tuple[Any, Tensor]:
    """See `torch_ops.row_weights`; three launches, two for depthwise layers."""
    if all(map(serves, xs)):
        return row_weights_.row_weights(xs, ys, row_length)
    return torch_ops.row_weights(xs, ys, row_length)


def fisher_weights(
    ys: Sequence[Tensor], norms: Sequence[Tensor], row_length: int
) -> tuple[Tensor, Tensor]:
    """See `torch_ops.fisher_weights`; one launch. Weights are ``(L, n * P, R, 1)``."""
    if ys[0].dtype not in DTYPES:
        ys = [written_out(y) for y in ys]
        return torch_ops.fisher_weights(ys, norms, row_length)
    return weights.fisher_weights(ys, norms, row_length)


def cg_start(
    xs: Sequence[SampleMap],
    ms: Sequence[Rows],
    scales: Tensor,
    status: Tensor,
    iters: int,
) -> CGState | PrimalState:
    """See `torch_ops.cg_start`."""
    if all(map(serves, xs)):
        return start(xs, ms, scales, status, iters)
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
        primal_forward.forward(weights, state, damping, last)


def cg_adjoint_(
    xs: Sequence[SampleMap], state: CGState | PrimalState, damping: float | Tensor
) -> None:
    """See `torch_ops.cg_adjoint_`; one launch."""
    if isinstance(state, CGState):
        torch_ops.cg_adjoint_(xs, state, damping)
    else:
        primal_adjoint.adjoint(state, damping)


def cg_rows(state: CGState | PrimalState) -> Rows:
    """See `torch_ops.cg_rows`; one launch."""
    if isinstance(state, CGState):
        return torch_ops.cg_rows(state)
    z, layers = empty_rows(state.ms)
    primal_update.finish(layers, state, state.status, [], 0.0, 0.0, step=False)
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
    primal_update.finish(rows, state, finite, counts, lr, weight_decay, step=True)
    write_back(params, rows)


def gather_patches(
    x: Tensor, index: Tensor, output_shape: Sequence[int], window: Window
) -> Tensor:
    """See `torch_ops.gather_patches`; one launch for zero padding in 1 or 2 axes."""
    if x.ndim > 4 or window.padding_mode != "zeros":
        return torch_ops.gather_patches(x, index, output_shape, window)
    return gather(x, index, output_shape, window)
