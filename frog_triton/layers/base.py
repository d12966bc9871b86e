"""The one form that all later maths relies on.

Every layer is a linear map ``X`` of its rows: for sample ``n``, output row ``j``
and position ``p``,

    output[n, j, p] = <x[n, p], row_j> + bias_j

where ``row_j`` holds ``D`` weights. ``apply`` is ``X V``, ``apply_adjoint`` is
``X^T T``, ``row_norms`` are the ``|x|^2``. A bias is a homogeneous coordinate: ``x``
gets a last entry 1, kept in `Rows.bias` and never concatenated. With groups, row
``j`` sees the channels of group ``j // (R / groups)`` only. Where samples are scaled
(`LinearMap.scale`), so is that 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..linalg.rows import Reading, Rows, Window, written_out
from ..ops.backend import Backend
from .computed import row_wise
from .rows import Weight


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


class LinearMap(ABC):
    """Sampled activations ``X`` of one layer, seen as a linear map of its rows.

    Attributes:
        samples: n, the sampled examples, or the sampled positions.
        positions: P, output positions an example (1 where samples are positions).
        dim: D, weights in a row.
        groups: number of groups.
        bias: whether the homogeneous coordinate takes part.
        pointwise: whether each position sees one input position, so that writing the
            rows out repeats nothing.
        x: the samples as captured, channels (of a matrix: columns) in dimension 1.
        scale: what the samples of each group, the homogeneous coordinate included, are
            to be multiplied by, ``(groups,)``; None for one. See `linalg.scales`.
        largest: their largest entries, ``(groups, parts)``, for kernels that find the
            scale themselves; None where they are not known.
        window: of a convolution in one or two dimensions over whole examples; None
            for all other maps.
        output_shape: spatial shape of the output.
    """

    samples: int
    positions: int
    dim: int
    groups: int
    bias: bool
    pointwise: bool
    x: Tensor
    scale: Tensor | None = None
    largest: Tensor | None = None
    window: Window | None = None
    output_shape: tuple[int, ...] = ()

    def scaled(self, scale: Tensor | None) -> Self:
        """The same samples with another scale."""
        other = copy(self)
        other.__dict__.pop("scaled_x", None)
        other.scale = scale
        return other

    def with_largest(self, largest: Tensor | None) -> Self:
        """The same samples, knowing their largest entries."""
        other = copy(self)
        other.largest = largest
        return other

    @cached_property
    def scaled_x(self) -> Tensor:
        """The samples times their scale."""
        if self.scale is None:
            return self.x
        each = self.scale.repeat_interleave(self.x.shape[1] // self.groups)
        return self.x * each.view(-1, *(1,) * (self.x.ndim - 2))

    def one(self, count: int) -> Tensor | float:
        """The homogeneous coordinate of `count` rows or problems, scaled."""
        if self.scale is None:
            return 1.0
        return self.scale.repeat_interleave(count // self.groups)

    @abstractmethod
    def apply(self, v: Rows) -> Tensor:
        """``X V``: rows ``(R, D)`` to ``(n, R, P)``."""

    @abstractmethod
    def apply_adjoint(self, t: Tensor) -> Rows:
        """``X^T T``: ``(n, R, P)`` to rows ``(R, D)``."""

    @abstractmethod
    def row_norms(self) -> Tensor:
        """``|x|^2``, one more with a bias: shape ``(n, groups, P)``."""

    def _with_bias(self, norms: Tensor) -> Tensor:
        """Norms ``(n, groups, P)`` with the homogeneous coordinate's part."""
        if not self.bias:
            return norms
        one = self.one(self.groups)
        return norms + (one**2 if isinstance(one, float) else one[:, None] ** 2)

    @abstractmethod
    def to(self, dtype: torch.dtype) -> LinearMap:
        """The same samples in another dtype."""

    @abstractmethod
    def matrix(self) -> MatrixMap:
        """The same map with its ``n * P`` rows written out."""

    def explicit(self, x: Tensor) -> MatrixMap:
        """The same map, given its rows ``(N, groups * D)``."""
        explicit = MatrixMap(x, self.groups, self.bias).scaled(self.scale)
        return explicit.with_largest(self.largest)

    @abstractmethod
    def narrow_groups(self, start: int, stop: int) -> LinearMap:
        """The map of groups `start` to `stop` alone."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the samples."""

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
    pointwise = True

    def __init__(self, x: Tensor, groups: int = 1, bias: bool = False) -> None:
        self.x = x
        self.samples = x.shape[0]
        self.groups = groups
        self.dim = x.shape[1] // groups
        self.bias = bias

    def grouped(self) -> Tensor:
        """``X`` as ``(groups, N, D)``, scaled."""
        x = self.scaled_x.view(self.samples, self.groups, self.dim)
        return x.transpose(0, 1)

    def apply(self, v: Rows) -> Tensor:
        rows = v.weight.shape[0] // self.groups
        weight = v.weight.reshape(self.groups, rows, self.dim)
        t = torch.matmul(self.grouped(), weight.mT)  # (groups, N, R / groups)
        t = t.transpose(0, 1).reshape(self.samples, -1, 1)
        return t if v.bias is None else t + (v.bias * self.one(len(v.bias)))[:, None]

    def apply_adjoint(self, t: Tensor) -> Rows:
        grouped = t.view(self.samples, self.groups, -1).permute(1, 2, 0)
        weight = torch.matmul(grouped, self.grouped()).reshape(t.shape[1], self.dim)
        bias = t.sum((0, 2)) * self.one(t.shape[1]) if self.bias else None
        return Rows(weight, bias)

    def row_norms(self) -> Tensor:
        x = self.grouped()
        return self._with_bias(torch.linalg.vecdot(x, x).mT.unsqueeze(-1))

    def to(self, dtype: torch.dtype) -> MatrixMap:
        return self.explicit(self.x.to(dtype))

    def matrix(self) -> MatrixMap:
        return self

    def narrow_groups(self, start: int, stop: int) -> MatrixMap:
        x = self.x[:, start * self.dim : stop * self.dim]
        scale = None if self.scale is None else self.scale[start:stop]
        return MatrixMap(x, stop - start, self.bias).scaled(scale)

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def key(self) -> Hashable:
        return "matrix"

    def concat(self, others: Sequence[MatrixMap]) -> MatrixMap:
        joined = torch.cat([self.x, *(o.x for o in others)])
        return self.explicit(joined)


class LayerAdapter(ABC):
    """What FROG needs to know of one kind of layer.

    A new kind is one subclass and one line in the registry of `frog_triton.layers`.
    In the methods below ``x`` is what the module was called with (`input`), in batched
    form (`batched`), and ``y`` has the shape of the module's output. Weights that are
    not seen at the module's call need `weights` and `geometry` alone.

    Attributes:
        any_forward: whether modules with a forward of their own may be served: what
            they compute is checked at a call, or seen where it happens.
    """

    any_forward = True

    def weights(self, module: nn.Module) -> Sequence[Weight]:
        """The module's weights, each with its rows; ``weight`` and ``bias`` if not."""
        return (row_wise(module, Weight()),)

    @abstractmethod
    def geometry(self, module: nn.Module, weight: Weight | None = None) -> Geometry:
        """Sizes of the rows of one of the module's weights.

        Args:
            module: the layer.
            weight: one of `weights`; None for the first.
        """

    def input(
        self, module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        """Of the module's arguments, what X is made of: one tensor."""
        return args[0] if args else kwargs.get("input")

    @abstractmethod
    def batched(self, module: nn.Module, x: Tensor) -> Tensor:
        """``x`` (an input or an output) with a batch dimension in front."""

    @abstractmethod
    def positions(self, y: Tensor) -> int:
        """P, the positions of one example of a batched output."""

    @abstractmethod
    def take_input_positions(
        self,
        module: nn.Module,
        x: Tensor,
        y_shape: torch.Size,
        index: Tensor,
        backend: Backend,
    ) -> Tensor:
        """Rows of ``X`` at flat positions ``index``: ``(N, groups * D)``.

        Args:
            module: the layer.
            x: its input.
            y_shape: shape of its output.
            index: positions, int64.
            backend: a module of `frog_triton.ops`.
        """

    @abstractmethod
    def take_output_positions(self, y: Tensor, index: Tensor) -> Tensor:
        """Output gradients at flat positions ``index``: ``(N, R)``."""

    def input_reading(
        self, module: nn.Module, shape: torch.Size, y_shape: torch.Size
    ) -> Reading | None:
        """What `take_input_positions` does, for kernels that draw positions themselves.

        Args:
            module: the layer.
            shape: of its input.
            y_shape: of its output.

        Returns:
            How rows of X are read; None, the default, where only that method knows.
        """
        return None

    def output_reading(self) -> Reading | None:
        """The same of `take_output_positions`."""
        return None

    def reads_by(self, module: nn.Module) -> Hashable:
        """What of the module `input_reading` depends on."""
        return None

    @abstractmethod
    def linear_map(
        self,
        module: nn.Module,
        x: Tensor,
        bias: bool,
        output_shape: Sequence[int] | None = None,
    ) -> LinearMap:
        """The map of whole examples ``x``.

        Args:
            module: the layer.
            x: its input.
            bias: whether the bias takes part.
            output_shape: spatial shape of the output, which a transposed convolution
                may be told at the call; None for what follows from the module.
        """

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
