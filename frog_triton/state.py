"""State of the parameters: how it is made, and how it follows them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .guards import refuse_to_make_in_graph
from .layers.rows import ROWS_FIRST, RowAxes

if TYPE_CHECKING:
    from .model.plan import Layer

STATE_VERSION = 2
BEFORE: dict[str, Any] = {"orthogonalize": False}
"""Options that are younger than some saved states, as those were written without."""

ROW_KEYS = frozenset({"momentum_buffer"})
"""What the state of a preconditioned parameter holds."""

STEP_KEYS = frozenset({"step"})
"""What that of a layer's weight holds, too: the layer's step counter."""


RECENT_KEYS = ("recent_x", "recent_y")
"""What it holds where samples of several steps are solved together; see `recent`."""


def row_state(
    param: nn.Parameter, dtype: torch.dtype | None, axes: RowAxes = ROWS_FIRST
) -> dict[str, Tensor]:
    """Fresh state of a preconditioned parameter, shaped like it.

    Args:
        param: a layer's weight or bias.
        dtype: of the momentum. None: float32, or the parameter's own if that is wider.
        axes: where it has its rows. It lies in memory as the parameter does if rows are
            in front there; else they lie one after the other if there is a way.
    """
    dtype = dtype or torch.promote_types(param.dtype, torch.float32)
    first = axes == ROWS_FIRST
    # Sharded like the parameter.
    fmt = torch.preserve_format if first else torch.contiguous_format
    buffer = torch.zeros_like(param, dtype=dtype, memory_format=fmt)
    if not first and axes.split == 1 and not hasattr(param, "to_local"):
        buffer = axes.home(axes.view(buffer).contiguous())
    return {"momentum_buffer": buffer}


def step_counter(device: torch.device) -> Tensor:
    """A counter at 0."""
    return torch.zeros((), dtype=torch.float32, device=device)


def complete(
    state: dict[str, Any],
    keys: frozenset[str],
    make: Callable[[], dict[str, Tensor]],
    name: str,
) -> None:
    """Make what is missing of a parameter's state: all of it at first.

    Args:
        state: the parameter's.
        keys: what it is to hold.
        make: gives fresh state.
        name: the parameter's.

    Raises:
        RuntimeError: it would be made while a CUDA graph is captured.
    """
    missing = keys - state.keys()
    if missing:
        refuse_to_make_in_graph(name)
        fresh = make()
        state |= {key: fresh[key] for key in sorted(missing)}


def complete_rows(
    state: Mapping[Any, dict[str, Any]],
    param: nn.Parameter,
    layer: Layer,
    names: Mapping[nn.Parameter, str],
    dtype: torch.dtype | None,
    capturable: bool,
) -> None:
    """The same for a parameter that FROG updates, and its layer's step counter.

    Args:
        state: of all parameters.
        param: the layer's weight or bias.
        layer: its own.
        names: of the parameters.
        dtype: of the momentum; see `row_state`.
        capturable: whether the counter lies with the weight, not on the host.
    """
    weight = layer.weight
    axes = layer.axes if param is weight else ROWS_FIRST
    make = partial(row_state, param, dtype, axes)
    complete(state[param], ROW_KEYS, make, names[param])
    place = weight.device if capturable else torch.device("cpu")
    # The layer's counter, whether the weight has a gradient or not.
    counter = partial(_counter_state, place)
    complete(state[weight], STEP_KEYS, counter, names[weight])


def _counter_state(device: torch.device) -> dict[str, Tensor]:
    return {"step": step_counter(device)}


def move_state(
    state: Mapping[Any, dict[str, Any]],
    group: Mapping[str, Any],
    params: Iterable[nn.Parameter],
) -> None:
    """Follow parameters that were moved to another device, or cast.

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
            # Rows keep a momentum of their own type; torch's optimizers cannot.
            follows = key != "step" and group["updated_by"] != "frog"
            dtype = param.dtype if follows else value.dtype
            if value.device != device or value.dtype != dtype:
                state[param][key] = value.to(device, dtype)
