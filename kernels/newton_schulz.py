"""Newton-Schulz iterations, ``X <- a X + P X`` with ``P = b G + c G^2``, ``G = X X^T``.

G and P are symmetric: only tiles on and below the diagonal are computed, and written
twice. A tall X has the smaller ``G = X^T X``, and ``X <- a X + X P``.

X comes as it is. The trace of its G is ``|X|^2``, by which the first P divides, so that
the iterations begin at a norm of one and nothing is read to find it.
"""

import triton
import triton.language as tl

from ..linalg.quintic import QUINTIC
from .common import grouped_program, programs
from .products import product

A: tl.constexpr = tl.constexpr(QUINTIC[0])
B: tl.constexpr = tl.constexpr(QUINTIC[1])
C: tl.constexpr = tl.constexpr(QUINTIC[2])

SMALLEST: tl.constexpr = tl.constexpr(1e-37)
"""Squared norm from which on directions are no zeros; its reciprocal is finite."""


@triton.jit
def _tile_below(program, tiles):
    """Row and column of one of the tiles on and below the diagonal.

    A long row of them and a short one together make a row of a rectangle.
    """
    odd = tiles % 2
    width = tiles + 1 - odd
    row, column = program // width, program % width
    length = tiles - row
    in_long = column < length
    i = tl.where(in_long, length - 1, row - odd)
    return i, tl.where(in_long, column, column - length)


@triton.jit
def _store_symmetric(ptr, tile, block_i, block_j, SIDE, BLOCK: tl.constexpr):
    """A tile on or below the diagonal, and its mirror image."""
    i = block_i * BLOCK + tl.arange(0, BLOCK)
    j = block_j * BLOCK + tl.arange(0, BLOCK)
    tile = tile.to(tl.bfloat16)
    mask = (i < SIDE)[:, None] & (j < SIDE)[None, :]
    tl.store(ptr + i[:, None].to(tl.int64) * SIDE + j[None, :], tile, mask=mask)
    if block_i != block_j:
        at = j[:, None].to(tl.int64) * SIDE + i[None, :]
        tl.store(ptr + at, tl.trans(tile), mask=tl.trans(mask))


@triton.jit
def _newton_gram_kernel(
    x_ptr,
    g_ptr,
    R,
    ROW,
    SIDE,
    TALL: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    within=None,
):
    """``X X^T`` of wide matrices, ``X^T X`` of tall ones."""
    program = programs(within)
    problem = program[1].to(tl.int64)
    block_i, block_j = _tile_below(program[0], tl.cdiv(SIDE, BLOCK))
    x_ptr += problem * R * ROW
    in_block = tl.arange(0, BLOCK)
    in_step = tl.arange(0, BLOCK_K)
    i, j = block_i * BLOCK + in_block, block_j * BLOCK + in_block
    g = tl.zeros((BLOCK, BLOCK), tl.float32)
    if TALL:
        i_ok, j_ok = (i < ROW)[None, :], (j < ROW)[None, :]
        at = in_step[:, None] * ROW
        for start in range(0, R, BLOCK_K):
            ok = (start + in_step < R)[:, None]
            xi = tl.load(x_ptr + (at + i[None, :]), mask=ok & i_ok, other=0.0)
            xj = tl.load(x_ptr + (at + j[None, :]), mask=ok & j_ok, other=0.0)
            g = product(tl.trans(xi), xj, g, PRECISION)
            x_ptr += BLOCK_K * ROW
    else:
        i_ok, j_ok = (i < R)[:, None], (j < R)[None, :]
        i_ptr = x_ptr + (block_i * BLOCK).to(tl.int64) * ROW
        j_ptr = x_ptr + (block_j * BLOCK).to(tl.int64) * ROW
        at = in_block * ROW
        for start in range(0, ROW, BLOCK_K):
            k = start + in_step
            ok = k < ROW
            xi = tl.load(
                i_ptr + (at[:, None] + k[None, :]),
                mask=i_ok & ok[None, :],
                other=0.0,
            )
            xj = tl.load(
                j_ptr + (at[None, :] + k[:, None]),
                mask=j_ok & ok[:, None],
                other=0.0,
            )
            g = product(xi, xj, g, PRECISION)
    g_ptr += problem * SIDE * SIDE
    _store_symmetric(g_ptr, g, block_i, block_j, SIDE, BLOCK)


@triton.jit
def _newton_polynomial_kernel(
    g_ptr,
    p_ptr,
    size_ptr,
    SIDE,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    within=None,
):
    """``b G + c G^2``; the first G is divided by its trace, and X will be by the root.

    What X is to be multiplied by goes to `size_ptr`, in later iterations one.
    """
    program = programs(within)
    problem = program[1].to(tl.int64)
    block_i, block_j = _tile_below(program[0], tl.cdiv(SIDE, BLOCK))
    g_ptr += problem * SIDE * SIDE
    in_block = tl.arange(0, BLOCK)
    in_step = tl.arange(0, BLOCK_K)
    i, j = block_i * BLOCK + in_block, block_j * BLOCK + in_block
    i_ok, j_ok = (i < SIDE)[:, None], (j < SIDE)[None, :]
    inverse = 1.0
    if FIRST:
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, SIDE, BLOCK):
            d = (start + in_block).to(tl.int64)
            on = tl.load(g_ptr + d * (SIDE + 1), mask=d < SIDE, other=0.0)
            squares += on.to(tl.float32)
        trace = tl.sum(squares, axis=0)
        usable = (trace > SMALLEST) & (trace < float("inf"))
        trace = tl.where(usable, trace, 1.0)
        inverse = tl.where(usable, tl.div_rn(1.0, trace), 0.0)
    if program[0] == 0:
        size = 1.0
        if FIRST:
            size = tl.sqrt_rn(inverse)
        tl.store(size_ptr + problem, size)
    i_ptr = g_ptr + (block_i * BLOCK).to(tl.int64) * SIDE
    j_ptr = g_ptr + (block_j * BLOCK).to(tl.int64) * SIDE
    at = in_block * SIDE
    p = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, SIDE, BLOCK_K):
        k = start + in_step
        ok = k < SIDE
        gi = tl.load(
            i_ptr + (at[:, None] + k[None, :]), mask=i_ok & ok[None, :], other=0.0
        )
        gj = tl.load(
            j_ptr + (at[None, :] + k[:, None]), mask=j_ok & ok[:, None], other=0.0
        )
        if FIRST:  # so that no product is beyond float32
            gi = gi.to(tl.float32) * inverse
        p = product(gi, gj, p, PRECISION)
    g = tl.load(i_ptr + (at[:, None] + j[None, :]), mask=i_ok & j_ok, other=0.0)
    p = B * g.to(tl.float32) + C * p
    if FIRST:
        p = tl.where(inverse > 0, p * inverse, 0.0)
    p_ptr += problem * SIDE * SIDE
    _store_symmetric(p_ptr, p, block_i, block_j, SIDE, BLOCK)


@triton.jit
def _newton_step_kernel(
    x_ptr,
    p_ptr,
    next_ptr,
    size_ptr,
    R,
    ROW,
    SIDE,
    length,
    last,
    TALL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    within=None,
):
    """``a X + P X`` of wide matrices, ``a X + X P`` of tall ones.

    The first X is divided by its norm, the last one multiplied by ``sqrt(max(1, R /
    length))``, which is `torch.optim.Muon`'s own adjustment.
    """
    program = programs(within)
    problem = program[1].to(tl.int64)
    block_i, block_j = grouped_program(
        program[0], tl.cdiv(R, BLOCK_R), tl.cdiv(ROW, BLOCK_D), GROUP_M
    )
    x_ptr += problem * R * ROW
    next_ptr += problem * R * ROW
    p_ptr += problem * SIDE * SIDE
    in_step = tl.arange(0, BLOCK_K)
    rows = tl.arange(0, BLOCK_R)
    first = block_i * BLOCK_R
    j = block_j * BLOCK_D + tl.arange(0, BLOCK_D)
    j_ok = (j < ROW)[None, :]
    row_ok = (first + rows < R)[:, None]
    rows_ptr = x_ptr + first.to(tl.int64) * ROW
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    if TALL:
        at = in_step[:, None] * ROW + j[None, :]
        for start in range(0, ROW, BLOCK_K):
            k = start + in_step
            ok = k < ROW
            a = tl.load(
                rows_ptr + (rows[:, None] * ROW + k[None, :]),
                mask=row_ok & ok[None, :],
                other=0.0,
            )
            b = tl.load(p_ptr + at, mask=ok[:, None] & j_ok, other=0.0)
            acc = product(a, b, acc, PRECISION)
            p_ptr += BLOCK_K * ROW
    else:
        at = in_step[:, None] * ROW + j[None, :]
        there = (first + rows < SIDE)[:, None]
        p_ptr += first.to(tl.int64) * SIDE
        for start in range(0, R, BLOCK_K):
            k = start + in_step
            a = tl.load(
                p_ptr + (rows[:, None] * SIDE + k[None, :]),
                mask=there & (k < SIDE)[None, :],
                other=0.0,
            )
            b = tl.load(x_ptr + at, mask=(k < R)[:, None] & j_ok, other=0.0)
            acc = product(a, b, acc, PRECISION)
            x_ptr += BLOCK_K * ROW
    at = rows[:, None] * ROW + j[None, :]
    x = tl.load(rows_ptr + at, mask=row_ok & j_ok, other=0.0)
    acc += A * x.to(tl.float32)
    acc *= tl.load(size_ptr + problem)
    adjustment = tl.sqrt_rn(tl.maximum(tl.div_rn(R * 1.0, length * 1.0), 1.0))
    acc *= tl.where(last != 0, adjustment, 1.0)
    next_ptr += first.to(tl.int64) * ROW
    tl.store(next_ptr + at, acc.to(tl.bfloat16), mask=row_ok & j_ok)
