"""Directions orthogonalized on a GPU: what `newton_schulz` is launched with."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..linalg.quintic import ITERATIONS
from ..linalg.rows import Rows
from .config import Config, tile_side
from .gpu import is_hopper
from .kernel import Args, Kernel, Parts, Values, blocks
from .launch import settle
from .launchers import padded, room_of
from .newton_schulz import (
    _newton_gram_kernel,
    _newton_polynomial_kernel,
    _newton_step_kernel,
)
from .products import gram_precision
from .work import Sizes


@dataclass(frozen=True)
class SymmetricConfig(Config):
    """`NEWTON_GRAM` and `NEWTON_POLYNOMIAL`."""

    num_warps: int = 8
    num_stages: int = 3
    BLOCK: int = 128
    BLOCK_K: int = 64


@dataclass(frozen=True)
class StepConfig(Config):
    """`NEWTON_STEP`."""

    num_warps: int = 8
    num_stages: int = 3
    BLOCK_R: int = 128
    BLOCK_D: int = 128
    BLOCK_K: int = 64
    GROUP_M: int = 8


def symmetric_config(side: int) -> SymmetricConfig:
    """Tiles that a small matrix fills."""
    if side > 128:
        return SymmetricConfig()
    block = min(tile_side(side), 64)
    return SymmetricConfig(BLOCK=block, BLOCK_K=max(32, block), num_warps=4)


def step_config(rows: int, length: int, hopper: bool = True) -> StepConfig:
    """Likewise; the larger a tile, the less of what others read is read again.

    Args:
        rows: of X.
        length: of a row.
        hopper: see `gpu.is_hopper`; others have no room for more stages of large tiles.
    """
    if min(rows, length) > 64:
        fits = hopper and rows % 256 == 0
        return StepConfig(BLOCK_R=256 if fits else 128)
    block = tile_side(min(rows, length))
    return StepConfig(
        BLOCK_R=min(tile_side(rows), 64),
        BLOCK_D=min(tile_side(length), 64),
        BLOCK_K=max(32, block),
        num_warps=4,
    )


def _symmetric_parts(args: Args, problems: int, values: Values) -> Parts:
    side = blocks(args["SIDE"], values["BLOCK"])
    return [((side * (side + 1) // 2, problems), {})]


def _step_parts(args: Args, problems: int, values: Values) -> Parts:
    down = blocks(args["R"], values["BLOCK_R"])
    return [((down * blocks(args["ROW"], values["BLOCK_D"]), problems), {})]


def _of_x(s: Sizes) -> int:
    """Entries of X."""
    return int(s.args["R"] * s.args["ROW"] * s.problems)


def _of_g(s: Sizes) -> int:
    """Entries of G, and of P."""
    return int(s.args["SIDE"] ** 2 * s.problems)


def _count_gram(s: Sizes) -> tuple[int, int]:
    x, g = _of_x(s), _of_g(s)
    return x * (s.args["SIDE"] + 1), 2 * (x + g)


def _count_polynomial(s: Sizes) -> tuple[int, int]:
    g = _of_g(s)
    return g * (s.args["SIDE"] + 1), 2 * 2 * g


def _count_step(s: Sizes) -> tuple[int, int]:
    x, g = _of_x(s), _of_g(s)
    return 2 * x * s.args["SIDE"], 2 * (2 * x + g)


def _again_gram(s: Sizes, values: Values) -> float:
    return 2.0 * _of_x(s) * blocks(s.args["SIDE"], values["BLOCK"])


def _again_polynomial(s: Sizes, values: Values) -> float:
    return 2.0 * _of_g(s) * blocks(s.args["SIDE"], values["BLOCK"])


def _again_step(s: Sizes, values: Values) -> float:
    x, g = _of_x(s), _of_g(s)
    down = blocks(s.args["R"], values["BLOCK_R"])
    across = blocks(s.args["ROW"], values["BLOCK_D"])
    if s.args["TALL"]:
        return 2.0 * (x * across + g * (down - 1))
    return 2.0 * (x * down + g * (across - 1))


NEWTON_GRAM = Kernel(
    fn=_newton_gram_kernel,
    config=SymmetricConfig,
    parts=_symmetric_parts,
    count=_count_gram,
    again=_again_gram,
)

NEWTON_POLYNOMIAL = Kernel(
    fn=_newton_polynomial_kernel,
    config=SymmetricConfig,
    parts=_symmetric_parts,
    count=_count_polynomial,
    again=_again_polynomial,
)

NEWTON_STEP = Kernel(
    fn=_newton_step_kernel,
    config=StepConfig,
    parts=_step_parts,
    count=_count_step,
    again=_again_step,
)


def orthogonalize(rows: Rows, finite: Tensor, groups: int) -> Rows:
    """See `torch_ops.orthogonalize`; three launches an iteration.

    Args:
        rows: ``(L, R, D)``. If they are bfloat16, a kernel has written them into what
            `empty_directions` made, with zeros where nothing is to move, and they are
            overwritten.
        finite: rows that are to move ``(L, R)``.
        groups: of the layers.

    Returns:
        Rows in bfloat16, laid like those.
    """
    dim, bias = rows.weight.shape[-1], rows.bias is not None
    if rows.weight.dtype != torch.bfloat16:
        rows = _narrowed(rows, finite)
    x = room_of(rows)
    layers, height, row = x.shape
    problems, height, length = layers * groups, height // groups, dim + bias
    tall = height > length
    side = row if tall else padded(height)
    g = x.new_empty(problems, side, side)
    p, spare = torch.empty_like(g), torch.empty_like(x)
    size = x.new_empty(problems, dtype=torch.float32)
    how: dict[str, Any] = {
        "SIDE": side,
        "PRECISION": gram_precision(torch.bfloat16),
    }
    of_rows = {"R": height, "ROW": row, "TALL": tall, **how}
    symmetric = symmetric_config(side)
    stepping = step_config(height, row, is_hopper(x.device))
    for iteration in range(ITERATIONS):
        NEWTON_GRAM.launch(symmetric, problems, x_ptr=x, g_ptr=g, **of_rows)
        NEWTON_POLYNOMIAL.launch(
            symmetric,
            problems,
            g_ptr=g,
            p_ptr=p,
            size_ptr=size,
            FIRST=iteration == 0,
            **how,
        )
        NEWTON_STEP.launch(
            stepping,
            problems,
            x_ptr=x,
            p_ptr=p,
            next_ptr=spare,
            size_ptr=size,
            length=length,
            last=int(iteration + 1 == ITERATIONS),
            **of_rows,
        )
        x, spare = spare, x
    return Rows(x[..., :dim], x[..., dim] if bias else None)


def _narrowed(rows: Rows, finite: Tensor) -> Rows:
    """Rows that torch has written, as kernels write them."""
    settle()
    weight, bias = rows
    whole = weight if bias is None else torch.cat([weight, bias[..., None]], -1)
    beyond = padded(whole.shape[-1]) - whole.shape[-1]
    room = torch.nn.functional.pad(whole.to(torch.bfloat16), (0, beyond))
    kept = finite & torch.isfinite(room).all(-1)
    room.masked_fill_(~kept[..., None], 0)
    dim = weight.shape[-1]
    return Rows(room[..., :dim], None if bias is None else room[..., dim])
