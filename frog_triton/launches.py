"""The launches of a step for given sizes; their tensors have no memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from .layers import ConvMap, LinearMap, MatrixMap
from .layers.conv import ConvSpec
from .ops.launch import Launch, recording
from .ops.types import Rows
from .solvers import FORMULATIONS, Batch


@dataclass(frozen=True)
class LayerShape:
    """A layer as far as cost goes.

    Attributes:
        name: for the report.
        rows: R.
        dim: D, weights in a row.
        samples: N, all positions counted.
        groups: groups.
        bias: whether rows have a bias.
        image: shape of an example, ``(channels, *spatial)``, where the samples are
            whole images of a convolution; else None.
        conv: the convolution then.
    """

    name: str
    rows: int
    dim: int
    samples: int
    groups: int = 1
    bias: bool = True
    image: tuple[int, ...] | None = None
    conv: ConvSpec | None = None

    @property
    def row_length(self) -> int:
        """D of the paper, the bias included."""
        return self.dim + self.bias

    @property
    def volume(self) -> bool:
        """Whether the samples are whole images of three dimensions."""
        return self.conv is not None and len(self.conv.kernel) > 2


def shape_of(batch: Batch) -> LayerShape:
    """Sizes of the systems of a batch."""
    x, rows = batch.xs[0], batch.ms[0].weight.shape[0]
    n = x.samples * x.positions
    shape = LayerShape("", rows, x.dim, n, x.groups, x.bias)
    if isinstance(x, ConvMap):
        shape = replace(shape, image=tuple(x.x.shape[1:]), conv=x.spec)
    return shape


Make = Callable[[tuple[int, ...], torch.dtype], Tensor]


@dataclass(frozen=True)
class Problem:
    """All that a step for layers of one geometry takes.

    Attributes:
        batch: samples, momentum and gradients.
        params: theta of each layer.
        counts: anomaly counters of each layer.
        formulation: ``"primal"`` or ``"gram"``.
        iters: k.
    """

    batch: Batch
    params: list[Rows]
    counts: list[Tensor]
    formulation: str
    iters: int

    def step(self, backend: ModuleType) -> None:
        """Momentum, solve and update, as `FROG.step` makes them."""
        rows = self.batch.ms[0].weight
        dtype = torch.promote_types(rows.dtype, torch.float32)
        pairs = zip(self.batch.xs, self.batch.ys, strict=True)
        prepared = [backend.prepare(x, y, dtype) for x, y in pairs]
        xs, ys = [x for x, _ in prepared], [y for _, y in prepared]
        batch = replace(self.batch, xs=xs, ys=ys)
        solution = FORMULATIONS[self.formulation](backend, batch, 1e-4, self.iters)
        solution.update_(self.params, self.counts, 2e-2, 1e-5)


def step_problem(
    shape: LayerShape,
    count: int,
    formulation: str,
    iters: int,
    nesterov: bool,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    make: Make,
) -> Problem:
    """A step for layers of one geometry.

    Args:
        shape: of each layer.
        count: how many layers.
        formulation: ``"primal"`` or ``"gram"``.
        iters: k.
        nesterov: whether the momentum is Nesterov's.
        dtypes: of samples, parameters and momentum.
        make: gives a tensor of a shape and dtype. Where values matter, they should be
            normally distributed, integers zero.
    """
    sample_dtype, param_dtype, momentum_dtype = dtypes
    n, r, d, groups = shape.samples, shape.rows, shape.dim, shape.groups

    def rows(dtype: torch.dtype) -> list[Rows]:
        bias = [make((r,), dtype) if shape.bias else None for _ in range(count)]
        return [Rows(make((r, d), dtype), b) for b in bias]

    def samples(*size: int) -> list[Tensor]:
        return [make(size, sample_dtype) for _ in range(count)]

    xs: list[LinearMap]
    if shape.conv is None or shape.image is None:
        ys = samples(n, r, 1)
        xs = [MatrixMap(x, groups, shape.bias) for x in samples(n, groups * d)]
    else:
        meta = torch.empty(1, *shape.image, device="meta")
        one = ConvMap(meta, shape.conv, False)
        examples = n // one.positions
        ys = samples(examples, r, one.positions)
        images = samples(examples, *shape.image)
        if len(shape.image) == 3:  # as fast training has them
            images = [x.to(memory_format=torch.channels_last) for x in images]
        xs = [ConvMap(x, shape.conv, shape.bias) for x in images]
    batch = Batch(xs, ys, rows(momentum_dtype), rows(param_dtype), 0.9, nesterov)
    params = rows(param_dtype)
    counts = [make((2, r), torch.int32) for _ in range(count)]
    return Problem(batch, params, counts, formulation, iters)


def step_launches(
    shape: LayerShape,
    count: int,
    formulation: str,
    cg_iters: int = 4,
    nesterov: bool = False,
    sample_dtype: torch.dtype = torch.float32,
    param_dtype: torch.dtype = torch.float32,
    momentum_dtype: torch.dtype = torch.float32,
) -> list[Launch]:
    """The launches of a step for layers of one geometry; their tensors have no memory.

    Args:
        shape: of each layer.
        count: how many layers.
        formulation: ``"primal"`` or ``"gram"``.
        cg_iters: k.
        nesterov: whether the momentum is Nesterov's.
        sample_dtype: of activations and output gradients.
        param_dtype: of parameters and gradients.
        momentum_dtype: of the momentum.
    """
    from .ops import triton_ops  # Triton need not be installed for torch's backend

    dtypes = (sample_dtype, param_dtype, momentum_dtype)
    problem = step_problem(
        shape,
        count,
        formulation,
        cg_iters,
        nesterov,
        dtypes,
        lambda size, dtype: torch.empty(size, dtype=dtype, device="meta"),
    )
    with recording(run=False) as launches:
        problem.step(triton_ops)
    return launches
