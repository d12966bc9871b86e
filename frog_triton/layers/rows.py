"""Which dimensions of a parameter count rows, and which weights a module has."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RowAxes:
    """Where a parameter has its rows. No axis is moved in memory.

    Attributes:
        rows: the dimensions that count rows, outermost first, after `split`.
        split: how many parts dimension 0 falls into first, as two dimensions: a
            grouped transposed convolution has its groups there.
    """

    rows: tuple[int, ...] = (0,)
    split: int = 1

    def view(self, tensor: Tensor) -> Tensor:
        """The tensor with the dimensions of rows in front; shares its memory."""
        if self.split > 1:
            tensor = tensor.unflatten(0, (self.split, -1))
        if self.rows == tuple(range(len(self.rows))):
            return tensor
        rest = [axis for axis in range(tensor.ndim) if axis not in self.rows]
        return tensor.permute(*self.rows, *rest)

    def matrix(self, tensor: Tensor) -> Tensor:
        """Rows ``(R, D)``: in the tensor's own memory if its strides allow, else not.

        Args:
            tensor: shaped like the parameter.
        """
        view = self.view(tensor)
        return view.flatten(0, len(self.rows) - 1).flatten(1)

    def home(self, view: Tensor) -> Tensor:
        """What `view` was made of, in the same memory; not of split parameters."""
        order = [*self.rows, *(i for i in range(view.ndim) if i not in self.rows)]
        return view.permute(*(order.index(axis) for axis in range(view.ndim)))

    def back(self, rows: Tensor, like: Tensor) -> Tensor:
        """Rows ``(R, D)`` in the shape of `like`: undoes `matrix`."""
        made = torch.empty_like(like, dtype=rows.dtype)
        self.view(made).copy_(rows.reshape(self.view(made).shape))
        return made


ROWS_FIRST = RowAxes()
"""``(R, ...)``: Linear and convolutions."""

ROWS_SECOND = RowAxes((1,))
"""``(D, R, ...)``: what multiplies from the right, as transformers' Conv1D does."""

EXPERTS = RowAxes((0, 1))
"""``(E, R / E, D)``: a matrix for each expert."""

EXPERTS_SECOND = RowAxes((0, 2))
"""``(E, D, R / E)``."""


class Seen(Enum):
    """Where the inputs and output gradients that belong to a weight are seen."""

    CALL = "call"
    """At the module's own call: what it is given, and what it returns."""

    PRODUCT = "product"
    """At products inside of its forward."""

    CALL_SITE = "call site"
    """Wherever `frog_triton.linear` is called with it."""

    REPLAY = "replay"
    """In a fused kernel, so that a few sequences are run again."""


@dataclass(frozen=True)
class Weight:
    """One weight of a module.

    Attributes:
        name: of the parameter, from the module: ``"weight"``, ``"out_proj.weight"``.
        bias: of the bias that belongs to the rows, or None.
        axes: where the weight has its rows.
        seen: where its samples come from.
        label: what is added to the module's name to name the layer; none for the one
            weight of a module.
    """

    name: str = "weight"
    bias: str | None = "bias"
    axes: RowAxes = ROWS_FIRST
    seen: Seen = Seen.CALL
    label: str = ""

    def of(self, module: nn.Module) -> nn.Parameter | None:
        """The parameter, unless it is None or computed."""
        return parameter(module, self.name)

    def bias_of(self, module: nn.Module) -> nn.Parameter | None:
        """The bias, if there is one that is a parameter."""
        return None if self.bias is None else parameter(module, self.bias)


def owner(module: nn.Module, path: str) -> tuple[nn.Module | None, str]:
    """The module that holds what a path names, and its name there."""
    if "." not in path:
        return module, path
    *parents, name = path.split(".")
    held: nn.Module | None = module
    for parent in parents:
        held = None if held is None else held._modules.get(parent)
    return held, name


def parameter(module: nn.Module, path: str) -> nn.Parameter | None:
    """What a path names, if it is a parameter."""
    held, name = owner(module, path)
    found = None if held is None else held._parameters.get(name)
    return found if isinstance(found, nn.Parameter) else None


def named(module: nn.Module, path: str) -> Tensor:
    """The tensor that a path names, whether a parameter or computed."""
    held, name = owner(module, path)
    found = getattr(held, name)
    assert isinstance(found, Tensor)
    return found
