"""State of the parameters: how it is made, follows them, and is loaded again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .groups import check_group, chosen

STATE_VERSION = 2
BEFORE: dict[str, Any] = {"orthogonalize": False}
"""Options that are younger than some saved states, as those were written without."""

MOMENTUM_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
ROW_KEYS = frozenset({"momentum_buffer"})
"""What the state of a preconditioned parameter holds."""

STEP_KEYS = frozenset({"step"})
"""What that of a layer's weight holds, too: the layer's step counter."""


def row_state(param: nn.Parameter, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Fresh state of a preconditioned parameter.

    Args:
        param: a layer's weight or bias.
        dtype: of the momentum. None: float32, or the parameter's own if that is wider.
    """
    dtype = dtype or torch.promote_types(param.dtype, torch.float32)
    # Sharded like the parameter.
    fmt = torch.contiguous_format
    return {"momentum_buffer": torch.zeros_like(param, dtype=dtype, memory_format=fmt)}


def step_counter(device: torch.device) -> Tensor:
    """A counter at 0."""
    return torch.zeros((), dtype=torch.float32, device=device)


def move_state(
    state: Mapping[Any, dict[str, Any]],
    group: Mapping[str, Any],
    params: Iterable[nn.Parameter],
) -> None:
    """Follow parameters that were moved to another device.

    The step counters of preconditioned layers stay on the host, where hooks read them,
    unless the group is capturable.

    Args:
        state: of all parameters.
        group: of these parameters.
        params: whose state is to be where they are.
    """
    on_host = group["updated_by"] == "frog" and not group["capturable"]
    for param in params:
        for key, value in state[param].items():
            if not isinstance(value, Tensor):
                continue
            stays = key == "step" and on_host
            device = torch.device("cpu") if stays else param.device
            if value.device != device:
                state[param][key] = value.to(device)


def check_version(state_dict: Mapping[str, Any]) -> None:
    """Raise ValueError for a state_dict that a later version has written."""
    version = state_dict.get("version", STATE_VERSION)
    if version > STATE_VERSION:
        raise ValueError(
            f"this state_dict has version {version}, but this frog_triton reads up "
            f"to {STATE_VERSION}: upgrade frog_triton"
        )


def check_state(
    optimizer: Optimizer, state_dict: Mapping[str, Any], names: Mapping[Any, str]
) -> None:
    """Raise ValueError for state that does not fit, before anything is changed.

    Args:
        optimizer: that is to load it.
        state_dict: whose groups are in this optimizer's order.
        names: of the parameters.
    """
    pairs = zip(state_dict["param_groups"], optimizer.param_groups, strict=False)
    for i, (saved, group) in enumerate(pairs):
        try:
            check_group({**group, **saved, "params": group["params"]}, places=False)
        except ValueError as error:
            raise ValueError(f"saved param_groups[{i}]: {error}") from None
        for index, param in zip(saved["params"], group["params"], strict=False):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor) and key in _SHAPED | {"step"}:
                    _check_tensor(names[param], param, key, value)


_SHAPED = {"momentum_buffer", "exp_avg", "exp_avg_sq"}


def _check_tensor(name: str, param: Tensor, key: str, value: Tensor) -> None:
    shape = param.shape if key in _SHAPED else torch.Size()
    if value.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(param.shape)}, but its saved {key} has "
            f"{tuple(value.shape)}; load the state of the same model, with the same "
            "options of FROG"
        )
    if key in _SHAPED and hasattr(param, "to_local") != hasattr(value, "to_local"):
        raise ValueError(
            f"{name}: {key} is sharded on one side only, here or in the saved state; "
            "load it with torch.distributed.checkpoint.state_dict"
            ".set_optimizer_state_dict"
        )


def in_order(
    state_dict: dict[str, Any],
    groups: Sequence[dict[str, Any]],
    names: Mapping[Any, str],
) -> dict[str, Any]:
    """A saved state with its parameters where this version keeps them.

    Version 1 moved layers that it let go of from their group to its other half, and
    listed their names under ``"unhooked"``.
    """
    gone = list(state_dict.get("unhooked", ()))
    saved = state_dict["param_groups"]
    if not gone or len(saved) != len(groups):
        return state_dict
    ordered: list[dict[str, Any]] = []
    for half, rest, saved_half, saved_rest in zip(
        groups[::2], groups[1::2], saved[::2], saved[1::2], strict=True
    ):
        left = [p for p in half["params"] if names[p] not in gone]
        moved = [p for p in half["params"] if names[p] in gone]
        moved.sort(key=lambda param: gone.index(names[param]))
        homes = [(saved_half, p) for p in left]
        homes += [(saved_rest, p) for p in (*rest["params"], *moved)]
        places = [*range(len(left)), *range(len(rest["params"]) + len(moved))]
        if len(places) != len(saved_half["params"]) + len(saved_rest["params"]):
            return state_dict
        found = {p: chosen(g, [i]) for (g, p), i in zip(homes, places, strict=True)}
        for group, theirs in ((half, saved_half), (rest, saved_rest)):
            lists = {
                key: [entry for p in group["params"] for entry in found[p][key]]
                for key in ("params", "param_names")
                if key in theirs
            }
            ordered.append({**theirs, **lists})
    return {**state_dict, "param_groups": ordered}


def restore(
    optimizer: Optimizer, state_dict: Mapping[str, Any], capturable: bool
) -> None:
    """Undo torch's cast to the parameters' dtype: a float32 momentum stays one.

    Step counters go where this optimizer keeps them, and `capturable` stays its own.

    Args:
        optimizer: that has just loaded `state_dict`.
        state_dict: as it was saved.
        capturable: of this optimizer.
    """
    saved = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for index, param in zip(saved, params, strict=True):
        for key, value in state_dict["state"].get(index, {}).items():
            if isinstance(value, Tensor):
                optimizer.state[param][key] = value.to(param.device, copy=True)
    for group in optimizer.param_groups:
        group["capturable"] = capturable
        known = [p for p in group["params"] if p in optimizer.state]
        move_state(optimizer.state, group, known)
