"""Predicted time of a launch: roofline and occupancy.

Used to rank candidates, of which the best few are then timed; and where nothing can be
timed. The efficiencies below are assumptions (an H200 took up to ten times as long);
ranking needs no more than that more padding, more traffic and emptier processors cost
more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..ops.launch import Launch
from .config import Config
from .offline import Resources
from .remake import blocks, remade
from .space import REGISTERS, shared_limit, threads_limit
from .traffic import GPU, Sizes, work

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
    launches = [launch] if config is None else remade(launch, config)
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
    reread = _REREAD.get(launch.name, _no_rereads)
    cache_bytes = least.bytes + reread(Sizes(launch), values)
    tile = _tile(launch.name, values)
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
    args, letter = launch.args, _LOOP.get(launch.name)
    if letter is None or not args.get("MULTIPLY", True):
        return 1
    length = min(args[letter], args.get("split_length", args[letter]))
    return blocks(length, launch.config.values()[f"BLOCK_{letter}"])


# Letter of the block that a kernel's loop advances by.
_LOOP = {
    "_fisher_weights_kernel": "N",
    "_momentum_project_kernel": "D",
    "_gram_kernel": "D",
    "_update_kernel": "N",
    "_primal_forward_kernel": "D",
    "_primal_adjoint_kernel": "N",
    "_row_norms_kernel": "D",
    "_row_scale_kernel": "N",
}


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


def _tile(kernel: str, values: Mapping[str, int]) -> int:
    """Entries of the output tile of a kernel's matrix product."""
    sides = {
        "_update_kernel": ("BLOCK_R", "BLOCK_D"),
        "_primal_adjoint_kernel": ("BLOCK_R", "BLOCK_D"),
        "_gram_kernel": ("BLOCK_N", "BLOCK_N"),
    }.get(kernel, ("BLOCK_N", "BLOCK_R"))
    return math.prod(values.get(side, 16) for side in sides)


def _forward(s: Sizes, values: Mapping[str, int]) -> float:
    rows = blocks(s.args["R"], values["BLOCK_R"])
    samples = blocks(s.n, values["BLOCK_N"])
    vectors = (s.size("M_DTYPE") if s.args["FIRST"] else 8) * s.row_entries
    x = s.n * s.args["D"] * s.problems * s.size("X_DTYPE")
    return x * rows - s.x_entries * s.size("X_DTYPE") + vectors * (samples - 1)


def _adjoint(s: Sizes, values: Mapping[str, int]) -> float:
    if not s.args["MULTIPLY"]:
        return 0.0
    rows = blocks(s.args["R"], values["BLOCK_R"])
    columns = blocks(s.args["D"], values["BLOCK_D"])
    x = s.n * s.args["D"] * s.problems * s.size("X_DTYPE")
    t = s.nr * s.args["t_ptr"].element_size()
    return x * rows - s.x_entries * s.size("X_DTYPE") + t * (columns - 1)


def _project(s: Sizes, values: Mapping[str, int]) -> float:
    again = 0
    if s.args["MEASURE"]:  # the rows are read once ahead
        again = s.row_entries * s.size("M_DTYPE")
        again += s.row_entries * s.size("G_DTYPE") * s.args["UPDATE"]
    if not s.args["PROJECT"]:
        return again
    rows = blocks(s.args["R"], values["BLOCK_R"])
    again += s.x_entries * s.size("X_DTYPE") * (rows - 1)
    samples = blocks(s.n, values["BLOCK_N"])
    return again + s.row_entries * s.size("M_DTYPE") * (samples - 1)


def _gram(s: Sizes, values: Mapping[str, int]) -> float:
    tiles = blocks(s.n, values["BLOCK_N"])
    return s.x_entries * s.size("X_DTYPE") * (2.0 * tiles - 1)


def _update(s: Sizes, values: Mapping[str, int]) -> float:
    rows = blocks(s.args["R"], values["BLOCK_R"])
    columns = blocks(s.args["D"], values["BLOCK_D"])
    return s.x_entries * s.size("X_DTYPE") * (rows - 1) + 4 * s.nr * (columns - 1)


def _cg(s: Sizes, values: Mapping[str, int]) -> float:
    rows = blocks(s.args["R"], values["BLOCK_R"])
    repeats = s.args["ITERS"] - 1
    again = 4 * s.nn * (rows * repeats - 1.0)
    resident = values["BLOCK_N"] >= s.n and values["BLOCK_K"] >= values["BLOCK_N"]
    return again + (0 if resident else 4 * 4 * s.nr * repeats)


def _no_rereads(s: Sizes, values: Mapping[str, int]) -> float:
    return 0.0


# Bytes that tiles read again, mostly from the cache.
_REREAD: dict[str, Callable[[Sizes, Mapping[str, int]], float]] = {
    "_primal_forward_kernel": _forward,
    "_primal_adjoint_kernel": _adjoint,
    "_momentum_project_kernel": _project,
    "_gram_kernel": _gram,
    "_update_kernel": _update,
    "_gram_cg_kernel": _cg,
    "_gram_cg_tiled_kernel": _cg,
}
