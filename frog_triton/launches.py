"""The launches of a step for given sizes; their tensors have no memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

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

    n, r, d, groups = shape.samples, shape.rows, shape.dim, shape.groups

    def empty(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    def rows(dtype: torch.dtype) -> list[Rows]:
        bias = [empty(r, dtype=dtype) if shape.bias else None for _ in range(count)]
        return [Rows(empty(r, d, dtype=dtype), b) for b in bias]

    def samples(*size: int) -> list[Tensor]:
        return [empty(*size, dtype=sample_dtype) for _ in range(count)]

    xs: list[LinearMap]
    if shape.conv is None or shape.image is None:
        ys = samples(n, r, 1)
        xs = [MatrixMap(x, groups, shape.bias) for x in samples(n, groups * d)]
    else:
        one = ConvMap(empty(1, *shape.image, dtype=sample_dtype), shape.conv, False)
        examples = n // one.positions
        ys = samples(examples, r, one.positions)
        images = samples(examples, *shape.image)
        if len(shape.image) == 3:  # as fast training has them
            images = [x.to(memory_format=torch.channels_last) for x in images]
        xs = [ConvMap(x, shape.conv, shape.bias) for x in images]
    prepared = [
        triton_ops.prepare(x, y, torch.float32) for x, y in zip(xs, ys, strict=True)
    ]
    batch = Batch(
        [x for x, _ in prepared],
        [y for _, y in prepared],
        rows(momentum_dtype),
        rows(param_dtype),
        0.9,
        nesterov,
    )
    with recording(run=False) as launches:
        solution = FORMULATIONS[formulation](triton_ops, batch, 1e-4, cg_iters)
        counts = [empty(2, r, dtype=torch.int32) for _ in range(count)]
        solution.update_(rows(param_dtype), counts, 2e-2, 1e-5)
    return launches
