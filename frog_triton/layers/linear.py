"""Linear layers with any number of leading dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..linalg.rows import Reading, unravel
from ..ops.backend import Backend
from .base import Geometry, LayerAdapter, MatrixMap
from .computed import row_wise
from .rows import Weight, named

_WEIGHT = Weight()


class LinearAdapter(LayerAdapter):
    """`torch.nn.Linear`: every leading index but the first is a position.

    Args:
        weight: the one weight, ``(R, D)`` or with `ROWS_SECOND` ``(D, R)``.
    """

    def __init__(self, weight: Weight = _WEIGHT) -> None:
        self._weight = weight

    def weights(self, module: nn.Module) -> tuple[Weight, ...]:
        return (row_wise(module, self._weight),)

    def geometry(self, module: nn.Module, weight: Weight | None = None) -> Geometry:
        own = weight or self.weights(module)[0]
        rows, dim = own.axes.view(named(module, own.name)).shape
        return Geometry(rows, dim, groups=1, bias=own.bias_of(module) is not None)

    def batched(self, module: nn.Module, x: Tensor) -> Tensor:
        return x.unsqueeze(0) if x.ndim == 1 else x

    def positions(self, y: Tensor) -> int:
        return y.shape[1:-1].numel()

    def take_input_positions(
        self,
        module: nn.Module,
        x: Tensor,
        y_shape: torch.Size,
        index: Tensor,
        backend: Backend,
    ) -> Tensor:
        return _at(x, index)

    def take_output_positions(self, y: Tensor, index: Tensor) -> Tensor:
        return _at(y, index)

    def input_reading(
        self, module: nn.Module, shape: torch.Size, y_shape: torch.Size
    ) -> Reading | None:
        return Reading(-1)

    def output_reading(self) -> Reading | None:
        return Reading(-1)

    def linear_map(
        self,
        module: nn.Module,
        x: Tensor,
        bias: bool,
        output_shape: Sequence[int] | None = None,
    ) -> MatrixMap:
        return MatrixMap(x.reshape(-1, x.shape[-1]), bias=bias)

    def canonical(self, y: Tensor) -> Tensor:
        return y.reshape(-1, y.shape[-1], 1)


def _at(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x`` at flat leading positions, without flattening (a copy) first."""
    if x.ndim == 2:
        return x.index_select(0, index)
    return x[tuple(unravel(index, x.shape[:-1]))]
