"""Which parameter is updated by what, and why."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn
from torch.nn.parameter import UninitializedParameter

from .layers import Geometry, LayerAdapter, adapter_for
from .table import Route as Route
from .table import RoutingTable as RoutingTable

Exclusion = str | type[nn.Module]


@dataclass
class Layer:
    """A preconditioned weight, the modules that use it, and its bias if it has one.

    Attributes:
        name: of the (first) module; the weight's own name where the model is a layer.
        modules: the modules that share the weight, usually one.
        adapter: of their kind.
        geometry: of the rows.
        weight: the parameter.
        bias: the bias that belongs to the rows, or None.
    """

    name: str
    modules: tuple[nn.Module, ...]
    adapter: LayerAdapter
    geometry: Geometry
    weight: nn.Parameter
    bias: nn.Parameter | None

    def without_bias(self) -> Layer:
        """The same layer, its rows without the bias."""
        return replace(self, bias=None, geometry=replace(self.geometry, bias=False))

    @property
    def params(self) -> list[nn.Parameter]:
        """The weight, and the bias if there is one."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]


@dataclass
class Plan:
    """The result of routing.

    Attributes:
        layers: what FROG preconditions, by name, in model order.
        names: every parameter's name, in model order.
        reasons: why a parameter goes where it goes.
    """

    layers: dict[str, Layer] = field(default_factory=dict)
    names: dict[nn.Parameter, str] = field(default_factory=dict)
    reasons: dict[nn.Parameter, str] = field(default_factory=dict)

    def preconditioned(self) -> set[nn.Parameter]:
        """Parameters that belong to a layer."""
        return {p for layer in self.layers.values() for p in layer.params}


def route(
    model: nn.Module,
    group_of: Mapping[nn.Parameter, int],
    exclude: Sequence[Exclusion] = (),
    exclude_output_layer: bool = True,
) -> Plan:
    """Sort the parameters of a model into layers FROG can precondition and the rest.

    Args:
        model: the model.
        group_of: the user's group of each parameter to be optimized. A bias in
            another group than its weight is not part of the rows.
        exclude: module or parameter names, shell patterns of them, or module types.
        exclude_output_layer: leave the last supported layer, in the order of
            ``model.modules()``, to the fallback.

    Raises:
        TypeError: an exclusion is neither a string nor a module type.
        ValueError: an exclusion matches nothing, or a parameter has no shape yet.
    """
    plan = Plan(names={p: name for name, p in model.named_parameters()})
    for name, param in model.named_parameters():
        if isinstance(param, UninitializedParameter):
            raise ValueError(
                f"{name} has no shape yet: run one forward pass before FROG(model)"
            )
    excluded = _excluded(model, exclude)
    owners = _owners(model)
    supported = [
        (name, module)
        for name, module in model.named_modules()
        if adapter_for(module) is not None and _own_weight(module) is not None
    ]
    output = supported[-1][1] if supported and exclude_output_layer else None
    layered: set[nn.Parameter] = set()
    for name, module in supported:
        weight = _own_weight(module)
        assert weight is not None
        if weight in layered or weight in plan.reasons:
            continue  # shared with a module seen before
        users = owners[weight]
        reason = None if weight in group_of else "not in params"
        reason = reason or excluded.get(weight)
        if reason is None and any(user is output for user in users):
            reason = "output layer"
        reason = reason or _obstacle(module, users)
        if reason is None:
            layer = _layer(name, module, users, owners)
            bias = layer.bias
            if bias is not None and group_of.get(bias) != group_of[weight]:
                plan.reasons[bias] = "in another group than its weight"
            elif bias is not None and bias in excluded:
                plan.reasons[bias] = excluded[bias]
            elif bias is not None and bias.dtype != weight.dtype:
                plan.reasons[bias] = "of another dtype than its weight"
            if bias in plan.reasons:
                layer = layer.without_bias()
            plan.layers[layer.name] = layer
            layered.add(weight)
        else:
            plan.reasons[weight] = reason
    _explain(plan, model, excluded)
    for param in plan.names:
        if param not in group_of:
            plan.reasons[param] = "not in params"
    return plan


def _own_weight(module: nn.Module) -> nn.Parameter | None:
    """The weight, unless a parametrization or a hook computes it."""
    weight = module._parameters.get("weight")
    return weight if isinstance(weight, nn.Parameter) else None


def _owners(model: nn.Module) -> dict[nn.Parameter, list[nn.Module]]:
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            owners.setdefault(param, []).append(module)
    return owners


def _obstacle(module: nn.Module, users: list[nn.Module]) -> str | None:
    """Why a supported layer cannot be preconditioned after all."""
    adapter = adapter_for(module)
    assert adapter is not None
    geometry = adapter.geometry(module)
    weight = _own_weight(module)
    if weight is None or not weight.is_floating_point():
        return "weight is not real"
    if weight.numel() == 0:
        return "weight has no elements"
    for user in users:
        other = adapter_for(user)
        if other is not adapter or _own_weight(user) is not weight:
            return f"weight shared with {type(user).__name__}"
        theirs = other.geometry(user)
        if (theirs.rows, theirs.dim, theirs.groups) != (
            geometry.rows,
            geometry.dim,
            geometry.groups,
        ):
            return "weight shared by layers of different geometry"
    return None


def _layer(
    name: str,
    module: nn.Module,
    users: list[nn.Module],
    owners: dict[nn.Parameter, list[nn.Module]],
) -> Layer:
    adapter, weight = adapter_for(module), _own_weight(module)
    assert adapter is not None and weight is not None
    bias = module._parameters.get("bias")
    geometry = adapter.geometry(module)
    layer = Layer(name or "weight", tuple(users), adapter, geometry, weight, bias)
    # A bias is part of the rows only if it goes wherever the weight goes.
    if bias is None or owners[bias] != users:
        return layer.without_bias()
    return layer


def _explain(plan: Plan, model: nn.Module, excluded: dict[nn.Parameter, str]) -> None:
    """Fill in the reasons of all that has none yet."""
    for layer in plan.layers.values():
        kind = type(layer.modules[0]).__name__
        shared = "" if len(layer.modules) == 1 else f", shared by {len(layer.modules)}"
        for param in layer.params:
            plan.reasons[param] = kind + shared
    for module in model.modules():
        for local, param in module.named_parameters(recurse=False):
            if param in plan.reasons:
                continue
            kind = type(module).__name__
            weight = _own_weight(module)
            if param in excluded:
                reason = excluded[param]
            elif weight is not None and local == "bias" and weight in plan.reasons:
                follows = plan.reasons[weight]
                reason = (
                    "bias not shared like its weight"
                    if weight in plan.preconditioned()
                    else follows
                )
            elif adapter_for(module) is not None:
                reason = f"{kind} whose weight is computed"
            elif "forward" in vars(module):
                reason = f"{kind} whose forward was replaced"
            else:
                reason = f"no adapter for {kind}"
            plan.reasons[param] = reason


def _excluded(
    model: nn.Module, exclude: Sequence[Exclusion]
) -> dict[nn.Parameter, str]:
    found: dict[nn.Parameter, str] = {}
    modules, params = dict(model.named_modules()), dict(model.named_parameters())
    for entry in exclude:
        matched = list(_matches(entry, modules, params))
        if not matched:
            raise ValueError(_no_match(entry, [*modules, *params]))
        label = repr(entry) if isinstance(entry, str) else entry.__name__
        for param in matched:
            found.setdefault(param, f"excluded by {label}")
    return found


def _matches(
    entry: Exclusion,
    modules: dict[str, nn.Module],
    params: dict[str, nn.Parameter],
) -> Iterator[nn.Parameter]:
    if isinstance(entry, type):
        for module in modules.values():
            if isinstance(module, entry):
                yield from module.parameters()
        return
    if not isinstance(entry, str):
        raise TypeError(f"exclude takes names, patterns or module types, got {entry!r}")
    for name, module in modules.items():
        if name and fnmatch.fnmatchcase(name, entry):
            yield from module.parameters()
    for name, param in params.items():
        if fnmatch.fnmatchcase(name, entry):
            yield param


def _no_match(entry: Exclusion, names: Iterable[str]) -> str:
    if isinstance(entry, str):
        close = difflib.get_close_matches(entry, [n for n in names if n], n=3)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        return f"exclude names {entry!r}, but the model has no such module{hint}"
    return f"exclude names {entry.__name__}, but the model has no module of that type"
