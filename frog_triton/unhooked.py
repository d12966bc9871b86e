"""Layers whose weight is used without calling their module.

FROG sees no activations of theirs, so they move from the preconditioned half of their
parameter group to the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

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
        kept = [p for p in group["params"] if p is not param]
        if len(kept) < len(group["params"]):
            group["params"] = kept
            rest["params"].append(param)
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
        late = [p for p in group["params"] if names[p] in order]
        first = [p for p in group["params"] if names[p] not in order]
        group["params"] = first + sorted(late, key=lambda p: order[names[p]])
