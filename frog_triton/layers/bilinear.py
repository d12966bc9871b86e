"""Bilinear layers: each row is a linear map of the outer product of two inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..ops.backend import Backend
from .base import Geometry, MatrixMap
from .linear import LinearAdapter
from .rows import Weight, named


class BilinearAdapter(LinearAdapter):
    """`torch.nn.Bilinear`: ``y_j = x1^T W_j x2 + b_j``, positions as of a Linear layer.

    A row of X is the outer product of ``x1`` and ``x2``, ``D = in1 * in2`` entries of
    the inputs' dtype. Until rows are wanted, the two inputs travel side by side in one
    tensor ``(..., in1 + in2)``.
    """

    def geometry(self, module: nn.Module, weight: Weight | None = None) -> Geometry:
        own = weight or self.weights(module)[0]
        shape = named(module, own.name).shape
        bias = own.bias_of(module) is not None
        return Geometry(shape[0], shape[1:].numel(), groups=1, bias=bias)

    def input(
        self, module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Tensor:
        names = ("input1", "input2")
        pair = [*args, *(kwargs[name] for name in names[len(args) :])]
        return torch.cat([x.detach() for x in pair], -1)

    def take_input_positions(
        self,
        module: nn.Module,
        x: Tensor,
        y_shape: torch.Size,
        index: Tensor,
        backend: Backend,
    ) -> Tensor:
        taken = super().take_input_positions(module, x, y_shape, index, backend)
        return _products(module, taken)

    def linear_map(
        self,
        module: nn.Module,
        x: Tensor,
        bias: bool,
        output_shape: Sequence[int] | None = None,
    ) -> MatrixMap:
        return MatrixMap(_products(module, x.reshape(-1, x.shape[-1])), bias=bias)


def _products(module: nn.Module, x: Tensor) -> Tensor:
    """Outer products ``(N, in1 * in2)`` of the two parts of ``(N, in1 + in2)``."""
    layer = cast(nn.Bilinear, module)
    first, second = x.split((layer.in1_features, layer.in2_features), 1)
    products: Tensor = first.unsqueeze(2) * second.unsqueeze(1)
    return products.flatten(1)
