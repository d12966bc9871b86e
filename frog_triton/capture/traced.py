"""Samples of layers inside a graph that torch.compile makes.

Dynamo cannot trace a hook on an intermediate tensor, nor what `SampleCapture` keeps on
the host. So both ends are custom operators, opaque to it: `sample` copies ``X[index]``
in the forward graph; `keep` stands in the backward graph, where an identity on the
output (`_Tap`) meets its gradient, and hands ``Y[index]`` to the capture. What travels
from one to the other is the key that both draw by. What `keep`
returns is the gradient of one more tensor, so that no pass removes it as dead code (one
that is not empty: Inductor drops what empty tensors are made of).

Operators take tensors and numbers only: a hook is known to them by its number.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Receiver(Protocol):
    """What the operators call back, outside of any graph."""

    def mark(self, reason: str) -> None:
        """Remember why a graph that calls the layer's module does not sample it."""

    def refuse(self) -> str:
        """Why no call of the module can be sampled now, if none can."""

    def sample(
        self, x: Tensor, y_shape: Sequence[int], output: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """``X[index]`` and the draw's key; None where nobody wants samples (any more).

        The output is there where it is still to prove what the layer computes.
        """

    def keep(self, x: Tensor, key: Tensor, grad: Tensor) -> None:
        """Take the output's gradient in, for samples that `sample` gave."""


class Noted(Protocol):
    """A hook that wants to know whether it is part of a graph."""

    def noted(self) -> bool:
        """It is; returns whether it does anything."""


_RECEIVERS: WeakValueDictionary[int, Receiver] = WeakValueDictionary()
_NOTED: WeakValueDictionary[int, Noted] = WeakValueDictionary()
_numbers = itertools.count()
F = TypeVar("F", bound=Callable[..., Any])

# Replaying a graph would leave out what these do on the host.
_TAGS = tuple(filter(None, [getattr(torch.Tag, "cudagraph_unsafe", None)]))


def register(receiver: Receiver) -> int:
    """A number by which the operators find the receiver for as long as it lives."""
    number = next(_numbers)
    _RECEIVERS[number] = receiver
    return number


def register_hook(hook: Noted) -> int:
    """The same of a hook, for `note`."""
    number = next(_numbers)
    _NOTED[number] = hook
    return number


def make_anchor() -> Tensor:
    """What `keep` returns the gradient of."""
    return torch.zeros(1, device="cpu", requires_grad=True)


def _constant(function: F) -> F:
    """`torch.compiler.assume_constant_result`, which would import Dynamo at once."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def refuse(number: int) -> str:
    """At the time of tracing: why no call of the layer can be sampled, if none can."""
    receiver = _RECEIVERS.get(number)
    return "" if receiver is None else receiver.refuse()


@_constant
def note(number: int) -> bool:
    """At the time of tracing: a hook is part of the graph. Whether it does anything."""
    installed = _NOTED.get(number)
    return installed is not None and installed.noted()


@_constant
def mark(number: int, reason: str) -> bool:
    """At the time of tracing: the layer is not sampled in this graph."""
    receiver = _RECEIVERS.get(number)
    if receiver is not None:
        receiver.mark(reason)
    return True


def tap(
    output: Tensor,
    anchor: Tensor,
    x: Tensor,
    y_shape: Sequence[int],
    count: int,
    row: int,
    number: int,
    on_device: bool,
    seen: Tensor | None = None,
) -> Tensor:
    """Sample a layer's call in the graph that is being made.

    Args:
        output: of the layer.
        anchor: `make_anchor`'s.
        x: the layer's input, batched.
        y_shape: shape of its output, batched.
        count: how many samples there will be.
        row: the length of a sampled row of X; 0 if whole examples are sampled.
        number: from `register`.
        on_device: whether keys lie on the device.
        seen: the output, detached, where it is still to prove what the layer computes.

    Returns:
        The output, to be used from now on.
    """
    sampled, key = torch.ops.frog_triton.sample(
        x, y_shape, count, row, number, on_device, seen
    )
    tapped: Tensor = _Tap.apply(output, anchor, sampled, key, number)
    return tapped


def carried(key: int | Tensor, device: torch.device | str) -> Tensor:
    """A key as graphs hand it on; see `number`."""
    if isinstance(key, Tensor):
        return key
    key = key - (1 << 64) if key >> 63 else key
    return torch.full((), key, dtype=torch.int64, device=device)


def number(key: Tensor) -> int:
    """The key that the host knew."""
    return int(key) % (1 << 64)


class _Tap(torch.autograd.Function):
    """The identity as a copy, because what comes after may work in place.

    Inductor fuses the copy with the next pointwise operation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        anchor: Tensor,
        sampled: Tensor,
        key: Tensor,
        number: int,
    ) -> Tensor:
        ctx.save_for_backward(sampled, key)
        ctx.number = number
        return output.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sampled, key = ctx.saved_tensors
        token = torch.ops.frog_triton.keep(grad, sampled, key, ctx.number)
        return grad, token, None, None, None


@torch.library.custom_op("frog_triton::sample", mutates_args=(), tags=_TAGS)
def _sample(
    x: Tensor,
    y_shape: Sequence[int],
    count: int,
    row: int,
    number: int,
    on_device: bool,
    seen: Tensor | None,
) -> tuple[Tensor, Tensor]:
    receiver = _RECEIVERS.get(number)
    found = None if receiver is None else receiver.sample(x, y_shape, seen)
    if found is None:
        sampled, key = _empty_sample(x, y_shape, count, row, number, on_device, seen)
        return sampled.zero_(), key.zero_()
    sampled, key = found
    return sampled.contiguous(), key


@_sample.register_fake
def _empty_sample(
    x: Tensor,
    y_shape: Sequence[int],
    count: int,
    row: int,
    number: int,
    on_device: bool,
    seen: Tensor | None,
) -> tuple[Tensor, Tensor]:
    shape = (count, row) if row else (count, *x.shape[1:])
    device = x.device if on_device else "cpu"
    return x.new_empty(shape), x.new_empty((), dtype=torch.int64, device=device)


@torch.library.custom_op("frog_triton::keep", mutates_args=(), tags=_TAGS)
def _keep(grad: Tensor, sampled: Tensor, key: Tensor, number: int) -> Tensor:
    receiver = _RECEIVERS.get(number)
    if receiver is not None:
        # The graph may use its buffers again.
        receiver.keep(sampled.clone(), key, grad)
    return torch.zeros(1, device="cpu")


@_keep.register_fake
def _empty_token(grad: Tensor, sampled: Tensor, key: Tensor, number: int) -> Tensor:
    return torch.empty(1, device="cpu")
