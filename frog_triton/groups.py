"""Parameter groups in the forms that torch's optimizers take."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .options import check_group, scalar


def user_groups(model: nn.Module, params: Iterable[Any] | None) -> list[dict[str, Any]]:
    """`params` in any of torch's forms, or all of the model's, as a list of groups.

    Raises:
        TypeError: it is none of those forms.
        ValueError: it is empty, or names are missing.
    """
    if isinstance(params, Tensor | set | frozenset | str):
        raise TypeError(
            "params must be a list of tensors, (name, tensor) pairs or dicts, got "
            f"{type(params).__name__}"
        )
    entries = list(model.parameters() if params is None else params)
    if params is not None and not entries:
        raise ValueError("params is empty; leave it out to optimize all parameters")
    if entries and isinstance(entries[0], dict):
        return [user_group(group) for group in entries]
    return [user_group({"params": entries})]


def user_group(group: Any) -> dict[str, Any]:
    """One torch-style group with its tensors in a list.

    Names that come with the tensors go to ``"param_names"``, where torch keeps them.

    Raises:
        TypeError: it is no group, or holds what is no tensor.
        ValueError: some tensors have names and some have none.
    """
    if not isinstance(group, dict) or "params" not in group:
        raise TypeError(f"a parameter group must be a dict with params, got {group!r}")
    params = group["params"]
    if isinstance(params, set | frozenset):
        raise TypeError(
            "the order of a set changes between runs, and state goes by order: "
            "pass the group's params as a list"
        )
    entries = [params] if isinstance(params, Tensor) else list(params)
    pairs = [entry for entry in entries if isinstance(entry, tuple)]
    if pairs and len(pairs) < len(entries):
        raise ValueError("some params of a group have names and some have none")
    tensors = [pair[1] for pair in pairs] or entries
    for entry in tensors:
        if not isinstance(entry, Tensor):
            raise TypeError(
                f"FROG optimizes tensors, but params holds a {type(entry).__name__}"
            )
    named = {"param_names": [pair[0] for pair in pairs]} if pairs else {}
    options = {key: scalar(value) for key, value in group.items() if key != "params"}
    return {**options, "params": tensors, **named}


def check_names(group: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError unless a group has names as others have them, or as they none.

    Args:
        group: a new one.
        others: those that are there.
    """
    if ("param_names" in group) != ("param_names" in others[0]):
        raise ValueError(
            "parameter groups must all have names or none: pass (name, tensor) "
            "pairs to all or to none"
        )


def part_of(group: dict[str, Any], params: Collection[Tensor]) -> dict[str, Any]:
    """A group with only some of its parameters, and their names if it has names."""
    kept = [i for i, param in enumerate(group["params"]) if param in params]
    return {**group, **chosen(group, kept)}


def chosen(group: Mapping[str, Any], places: Sequence[int]) -> dict[str, Any]:
    """A group's lists, of the parameters in these places and in this order."""
    lists = [key for key in ("params", "param_names") if key in group]
    return {key: [group[key][i] for i in places] for key in lists}


def fallback_lr(
    group: Mapping[str, Any], lr: float | Tensor, default: float | Tensor
) -> float | Tensor:
    """The rate of a group's parameters that are not preconditioned.

    Its own ``fallback_lr``; else the default, scaled as the group scales `lr`.

    Args:
        group: the user's.
        lr: the optimizer's default.
        default: of `fallback_lr`.
    """
    if "fallback_lr" in group or "lr" not in group:
        given: float | Tensor = group.get("fallback_lr", default)
        return given
    own: float | Tensor = group["lr"]
    if default is lr:
        return own
    return default * (own / lr) if lr != 0 else default


def own_tensors(groups: Iterable[dict[str, Any]]) -> None:
    """Give each group tensors of its own, so that a schedule may differ by group.

    The first group that has a tensor keeps the very one.
    """
    taken: set[tuple[torch.device, int]] = set()
    for group in groups:
        here = set()
        for name, value in group.items():
            if isinstance(value, Tensor):
                place = (value.device, value.data_ptr())
                if place in taken:
                    group[name] = value.clone()
                here.add(place)
        taken |= here


def check_groups(groups: Iterable[dict[str, Any]]) -> None:
    """Raise ValueError for an entry, set since the last step, that no step can use.

    A tensor of one number becomes one without dimensions, in the same memory. Tensors
    that the host would have to wait for are taken as they are.
    """
    for i, group in enumerate(groups):
        for name, value in group.items():
            if isinstance(value, Tensor) and value.ndim:
                group[name] = scalar(value)
        try:
            check_group(group, places=False)
        except ValueError as error:
            raise ValueError(f"param_groups[{i}]: {error}") from None


def entries(groups: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """All entries of parameter groups but the parameters, as one would write them."""
    return {
        f"param_groups[{i}][{key!r}]": float(value)
        if isinstance(value, Tensor)
        else value
        for i, group in enumerate(groups)
        for key, value in group.items()
        if key != "params"
    }
