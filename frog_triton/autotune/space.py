"""Which configurations a kernel may have on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..kernels.config import Config, tile_side
from ..kernels.gpu import shared_limit
from ..kernels.kernel import Kernel

TOP = 6
"""Candidates that are looked at closely for each key."""

LARGEST_ACCUMULATOR = 128
"""Entries a thread: with as many registers again for operands, more would spill."""


def candidates(kernel: Kernel, default: Config) -> Iterator[Config]:
    """Every combination of a kernel's values, the default among them, valid or not.

    Args:
        kernel: which.
        default: gives the fields that are not tuned.
    """
    yield default
    for values in itertools.product(*kernel.values.values()):
        changes: dict[str, Any] = dict(zip(kernel.values, values, strict=True))
        found = replace(default, **changes)
        if found != default:
            yield found


def invalid(
    kernel: Kernel,
    config: Config,
    sizes: Mapping[str, int],
    kind: str,
    capability: int,
    itemsize: int = 4,
) -> str | None:
    """Why a configuration cannot serve, or None if it can.

    Args:
        kernel: which.
        config: the configuration.
        sizes: of the launch, by the letter of the block that covers them: n, r, d.
        kind: how samples are addressed; see `table.tuned`.
        capability: of the GPU.
        itemsize: bytes of an entry that a pipeline stage loads.
    """
    values = config.values()
    if type(config) is not kernel.config:
        return f"of type {type(config).__name__}"
    for name, value in values.items():
        if value < 1 or (
            value & (value - 1) and name not in ("num_stages", "programs")
        ):
            return f"{name} is not a power of two"
    depthwise = kind.startswith("depthwise")
    for letter, size in sizes.items():
        block = values.get(f"BLOCK_{letter.upper()}")
        if block is not None and block > 2 * tile_side(size) and not depthwise:
            return f"BLOCK_{letter.upper()} is far beyond its size"
    threads = 32 * values["num_warps"]
    accumulator = 1
    for name in kernel.accumulator:
        accumulator *= values[name]
    if accumulator > LARGEST_ACCUMULATOR * threads:
        return "too many accumulators a thread"
    if accumulator < threads:
        return "fewer accumulators than threads"
    products = kernel.tiles and not depthwise and kind != "alone"
    if products and min(values[n] for tile in kernel.tiles for n in tile) < 16:
        return "a matrix product takes sides of 16 and more"
    if why := kernel.rule(values, sizes, kind):
        return why
    if products:
        entries = sum(values[a] * values[b] for a, b in kernel.tiles)
        needed = (values["num_stages"] - 1) * entries * itemsize
        if needed > shared_limit(capability):
            return "shared memory"
    return None
