"""A Triton function with all that its launcher, its counter and its tuner must know."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .config import Config
from .launch import Launch, launch
from .table import C, tuned
from .work import Sizes

Args = Mapping[str, Any]
Values = Mapping[str, int]
Parts = list[tuple[tuple[int, ...], dict[str, Any]]]
"""A grid for each launch of a product, and the arguments that go with it."""


SIDE = 64
"""Rows and columns of an ordinary tile."""

MANY = 256 * SIDE**2
"""Entries whose tiles fill a large GPU about twice."""


def _no_rereads(sizes: Sizes, values: Values) -> float:
    return 0.0


def _no_rule(values: Values, sizes: Mapping[str, int], kind: str) -> str | None:
    return None


def _itself(kernel: Kernel, args: Args, values: Values) -> Kernel:
    return kernel


@dataclass(frozen=True, kw_only=True, eq=False)
class Kernel:
    """One op.

    Attributes:
        fn: the Triton function.
        config: type of its configurations.
        parts: grids and arguments that follow from the other arguments, the number of
            problems and a configuration's values; most products are one launch.
        count: operations of matrix products, and bytes, of a launch.
        again: bytes that tiles read again, mostly from the cache.
        values: that the tuner may try, by field of the configuration; fields left out
            keep the default's. Empty if it is not tuned.
        accumulator: fields that are the sides of the tile that stays in registers.
        tiles: pairs of fields, the sides of the tiles that a pipeline stage loads.
        loop: letter of the block that a program's loop advances by.
        rule: why values cannot serve sizes and a kind of samples, or None.
        variant: which kernel serves arguments, of those that share configurations.
        most_programs: of a launch that may be part of a `bundle`. To look up its many
            arguments takes a program so many registers that fewer fit a processor,
            which does not matter where there are few.
    """

    fn: Any
    config: type[Config] = Config
    parts: Callable[[Args, int, Values], Parts]
    count: Callable[[Sizes], tuple[int, int]]
    again: Callable[[Sizes, Values], float] = _no_rereads
    values: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    accumulator: tuple[str, ...] = ("BLOCK_N", "BLOCK_R")
    tiles: tuple[tuple[str, str], ...] = ()
    loop: str = ""
    rule: Callable[[Values, Mapping[str, int], str], str | None] = _no_rule
    variant: Callable[[Kernel, Args, Values], Kernel] = _itself
    most_programs: int = 2**31 - 1

    @property
    def name(self) -> str:
        """Of the Triton function."""
        return str(self.fn.__name__)

    def tuned(
        self,
        default: C,
        sizes: Mapping[str, int],
        dtypes: Sequence[torch.dtype] = (),
        kind: str = "",
    ) -> C:
        """The configuration of the table in force, else the default; see `tuned`.

        Layers of different sizes share launches where they share a key. So sizes are in
        it no further than the largest tile that is tried, beyond which there are more
        programs of the same; and of their number, whether it fills a GPU.

        Args:
            default: its default.
            sizes: n samples, r rows and d weights in a row of p problems.
            dtypes: of what it reads.
            kind: what else makes another kernel of it.
        """
        known = {}
        for letter, size in sizes.items():
            tiles = self.values.get(f"BLOCK_{letter.upper()}")
            most = max(tiles) if tiles and letter in "rd" else size
            if letter != "p":
                known[letter] = min(size, most)
        if "p" in sizes:
            entries = sizes["p"] * sizes.get("r", SIDE) * sizes.get("d", SIDE)
            kind = f"{kind} {'many' if entries >= MANY else 'few'}".strip()
        return tuned(self.name, default, known, dtypes, kind)

    def launches(self, config: Config, problems: int, args: Args) -> list[Launch]:
        """What a configuration makes of arguments.

        Args:
            config: of this kernel.
            problems: layers times groups.
            args: all arguments but those that `parts` adds.
        """
        values = config.values()
        kernel = self.variant(self, args, values)
        if kernel.fn is not self.fn:  # and may take others
            args = {k: v for k, v in args.items() if k in kernel.fn.arg_names}
        return [
            Launch(kernel, grid, {**args, **changes}, config, leads=i == 0)
            for i, (grid, changes) in enumerate(self.parts(args, problems, values))
        ]

    def launch(self, config: Config, problems: int = 1, **args: Any) -> None:
        """Launch; see `launches`."""
        for made in self.launches(config, problems, args):
            launch(made)


def ceil_div(size: int, block: int) -> int:
    """How many blocks cover a size."""
    return -(-size // block)


def blocks(size: int, block: int) -> int:
    """The same, at least one."""
    return max(1, ceil_div(size, block))


def pieces(n: int, programs: int, least: int, fill: int) -> tuple[int, int]:
    """Pieces of at least `least` samples that make `fill` programs; their length."""
    count = max(1, min(ceil_div(fill, programs), n // least))
    length = ceil_div(ceil_div(n, count), 16) * 16
    return ceil_div(n, length), length


def covering(letters: Sequence[str]) -> Callable[[Args, int, Values], Parts]:
    """Blocks of these sizes along the first axis, problems along the second."""

    def parts(args: Args, problems: int, values: Values) -> Parts:
        count = 1
        for letter in letters:
            count *= blocks(args[letter], values[f"BLOCK_{letter}"])
        return [((count, problems), {})]

    return parts


FEW = 4 * 132
"""Programs, four for each of an H200's processors: so few end soon however few of them
run at once."""

TILES = (16, 32, 64, 128)
WARPS = (4, 8)
STAGES = (2, 3, 4)

PRODUCT: Mapping[str, tuple[int, ...]] = {
    "BLOCK_N": (*TILES, 256),
    "BLOCK_R": TILES,
    "BLOCK_D": TILES,
    "num_warps": WARPS,
    "num_stages": STAGES,
}
"""What products of samples, rows and weights try."""
