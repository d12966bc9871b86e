"""All that decides what a step launches.

Parameters, momentum and counters with their addresses; sizes, dtypes, strides and
alignment of gradients and samples; options that are no plain numbers; who updates which
layer. Two steps of equal circumstances launch the same, but for addresses of gradients
and samples, and numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .linalg.precision import tf32_convolutions
from .state import RECENT_KEYS

if TYPE_CHECKING:
    from .anomalies import Anomalies
    from .capture.capture import SampleCapture

MOST_DECISIONS = 16
"""Of groups, as to who updates which of their parameters, that are remembered."""

NUMBERS = ("momentum", "damping", "lr", "weight_decay")
"""Entries of a group that may differ from step to step; all others may not.

In the order of `Numbers`, where whether the step is skipped comes next."""


class Key:
    """A long tuple whose hash is found once.

    Args:
        parts: of which each can be hashed.
    """

    __slots__ = ("_hash", "_parts")

    def __init__(self, parts: tuple[Hashable, ...]) -> None:
        self._parts, self._hash = parts, hash(parts)

    def __hash__(self) -> int:
        """Of all parts."""
        return self._hash

    def __eq__(self, other: object) -> bool:
        """Whether all parts are equal."""
        return isinstance(other, Key) and self._parts == other._parts


@dataclass(frozen=True)
class Circumstances:
    """Of one step.

    Attributes:
        key: equal for steps that launch the same.
        decided: of these, what a step may change itself.
        moving: gradients and samples, which may lie elsewhere the next time.
        addresses: of these, now.
        numbers: of each group.
        device: of everything.
    """

    key: Hashable
    decided: Hashable
    moving: list[Tensor]
    addresses: list[int]
    numbers: list[tuple[float, ...]]
    device: torch.device


class Look:
    """Looks at what a step is about to do.

    Args:
        capture: of samples.
        anomalies: counters of the layers' rows.
        sample_steps: with more than one, samples are solved where state keeps them.
    """

    def __init__(
        self, capture: SampleCapture, anomalies: Anomalies, sample_steps: int
    ) -> None:
        self._capture = capture
        self._keeps_samples = sample_steps > 1
        self._anomalies = anomalies
        self._served: dict[Hashable, list[bool]] = {}

    def forget(self) -> None:
        """Who updates what may be decided otherwise."""
        self._served.clear()

    def at(
        self,
        groups: Sequence[dict[str, Any]],
        state: Mapping[Any, dict[str, Any]],
        decided: Hashable,
        serves: Callable[[nn.Parameter], bool],
    ) -> Circumstances | str:
        """The circumstances of the step that is due; see `Routines.look`.

        Returns:
            In words why it cannot be recorded, if it cannot; none of them where the
            next may be.
        """
        keys: list[Hashable] = [tf32_convolutions()]
        moving: list[Tensor] = []
        addresses: list[int] = []
        numbers = []
        for group in groups:
            ids = tuple(map(id, group["params"]))
            keys += (_options(group), ids)
            if group["updated_by"] == "frog":
                values = tuple(group[name] for name in NUMBERS)
                if any(isinstance(v, Tensor) and not v.is_cpu for v in values):
                    return "a number of a group lies on the device"
                numbers.append(tuple(map(float, values)))
            if (decided, ids) not in self._served:
                if len(self._served) > MOST_DECISIONS:
                    self._served.clear()
                self._served[decided, ids] = [serves(p) for p in group["params"]]
            served = zip(group["params"], self._served[decided, ids], strict=True)
            keeps = self._keeps_samples
            why = _look_at(served, state, keeps, keys, moving, addresses)
            if why is not None:
                return why
        if not any(grad.numel() for grad in moving):
            return ""
        for name, call in self._capture.as_calls():
            if call is None:
                return f"samples of {name} are of several calls"
            keys += (name, id(call.module), call.adapter)
            if call.adapter is not None:
                keys.append(call.adapter.reads_by(call.module))
            for tensor in (call.x, call.y):
                address = tensor.data_ptr()
                keys += _layout(tensor, address)
                if not self._keeps_samples:
                    moving.append(tensor)
                    addresses.append(address)
        device = moving[0].device
        if any(tensor.device != device for tensor in moving):
            return "it is on several devices"
        keys += ((n, c.data_ptr()) for n, c in self._anomalies.counts.items())
        try:
            key = Key((decided, *keys))
        except TypeError:
            return "a group has an entry that cannot be compared"
        return Circumstances(key, decided, moving, addresses, numbers, device)


def _options(group: Mapping[str, Any]) -> Hashable:
    """Entries of a group that decide what is launched."""
    return tuple(
        (name, tuple(value) if isinstance(value, list) else value)
        for name, value in group.items()
        if name not in NUMBERS and name != "params"
    )


def _look_at(
    params: Iterable[tuple[Tensor, bool]],
    state: Mapping[Any, dict[str, Any]],
    keeps_samples: bool,
    keys: list[Hashable],
    moving: list[Tensor],
    addresses: list[int],
) -> str | None:
    """Add what parameters bring.

    Args:
        params: of a group, each with whether FROG updates it.
        state: of all parameters.
        keeps_samples: whether it holds samples, too.
        keys: gains what decides about launches.
        moving: gains gradients.
        addresses: gains theirs.

    Returns:
        Why the step cannot be recorded with them; None if it can.
    """
    for param, ours in params:
        grad = param.grad
        if keeps_samples:  # also those of a frozen weight, for its bias
            rings = (state.get(param, {}).get(key) for key in RECENT_KEYS)
            keys += ((r.data_ptr(), r.shape) for r in rings if r is not None)
        if grad is None:
            keys.append(None)
            continue
        if type(grad) is not Tensor or grad.layout != torch.strided or grad.is_neg():
            return "gradients are no plain tensors"
        address = grad.data_ptr()
        keys += _layout(grad, address)
        moving.append(grad)
        addresses.append(address)
        if not ours:
            continue
        held = state.get(param)
        momentum = None if held is None else held.get("momentum_buffer")
        if momentum is None:
            return ""  # made by this step
        # Of the gradient's shape, both; where they lie says on which device.
        keys += (param.data_ptr(), param.dtype, param.stride())
        keys += (momentum.data_ptr(), momentum.dtype, momentum.stride())
    return None


def _layout(tensor: Tensor, address: int) -> tuple[Hashable, ...]:
    """What a launch is made for; of an address its alignment."""
    form = (tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device())
    return (*form, address & 15)
