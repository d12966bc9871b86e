"""Predicted time of a launch: roofline and occupancy.

Used to rank candidates, of which the best few are then timed; and where nothing can be
timed. The efficiencies below are assumptions, no GPU has confirmed them; ranking needs
no more than that more padding, more traffic and emptier processors cost more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .config import Config
from .offline import Resources
from .space import REGISTERS, shared_limit, threads_limit
from .traffic import GPU, Sizes, work

if TYPE_CHECKING:
    from ..ops.launch import Launch

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
        config: to take in place of the launch's own.
    """
    args, values = launch.args, (config or launch.config).values()
    least = work(launch.name, args, launch.grid)
    operations = least.tf32_operations * padding(args, values)
    reread = _REREAD.get(launch.name, _no_rereads)
    cache_bytes = least.bytes + reread(Sizes(args, launch.grid), values)
    tile = _tile(launch.name, values)
    rate = gpu.tf32 * tile / (tile + HALF_RATE_TILE)
    bound = max(
        operations / rate,
        least.bytes / gpu.bandwidth,
        cache_bytes / (gpu.bandwidth * L2_OVER_MEMORY),
    )
    programs = count_programs(launch.name, args, launch.grid, values)
    held = occupancy(gpu, values["num_warps"], resources)
    waves = math.ceil(programs / (gpu.processors * held))
    if programs < gpu.processors:
        stretch = gpu.processors / programs
    else:
        stretch = waves * gpu.processors * held / programs if waves > 1 else 1.0
    ahead = max(1, values["num_stages"] - 1)
    trips = count_trips(launch.name, args, values, programs, launch.grid)
    waiting = waves * trips * LATENCY_US / ahead
    return Prediction(
        max(1e6 * bound * stretch, waiting) + gpu.launch_us,
        least.floor(gpu),
        operations,
        cache_bytes,
        held,
        waves,
    )


def count_programs(
    kernel: str,
    args: Mapping[str, Any],
    grid: tuple[int, ...],
    values: Mapping[str, int],
) -> int:
    """Programs of a launch, had it these values; splits as its launcher makes them."""
    count = grid[1] if len(grid) > 1 else 1
    for letter in _GRID.get(kernel, ""):
        size = args["ROW"] if kernel == "_gather_kernel" else args[letter]
        count *= _blocks(size, values[f"BLOCK_{letter}"])
    if kernel == "_gather_kernel":
        return count // grid[1] * int(args["N"])
    if "programs" in values and args.get("MULTIPLY", True):
        length = args["N"] if kernel != "_gram_kernel" else args["D"]
        least = 256 if kernel == "_gram_kernel" else 8 * values["BLOCK_N"]
        most = max(1, length // least)
        count *= max(1, min(values["programs"] // count, most))
    return count


def count_trips(
    kernel: str,
    args: Mapping[str, Any],
    values: Mapping[str, int],
    programs: int,
    grid: tuple[int, ...],
) -> int:
    """Tiles that a program waits for, one after the other."""
    letter = _LOOP.get(kernel)
    if letter is None or not args.get("MULTIPLY", True):
        return 1
    trips = _blocks(args[letter], values[f"BLOCK_{letter}"])
    if "programs" in values:
        unsplit = grid[1] if len(grid) > 1 else 1
        for other in _GRID[kernel]:
            unsplit *= _blocks(args[other], values[f"BLOCK_{other}"])
        trips = _blocks(trips, max(1, programs // unsplit))
    return trips


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

# Letters of the blocks that tile a kernel's first axis.
_GRID = {
    "_fisher_weights_kernel": "R",
    "_momentum_project_kernel": "R",
    "_gram_kernel": "NN",
    "_gram_cg_kernel": "R",
    "_gram_cg_tiled_kernel": "R",
    "_update_kernel": "RD",
    "_gather_kernel": "D",
    "_primal_forward_kernel": "NR",
    "_primal_adjoint_kernel": "RD",
    "_primal_update_kernel": "RD",
    "_row_norms_kernel": "N",
    "_row_scale_kernel": "R",
}


def padding(args: Mapping[str, Any], values: Mapping[str, int]) -> float:
    """How much more than the exact work full tiles do."""
    factor = 1.0
    for letter in "NRD":
        size, block = args.get(letter, 0), values.get(f"BLOCK_{letter}", 0)
        if size and block:
            factor *= -(-size // block) * block / size
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


def _blocks(size: int, block: int) -> int:
    return max(1, -(-size // block))


def _forward(s: Sizes, values: Mapping[str, int]) -> float:
    rows, samples = (
        _blocks(s.args["R"], values["BLOCK_R"]),
        _blocks(s.n, values["BLOCK_N"]),
    )
    vectors = (s.size("M_DTYPE") if s.args["FIRST"] else 8) * s.row_entries
    x = s.n * s.args["D"] * s.problems * s.size("X_DTYPE")
    return x * rows - s.x_entries * s.size("X_DTYPE") + vectors * (samples - 1)


def _adjoint(s: Sizes, values: Mapping[str, int]) -> float:
    if not s.args["MULTIPLY"]:
        return 0.0
    rows = _blocks(s.args["R"], values["BLOCK_R"])
    columns = _blocks(s.args["D"], values["BLOCK_D"])
    x = s.n * s.args["D"] * s.problems * s.size("X_DTYPE")
    t = s.nr * s.args["t_ptr"].element_size()
    return x * rows - s.x_entries * s.size("X_DTYPE") + t * (columns - 1)


def _project(s: Sizes, values: Mapping[str, int]) -> float:
    if not s.args["PROJECT"]:
        return 0.0
    rows = _blocks(s.args["R"], values["BLOCK_R"])
    x = s.x_entries * s.size("X_DTYPE") * (rows - 1)
    samples = _blocks(s.n, values["BLOCK_N"])
    return x + s.row_entries * s.size("M_DTYPE") * (samples - 1)


def _gram(s: Sizes, values: Mapping[str, int]) -> float:
    blocks = _blocks(s.n, values["BLOCK_N"])
    return s.x_entries * s.size("X_DTYPE") * (2.0 * blocks - 1)


def _update(s: Sizes, values: Mapping[str, int]) -> float:
    rows = _blocks(s.args["R"], values["BLOCK_R"])
    columns = _blocks(s.args["D"], values["BLOCK_D"])
    return s.x_entries * s.size("X_DTYPE") * (rows - 1) + 4 * s.nr * (columns - 1)


def _cg(s: Sizes, values: Mapping[str, int]) -> float:
    rows = _blocks(s.args["R"], values["BLOCK_R"])
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
