"""Which examples or positions are sampled: a pure function of a counter.

Indices come from hashing ``(seed, step, layer, call)``, never from a random
generator with state, so a run resumed from a checkpoint draws what the
uninterrupted run would have drawn, and the global random state is untouched.
All arithmetic is on integers, hence identical on every device. A counter may be a
tensor on the device, as the step is where nothing may wait for it: then the key is one.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from ..linalg.rows import Array, as_tensor, numpy_serves
from ..presets import SAMPLINGS as SAMPLINGS

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment and multipliers
_MULTIPLIERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))

Counter = int | Tensor


class Counted(NamedTuple):
    """A key that the host does not know.

    Attributes:
        prefix: key of the counters before the step.
        step: counted on the device, in any dtype.
        forward: the counter after it.
    """

    prefix: int
    step: Tensor
    forward: int

    def hashed(self) -> Tensor:
        """The key, on the device."""
        key = hash_on(self.prefix, self.step.to(torch.int64), self.forward)
        assert isinstance(key, Tensor)
        return key


@overload
def counter_key(*counters: int) -> int: ...


@overload
def counter_key(*counters: Counter) -> Counter: ...


def counter_key(*counters: Counter) -> Counter:
    """Hash a tuple of integers into one 64-bit key.

    Args:
        counters: integers, or int64 tensors of no dimension, all on one device.

    Returns:
        An integer below ``2**64``, or if a counter is a tensor, a tensor of the same
        bits.
    """
    return hash_on(0, *counters)


@overload
def hash_on(key: int, *counters: int) -> int: ...


@overload
def hash_on(key: Counter, *counters: Counter) -> Counter: ...


def hash_on(key: Counter, *counters: Counter) -> Counter:
    """The key of more counters than a key was made from."""
    for counter in counters:
        if isinstance(key, int) and isinstance(counter, int):
            key = _splitmix64((key + _GOLDEN + counter) & _MASK)
        else:
            z = _add(_signed(_GOLDEN), key)
            key = _mix(_add(z, counter))
    return key


def draw(
    total: int, size: int, key: Counter, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw ``min(size, total)`` distinct indices below ``total``, one per stratum.

    The range is cut into ``size`` slices of equal length (up to one), one index is
    drawn in each, and the whole is rotated by a random offset, so that each index
    is equally likely whatever ``total`` and ``size``.

    Args:
        total: how many candidates there are.
        size: how many to draw.
        key: from `counter_key`; the same key gives the same indices.
        device: where the indices are made; the key's, if that is a tensor.

    Returns:
        int64 tensor of shape ``(min(size, total),)``.
    """
    if isinstance(key, int) and numpy_serves(device):
        return as_tensor(_draw_on_host(total, size, key))
    index = torch.arange(min(size, total), device=device)
    if size in (0, total) or size > total:
        return index
    length: Tensor | int = total // size
    if total % size == 0:
        start = index * length
    else:
        edges = torch.arange(0, size * total + 1, total, device=device)
        edges.div_(size, rounding_mode="floor")
        start, length = edges[:-1], edges[1:] - edges[:-1]
    drawn = _below(length, index, key).add_(start)
    drawn += _remainder(counter_key(key, 1), total)
    return drawn.remainder_(total)


def _draw_on_host(total: int, size: int, key: int) -> Array:
    """The same integers in numpy, whose calls cost a fraction of torch's."""
    if size in (0, total) or size > total:
        return np.arange(min(size, total), dtype=np.int64)
    start, length, z = _slices(total, size)
    z = z + np.uint64(key)
    for shift, multiplier in _MULTIPLIERS:
        z ^= z >> np.uint64(shift)
        z *= np.uint64(multiplier)
    z ^= z >> np.uint64(31)
    z &= np.uint64(0xFFFFFFFF)
    drawn = z.view(np.int64)
    drawn *= length
    drawn >>= 32
    drawn += start
    drawn += counter_key(key, 1) % total
    drawn %= total
    return drawn


@lru_cache(maxsize=256)
def _slices(total: int, size: int) -> tuple[Array, Array, Array]:
    """What all draws of as many have in common: slices, and what their hash adds."""
    index = np.arange(size + 1, dtype=np.int64)
    edges = index * total // size
    return edges[:-1], np.diff(edges), index[:-1].view(np.uint64) * np.uint64(_GOLDEN)


class Drawn:
    """Positions that are drawn, written out where somebody asks for them.

    Args:
        total: how many there were.
        size: how many were to be drawn.
        key: by which.
    """

    def __init__(self, total: int, size: int, key: Counter) -> None:
        self.total, self.size, self.key = total, size, key
        self._index: Tensor | None = None

    def index(self, device: torch.device) -> Tensor:
        """Positions ``(min(size, total),)`` on a device; see `draw`."""
        if self._index is None or self._index.device != device:
            self._index = draw(self.total, self.size, self.key, device)
        return self._index


def draw_groups(
    ends: Tensor, total: int, size: int, key: Counter
) -> tuple[Tensor, Tensor]:
    """Draw up to `size` indices of each group, without asking how long groups are.

    As many slots for each group as twice its fair share would fill, at most `size`. A
    group with more members has one drawn a slot, each in a slice of its own; one with
    fewer has all of them, and slots that stay empty.

    Args:
        ends: where each group's members end ``(groups,)``, in order, on the device.
        total: members of all groups, or more.
        size: slots of a group at most.
        key: from `counter_key`.

    Returns:
        Indices below `total` ``(slots * groups,)``, a group after the other for each
        slot, and which of them are members.
    """
    ends = ends.to(torch.int64)
    groups = ends.shape[0]
    slots = max(1, min(size, -(-2 * total // groups)))
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    counts = (ends - starts).expand(slots, groups)
    slot = torch.arange(slots, device=ends.device)[:, None]
    number = slot * groups + torch.arange(groups, device=ends.device)
    within = (slot * counts + _below(counts, number, key)) // slots
    within = (within + _remainder(counter_key(key, 1), max(total, 1))) % counts.clamp(1)
    chosen = torch.where(counts > slots, within, slot)
    there = (slot < counts).flatten()
    return (starts + chosen).clamp(max=max(total - 1, 0)).flatten(), there


def _remainder(key: Counter, total: int) -> Counter:
    """``key % total``, where a tensor's bits stand for an unsigned number."""
    if isinstance(key, int):
        return key % total
    return (_shift_right(key, 1) % total * 2 + (key & 1)) % total


def _add(a: Counter, b: Counter) -> Counter:
    """The sum modulo ``2**64``: tensors wrap around by themselves."""
    a, b = (v if isinstance(v, Tensor) else _signed(v & _MASK) for v in (a, b))
    if isinstance(a, int) and isinstance(b, int):
        return _signed((a + b) & _MASK)
    return a + b


def take(x: Tensor, index: Tensor) -> Tensor:
    """Examples of a batch; images that are channels_last stay so."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.movedim(1, -1).index_select(0, index).movedim(-1, 1)
    return x.index_select(0, index)


def _splitmix64(z: int) -> int:
    for shift, multiplier in _MULTIPLIERS:
        z = ((z ^ (z >> shift)) * multiplier) & _MASK
    return z ^ (z >> 31)


def _mix(z: Counter) -> Tensor:
    """`_splitmix64` of each entry of a tensor."""
    assert isinstance(z, Tensor)
    for shift, multiplier in _MULTIPLIERS:
        z = _shift_right(z, shift).bitwise_xor_(z).mul_(_signed(multiplier))
    return _shift_right(z, 31).bitwise_xor_(z)


def _below(bound: Tensor | int, index: Tensor, key: Counter) -> Tensor:
    """One pseudo-random integer in ``[0, bound)`` for each index."""
    z = _mix(_add(index * _signed(_GOLDEN), key))
    return z.bitwise_and_(0xFFFFFFFF).mul_(bound).bitwise_right_shift_(32)


def _shift_right(z: Tensor, shift: int) -> Tensor:
    """Logical shift: int64's own is arithmetic."""
    return (z >> shift).bitwise_and_((1 << (64 - shift)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
