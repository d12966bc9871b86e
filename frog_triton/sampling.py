"""Which examples or positions are sampled: a pure function of a counter.

Indices come from hashing ``(seed, step, layer, call)``, never from a random
generator with state, so a run resumed from a checkpoint draws what the
uninterrupted run would have drawn, and the global random state is untouched.
All arithmetic is on integers, hence identical on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment and multipliers
_MULTIPLIERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def counter_key(*counters: int) -> int:
    """Hash a tuple of integers into one 64-bit key."""
    key = 0
    for counter in counters:
        key = _splitmix64((key + _GOLDEN + counter) & _MASK)
    return key


def draw(total: int, size: int, key: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw ``min(size, total)`` distinct indices below ``total``, one per stratum.

    The range is cut into ``size`` slices of equal length (up to one), one index is
    drawn in each, and the whole is rotated by a random offset, so that each index
    is equally likely whatever ``total`` and ``size``.

    Args:
        total: how many candidates there are.
        size: how many to draw.
        key: from `counter_key`; the same key gives the same indices.
        device: where the indices are made.

    Returns:
        int64 tensor of shape ``(min(size, total),)``.
    """
    index = torch.arange(min(size, total), dtype=torch.int64, device=device)
    if size >= total:
        return index
    start = index * total // size
    length = (index + 1) * total // size - start
    offset = counter_key(key, 1) % total
    return (start + _below(length, index, key) + offset) % total


def _splitmix64(z: int) -> int:
    for shift, multiplier in _MULTIPLIERS:
        z = ((z ^ (z >> shift)) * multiplier) & _MASK
    return z ^ (z >> 31)


def _below(bound: Tensor, index: Tensor, key: int) -> Tensor:
    """One pseudo-random integer in ``[0, bound)`` for each index."""
    z = index * _signed(_GOLDEN) + _signed(key)
    for shift, multiplier in _MULTIPLIERS:
        z = (z ^ _shift_right(z, shift)) * _signed(multiplier)
    z = z ^ _shift_right(z, 31)
    return ((z & 0xFFFFFFFF) * bound) >> 32


def _shift_right(z: Tensor, shift: int) -> Tensor:
    """Logical shift: int64's own is arithmetic."""
    return (z >> shift) & ((1 << (64 - shift)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
