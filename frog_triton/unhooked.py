"""Layers whose weight is used without calling their module.

FROG sees no activations of theirs, so they move from the preconditioned half of their
parameter group to the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from .groups import chosen
from .routing import Plan

REASON = "used without calling its module"


def missed(plan: Plan, fired: Collection[str]) -> list[str]:
    """Layers that have a gradient although their hooks did not fire."""
    return [
        name
        for name, layer in plan.layers.items()
        if layer.weight.grad is not None and name not in fired
    ]


def names_of(plan: Plan, groups: Iterable[Mapping[str, Any]]) -> list[str]:
    """Parameters that were let go, in the order of the groups."""
    return [
        plan.names[p]
        for group in groups
        for p in group["params"]
        if plan.reasons[p] == REASON
    ]


def move(groups: Sequence[dict[str, Any]], param: nn.Parameter) -> dict[str, Any]:
    """Move a parameter to its group's other half, which follows; returns that."""
    for group, rest in itertools.pairwise(groups):
        places = range(len(group["params"]))
        kept = [i for i in places if group["params"][i] is not param]
        if len(kept) < len(places):
            (gone,) = set(places) - set(kept)
            for key, moved in chosen(group, [gone]).items():
                rest[key] += moved
            group |= chosen(group, kept)
            return rest
    raise KeyError("the parameter is in no group")


def order_like(
    groups: Iterable[dict[str, Any]],
    names: Mapping[nn.Parameter, str],
    unhooked: Sequence[str],
) -> None:
    """Reach the order of a saved optimizer: state goes by position in a group.

    Args:
        groups: changed in place.
        names: of the parameters.
        unhooked: what `names_of` said when it was saved.
    """
    order = {name: i for i, name in enumerate(unhooked)}
    for group in groups:
        place_of = {names[p]: i for i, p in enumerate(group["params"])}
        first = [i for name, i in place_of.items() if name not in order]
        late = sorted(place_of.keys() & order, key=lambda name: order[name])
        group |= chosen(group, first + [place_of[name] for name in late])
