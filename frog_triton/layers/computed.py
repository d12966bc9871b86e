"""Weights that are computed from other parameters at each call.

Weight normalization makes a row of the weight from a row of its own, ``w_j = g_j v_j /
|v_j|``, so the rows of ``v`` are preconditioned with the layer's samples. By the chain
rule a row's Jacobian is ``g_j / |v_j|``, a factor that cancels in the normalized
Fisher, times a projection off the row itself, which is left out of it. ``g_j`` is a
scale, as those of norm layers are, and goes to the fallback. Spectral normalization
divides all rows by one number, ``w = v / sigma(v)``: served alike, without what that
number's gradient adds. What mixes rows (orthogonal weights) goes to the fallback.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .rows import Weight


def row_wise(module: nn.Module, weight: Weight) -> Weight:
    """The weight, or the parameter that it is computed from row by row.

    Args:
        module: the layer.
        weight: that an adapter names.
    """
    for axis, name in _norms(module, weight.name):
        if axis is None or (weight.axes.split == 1 and weight.axes.rows == (axis,)):
            return replace(weight, name=name)
    return weight


def computed_by(module: nn.Module, name: str = "weight") -> str | None:
    """What computes a module's weight, in a word; None if it is a parameter."""
    if name in module._parameters:
        return None
    lists = getattr(module, "parametrizations", None)
    if lists is not None and name in lists:
        kinds = [type(made).__name__.lstrip("_") for made in lists[name]]
        return ", ".join(_NAMES.get(kind, kind) for kind in kinds)
    for hook in module._forward_pre_hooks.values():
        if name in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None)):
            kind = type(hook).__name__
            return _NAMES.get(kind, kind)
    return None


_NAMES = {
    "WeightNorm": "weight_norm",
    "SpectralNorm": "spectral_norm",
    "Orthogonal": "orthogonal",
}


def _norms(module: nn.Module, name: str) -> Iterator[tuple[int | None, str]]:
    """Of a normalized weight: the parameter behind it, and the axis of the norms."""
    lists = getattr(module, "parametrizations", None)
    if lists is not None and name in lists and len(lists[name]) == 1:
        (made,) = lists[name]
        if isinstance(made, _WeightNorm):
            yield made.dim, f"parametrizations.{name}.original1"
        if isinstance(made, _SpectralNorm):
            yield None, f"parametrizations.{name}.original"
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == name:
            yield hook.dim, f"{name}_v"
        if isinstance(hook, SpectralNorm) and hook.name == name:
            yield None, f"{name}_orig"
