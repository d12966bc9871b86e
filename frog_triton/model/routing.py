"""Which parameter is updated by what, and why."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from torch import nn
from torch.nn.parameter import UninitializedParameter

from ..layers import (
    LinearAdapter,
    Seen,
    adapter_for,
    computed_in,
    is_bare,
    is_proven,
    is_trusted,
    left_out,
)
from ..layers.rows import RowAxes, Weight, owner
from .outputs import named_outputs
from .plan import OUTPUT_LAYER, Layer, Plan, Use
from .table import Route as Route
from .table import RoutingTable as RoutingTable

Exclusion = str | type[nn.Module]


def route(
    model: nn.Module,
    group_of: Mapping[nn.Parameter, int],
    exclude: Sequence[Exclusion] = (),
    exclude_output_layer: bool = True,
    output_layers: Sequence[Exclusion] | None = None,
) -> Plan:
    """Sort the parameters of a model into layers FROG can precondition and the rest.

    Args:
        model: the model.
        group_of: the user's group of each parameter to be optimized. A bias in
            another group than its weight is not part of the rows.
        exclude: module or parameter names, shell patterns of them, or module types.
        exclude_output_layer: leave output layers to the fallback.
        output_layers: which these are, as for `exclude`. None: those that the model's
            methods and names tell, else until the first step the last one.

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
    uses = _uses(model)
    outputs: set[nn.Parameter] = set()
    guess = None
    if exclude_output_layer:
        told = _outputs(model, uses, output_layers)
        plan.search = told is None
        guess = list(uses)[-1] if told is None and len(uses) > 1 else None
        outputs = told or set()
        if output_layers is None:
            plan.named = {u.module for w in outputs for u in uses[w][1]}
        lone = outputs >= uses.keys() and not _has_bare(model)
        if lone and output_layers is None:
            outputs = set()
    for weight, (name, *_) in uses.items():
        users = uses[weight][1]
        reason = None if weight in group_of else "not in params"
        reason = reason or excluded.get(weight)
        if reason is None and weight in outputs:
            reason = OUTPUT_LAYER
        reason = reason or _obstacle(weight, users, owners[weight])
        if reason is not None:
            plan.reasons[weight] = reason
            continue
        layer = _layer(name, weight, users, owners)
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
        if weight is guess:
            plan.guess = layer.name
            plan.pending[layer.name] = OUTPUT_LAYER
    _explain(plan, model, uses, excluded)
    _add_bare(plan, model, group_of, {*excluded, *uses})
    for param in plan.names:
        if param not in group_of:
            plan.reasons[param] = "not in params"
    return plan


def _outputs(
    model: nn.Module, uses: Uses, output_layers: Sequence[Exclusion] | None
) -> set[nn.Parameter] | None:
    """Weights of the output layers, as user or model tell; None for neither."""
    if output_layers is not None:
        return set(_excluded(model, output_layers, "output_layers"))
    names = {module: name for name, module in model.named_modules()}
    users = {use.module: None for _, its in uses.values() for use in its}
    candidates = [(names[module], module) for module in users]
    told = named_outputs(model, candidates)
    if told is None:
        return None
    last = {use.module: w for w, (_, its) in uses.items() for use in its}
    return {last[module] for module in told if module in last}


def _has_bare(model: nn.Module) -> bool:
    return any(is_bare(m, name) for m in model.modules() for name in m._parameters)


def _add_bare(
    plan: Plan,
    model: nn.Module,
    group_of: Mapping[nn.Parameter, int],
    others: Collection[nn.Parameter],
) -> None:
    """Matrices that modules hold by themselves, until `frog_triton.linear` has them."""
    rows_first = (x.weight for x in plan.layers.values() if not x.axes.rows[0])
    placed = {_placement(weight) for weight in rows_first}
    for module in model.modules():
        for local, param in module._parameters.items():
            if param is None or param not in group_of or param in others:
                continue
            if not is_bare(module, local) or plan.names[param] in plan.layers:
                continue
            if placed and _placement(param) not in placed:
                continue  # not on the mesh of all others
            weight = Weight(local, None, seen=Seen.CALL_SITE)
            use = Use(module, weight, LinearAdapter(weight))
            geometry = use.adapter.geometry(module, weight)
            layer = Layer(plan.names[param], (use,), geometry, param, None)
            plan.layers[layer.name] = layer
            plan.pending[layer.name] = plan.reasons[param]


def _placement(param: nn.Parameter) -> tuple[object, object]:
    """Mesh and placements of a sharded parameter."""
    return getattr(param, "device_mesh", None), getattr(param, "placements", None)


Uses = dict[nn.Parameter, tuple[str, list[Use]]]
"""Of each weight that an adapter names: its layer's name, and who uses it."""


def _uses(model: nn.Module) -> Uses:
    """All weights of the model that adapters name, in the order of their modules."""
    uses: Uses = {}
    inner: set[nn.Module] = set()  # whose weight a module around them uses itself
    for name, module in model.named_modules():
        adapter = None if module in inner else adapter_for(module)
        if adapter is None:
            continue
        for weight in adapter.weights(module):
            param = weight.of(module)
            held, _ = owner(module, weight.name)
            if held is not None and held is not module:
                inner.add(held)
            if param is None:
                continue
            label = ".".join(filter(None, [name, weight.label])) or "weight"
            proven, trusted = is_proven(module), is_trusted(module)
            use = Use(module, weight, adapter, proven, trusted)
            uses.setdefault(param, (label, []))[1].append(use)
    return uses


def _owners(model: nn.Module) -> dict[nn.Parameter, list[nn.Module]]:
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            owners.setdefault(param, []).append(module)
    return owners


def _obstacle(
    weight: nn.Parameter, users: list[Use], owners: list[nn.Module]
) -> str | None:
    """Why a weight that adapters name cannot be preconditioned after all."""
    if not weight.is_floating_point():
        return "weight is not real"
    if weight.numel() == 0:
        return "weight has no elements"
    holders = [owner(use.module, use.weight.name)[0] for use in users]
    for held in owners:
        if held not in holders:
            return f"weight shared with {type(held).__name__}"
    first = users[0]
    for use in users:
        if use.adapter is not first.adapter or use.weight != first.weight:
            return f"weight shared with {type(use.module).__name__}"
    shapes = {_shape(use) for use in users}
    if len(shapes) > 1:
        return "weight shared by layers of different geometry"
    return _cut_by_shards(weight, first.weight.axes)


def _shape(use: Use) -> tuple[int, int, int]:
    found = use.adapter.geometry(use.module, use.weight)
    return found.rows, found.dim, found.groups


def _cut_by_shards(weight: nn.Parameter, axes: RowAxes) -> str | None:
    """Why a weight is left alone whose rows lie on several ranks by default."""
    first = axes.rows[0]
    if first == 0 and axes.split == 1:
        return None  # other placements are an error, which says what to do
    for placement in getattr(weight, "placements", ()):
        if not placement.is_shard():
            continue
        reason = f"sharded on dimension {placement.dim}, which cuts its"
        if axes.split > 1:
            return f"{reason} groups"
        if placement.dim != first:
            return (
                f"{reason} rows: shard it on {first} by fully_shard's "
                "shard_placement_fn"
            )
    return None


def _layer(
    name: str,
    weight: nn.Parameter,
    users: list[Use],
    owners: dict[nn.Parameter, list[nn.Module]],
) -> Layer:
    first = users[0]
    bias = first.weight.bias_of(first.module)
    geometry = first.adapter.geometry(first.module, first.weight)
    if bias is not None and bias.numel() != geometry.rows:
        raise ValueError(
            f"{name}: {type(first.module).__name__} has a weight of shape "
            f"{tuple(weight.shape)}, hence {geometry.rows} rows by its adapter, but a "
            f"bias of {bias.numel()}; if the weight is (in, out), register it with "
            "LinearAdapter(Weight(axes=ROWS_SECOND))"
        )
    layer = Layer(name, tuple(users), geometry, weight, bias)
    # A bias is part of the rows only if it goes wherever the weight goes.
    if bias is None or not _follow(bias, users, owners[bias]):
        return layer.without_bias()
    return layer


def _follow(bias: nn.Parameter, users: list[Use], owners: list[nn.Module]) -> bool:
    """Whether all that use a weight, and nobody else, use its bias."""
    holders = [
        owner(use.module, use.weight.bias)[0] for use in users if use.weight.bias
    ]
    return owners == holders and all(u.weight.bias_of(u.module) is bias for u in users)


def _explain(
    plan: Plan,
    model: nn.Module,
    uses: Uses,
    excluded: dict[nn.Parameter, str],
) -> None:
    """Fill in the reasons of all that has none yet."""
    for layer in plan.layers.values():
        kind = type(layer.uses[0].module).__name__
        shared = "" if len(layer.uses) == 1 else f", shared by {len(layer.uses)}"
        for param in layer.params:
            plan.reasons[param] = kind + shared
    follows = {}  # a bias that is no part of the rows, and the weight it belongs to
    for weight, (_, users) in uses.items():
        for use in users:
            bias = use.weight.bias_of(use.module)
            if bias is not None:
                follows[bias] = weight
    preconditioned = {p for layer in plan.layers.values() for p in layer.params}
    computed = computed_in(model)
    for module in model.modules():
        for local, param in module.named_parameters(recurse=False):
            if param in plan.reasons:
                continue
            if param in excluded:
                reason = excluded[param]
            elif param in follows:
                weight = follows[param]
                reason = (
                    "bias not shared like its weight"
                    if weight in preconditioned
                    else plan.reasons[weight]
                )
            else:
                reason = left_out(computed, module, local)
            plan.reasons[param] = reason


def _excluded(
    model: nn.Module, exclude: Sequence[Exclusion], option: str = "exclude"
) -> dict[nn.Parameter, str]:
    found: dict[nn.Parameter, str] = {}
    modules, params = dict(model.named_modules()), dict(model.named_parameters())
    for entry in exclude:
        matched = list(_matches(entry, modules, params, option))
        if not matched:
            raise ValueError(_no_match(entry, [*modules, *params], option))
        label = repr(entry) if isinstance(entry, str) else entry.__name__
        for param in matched:
            found.setdefault(param, f"excluded by {label}")
    return found


def _matches(
    entry: Exclusion,
    modules: dict[str, nn.Module],
    params: dict[str, nn.Parameter],
    option: str,
) -> Iterator[nn.Parameter]:
    if isinstance(entry, type):
        for module in modules.values():
            if isinstance(module, entry):
                yield from module.parameters()
        return
    if not isinstance(entry, str):
        raise TypeError(
            f"{option} takes names, patterns or module types, got {entry!r}"
        )
    for name, module in modules.items():
        if name and fnmatch.fnmatchcase(name, entry):
            yield from module.parameters()
    for name, param in params.items():
        if fnmatch.fnmatchcase(name, entry):
            yield param


def _no_match(entry: Exclusion, names: Iterable[str], option: str) -> str:
    if isinstance(entry, str):
        close = difflib.get_close_matches(entry, [n for n in names if n], n=3)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        return f"{option} names {entry!r}, but the model has no such module{hint}"
    return f"{option} names {entry.__name__}, but the model has no module of that type"
