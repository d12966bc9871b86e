"""Transposed convolutions in one, two and three dimensions.

Output position ``p`` sees input position ``(p + pad - k * dilation) / stride`` through
tap ``k``, where that is whole and in the map, and zeros elsewhere: a row of X has the
input channels of the group, and for each its taps. ``X V`` is the transposed
convolution and ``X^T T`` its weight gradient.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..linalg.precision import exact_convolutions
from ..linalg.rows import Rows, Window
from ..ops import torch_ops
from ..ops.backend import Backend
from .base import Geometry, LinearMap, MatrixMap
from .computed import row_wise
from .conv import ConvAdapter, ConvSpec
from .rows import ROWS_SECOND, RowAxes, Weight, named

_ConvTranspose = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


class TransposedConvMap(LinearMap):
    """``X`` of whole images, implicit. There is no `window`: torch's convolutions.

    Args:
        x: ``(n, C_in, *spatial)``.
        spec: the transposed convolution.
        output_shape: spatial shape of the output.
        bias: whether the homogeneous coordinate takes part.
    """

    def __init__(
        self, x: Tensor, spec: ConvSpec, output_shape: tuple[int, ...], bias: bool
    ) -> None:
        self.x = x
        self.spec = spec
        self.output_shape = output_shape
        self.bias = bias
        # With a larger stride most of what is written out would be zeros.
        self.pointwise = {*spec.kernel, *spec.stride} == {1}
        self.samples = x.shape[0]
        self.positions = torch.Size(output_shape).numel()
        self.groups = spec.groups
        self.dim = x.shape[1] // spec.groups * torch.Size(spec.kernel).numel()

    def apply(self, v: Rows) -> Tensor:
        weight = row_axes(self.groups).back(v.weight, self._like(v.weight.shape[0]))
        bias = None if v.bias is None else v.bias * self.one(len(v.bias))
        return self._convolve(self.scaled_x, weight, bias).flatten(2)

    def apply_adjoint(self, t: Tensor) -> Rows:
        rows = t.shape[1]
        with exact_convolutions(self.x):
            _, weight, _ = torch.ops.aten.convolution_backward(
                t.view(self.samples, rows, *self.output_shape),
                self.scaled_x,
                self._like(rows),
                None,
                *self._options(),
                (False, True, False),
            )
        weight = row_axes(self.groups).matrix(weight)
        return Rows(weight, t.sum((0, 2)) * self.one(rows) if self.bias else None)

    def row_norms(self) -> Tensor:
        # |x|^2 of a row is a transposed convolution of summed squares with ones.
        squares = self.scaled_x.square().unflatten(1, (self.groups, -1)).sum(2)
        ones = squares.new_ones(self.groups, 1, *self.spec.kernel)
        return self._with_bias(self._convolve(squares, ones).flatten(2))

    def to(self, dtype: torch.dtype) -> TransposedConvMap:
        return self._with(self.x.to(dtype)).scaled(self.scale)

    def matrix(self) -> MatrixMap:
        index = torch.arange(self.samples * self.positions, device=self.x.device)
        window = _window(self.spec)
        rows = torch_ops.gather_patches(self.x, index, self.output_shape, window)
        return self.explicit(rows)

    def narrow_groups(self, start: int, stop: int) -> TransposedConvMap:
        channels = self.x.shape[1] // self.groups
        x = self.x[:, start * channels : stop * channels]
        spec = replace(self.spec, groups=stop - start)
        scale = None if self.scale is None else self.scale[start:stop]
        narrow = TransposedConvMap(x, spec, self.output_shape, self.bias)
        return narrow.scaled(scale)

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def key(self) -> Hashable:
        return (self.spec, self.x.shape[1:], self.output_shape)

    def concat(self, others: Sequence[TransposedConvMap]) -> TransposedConvMap:
        joined = torch.cat([self.x, *(o.x for o in others)])
        return self._with(joined).scaled(self.scale)

    def _with(self, x: Tensor) -> TransposedConvMap:
        return TransposedConvMap(x, self.spec, self.output_shape, self.bias)

    def _like(self, rows: int) -> Tensor:
        """Shaped like a weight of `rows` rows, without memory of its own."""
        shape = (self.x.shape[1], rows // self.groups, *self.spec.kernel)
        return self.scaled_x.new_empty(()).expand(shape)

    def _options(self) -> tuple[Any, ...]:
        """Arguments of torch's convolutions, from the stride to the groups."""
        spec = self.spec
        least = _output_shape(self.x.shape[2:], spec, (0,) * len(spec.kernel))
        added = [
            size - fewest for size, fewest in zip(self.output_shape, least, strict=True)
        ]
        return spec.stride, spec.padding, spec.dilation, True, added, self.groups

    def _convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        with exact_convolutions(x):
            return torch.convolution(x, weight, bias, *self._options())


class TransposedConvAdapter(ConvAdapter):
    """`torch.nn.ConvTranspose1d`, `ConvTranspose2d` and `ConvTranspose3d`."""

    def weights(self, module: nn.Module) -> tuple[Weight, ...]:
        axes = row_axes(cast(_ConvTranspose, module).groups)
        return (row_wise(module, Weight(axes=axes)),)

    def geometry(self, module: nn.Module, weight: Weight | None = None) -> Geometry:
        groups = cast(_ConvTranspose, module).groups
        own = weight or self.weights(module)[0]
        channels, rows, *kernel = named(module, own.name).shape
        dim = channels // groups * torch.Size(kernel).numel()
        return Geometry(rows * groups, dim, groups, own.bias_of(module) is not None)

    def take_input_positions(
        self,
        module: nn.Module,
        x: Tensor,
        y_shape: torch.Size,
        index: Tensor,
        backend: Backend,
    ) -> Tensor:
        window = self.window(module, x.shape[2:])
        rows: Tensor = backend.gather_patches(x, index, y_shape[2:], window)
        return rows

    def window(self, module: nn.Module, size: Sequence[int]) -> Window:
        return _window(_spec(module))

    def linear_map(  # type: ignore[override]
        self,
        module: nn.Module,
        x: Tensor,
        bias: bool,
        output_shape: Sequence[int] | None = None,
    ) -> TransposedConvMap:
        """The map of whole examples ``x``.

        Args:
            module: the layer.
            x: ``(n, C_in, *spatial)``.
            bias: whether the homogeneous coordinate takes part.
            output_shape: spatial shape of the output. None for what the module's
                ``output_padding`` makes; a call with ``output_size`` may have another.
        """
        spec = _spec(module)
        if output_shape is None:
            added = tuple(cast(_ConvTranspose, module).output_padding)
            output_shape = _output_shape(x.shape[2:], spec, added)
        return TransposedConvMap(x, spec, tuple(output_shape), bias)


def row_axes(groups: int) -> RowAxes:
    """Where the weight ``(C_in, C_out / groups, *kernel)`` has its rows."""
    return ROWS_SECOND if groups == 1 else RowAxes((0, 2), split=groups)


def _spec(module: nn.Module) -> ConvSpec:
    conv = cast(_ConvTranspose, module)
    return ConvSpec(
        tuple(conv.kernel_size),
        tuple(conv.stride),
        tuple(int(pad) for pad in conv.padding),
        tuple(conv.dilation),
        conv.groups,
    )


def _window(spec: ConvSpec) -> Window:
    """Of a transposed convolution: taps run backwards over inputs `stride` apart."""
    return Window(
        spec.kernel,
        (1,) * len(spec.kernel),
        tuple(-dilation for dilation in spec.dilation),
        tuple(-pad for pad in spec.padding),
        "zeros",
        upsample=spec.stride,
    )


def _output_shape(
    shape: Sequence[int], spec: ConvSpec, added: Sequence[int]
) -> tuple[int, ...]:
    """Spatial shape of the output, with `added` positions at each end."""
    sizes = zip(
        *(shape, spec.kernel, spec.stride, spec.padding, spec.dilation, added),
        strict=True,
    )
    return tuple(
        (size - 1) * stride - 2 * pad + dilation * (kernel - 1) + 1 + more
        for size, kernel, stride, pad, dilation, more in sizes
    )
