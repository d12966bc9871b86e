"""Layer kinds and their registry.

A new kind is one `LayerAdapter` subclass and one `register` line.
"""

from __future__ import annotations

from torch import nn

from .base import (
    Geometry,
    LayerAdapter,
    LinearMap,
    MatrixMap,
    pool_samples,
)
from .conv import ConvAdapter, ConvMap
from .linear import LinearAdapter

__all__ = [
    "ConvMap",
    "Geometry",
    "LayerAdapter",
    "LinearMap",
    "MatrixMap",
    "adapter_for",
    "pool_samples",
    "register",
]

_REGISTRY: dict[type[nn.Module], LayerAdapter] = {}


def register(kind: type[nn.Module], adapter: LayerAdapter) -> None:
    """Let `adapter` serve modules of type `kind`."""
    _REGISTRY[kind] = adapter


def adapter_for(module: nn.Module) -> LayerAdapter | None:
    """The adapter of a module's kind, or None.

    A subclass is served by its parent's adapter as long as it inherits ``forward``:
    a layer that computes something else is not the linear map its parent is. Nor is
    one whose ``forward`` was replaced on the instance.
    """
    if "forward" in vars(module):
        return None
    for kind in type(module).__mro__:
        if kind in _REGISTRY:
            same = type(module).forward is kind.forward
            return _REGISTRY[kind] if same else None
    return None


register(nn.Linear, LinearAdapter())
for _kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    register(_kind, ConvAdapter())
