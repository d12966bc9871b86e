"""Which configurations a kernel may have on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .config import (
    AdjointConfig,
    Config,
    FinishConfig,
    ForwardConfig,
    GatherConfig,
    GramCGConfig,
    GramConfig,
    NormsConfig,
    ProjectConfig,
    ScaleConfig,
    UpdateConfig,
    WeightsConfig,
    power_of_two,
)

_TILES = (16, 32, 64, 128)
_WARPS = (4, 8)
_STAGES = (2, 3, 4)


@dataclass(frozen=True)
class Space:
    """The configurations of one kernel.

    Attributes:
        config: their type.
        values: of each field; fields left out keep the default's value.
        accumulator: the sides of the tile that stays in registers.
        tiles: pairs of sides of the tiles that a pipeline stage loads.
    """

    config: type[Config]
    values: Mapping[str, tuple[int, ...]]
    accumulator: tuple[str, ...]
    tiles: tuple[tuple[str, str], ...] = ()


_PRODUCT = {
    "BLOCK_N": (*_TILES, 256),
    "BLOCK_R": _TILES,
    "BLOCK_D": _TILES,
    "num_warps": _WARPS,
    "num_stages": _STAGES,
}

SPACES: dict[str, Space] = {
    "_fisher_weights_kernel": Space(
        WeightsConfig,
        {"BLOCK_N": (*_TILES, 256), "BLOCK_R": _TILES, "num_warps": _WARPS},
        ("BLOCK_N", "BLOCK_R"),
    ),
    "_momentum_project_kernel": Space(
        ProjectConfig,
        _PRODUCT | {"BLOCK_R": (4, 8, *_TILES)},
        ("BLOCK_N", "BLOCK_R"),
        (("BLOCK_N", "BLOCK_D"), ("BLOCK_R", "BLOCK_D")),
    ),
    "_gram_kernel": Space(
        GramConfig,
        {
            "BLOCK_N": _TILES,
            "BLOCK_D": _TILES,
            "num_warps": _WARPS,
            "num_stages": _STAGES,
            "programs": (128, 256, 512),
        },
        ("BLOCK_N", "BLOCK_N"),
        (("BLOCK_N", "BLOCK_D"), ("BLOCK_N", "BLOCK_D")),
    ),
    "_gram_cg_kernel": Space(
        GramCGConfig,
        {
            "BLOCK_N": (*_TILES, 256),
            "BLOCK_R": (16, 32),
            "BLOCK_K": _TILES,
            "num_warps": _WARPS,
        },
        ("BLOCK_N", "BLOCK_R"),
        (("BLOCK_N", "BLOCK_K"),),
    ),
    "_update_kernel": Space(
        UpdateConfig,
        _PRODUCT | {"GROUP_M": (1, 4)},
        ("BLOCK_R", "BLOCK_D"),
        (("BLOCK_N", "BLOCK_D"), ("BLOCK_N", "BLOCK_R")),
    ),
    "_gather_kernel": Space(
        GatherConfig,
        {"BLOCK_D": (128, 256, 512, 1024, 2048), "num_warps": (1, 2, 4, 8)},
        ("BLOCK_D",),
    ),
    "_primal_forward_kernel": Space(
        ForwardConfig,
        _PRODUCT | {"GROUP_M": (1, 4)},
        ("BLOCK_N", "BLOCK_R"),
        (("BLOCK_N", "BLOCK_D"), ("BLOCK_R", "BLOCK_D")),
    ),
    "_primal_adjoint_kernel": Space(
        AdjointConfig,
        _PRODUCT
        | {"BLOCK_D": (1, *_TILES), "GROUP_M": (1, 4), "programs": (128, 256, 512)},
        ("BLOCK_R", "BLOCK_D"),
        (("BLOCK_N", "BLOCK_D"), ("BLOCK_N", "BLOCK_R")),
    ),
    "_primal_update_kernel": Space(
        FinishConfig,
        {"BLOCK_R": (4, 8, 16, 32), "BLOCK_D": (64, 128, 256), "num_warps": _WARPS},
        ("BLOCK_R", "BLOCK_D"),
    ),
    "_row_norms_kernel": Space(
        NormsConfig,
        {
            "BLOCK_N": (4, 8, *_TILES),
            "BLOCK_D": (32, 64, 128, 256),
            "num_warps": _WARPS,
        },
        ("BLOCK_N", "BLOCK_D"),
    ),
    "_row_scale_kernel": Space(
        ScaleConfig,
        {
            "BLOCK_N": (32, 64, 128, 256),
            "BLOCK_R": (16, 32, 64),
            "num_warps": _WARPS,
            "programs": (128, 256, 512),
        },
        ("BLOCK_N", "BLOCK_R"),
    ),
}
"""Of each kernel that can be tuned."""

# A multiprocessor's limits from CUDA's guide: shared memory a block may have, threads.
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
THREADS = {80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 103: 2048, 120: 1536}
REGISTERS = 65536
"""32-bit registers of a multiprocessor."""

LARGEST_ACCUMULATOR = 128
"""Entries a thread: with as many registers again for operands, more would spill."""


def shared_limit(capability: int) -> int:
    """Bytes of shared memory a block may have on a GPU."""
    return 1024 * _nearest(SHARED, capability)


def threads_limit(capability: int) -> int:
    """Threads that a multiprocessor holds at a time."""
    return _nearest(THREADS, capability)


def _nearest(table: Mapping[int, int], capability: int) -> int:
    known = [c for c in table if c <= capability] or [min(table)]
    return table[max(known)]


def candidates(kernel: str, default: Config) -> Iterator[Config]:
    """Every combination of a kernel's values, the default among them, valid or not.

    Args:
        kernel: its name.
        default: gives the fields that are not tuned.
    """
    space = SPACES[kernel]
    yield default
    for values in itertools.product(*space.values.values()):
        changes: dict[str, Any] = dict(zip(space.values, values, strict=True))
        found = replace(default, **changes)
        if found != default:
            yield found


def invalid(
    kernel: str,
    config: Config,
    sizes: Mapping[str, int],
    kind: str,
    capability: int,
    itemsize: int = 4,
) -> str | None:
    """Why a configuration cannot serve, or None if it can.

    Args:
        kernel: its name.
        config: the configuration.
        sizes: of the launch, by the letter of the block that covers them: n, r, d.
        kind: how samples are addressed; see `table.tuned`.
        capability: of the GPU.
        itemsize: bytes of an entry that a pipeline stage loads.
    """
    space, values = SPACES[kernel], config.values()
    if type(config) is not space.config:
        return f"of type {type(config).__name__}"
    for name, value in values.items():
        if value < 1 or (
            value & (value - 1) and name not in ("num_stages", "programs")
        ):
            return f"{name} is not a power of two"
    depthwise = kind.startswith("depthwise")
    for letter, size in sizes.items():
        block = values.get(f"BLOCK_{letter.upper()}")
        if block is not None and block > 2 * power_of_two(size) and not depthwise:
            return f"BLOCK_{letter.upper()} is far beyond its size"
    threads = 32 * values["num_warps"]
    accumulator = 1
    for name in space.accumulator:
        accumulator *= values[name]
    if accumulator > LARGEST_ACCUMULATOR * threads:
        return "too many accumulators a thread"
    if accumulator < threads:
        return "fewer accumulators than threads"
    if kernel == "_primal_adjoint_kernel" and depthwise != (values["BLOCK_D"] == 1):
        return "a depthwise layer has one weight a tile, and others have more"
    if kernel == "_primal_forward_kernel" and depthwise and values["BLOCK_D"] > 16:
        return "a depthwise layer does not use BLOCK_D"
    products = space.tiles and not depthwise and kind != "alone"
    if products and min(values[n] for tile in space.tiles for n in tile) < 16:
        return "a matrix product takes sides of 16 and more"
    if kernel == "_gram_cg_kernel":
        if values["BLOCK_K"] > values["BLOCK_N"]:
            return "BLOCK_K beyond BLOCK_N"
        if values["BLOCK_N"] > power_of_two(sizes["n"]):
            return "BLOCK_N beyond the samples"
    if products:
        entries = sum(values[a] * values[b] for a, b in space.tiles)
        needed = (values["num_stages"] - 1) * entries * itemsize
        if needed > shared_limit(capability):
            return "shared memory"
    return None
