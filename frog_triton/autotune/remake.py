"""What a launcher would launch with another configuration: grids, splits, arguments.

So that thousands of candidates can be counted without building a step for each. A test
holds this to the launchers, launch by launch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import triton
import triton.language as tl

from ..kernels.gram_cg import _gram_cg_kernel, _gram_cg_tiled_kernel
from ..ops.launch import Launch
from .config import Config

Args = Mapping[str, Any]
Values = Mapping[str, int]
Grids = list[tuple[tuple[int, ...], dict[str, Any]]]
"""Grids, and the arguments that go with each."""


def leads(launch: Launch) -> bool:
    """Whether a launch does not merely go on with what another of its key began."""
    args = launch.args
    return not args.get("first_block_n") and bool(args.get("MULTIPLY", True))


def remade(launch: Launch, config: Config) -> list[Launch]:
    """What its launcher makes in place of a launch, had it this configuration.

    Args:
        launch: as recorded; of several that serve one product, the one that leads.
        config: of the same kernel.

    Raises:
        KeyError: nothing is known about the kernel.
    """
    grids = _GRIDS[launch.name](launch.args, launch.grid[1], config.values())
    kernel = launch.kernel
    if kernel in (_gram_cg_kernel, _gram_cg_tiled_kernel):
        resident = launch.args["N"] <= config.values()["BLOCK_N"]
        kernel = _gram_cg_kernel if resident else _gram_cg_tiled_kernel
    return [
        replace(
            launch,
            kernel=kernel,
            grid=grid,
            args={**launch.args, **changes},
            config=config,
        )
        for grid, changes in grids
    ]


def blocks(size: int, block: int) -> int:
    """How many cover a size, at least one."""
    return max(1, triton.cdiv(size, block))


def _tiles(letters: Sequence[str]) -> Callable[[Args, int, Values], Grids]:
    """Grids of blocks along the first axis, problems along the second."""

    def grids(args: Args, problems: int, values: Values) -> Grids:
        count = 1
        for letter in letters:
            count *= blocks(args[letter], values[f"BLOCK_{letter}"])
        return [((count, problems), {})]

    return grids


def _project(args: Args, problems: int, values: Values) -> Grids:
    rows = blocks(args["R"], values["BLOCK_R"])
    samples = blocks(args["N"], values["BLOCK_N"])
    if not args["UPDATE"]:
        return [((rows, problems, samples), {})]
    found: Grids = [((rows, problems, 1), {})]
    if samples > 1:
        rest = {"UPDATE": False, "MEASURE": False, "first_block_n": 1}
        rest["M_DTYPE"] = tl.float32 if args["NESTEROV"] else args["M_DTYPE"]
        found.append(((rows, problems, samples - 1), rest))
    return found


def _gram(args: Args, problems: int, values: Values) -> Grids:
    dim, block = args["D"], values["BLOCK_D"]
    tiles = blocks(args["N"], values["BLOCK_N"]) ** 2
    splits = max(1, min(values["programs"] // (tiles * problems), dim // 256))
    length = triton.cdiv(triton.cdiv(dim, splits), block) * block
    splits = blocks(dim, max(length, 1))
    return [((tiles, problems, splits), {"split_length": length})]


def _scale(args: Args, problems: int, values: Values) -> Grids:
    rows = blocks(args["R"], values["BLOCK_R"])
    least = 4 * values["BLOCK_N"]
    splits, length = _splits(args["N"], rows * problems, least, values["programs"])
    return [((rows, problems, splits), {"split_length": length})]


def _adjoint(args: Args, problems: int, values: Values) -> Grids:
    count = blocks(args["R"], values["BLOCK_R"]) * blocks(args["D"], values["BLOCK_D"])
    least = 8 * values["BLOCK_N"]
    splits, length = _splits(args["N"], count * problems, least, values["programs"])
    split = {"SPLITS": splits, "split_length": length}
    if splits == 1:
        whole = {"MULTIPLY": True, "ADVANCE": True}
        return [((count, problems, 1), split | whole)]
    return [
        ((count, problems, splits), split | {"MULTIPLY": True, "ADVANCE": False}),
        ((count, problems, 1), split | {"MULTIPLY": False, "ADVANCE": True}),
    ]


def _splits(n: int, programs: int, least: int, fill: int) -> tuple[int, int]:
    splits = max(1, min(triton.cdiv(fill, programs), n // least))
    length = triton.cdiv(triton.cdiv(n, splits), 16) * 16
    return triton.cdiv(n, length), length


def _gather(args: Args, problems: int, values: Values) -> Grids:
    return [((args["N"], blocks(args["ROW"], values["BLOCK_D"])), {})]


_GRIDS: dict[str, Callable[[Args, int, Values], Grids]] = {
    "_fisher_weights_kernel": _tiles("R"),
    "_momentum_project_kernel": _project,
    "_gram_kernel": _gram,
    "_gram_cg_kernel": _tiles("R"),
    "_gram_cg_tiled_kernel": _tiles("R"),
    "_update_kernel": _tiles("RD"),
    "_gather_kernel": _gather,
    "_primal_forward_kernel": _tiles("NR"),
    "_primal_adjoint_kernel": _adjoint,
    "_primal_update_kernel": _tiles("RD"),
    "_row_norms_kernel": _tiles("N"),
    "_row_scale_kernel": _scale,
}
"""Of each kernel that can be tuned."""
