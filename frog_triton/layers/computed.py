"""Weights that are computed from other parameters at each call.

Weight normalisation makes a row of the weight from a row of its own, ``w_j = g_j v_j /
|v_j|``, so the rows of ``v`` are preconditioned with the layer's samples. By the chain
rule a row's Jacobian is ``g_j / |v_j|``, a factor that cancels in the normalised
Fisher, times a projection off the row itself, which is left out of it. ``g_j`` is a
scale, as those of norm layers are, and goes to the fallback. What mixes rows (spectral
normalisation, orthogonal weights) is left to the fallback as a whole.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm

from .rows import RowAxes, Weight


def row_wise(module: nn.Module, weight: Weight) -> Weight:
    """The weight, or the parameter that it is computed from row by row.

    Args:
        module: the layer.
        weight: that an adapter names.
    """
    norm = _norm(module, weight.name)
    if norm is not None and _by_row(norm[0], weight.axes):
        return replace(weight, name=norm[1])
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


def _norm(module: nn.Module, name: str) -> tuple[int, str] | None:
    """Of a weight normalisation: the dimension whose slices it scales, and v's name."""
    lists = getattr(module, "parametrizations", None)
    if lists is not None and name in lists:
        made = list(lists[name])
        if len(made) == 1 and isinstance(made[0], _WeightNorm):
            return made[0].dim, f"parametrizations.{name}.original1"
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == name:
            return hook.dim, f"{name}_v"
    return None


def _by_row(dim: int, axes: RowAxes) -> bool:
    return axes.split == 1 and axes.rows == (dim,)
