"""What backends compute on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

Array = np.ndarray[Any, Any]


class Rows(NamedTuple):
    """Row vectors of one layer (or, with a leading dimension, of several).

    Attributes:
        weight: ``(..., R, D)``; of parameters, their gradients and momentum also
            ``(R, *the parameter's other dimensions)``, see `flat`.
        bias: ``(..., R)``, or None where rows have no bias.
    """

    weight: Tensor
    bias: Tensor | None

    @property
    def dim(self) -> int:
        """D, of one layer's rows in whatever shape."""
        return math.prod(self.weight.shape[1:])

    def flat(self) -> Rows:
        """One layer's rows as ``(R, D)``: a copy if they lie otherwise."""
        return Rows(self.weight.flatten(1), self.bias)

    def layer(self, i: int) -> Rows:
        """The rows of layer i alone, ``(R, D)``."""
        return Rows(self.weight[i], None if self.bias is None else self.bias[i])

    def dot(self, other: Rows) -> Tensor:
        """Inner products row by row, shape ``(..., R)``."""
        total: Tensor = torch.linalg.vecdot(self.weight, other.weight)
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
        ones = (1,) * (self.weight.ndim - condition.ndim)
        of_rows = condition.view(*condition.shape, *ones)
        weight = torch.where(of_rows, self.weight, other.weight)
        if self.bias is None or other.bias is None:
            return Rows(weight, None)
        return Rows(weight, torch.where(condition, self.bias, other.bias))

    def times(self, factors: Tensor) -> Rows:
        """Other rows: these times one factor a row."""
        bias = None if self.bias is None else self.bias * factors
        return Rows(self.weight * factors.unsqueeze(-1), bias)

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

    def copy_(self, other: Rows) -> Rows:
        """Overwrite with the values of `other`; returns ``self``."""
        self.weight.copy_(other.weight)
        if self.bias is not None and other.bias is not None:
            self.bias.copy_(other.bias)
        return self

    def zeros_like(self) -> Rows:
        """Zeros of the same shapes."""
        bias = None if self.bias is None else torch.zeros_like(self.bias)
        return Rows(torch.zeros_like(self.weight), bias)


def rows_in_place(weight: Tensor) -> Tensor:
    """Rows ``(R, D)`` where they lie; else, as if channels_last, ``(R, C, taps)``.

    Args:
        weight: ``(R, *others)``; copied if its channels, or its taps, do not lie at
            equal distances.
    """
    channels_apart = not _lies_as_one(weight, 1) and _lies_as_one(weight, 2)
    return weight.flatten(2 if channels_apart else 1)


def _lies_as_one(tensor: Tensor, first: int) -> bool:
    """Whether dimensions from `first` on can be flattened without a copy."""
    axes = zip(tensor.shape[first:], tensor.stride()[first:], strict=True)
    pairs = itertools.pairwise((size, stride) for size, stride in axes if size != 1)
    return all(outer == size * inner for (_, outer), (size, inner) in pairs)


def stack_rows(rows: Sequence[Rows]) -> Rows:
    """Copy the rows of several layers of one geometry into ``(L, R, D)``."""
    biases = [r.bias for r in rows if r.bias is not None]
    return Rows(
        torch.stack([r.weight for r in rows]), torch.stack(biases) if biases else None
    )


@dataclass(frozen=True)
class Window:
    """The window of a convolution, one entry a spatial dimension.

    Attributes:
        kernel: its size.
        stride: from one output position to the next.
        dilation: between its taps.
        pads: padding before the first input position.
        padding_mode: torch's name of what is there.
        upsample: from one input position to the next, as zeros stand between them: the
            stride of a transposed convolution, whose window steps by one. Ones if
            empty; otherwise the padding is zeros.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[int, ...]
    padding_mode: str
    upsample: tuple[int, ...] = ()


class Reading(NamedTuple):
    """How rows are read from a tensor, one at each position.

    Attributes:
        axis: that holds features or channels; the others count positions, in order.
        window: through which a position sees the tensor ``(n, C, *spatial)``; None
            where a row is what lies at the position itself.
        output_shape: spatial shape of the positions then.
    """

    axis: int
    window: Window | None = None
    output_shape: tuple[int, ...] = ()


class SampleMap(Protocol):
    """Sampled activations as a linear map; see `frog_triton.layers.base`."""

    samples: int
    positions: int
    dim: int
    groups: int
    bias: bool
    pointwise: bool
    x: Tensor
    scale: Tensor | None
    largest: Tensor | None
    window: Window | None
    output_shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Of the samples."""

    def scaled(self, scale: Tensor | None) -> Self:
        """The same samples with another scale."""

    def with_largest(self, largest: Tensor) -> Self:
        """The same samples, knowing their largest entries."""

    def one(self, count: int) -> Tensor | float:
        """The homogeneous coordinate of `count` rows or problems, scaled."""

    def apply(self, v: Rows) -> Tensor:
        """``X V``: rows ``(R, D)`` to ``(n, R, P)``."""

    def apply_adjoint(self, t: Tensor) -> Rows:
        """``X^T T``: ``(n, R, P)`` to rows ``(R, D)``."""

    def row_norms(self) -> Tensor:
        """``|x|^2``, one more with a bias: shape ``(n, groups, P)``."""

    def to(self, dtype: torch.dtype) -> SampleMap:
        """The same samples in another dtype."""

    def explicit(self, x: Tensor) -> MatrixSamples:
        """The same map, given its rows ``(N, groups * D)``."""

    def matrix(self) -> MatrixSamples:
        """The same map with its rows written out."""


class MatrixSamples(SampleMap, Protocol):
    """A map whose rows are written out.

    Attributes:
        x: ``(N, groups * D)``.
    """

    x: Tensor

    def grouped(self) -> Tensor:
        """``X`` as ``(groups, N, D)``."""


def is_number(value: object) -> bool:
    """Whether an option is a real number, or a tensor of one."""
    if isinstance(value, Tensor):
        real = not value.is_complex() and value.dtype is not torch.bool
        return real and value.numel() == 1
    return isinstance(value, Real) and not isinstance(value, bool)


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that lies on this rank; another as it is."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def unravel(index: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """Flat positions to one index a dimension.

    `torch.unravel_index` copies the shape to the device, which waits for the host and
    cannot be captured in a CUDA graph. On the host numpy costs less than torch.
    """
    if numpy_serves(index.device):
        return [as_tensor(i) for i in split_positions(as_array(index), shape)]
    return split_positions(index, shape)


def numpy_serves(device: torch.device | str) -> bool:
    """Whether numpy may work with tensors there: no graph is made of what is done."""
    kind = device if isinstance(device, str) else device.type
    return kind == "cpu" and not torch.compiler.is_compiling()


def as_array(tensor: Tensor) -> Array:
    """A tensor of the host's in numpy, which shares its memory: no operation."""
    array: Array = np.from_dlpack(tensor)
    return array


def as_tensor(array: Array) -> Tensor:
    """A numpy array in torch, which shares its memory: no operation either."""
    tensor: Tensor = from_dlpack(array.__dlpack__())
    return tensor


def split_positions(index: Any, shape: Sequence[int]) -> list[Any]:
    """The same of an array of torch or of numpy."""
    indices = []
    for size in reversed(shape[1:]):
        indices.append(index % size)
        index = index // size
    return [index, *reversed(indices)]


def written_out(y: Tensor) -> Tensor:
    """``(n, R, P)`` as ``(n * P, R, 1)``, the order of `SampleMap.matrix`."""
    n, rows, positions = y.shape
    return y.transpose(1, 2).reshape(n * positions, rows, 1)
