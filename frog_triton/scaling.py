"""Steps of which only the device knows whether they are taken.

To an optimizer that supports it, a GradScaler hands ``grad_scale`` and ``found_inf`` as
tensors on the device; without one, FROG finds its own (`Numbers.skipped`). Experts that
met no token get a gradient that is not finite for as long as the step lasts, and the
solvers leave such rows, and their momentum, as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from .linalg.numbers import moved_to
from .linalg.rows import Rows


def unscaled(optimizer: Optimizer, grads: Iterable[Tensor]) -> Tensor | None:
    """What a GradScaler found that leaves its work to the optimizer; does that work.

    Args:
        optimizer: that has its attributes.
        grads: all gradients, divided by the scale in place.

    Returns:
        Not 0 where a gradient is not finite. None without such a GradScaler.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    if not isinstance(found_inf, Tensor):
        return None
    unscale_(grads, getattr(optimizer, "grad_scale", None))
    return found_inf


def unscale_(grads: Iterable[Tensor], grad_scale: Tensor | None) -> None:
    """Divide gradients by the scale, in place.

    Args:
        grads: of any devices and dtypes.
        grad_scale: None leaves them as they are.
    """
    if grad_scale is None:
        return
    # As in GradScaler: the reciprocal is not exact in float32.
    inverse = grad_scale.double().reciprocal().float()
    multiply_(grads, inverse)


def multiply_(tensors: Iterable[Tensor], factor: float | Tensor) -> None:
    """Multiply tensors of any devices by one number, in place.

    Without waiting, but for a GPU's number that goes to tensors of a CPU.
    """
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for (device, dtype), there in alike.items():
        if not isinstance(factor, Tensor):
            torch._foreach_mul_(there, factor)
            continue
        number = moved_to(factor, device)
        if dtype.is_floating_point:
            # torch takes all at once where dtypes agree; 16 bits are too few for this.
            number = number.to(torch.promote_types(dtype, torch.float32))
        torch._foreach_mul_(there, number)


def steps_taken(found_inf: Tensor | None, device: torch.device) -> float | Tensor:
    """1, or a tensor of 0 where the step is to be skipped.

    Args:
        found_inf: not 0 where the step is to be skipped; None takes every step.
        device: where the answer is wanted.
    """
    if found_inf is None:
        return 1.0
    return moved_to(found_inf == 0, device).double()


class Left(NamedTuple):
    """Rows of a layer that a step is to leave as they are.

    Attributes:
        grads: of all rows that the step reads.
        rows: which of them are left ``(R,)``.
        counts: the layer's anomaly counters, of the rows solved here.
        here: which of the rows those are.
    """

    grads: Rows | None
    rows: Tensor
    counts: Tensor
    here: slice


@contextmanager
def leaving(layers: Sequence[Left]) -> Iterator[None]:
    """Rows that are left alone keep weights and momentum, and count as no anomaly."""
    kept = []
    for grads, rows, counts, here in layers:
        if grads is not None:
            entries = grads.weight[:, 0] if grads.bias is None else grads.bias
            kept.append((entries, entries.clone(), rows[here], counts, counts.clone()))
            entries.masked_fill_(rows, float("nan"))
    try:
        yield
    finally:
        for entries, before, rows, counts, counted in kept:
            entries.copy_(before)
            counts.copy_(torch.where(rows, counted, counts))
