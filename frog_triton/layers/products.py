"""Modules whose products happen inside of their forward: attention, experts.

Their weights are groups of rows in the sense of `Geometry`: each group meets inputs of
its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from torch import nn

from .base import Geometry
from .linear import LinearAdapter
from .rows import EXPERTS, EXPERTS_SECOND, ROWS_SECOND, Seen, Weight, named


class AttentionAdapter(LinearAdapter):
    """`torch.nn.MultiheadAttention`.

    ``in_proj_weight`` is three matrices in one, whose inputs are query, key and value.
    """

    def weights(self, module: nn.Module) -> tuple[Weight, ...]:
        product = Seen.PRODUCT
        out = Weight("out_proj.weight", "out_proj.bias", seen=product, label="out_proj")
        if cast(nn.MultiheadAttention, module)._qkv_same_embed_dim:
            own = Weight(
                "in_proj_weight", "in_proj_bias", seen=product, label="in_proj"
            )
            return own, out
        # Their biases are parts of one parameter, which goes to the fallback.
        names = ("q_proj", "k_proj", "v_proj")
        separate = (Weight(f"{n}_weight", None, seen=product, label=n) for n in names)
        return *separate, out

    def geometry(self, module: nn.Module, weight: Weight | None = None) -> Geometry:
        weight = weight or self.weights(module)[0]
        rows, dim = named(module, weight.name).shape
        groups = 3 if weight.name == "in_proj_weight" else 1
        return Geometry(rows, dim, groups, weight.bias_of(module) is not None)


class ExpertsAdapter(LinearAdapter):
    """Mixtures of experts with stacked weights: ``(E, out, in)``, ``(E, in, out)``.

    An expert is a group of rows, with the tokens that were sent to it for samples.
    """

    def weights(self, module: nn.Module) -> tuple[Weight, ...]:
        found = []
        for name, param in _stacked(module).items():
            axes = EXPERTS_SECOND if _inputs_first(module, name, param) else EXPERTS
            rows = axes.view(param).shape[:2]
            names = (f"{name}_bias", name.replace("weight", "bias"), f"{name}_b")
            bias = next((b for b in names if _is_bias(module, b, rows)), None)
            found.append(Weight(name, bias, axes, Seen.PRODUCT, label=name))
        return tuple(found)

    def geometry(self, module: nn.Module, weight: Weight | None = None) -> Geometry:
        weight = weight or self.weights(module)[0]
        experts, rows, dim = weight.axes.view(named(module, weight.name)).shape
        return Geometry(
            experts * rows, dim, experts, weight.bias_of(module) is not None
        )


_BARE = Weight(seen=Seen.PRODUCT)
_CALLED = ("linear", "router", "gate", "dense", "proj")


class BareLinearAdapter(LinearAdapter):
    """Modules that are a Linear layer in all but type, such as mixtures' routers."""

    def __init__(self) -> None:
        super().__init__(_BARE)

    def weights(self, module: nn.Module) -> tuple[Weight, ...]:
        (weight,) = super().weights(module)
        rows = named(module, weight.name).shape
        bias = weight.bias_of(module)
        if bias is None or bias.shape == rows[:1]:
            return (weight,)
        if bias.shape == rows[1:]:  # (in, out)
            return (replace(weight, axes=ROWS_SECOND),)
        return (replace(weight, bias=None),)


def is_bare_linear(module: nn.Module) -> bool:
    """Whether a module looks like one: no children, a matrix, and a telling name."""
    weight = module._parameters.get("weight")
    name = type(module).__name__.lower()
    return (
        weight is not None
        and weight.ndim == 2
        and not module._modules
        and not hasattr(module, "num_embeddings")
        and any(word in name for word in _CALLED)
    )


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds stacked experts: it says how many, and has as many."""
    return len(_stacked(module)) > 0


def _stacked(module: nn.Module) -> dict[str, nn.Parameter]:
    counts = (getattr(module, n, None) for n in ("num_experts", "num_local_experts"))
    count = next((c for c in counts if isinstance(c, int) and c > 1), None)
    if count is None:
        return {}
    return {
        name: param
        for name, param in module._parameters.items()
        if param is not None and param.ndim == 3 and param.shape[0] == count
    }


def _inputs_first(module: nn.Module, name: str, param: nn.Parameter) -> bool:
    """Whether an expert's matrix is ``(in, out)``.

    transformers' modules say so; else the hidden size tells, on which the first
    product's inputs and the last one's outputs lie.
    """
    said = getattr(module, "is_transposed", None)
    if isinstance(said, bool):
        return said
    hidden = getattr(module, "hidden_size", getattr(module, "hidden_dim", None))
    _, first, second = param.shape
    if first == second or hidden not in (first, second):
        return False
    down = any(word in name for word in ("down", "w2", "fc2", "out"))
    return bool((second if down else first) == hidden)


def _is_bias(module: nn.Module, name: str, rows: tuple[int, ...]) -> bool:
    found = module._parameters.get(name)
    return found is not None and tuple(found.shape) == tuple(rows)
