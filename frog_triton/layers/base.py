"""The one form that all later maths relies on.

Every layer is a linear map ``X`` of its rows: for sample ``n``, output row ``j``
and position ``p``,

    output[n, j, p] = <x[n, p], row_j> + bias_j

where ``row_j`` holds ``D`` weights. ``apply`` is ``X V``, ``apply_adjoint`` is
``X^T T``, ``row_norms`` are the ``|x|^2``. A bias is a homogeneous coordinate: ``x``
gets a last entry 1, kept in `Rows.bias` and never concatenated. With groups, row
``j`` sees the channels of group ``j // (R / groups)`` only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Geometry:
    """Sizes of a layer's rows.

    Attributes:
        rows: R, the number of output features or channels.
        dim: D, the weights in a row (``C_in / groups * kernel size``).
        groups: how many groups of rows see different input channels.
        bias: whether a row has a bias as its last coordinate.
    """

    rows: int
    dim: int
    groups: int
    bias: bool

    @property
    def row_length(self) -> int:
        """D of the paper: weights in a row, and one more with a bias."""
        return self.dim + self.bias


class Rows(NamedTuple):
    """Row vectors of one layer (or, with a leading dimension, of several).

    Attributes:
        weight: ``(..., R, D)``.
        bias: ``(..., R)``, or None where rows have no bias.
    """

    weight: Tensor
    bias: Tensor | None

    def dot(self, other: Rows) -> Tensor:
        """Inner products row by row, shape ``(..., R)``."""
        total = torch.linalg.vecdot(self.weight, other.weight)
        if self.bias is not None and other.bias is not None:
            total = total + self.bias * other.bias
        return total

    def add_(self, other: Rows, alpha: Tensor) -> Rows:
        """``self += alpha * other`` with one alpha a row; returns ``self``."""
        self.weight.addcmul_(other.weight, alpha.unsqueeze(-1))
        if self.bias is not None and other.bias is not None:
            self.bias.addcmul_(other.bias, alpha)
        return self

    def scale_(self, alpha: Tensor) -> Rows:
        """``self *= alpha`` with one alpha a row; returns ``self``."""
        self.weight.mul_(alpha.unsqueeze(-1))
        if self.bias is not None:
            self.bias.mul_(alpha)
        return self

    def select(self, condition: Tensor, other: Rows) -> Rows:
        """Rows of ``self`` where ``condition`` holds, of ``other`` elsewhere."""
        weight = torch.where(condition.unsqueeze(-1), self.weight, other.weight)
        if self.bias is None or other.bias is None:
            return Rows(weight, None)
        return Rows(weight, torch.where(condition, self.bias, other.bias))

    def to(self, dtype: torch.dtype) -> Rows:
        """The same rows in another dtype."""
        return Rows(
            self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)
        )

    def clone(self) -> Rows:
        """A contiguous copy."""
        fmt = torch.contiguous_format
        bias = None if self.bias is None else self.bias.clone(memory_format=fmt)
        return Rows(self.weight.clone(memory_format=fmt), bias)

    def zeros_like(self) -> Rows:
        """Zeros of the same shapes."""
        bias = None if self.bias is None else torch.zeros_like(self.bias)
        return Rows(torch.zeros_like(self.weight), bias)


def stack_rows(rows: Sequence[Rows]) -> Rows:
    """Copy the rows of several layers of one geometry into ``(L, R, D)``."""
    biases = [r.bias for r in rows if r.bias is not None]
    return Rows(
        torch.stack([r.weight for r in rows]), torch.stack(biases) if biases else None
    )


class LinearMap(ABC):
    """Sampled activations ``X`` of one layer, seen as a linear map of its rows.

    Attributes:
        samples: n, the sampled examples, or the sampled positions.
        positions: P, output positions an example (1 where samples are positions).
        dim: D, weights in a row.
        groups: number of groups.
        bias: whether the homogeneous coordinate takes part.
    """

    samples: int
    positions: int
    dim: int
    groups: int
    bias: bool

    @abstractmethod
    def apply(self, v: Rows) -> Tensor:
        """``X V``: rows ``(R, D)`` to ``(n, R, P)``."""

    @abstractmethod
    def apply_adjoint(self, t: Tensor) -> Rows:
        """``X^T T``: ``(n, R, P)`` to rows ``(R, D)``."""

    @abstractmethod
    def row_norms(self) -> Tensor:
        """``|x|^2``, one more with a bias: shape ``(n, groups, P)``."""

    @abstractmethod
    def matrix(self) -> MatrixMap:
        """The same map with its ``n * P`` rows written out."""

    @property
    @abstractmethod
    def key(self) -> Hashable:
        """Maps with equal keys can be joined by `concat`."""

    @abstractmethod
    def concat(self, others: Sequence[Any]) -> LinearMap:
        """This map and others of the same key, as one with more samples."""


class MatrixMap(LinearMap):
    """``X`` as an explicit matrix: Linear layers, and drawn positions of any layer.

    Args:
        x: ``(N, groups * D)``.
        groups: number of groups.
        bias: whether the homogeneous coordinate takes part.
    """

    positions = 1

    def __init__(self, x: Tensor, groups: int = 1, bias: bool = False) -> None:
        self.x = x
        self.samples = x.shape[0]
        self.groups = groups
        self.dim = x.shape[1] // groups
        self.bias = bias

    def grouped(self) -> Tensor:
        """``X`` as ``(groups, N, D)``."""
        return self.x.view(self.samples, self.groups, self.dim).transpose(0, 1)

    def apply(self, v: Rows) -> Tensor:  # noqa: D102
        rows = v.weight.shape[0] // self.groups
        weight = v.weight.reshape(self.groups, rows, self.dim)
        t = torch.matmul(self.grouped(), weight.mT)  # (groups, N, R / groups)
        t = t.transpose(0, 1).reshape(self.samples, -1, 1)
        return t if v.bias is None else t + v.bias[:, None]

    def apply_adjoint(self, t: Tensor) -> Rows:  # noqa: D102
        grouped = t.view(self.samples, self.groups, -1).permute(1, 2, 0)
        weight = torch.matmul(grouped, self.grouped()).reshape(t.shape[1], self.dim)
        return Rows(weight, t.sum((0, 2)) if self.bias else None)

    def row_norms(self) -> Tensor:  # noqa: D102
        x = self.grouped()
        norms = torch.linalg.vecdot(x, x).mT.unsqueeze(-1)
        return norms + 1 if self.bias else norms

    def matrix(self) -> MatrixMap:  # noqa: D102
        return self

    @property
    def key(self) -> Hashable:  # noqa: D102
        return "matrix"

    def concat(self, others: Sequence[MatrixMap]) -> MatrixMap:  # noqa: D102
        joined = torch.cat([self.x, *(o.x for o in others)])
        return MatrixMap(joined, self.groups, self.bias)


class LayerAdapter(ABC):
    """What FROG needs to know of one kind of layer.

    A new kind is one subclass and one line in the registry of `frog_triton.layers`.
    In the methods below ``x`` is what the module was called with, in batched form
    (`batched`), and ``y`` has the shape of the module's output.
    """

    @abstractmethod
    def geometry(self, module: nn.Module) -> Geometry:
        """Sizes of the module's rows."""

    @abstractmethod
    def batched(self, module: nn.Module, x: Tensor) -> Tensor:
        """``x`` (an input or an output) with a batch dimension in front."""

    @abstractmethod
    def positions(self, y: Tensor) -> int:
        """P, the positions of one example of a batched output."""

    @abstractmethod
    def take_input_positions(
        self, module: nn.Module, x: Tensor, y_shape: torch.Size, index: Tensor
    ) -> Tensor:
        """Rows of ``X`` at flat positions ``index``: ``(N, groups * D)``."""

    @abstractmethod
    def take_output_positions(self, y: Tensor, index: Tensor) -> Tensor:
        """Output gradients at flat positions ``index``: ``(N, R)``."""

    @abstractmethod
    def linear_map(self, module: nn.Module, x: Tensor, bias: bool) -> LinearMap:
        """The map of whole examples ``x``."""

    @abstractmethod
    def canonical(self, y: Tensor) -> Tensor:
        """Output gradients of whole examples in the form ``(n, R, P)``."""


def pool_samples(
    maps: Sequence[LinearMap], grads: Sequence[Tensor]
) -> tuple[LinearMap, Tensor]:
    """Join the samples of several calls of a layer into one map.

    Calls of one shape stay implicit; where shapes differ (a convolution fed images
    of two sizes, one weight used with two strides) the rows are written out.

    Args:
        maps: one map a call.
        grads: their output gradients, each ``(n, R, P)``.

    Returns:
        The joint map and gradients.
    """
    if len({m.key for m in maps}) > 1:
        maps = [m.matrix() for m in maps]
        grads = [written_out(y) for y in grads]
    if len(maps) == 1:
        return maps[0], grads[0]
    return maps[0].concat(maps[1:]), torch.cat(list(grads))


def written_out(y: Tensor) -> Tensor:
    """``(n, R, P)`` as ``(n * P, R, 1)``, the order of `LinearMap.matrix`."""
    return y.transpose(1, 2).reshape(-1, y.shape[1], 1)
