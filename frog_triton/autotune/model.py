"""Predicted time of a launch: roofline and occupancy.

Used to rank candidates, of which the best few are then timed; and where nothing can be
timed. The efficiencies below are assumptions (an H200 took up to ten times as long);
ranking needs no more than that more padding, more traffic and emptier processors cost
more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..kernels.config import Config
from ..kernels.gpu import GPU, REGISTERS, shared_limit, threads_limit
from ..kernels.kernel import blocks
from ..kernels.launch import Launch
from ..kernels.work import Sizes, work
from .offline import Resources

L2_OVER_MEMORY = 2.5
"""Bandwidth of the L2 cache over that of memory."""

HALF_RATE_TILE = 32 * 32
"""Entries of an output tile at which tensor cores reach half their rate."""

LATENCY_US = 0.6
"""From asking memory for a tile to having it; a pipeline overlaps its stages."""

PROGRAMS_LIMIT = 32
"""Programs that a multiprocessor holds at most."""


@dataclass(frozen=True)
class Prediction:
    """What a launch is expected to take.

    Attributes:
        time_us: microseconds.
        floor_us: microseconds below which no configuration can come.
        operations: of matrix products, padding included.
        cache_bytes: through the L2 cache, what tiles read again included.
        occupancy: programs that a multiprocessor holds at a time.
        waves: of programs.
    """

    time_us: float
    floor_us: float
    operations: float
    cache_bytes: float
    occupancy: int
    waves: int


def predict(
    launch: Launch,
    gpu: GPU,
    resources: Resources | None = None,
    config: Config | None = None,
) -> Prediction:
    """Roofline time of a launch, stretched by waves that are not full.

    Args:
        launch: as recorded.
        gpu: whose rates.
        resources: what it compiles to; None assumes that registers and shared memory
            limit nothing.
        config: predicts what its launcher would launch in its place, one or two
            launches, had it this configuration.
    """
    launches = [launch]
    if config is not None:
        launches = launch.kernel.launches(config, launch.grid[1], launch.args)
    parts = [_predict(made, gpu, resources) for made in launches]
    return Prediction(
        sum(part.time_us for part in parts),
        sum(part.floor_us for part in parts),
        sum(part.operations for part in parts),
        sum(part.cache_bytes for part in parts),
        parts[0].occupancy,
        sum(part.waves for part in parts),
    )


def _predict(launch: Launch, gpu: GPU, resources: Resources | None) -> Prediction:
    values = launch.config.values()
    least = work(launch)
    operations = least.tf32_operations * padding(launch)
    cache_bytes = least.bytes + launch.kernel.again(Sizes(launch), values)
    tile = math.prod(values.get(side, 16) for side in launch.kernel.accumulator)
    rate = gpu.tf32 * tile / (tile + HALF_RATE_TILE)
    bound = max(
        operations / rate,
        least.bytes / gpu.bandwidth,
        cache_bytes / (gpu.bandwidth * L2_OVER_MEMORY),
    )
    programs = math.prod(launch.grid)
    held = occupancy(gpu, values["num_warps"], resources)
    waves = math.ceil(programs / (gpu.processors * held))
    if programs < gpu.processors:
        stretch = gpu.processors / programs
    else:
        stretch = waves * gpu.processors * held / programs if waves > 1 else 1.0
    ahead = max(1, values["num_stages"] - 1)
    waiting = waves * count_trips(launch) * LATENCY_US / ahead
    return Prediction(
        max(1e6 * bound * stretch, waiting) + gpu.launch_us,
        least.floor(gpu),
        operations,
        cache_bytes,
        held,
        waves,
    )


def count_trips(launch: Launch) -> int:
    """Tiles that a program waits for, one after the other."""
    args, letter = launch.args, launch.kernel.loop
    if not letter or not args.get("MULTIPLY", True):
        return 1
    length = min(args[letter], args.get("split_length", args[letter]))
    return blocks(length, launch.config.values()[f"BLOCK_{letter}"])


def padding(launch: Launch) -> float:
    """How much more than the exact work full tiles do."""
    factor, values = 1.0, launch.config.values()
    sizes = {"N": Sizes(launch).n, **{k: launch.args.get(k, 0) for k in "RD"}}
    for letter, size in sizes.items():
        block = values.get(f"BLOCK_{letter}", 0)
        if size and block:
            factor *= blocks(size, block) * block / size
    return factor


def occupancy(gpu: GPU, num_warps: int, resources: Resources | None = None) -> int:
    """Programs that a multiprocessor holds at a time."""
    threads = 32 * num_warps
    held = min(PROGRAMS_LIMIT, threads_limit(gpu.capability) // threads)
    if resources is not None:
        held = min(held, REGISTERS // (max(resources.registers, 16) * threads))
        held = min(held, shared_limit(gpu.capability) // max(resources.shared, 1))
    return max(held, 1)
