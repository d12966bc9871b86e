"""Samples of a layer's last steps, which are solved together: ``sample_steps``.

A ring of T places lies in the state of the layer's weight, and a step fills the place
that its number tells, modulo T. What it finds there is as old as T steps, so a step
that is skipped, or raises, loses nothing: the next fills the same place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .guards import refuse_to_make_in_graph
from .linalg.rows import written_out
from .state import RECENT_KEYS

if TYPE_CHECKING:
    from .capture.capture import SampleCapture
    from .model.plan import Layer

Pair = tuple[Tensor, Tensor]
"""Rows of X ``(n, groups * D)`` and output gradients ``(n, R)``."""


def samples_of(
    layer: Layer, own: dict[str, Any], capture: SampleCapture, steps: int
) -> Pair | None:
    """A layer's samples of the last steps, this one's among them; see `join`.

    Args:
        layer: whose.
        own: state of its weight.
        capture: holds this step's samples.
        steps: T.
    """
    found, new = capture.samples(layer, False), None
    if found is not None:
        x, y = found
        new = x.matrix().x, written_out(y).squeeze(2)
    return join(own, layer.name, steps, new)


def join(own: dict[str, Any], name: str, steps: int, new: Pair | None) -> Pair | None:
    """Put a step's samples into their layer's ring, and give all that it holds.

    A step's output gradients are divided by their root mean square: so all samples
    weigh alike, however small the loss has become. Entries that are not finite count as
    zero, or they would be met for T steps.

    Args:
        own: state of the layer's weight, with its step counter; gains the ring.
        name: the layer's.
        steps: T.
        new: this step's; None, if there are none, leaves its place empty.

    Returns:
        Those of the last T steps, zeros where there are fewer, in the ring's memory;
        None if there is no ring, nor a sample to make one for.

    Raises:
        RuntimeError: the ring would be made while a CUDA graph is captured.
    """
    if new is not None:
        x, y = new
        new = x.nan_to_num(0.0, 0.0, 0.0), _at_size_one(y.nan_to_num(0.0, 0.0, 0.0))
        _make_room(own, name, steps, new)
    rings = _rings(own, steps)
    if rings is None:
        return None
    for ring, part in zip(rings, new or (None, None), strict=True):
        _fill(ring, own["step"], part)
    xs, ys = rings
    return xs.flatten(0, 1), ys.flatten(0, 1)


def forget(own: dict[str, Any]) -> None:
    """Drop a parameter's ring, if it has one."""
    for key in RECENT_KEYS:
        own.pop(key, None)


def _rings(own: dict[str, Any], steps: int) -> Pair | None:
    """Those of X and Y, ``(T, room, ...)``; None where there are none of T places."""
    xs, ys = (own.get(key) for key in RECENT_KEYS)
    if not (isinstance(xs, Tensor) and isinstance(ys, Tensor)):
        return None
    fits = xs.ndim == ys.ndim == 3 and xs.shape[:2] == ys.shape[:2]
    return (xs, ys) if fits and len(xs) == steps else None


def _make_room(own: dict[str, Any], name: str, steps: int, new: Pair) -> None:
    """Have rings that new samples fit into.

    They begin anew where T, a width or a type is another; where a step brings more
    samples than any before, what they hold is kept.
    """
    held = _rings(own, steps)
    if held is not None and not all(map(_are_alike, held, new)):
        held = None
    count = len(new[0])
    if held is not None and held[0].shape[1] >= count:
        return
    refuse_to_make_in_graph(name)
    for i, (key, part) in enumerate(zip(RECENT_KEYS, new, strict=True)):
        ring = part.new_zeros(steps, count, part.shape[1])
        if held is not None:
            ring[:, : held[i].shape[1]] = held[i]
        own[key] = ring


def _are_alike(ring: Tensor, part: Tensor) -> bool:
    return (ring.shape[2], ring.dtype, ring.device) == (
        part.shape[1],
        part.dtype,
        part.device,
    )


def _fill(ring: Tensor, step: Tensor, part: Tensor | None) -> None:
    """Fill the place of a step, with zeros where there is no sample."""
    steps, room, width = ring.shape
    if part is None:
        part = ring.new_zeros(0, width)
    if len(part) < room:
        part = torch.cat([part, part.new_zeros(room - len(part), width)])
    if step.device == ring.device:  # nothing waits for the device
        place = (step % steps).to(torch.int64).view(1)
        ring.index_copy_(0, place, part[None])
    else:
        ring[int(step) % steps] = part


def _at_size_one(y: Tensor) -> Tensor:
    """Divided by its root mean square, zeros as they are; no square overflows."""
    if not y.numel():
        return y
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    smallest = torch.finfo(wide.dtype).tiny
    wide = wide / wide.abs().amax().clamp(min=smallest)
    size = wide.square().mean().sqrt()
    return (wide / size.clamp(min=smallest)).to(y.dtype)
