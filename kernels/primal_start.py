"""Scratch memory, and configurations, of a solve on the rows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..linalg.rows import Rows, SampleMap
from .kernel import blocks
from .launchers import in_place, padded
from .primal import PrimalState
from .primal_adjoint import PRIMAL_ADJOINT, adjoint_config, adjoint_pieces
from .primal_forward import PRIMAL_FORWARD, forward_config
from .products import product_precision
from .samples import samples


def cg_start(
    xs: Sequence[SampleMap],
    ms: Sequence[Rows],
    scales: Tensor,
    status: Tensor,
    iters: int,
) -> PrimalState:
    """See `torch_ops.cg_start`: scratch for `iters` iterations; nothing is launched."""
    ms = in_place(ms)
    m = ms[0]
    layers, rows, dim = len(ms), m.weight.shape[0], m.dim
    s = samples(xs, rows)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return m.weight.new_empty(shape, dtype=dtype)

    def vector(*leading: int) -> Rows:
        bias = None if m.bias is None else empty(*leading, layers, rows)
        return Rows(empty(*leading, layers, rows, dim), bias)

    precision = product_precision(s.map, s.tensors[0].dtype)
    rounded = precision.startswith("bf16") and not s.depthwise
    dtypes, kind = (s.tensors[0].dtype,), f"{s.kind} {precision}"
    of_forward = PRIMAL_FORWARD.tuned(
        forward_config(s.n, s.map.dim, s.kind, rounded, s.group_channels),
        s.key,
        dtypes,
        kind,
    )
    of_adjoint = PRIMAL_ADJOINT.tuned(
        adjoint_config(s.n, s.depthwise > 0, rounded), s.key, dtypes, kind
    )
    blocks_n = blocks(s.n, of_forward.BLOCK_N)
    blocks_d = blocks(dim, of_adjoint.BLOCK_D)
    problems = layers * s.groups
    splits, _ = adjoint_pieces(s.sizes, problems, of_adjoint.values())
    t_dtype = torch.bfloat16 if rounded else torch.float32
    return PrimalState(
        s,
        of_forward,
        of_adjoint,
        ms,
        scales,
        status,
        0,
        (vector(), vector()),
        empty(layers, rows, padded(dim), dtype=torch.bfloat16) if rounded else None,
        vector(),
        vector(),
        empty(layers, s.n, rows, dtype=t_dtype),
        empty(blocks_n, layers, rows),
        empty(blocks_d, layers, rows),
        empty(iters, layers, rows),
        empty(2 * iters, layers, rows, dtype=torch.int8),
        empty(layers, rows),
        empty(layers, rows),
        vector(splits) if splits > 1 else None,
    )
