"""Parameter groups in the forms that torch's optimizers take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .preconditioner import check_solver_options


def param_list(params: Any) -> list[nn.Parameter]:
    """One tensor, tensors, or ``(name, tensor)`` pairs, as a list of tensors."""
    if isinstance(params, Tensor):
        params = [params]
    return [p[1] if isinstance(p, tuple) else p for p in params]


def user_groups(model: nn.Module, params: Iterable[Any] | None) -> list[dict[str, Any]]:
    """`params` in any of torch's forms, or all of the model's, as a list of groups."""
    entries = list(model.parameters() if params is None else params)
    if entries and isinstance(entries[0], dict):
        return [{**group, "params": param_list(group["params"])} for group in entries]
    return [{"params": param_list(entries)}]


def check_group(group: dict[str, Any]) -> None:
    """Raise ValueError for a group entry that no step can use."""
    if group["capturable"]:
        _check_places(group)
    for name in ("lr", "momentum", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"{name} must not be negative, got {group[name]}")
    if group["nesterov"] and group["momentum"] == 0:
        raise ValueError("nesterov needs a momentum above 0")
    check_solver_options(group["damping"], group["cg_iters"], "auto", "auto")


def _check_places(group: dict[str, Any]) -> None:
    """A tensor entry of a capturable group lies where its parameters do."""
    devices = {param.device for param in group["params"]}
    for name, value in group.items():
        if isinstance(value, Tensor) and {value.device} != devices:
            where = ", ".join(sorted(map(str, devices)))
            raise ValueError(
                f"{name} is a tensor on {value.device}, but its parameters are on "
                f"{where}; with capturable=True move it there"
            )
