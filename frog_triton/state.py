"""State of the parameters: how it is made, follows them, and is loaded again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

STATE_VERSION = 1
BEFORE: dict[str, Any] = {"orthogonalize": False}
"""Options that are younger than some saved states, as those were written without."""

MOMENTUM_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def row_state(
    param: nn.Parameter, dtype: torch.dtype | None, *, step: bool, capturable: bool
) -> dict[str, Tensor]:
    """Fresh state of a preconditioned parameter.

    Args:
        param: a layer's weight or bias.
        dtype: of the momentum. None: float32, or the parameter's own if that is wider.
        step: whether the layer's step counter is kept here, as it is with its weight.
        capturable: keep the counter on the parameter's device.
    """
    dtype = dtype or torch.promote_types(param.dtype, torch.float32)
    # Sharded like the parameter.
    fmt = torch.contiguous_format
    buffer = torch.zeros_like(param, dtype=dtype, memory_format=fmt)
    if not step:
        return {"momentum_buffer": buffer}
    counter = step_counter(param.device if capturable else torch.device("cpu"))
    return {"momentum_buffer": buffer, "step": counter}


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


def check_shapes(
    optimizer: Optimizer, state_dict: Mapping[str, Any], names: Mapping[Any, str]
) -> None:
    """Raise ValueError for state that does not fit, before anything is changed."""
    for saved, group in zip(
        state_dict["param_groups"], optimizer.param_groups, strict=False
    ):
        for index, param in zip(saved["params"], group["params"], strict=False):
            for key, value in state_dict["state"].get(index, {}).items():
                known = optimizer.state[param].get(key)
                fits = known is not None and known.shape == value.shape
                if isinstance(value, Tensor) and not fits:
                    raise ValueError(
                        f"{names[param]} has shape {tuple(param.shape)}, but its saved "
                        f"{key} has {tuple(value.shape)}; load the state of the same "
                        "model, with the same options of FROG"
                    )
                sharded = [hasattr(t, "to_local") for t in (known, value)]
                if key != "step" and sharded[0] != sharded[1]:
                    raise ValueError(
                        f"{names[param]}: {key} is sharded on one side only, here or "
                        "in the saved state; load it with "
                        "torch.distributed.checkpoint.state_dict"
                        ".set_optimizer_state_dict"
                    )


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
        move_state(optimizer.state, group, group["params"])
