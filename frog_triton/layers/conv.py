"""Convolutions in one, two and three dimensions.

``X V`` is the convolution and ``X^T T`` its weight gradient, so the patch matrix is
never written. Where padding is uneven or not with zeros the *samples* are padded,
once, and everything after sees an unpadded convolution.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..linalg.precision import exact_convolutions
from ..linalg.rows import Reading, Rows, Window, unravel
from ..ops.backend import Backend
from .base import Geometry, LayerAdapter, LinearMap, MatrixMap
from .rows import Weight, named

_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
# torch's names for padding modes, as F.pad spells them.
_PAD_MODES = {"reflect": "reflect", "replicate": "replicate", "circular": "circular"}


@dataclass(frozen=True)
class ConvSpec:
    """The numbers of a convolution, one entry a spatial dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class ConvMap(LinearMap):
    """``X`` of whole images, implicit.

    Args:
        x: ``(n, C_in, *spatial)``, already padded where `spec` says padding 0.
        spec: the convolution.
        bias: whether the homogeneous coordinate takes part.
    """

    def __init__(self, x: Tensor, spec: ConvSpec, bias: bool) -> None:
        self.x = x
        self.spec = spec
        self.bias = bias
        self.pointwise = set(spec.kernel) == {1}
        if len(spec.kernel) <= 2:
            self.window = Window(
                spec.kernel, spec.stride, spec.dilation, spec.padding, "zeros"
            )
        self.samples = x.shape[0]
        self.groups = spec.groups
        self.dim = x.shape[1] // spec.groups * torch.Size(spec.kernel).numel()
        self.output_shape = tuple(
            (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for size, pad, dilation, kernel, stride in zip(
                x.shape[2:],
                spec.padding,
                spec.dilation,
                spec.kernel,
                spec.stride,
                strict=True,
            )
        )
        self.positions = torch.Size(self.output_shape).numel()

    def apply(self, v: Rows) -> Tensor:
        weight = v.weight.view(self._weight_shape(v.weight.shape[0]))
        bias = None if v.bias is None else v.bias * self.one(len(v.bias))
        return self._convolve(self.scaled_x, weight, self.groups, bias).flatten(2)

    def apply_adjoint(self, t: Tensor) -> Rows:
        rows = t.shape[1]
        with exact_convolutions(self.x):
            _, weight, _ = torch.ops.aten.convolution_backward(
                t.view(self.samples, rows, *self.output_shape),
                self.scaled_x,
                self.scaled_x.new_empty(()).expand(self._weight_shape(rows)),
                None,
                self.spec.stride,
                self.spec.padding,
                self.spec.dilation,
                False,
                [0] * len(self.spec.kernel),
                self.groups,
                (False, True, False),
            )
        weight = weight.reshape(rows, self.dim)
        return Rows(weight, t.sum((0, 2)) * self.one(rows) if self.bias else None)

    def row_norms(self) -> Tensor:
        # |x|^2 of a window is a convolution of the summed squares with ones.
        squares = self.scaled_x.square().unflatten(1, (self.groups, -1)).sum(2)
        ones = squares.new_ones(self.groups, 1, *self.spec.kernel)
        return self._with_bias(self._convolve(squares, ones, self.groups).flatten(2))

    def to(self, dtype: torch.dtype) -> ConvMap:
        return ConvMap(self.x.to(dtype), self.spec, self.bias).scaled(self.scale)

    def matrix(self) -> MatrixMap:
        spec = self.spec
        pads = [pad for pad in reversed(spec.padding) for _ in range(2)]
        windows = F.pad(self.x, pads)
        for axis, (kernel, stride, dilation) in enumerate(
            zip(spec.kernel, spec.stride, spec.dilation, strict=True)
        ):
            extent = dilation * (kernel - 1) + 1
            windows = windows.unfold(2 + axis, extent, stride)[..., ::dilation]
        # (n, C, *output, *kernel) -> (n, *output, C, *kernel)
        windows = windows.movedim(1, 1 + len(spec.kernel))
        return self.explicit(windows.reshape(self.samples * self.positions, -1))

    def narrow_groups(self, start: int, stop: int) -> ConvMap:
        channels = self.x.shape[1] // self.groups
        x = self.x[:, start * channels : stop * channels]
        scale = None if self.scale is None else self.scale[start:stop]
        narrow = ConvMap(x, replace(self.spec, groups=stop - start), self.bias)
        return narrow.scaled(scale)

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def key(self) -> Hashable:
        return (self.spec, self.x.shape[1:])

    def concat(self, others: Sequence[ConvMap]) -> ConvMap:
        joined = torch.cat([self.x, *(o.x for o in others)])
        return ConvMap(joined, self.spec, self.bias).scaled(self.scale)

    def _weight_shape(self, rows: int) -> tuple[int, ...]:
        return (rows, self.x.shape[1] // self.groups, *self.spec.kernel)

    def _convolve(
        self, x: Tensor, weight: Tensor, groups: int, bias: Tensor | None = None
    ) -> Tensor:
        spec = self.spec
        with exact_convolutions(x):
            return torch.convolution(
                x,
                weight,
                bias,
                spec.stride,
                spec.padding,
                spec.dilation,
                False,
                [0] * len(spec.kernel),
                groups,
            )


class ConvAdapter(LayerAdapter):
    """`torch.nn.Conv1d`, `Conv2d` and `Conv3d` with all their options."""

    def geometry(self, module: nn.Module, weight: Weight | None = None) -> Geometry:
        conv = cast(_Conv, module)
        weight = weight or self.weights(module)[0]
        shape = named(module, weight.name).shape
        bias = weight.bias_of(module) is not None
        return Geometry(shape[0], shape[1:].numel(), conv.groups, bias)

    def batched(self, module: nn.Module, x: Tensor) -> Tensor:
        spatial = len(cast(_Conv, module).kernel_size)
        return x.unsqueeze(0) if x.ndim == spatial + 1 else x

    def positions(self, y: Tensor) -> int:
        return y.shape[2:].numel()

    def take_input_positions(
        self,
        module: nn.Module,
        x: Tensor,
        y_shape: torch.Size,
        index: Tensor,
        backend: Backend,
    ) -> Tensor:
        window = self.window(module, x.shape[2:])
        patches: Tensor = backend.gather_patches(x, index, y_shape[2:], window)
        return patches

    def take_output_positions(self, y: Tensor, index: Tensor) -> Tensor:
        sample, *output = unravel(index, (y.shape[0], *y.shape[2:]))
        where: Any = (sample, slice(None), *output)
        return y[where]

    def input_reading(
        self, module: nn.Module, shape: torch.Size, y_shape: torch.Size
    ) -> Reading | None:
        return Reading(1, self.window(module, shape[2:]), tuple(y_shape[2:]))

    def output_reading(self) -> Reading | None:
        return Reading(1)

    def reads_by(self, module: nn.Module) -> Hashable:
        conv = cast(_Conv, module)
        spaces = (conv.kernel_size, conv.stride, conv.dilation)
        return (*map(tuple, spaces), str(conv.padding), conv.padding_mode)

    def window(self, module: nn.Module, size: Sequence[int]) -> Window:
        """Through which positions see an input of a spatial shape."""
        conv = cast(_Conv, module)
        return Window(
            tuple(conv.kernel_size),
            tuple(conv.stride),
            tuple(conv.dilation),
            tuple(before for before, _ in self.pads(module, size)),
            self.padding_mode(module),
        )

    def linear_map(
        self,
        module: nn.Module,
        x: Tensor,
        bias: bool,
        output_shape: Sequence[int] | None = None,
    ) -> ConvMap:
        conv = cast(_Conv, module)
        pads, mode = self.pads(module, x.shape[2:]), self.padding_mode(module)
        padding = tuple(before for before, _ in pads)
        if mode != "zeros" or any(a != b for a, b in pads):
            flat = [p for pair in reversed(pads) for p in pair]
            x = F.pad(x, flat, mode=_PAD_MODES.get(mode, "constant"))
            padding = (0,) * len(pads)
        spec = ConvSpec(
            tuple(conv.kernel_size),
            tuple(conv.stride),
            padding,
            tuple(conv.dilation),
            conv.groups,
        )
        return ConvMap(x, spec, bias)

    def canonical(self, y: Tensor) -> Tensor:
        return y.flatten(2)

    def pads(self, module: nn.Module, size: Sequence[int]) -> list[tuple[int, int]]:
        """Padding before and after, per spatial dimension, ``'same'`` resolved.

        Args:
            module: the layer.
            size: spatial shape of its input.
        """
        conv = cast(_Conv, module)
        if conv.padding == "valid":
            return [(0, 0)] * len(conv.kernel_size)
        if conv.padding == "same":
            total = [
                d * (k - 1)
                for d, k in zip(conv.dilation, conv.kernel_size, strict=True)
            ]
            return [(t // 2, t - t // 2) for t in total]
        return [(int(p), int(p)) for p in conv.padding]

    def padding_mode(self, module: nn.Module) -> str:
        """Torch's name of what the padding holds."""
        return cast(_Conv, module).padding_mode


class SameConvAdapter(ConvAdapter):
    """Convolutions padded with zeros to TensorFlow's "same", whatever their `padding`.

    Of an input of size i, stride s, kernel k and dilation d the output has
    ``ceil(i / s)`` positions, for which

        total = max((ceil(i / s) - 1) s + (k - 1) d + 1 - i, 0)

    zeros are added, ``total // 2`` of them before: as many as timm's ``pad_same``
    adds. Unlike torch's ``'same'`` it depends on the input's size.
    """

    def pads(self, module: nn.Module, size: Sequence[int]) -> list[tuple[int, int]]:
        conv = cast(_Conv, module)
        pads = []
        for i, k, s, d in zip(
            size, conv.kernel_size, conv.stride, conv.dilation, strict=True
        ):
            total = max((-(-i // s) - 1) * s + (k - 1) * d + 1 - i, 0)
            pads.append((total // 2, total - total // 2))
        return pads

    def padding_mode(self, module: nn.Module) -> str:
        return "zeros"
