"""The backend in Triton: the functions of `torch_ops` as launches of `kernels`.

Layers of one geometry share every launch, and `side_by_side` those of several do.
Samples may be float32, bfloat16 or float16, parameters and gradients float32 or 16-bit,
the momentum float32 or bfloat16; sums, weights and the vectors of CG are float32.
Arrays over samples and rows are stored as ``(L, N, R)``, whatever view of them a
function returns.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..kernels import magnitudes as measured
from ..kernels.draws import drawing
from ..kernels.gather import gather
from ..kernels.gram import gram
from ..kernels.gram_cg import gram_cg
from ..kernels.largest import with_largest
from ..kernels.launch import settle
from ..kernels.launchers import DTYPES
from ..kernels.momentum import momentum_, momentum_project_
from ..kernels.orthogonalize import orthogonalize as orthogonalize_narrow
from ..kernels.primal_adjoint import cg_adjoint_
from ..kernels.primal_forward import cg_forward_
from ..kernels.primal_start import cg_start
from ..kernels.primal_update import cg_rows as rows_of_cg
from ..kernels.primal_update import cg_update_
from ..kernels.queue import side_by_side
from ..kernels.row_weights import row_weights
from ..kernels.samples import matrix_view, serves
from ..kernels.update import direction_update_, gram_update_
from ..kernels.update import gram_rows as rows_of_gram
from ..linalg.numbers import Numbers
from ..linalg.products import on_host
from ..linalg.rows import Rows, SampleMap, Window, written_out
from ..linalg.scales import scaled
from . import torch_ops
from .backend import Backend
from .torch_ops import count_, step_along_  # they serve pieces of layers

__all__ = [
    "GROUPS_LAYERS",
    "NAME",
    "cg_adjoint_",
    "cg_forward_",
    "cg_rows",
    "cg_start",
    "cg_update_",
    "count_",
    "direction_update_",
    "drawing",
    "gather_patches",
    "gram",
    "gram_cg",
    "gram_rows",
    "gram_update_",
    "magnitudes",
    "momentum_",
    "momentum_project_",
    "on_rows",
    "orthogonalize",
    "prepare",
    "row_weights",
    "side_by_side",
    "step_along_",
    "write_out",
]

NAME = "triton_ops"
GROUPS_LAYERS = True


def magnitudes(tensors: Sequence[Tensor], kept: dict[Hashable, Any]) -> Tensor:
    """See `torch_ops.magnitudes`; two launches, one more for each further dtype."""
    if not measured.serves(tensors):
        return torch_ops.magnitudes(tensors, kept)
    key = tensors[0].device, *((t.numel(), t.dtype) for t in tensors)
    if key not in kept:
        kept[key] = measured.Magnitudes(tensors)
    found: Tensor = kept[key].of(tensors)
    return found


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


def on_rows(xs: Sequence[SampleMap]) -> Backend:
    """This backend where its kernels read the samples in place, else torch's.

    Windows in three dimensions have no kernel: torch's convolutions serve them.
    """
    if all(map(serves, xs)):
        return cast(Backend, sys.modules[__name__])
    settle()
    return torch_ops


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


def gather_patches(
    x: Tensor, index: Tensor, output_shape: Sequence[int], window: Window
) -> Tensor:
    """See `torch_ops.gather_patches`; one launch for zero padding in 1 or 2 axes."""
    if x.ndim > 4 or window.padding_mode != "zeros":
        return torch_ops.gather_patches(x, index, output_shape, window)
    return gather(x, index, output_shape, window)


def cg_rows(state: Any, numbers: Numbers, moving: Tensor | None = None) -> Rows:
    """See `torch_ops.cg_rows`; on a GPU bfloat16 if they are to be orthogonalized."""
    return rows_of_cg(state, numbers, None if on_host(state.status) else moving)


def gram_rows(
    xs: Sequence[SampleMap],
    ms: Sequence[Rows],
    scales: Tensor,
    s: Tensor,
    u: Tensor,
    moving: Tensor | None = None,
) -> Rows:
    """See `torch_ops.gram_rows`; likewise."""
    return rows_of_gram(xs, ms, scales, s, u, None if on_host(s) else moving)


def orthogonalize(rows: Rows, finite: Tensor, groups: int) -> Rows:
    """See `torch_ops.orthogonalize`; on a GPU by kernels, in bfloat16 throughout."""
    if on_host(rows.weight):
        settle()
        return torch_ops.orthogonalize(rows, finite, groups)
    return orthogonalize_narrow(rows, finite, groups)
