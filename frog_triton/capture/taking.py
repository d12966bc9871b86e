"""Rows of X and Y are taken where they lie.

What follows from the form of a tensor alone is worked out once. Where a kernel draws
the rows by itself, all that a forward hands to its backward is a key.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..layers import LayerAdapter
from ..linalg.rows import Reading
from ..ops.backend import Backend, Drawing
from .sampling import Counted, Drawn, take

MOST_FORMS = 64
"""That are remembered; with more, lengths of sequences change at every call."""


class _Inputs(NamedTuple):
    """How rows of X are taken of inputs of one form."""

    total: int
    backend: Backend
    drawing: Drawing | None


class _Outputs(NamedTuple):
    """How rows of Y are taken of gradients of one form."""

    as_it_is: bool
    drawing: Drawing | None


class Taker:
    """Takes rows of one layer's calls of one module.

    Args:
        size: positions or examples to take of each.
        by_position: which of both.
        backend: one of `ops.BACKENDS`.
    """

    def __init__(self, size: int, by_position: bool, backend: str) -> None:
        self._size, self._by_position, self._backend = size, by_position, backend
        self._inputs: dict[Hashable, _Inputs] = {}
        self._outputs: dict[Hashable, _Outputs] = {}

    def inputs(
        self,
        adapter: LayerAdapter,
        module: nn.Module,
        x: Tensor,
        y_shape: torch.Size,
        key: int | Counted,
    ) -> tuple[Tensor, Drawn]:
        """Draw examples, or rows of X.

        Args:
            adapter: of the module's kind.
            module: that was called.
            x: its input, batched.
            y_shape: shape of its output, batched.
            key: of the draw.
        """
        if x.is_neg():  # the kernel reads what lies there
            x = x.resolve_neg()
        options = adapter.reads_by(module)
        form = (x.shape, x.stride(), x.dtype, x.device, y_shape, adapter, options)
        found = self._inputs.get(form)
        if found is None:
            found = self._look_at_input(adapter, module, x, y_shape)
            _remember(self._inputs, form, found)
        total, backend, drawing = found
        if drawing is not None:
            if isinstance(key, int):
                return drawing.given(x, key), Drawn(total, self._size, key)
            if key.step.device == x.device:
                rows, written = drawing.counted(x, *key)
                return rows, Drawn(total, self._size, written)
        drawn = Drawn(total, self._size, key if isinstance(key, int) else key.hashed())
        index = drawn.index(x.device)
        with torch.no_grad():
            if not self._by_position:
                return take(x, index), drawn
            rows = adapter.take_input_positions(module, x, y_shape, index, backend)
        return rows.detach() if rows.requires_grad else rows, drawn

    def outputs(
        self,
        adapter: LayerAdapter,
        module: nn.Module,
        grad: Tensor,
        shape: torch.Size,
        drawn: Drawn,
    ) -> Tensor:
        """The output gradients that belong to what `inputs` has drawn.

        Args:
            adapter: of the module's kind.
            module: that was called.
            grad: the output's gradient, maybe with leading dimensions as one.
            shape: of the output.
            drawn: from `inputs`.
        """
        if grad.is_neg():
            grad = grad.resolve_neg()
        form = (
            *(grad.shape, grad.stride(), grad.dtype, grad.device),
            *(shape, drawn.total, adapter),
        )
        found = self._outputs.get(form)
        if found is None:
            found = self._look_at_output(adapter, module, grad, shape, drawn)
            _remember(self._outputs, form, found)
        as_it_is, drawing = found
        y = adapter.batched(module, grad if as_it_is else grad.view(shape))
        key = drawn.key
        if drawing is not None:
            if isinstance(key, int):
                return drawing.given(y, key)
            if key.device == y.device:
                return drawing.written(y, key)
        if y.requires_grad:
            y = y.detach()
        index = drawn.index(y.device)
        if not self._by_position:
            return take(y, index)
        return adapter.take_output_positions(y, index)

    def _look_at_input(
        self, adapter: LayerAdapter, module: nn.Module, x: Tensor, y_shape: torch.Size
    ) -> _Inputs:
        backend = ops.resolve(self._backend, x.device, x.dtype)
        total, reading = y_shape[0], None
        if self._by_position:
            y = x.detach().new_empty(()).expand(y_shape)
            total *= adapter.positions(y)
            if _is_newer(adapter, "input_reading", "take_input_positions"):
                reading = adapter.input_reading(module, x.shape, y_shape)
        return _Inputs(total, backend, self._drawing(backend, x, reading, total))

    def _look_at_output(
        self,
        adapter: LayerAdapter,
        module: nn.Module,
        grad: Tensor,
        shape: torch.Size,
        drawn: Drawn,
    ) -> _Outputs:
        reading = None
        told = _is_newer(adapter, "output_reading", "take_output_positions")
        if self._by_position and told:
            reading = adapter.output_reading()
        flat = reading is not None and reading.axis == -1 and grad.ndim > 1
        as_it_is = grad.shape == shape or (flat and grad.shape[-1:] == shape[-1:])
        backend: Any = ops.torch_ops
        if grad.dtype != torch.float64:
            backend = ops.resolve(self._backend, grad.device, grad.dtype)
        y = adapter.batched(module, grad if as_it_is else grad.view(shape))
        return _Outputs(as_it_is, self._drawing(backend, y, reading, drawn.total))

    def _drawing(
        self, backend: Backend, x: Tensor, reading: Reading | None, total: int
    ) -> Drawing | None:
        if reading is None and self._by_position:
            return None
        return backend.drawing(x, reading, total, self._size)


def _remember(known: dict[Hashable, Any], form: Hashable, found: Any) -> None:
    if len(known) >= MOST_FORMS:
        known.clear()
    known[form] = found


def _is_newer(adapter: LayerAdapter, name: str, than: str) -> bool:
    """Whether a method belongs to a class no further up than another's.

    A subclass that takes positions in a way of its own is not read by its parent's.
    """
    owners = [
        next(kind for kind in type(adapter).__mro__ if each in vars(kind))
        for each in (name, than)
    ]
    return issubclass(owners[0], owners[1])
