"""Loading a saved state: torch's own way, with all checks before anything changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .fallback import check_updated_by
from .groups import chosen, own_tensors
from .linalg.rows import is_number
from .options import check_group
from .state import BEFORE, STATE_VERSION, move_state


@contextmanager
def adding(optimizer: Optimizer, values: Mapping[str, Any]) -> Iterator[None]:
    """States saved in this context have more entries, which the user's hooks see."""

    def add(_: Optimizer, saved: dict[str, Any]) -> None:
        saved |= values

    hook = optimizer.register_state_dict_post_hook(add, prepend=True)
    try:
        yield
    finally:
        hook.remove()


class Loading:
    """One load, between torch's hooks: the last to see the state, and the first after.

    So the user's own hooks change what is loaded before it is checked, and find it in
    place afterwards.

    Args:
        names: of the parameters.
        groups: the optimizer's.
        capturable: the optimizer's.
        finish: called when all is in place, before the user's hooks.
    """

    def __init__(
        self,
        names: Mapping[Any, str],
        groups: Sequence[dict[str, Any]],
        capturable: bool,
        finish: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self._names = names
        self._before = [dict(group) for group in groups]
        self._capturable = capturable
        self._finish = finish
        self._loaded: dict[str, Any] = {}

    def run(
        self, optimizer: Optimizer, load: Callable[[dict[str, Any]], None], state: Any
    ) -> None:
        """Load.

        Args:
            optimizer: that loads.
            load: torch's method.
            state: as it was saved.
        """
        hooks = [
            optimizer.register_load_state_dict_pre_hook(self._check),
            optimizer.register_load_state_dict_post_hook(self._complete, prepend=True),
        ]
        try:
            load(state)
        finally:
            for hook in hooks:
                hook.remove()

    def _check(self, optimizer: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        """Refuse what does not fit; nothing has been changed yet."""
        _check_version(given)
        check_updated_by(given["param_groups"], "saved ")
        self._loaded = _in_order(given, optimizer.param_groups, self._names)
        _check_state(optimizer, self._loaded, self._names)
        return self._loaded

    def _complete(self, optimizer: Optimizer) -> None:
        """What torch leaves out."""
        for group, before in zip(optimizer.param_groups, self._before, strict=True):
            for name, value in (before | BEFORE).items():
                group.setdefault(name, value)
        own_tensors(optimizer.param_groups)
        _restore(optimizer, self._loaded, self._capturable)
        self._finish(self._loaded)


def _check_version(state_dict: Mapping[str, Any]) -> None:
    """Raise ValueError for a state_dict that a later version has written."""
    version = state_dict.get("version", STATE_VERSION)
    if not isinstance(version, int) or version > STATE_VERSION:
        raise ValueError(
            f"this state_dict has version {version}, but this frog_triton reads up "
            f"to {STATE_VERSION}: upgrade frog_triton"
        )


def _check_state(
    optimizer: Optimizer, state_dict: Mapping[str, Any], names: Mapping[Any, str]
) -> None:
    """Raise ValueError for state that does not fit, before anything is changed.

    Args:
        optimizer: that is to load it.
        state_dict: whose groups are in this optimizer's order.
        names: of the parameters.
    """
    for key, kind in (("let_go", str), ("misses", int)):
        entries = state_dict.get(key, {})
        fits = isinstance(entries, Mapping)
        if not fits or not all(isinstance(value, kind) for value in entries.values()):
            raise ValueError(f"saved {key} must map names of layers, got {entries!r}")
    pairs = zip(state_dict["param_groups"], optimizer.param_groups, strict=False)
    for i, (saved, group) in enumerate(pairs):
        try:
            check_group({**group, **saved, "params": group["params"]}, places=False)
        except ValueError as error:
            raise ValueError(f"saved param_groups[{i}]: {error}") from None
        for index, param in zip(saved["params"], group["params"], strict=False):
            for key, value in state_dict["state"].get(index, {}).items():
                if key in _SHAPED or (key == "step" and not is_number(value)):
                    _check_tensor(names[param], param, key, value)


_SHAPED = {"momentum_buffer", "exp_avg", "exp_avg_sq"}


def _check_tensor(name: str, param: Tensor, key: str, value: Any) -> None:
    shape = param.shape if key in _SHAPED else torch.Size()
    if not isinstance(value, Tensor) or value.shape != shape:
        found = tuple(value.shape) if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"{name} has shape {tuple(param.shape)}, but its saved {key} has {found}; "
            "load the state of the same model, with the same options of FROG"
        )
    if value.layout != torch.strided or (value.is_complex() and not param.is_complex()):
        raise ValueError(
            f"{name}: its saved {key} is {value.layout}, {value.dtype}, but the "
            f"parameter is {param.layout}, {param.dtype}"
        )
    if key in _SHAPED and hasattr(param, "to_local") != hasattr(value, "to_local"):
        raise ValueError(
            f"{name}: {key} is sharded on one side only, here or in the saved state; "
            "load it with torch.distributed.checkpoint.state_dict"
            ".set_optimizer_state_dict"
        )


def _in_order(
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


def _restore(
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
            if key == "step" and not isinstance(value, Tensor):
                value = torch.tensor(float(value))
            if isinstance(value, Tensor):
                value = value.view(()) if key == "step" else value
                optimizer.state[param][key] = value.to(param.device, copy=True)
    for group in optimizer.param_groups:
        group["capturable"] = capturable
        known = [p for p in group["params"] if p in optimizer.state]
        move_state(optimizer.state, group, known)
