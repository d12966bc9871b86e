"""Muon's orthogonalization, for directions of whole layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..linalg.products import (
    has_fast_bfloat16,
    on_host,
    plus_product,
    times_transposed,
)
from ..linalg.quintic import ITERATIONS, QUINTIC
from ..linalg.rows import Rows

ALIGNMENT = 8
"""Numbers in bfloat16 that fill 16 bytes."""

FAR = 2.0**60
"""Numbers up to this, and its reciprocal, have squares that float32 holds."""


def orthogonalize(rows: Rows, finite: Tensor, groups: int = 1) -> Rows:
    """Rows with all singular values near one, by Newton-Schulz iterations.

    A bias is the last column. Rows of different groups meet different inputs, so each
    group is a matrix of its own.

    Args:
        rows: of layers of one geometry, ``(L, R, D)``.
        finite: rows that are to move ``(L, R)``. The others, and rows that hold a value
            that is not finite, are left out of their matrix, and come out as zeros.
        groups: of the layers.

    Returns:
        Rows times ``sqrt(max(1, R / D))`` of the matrix, which is `torch.optim.Muon`'s
        own adjustment, dense and in the same dtype; on a GPU as products in bfloat16
        have left them. Zeros stay zeros.
    """
    weight, bias = rows.weight, rows.bias
    layers, height, width = weight.shape
    shape = (layers, groups, height // groups, width + (bias is not None))
    unit = None
    if on_host(weight):
        whole = weight if bias is None else torch.cat([weight, bias[..., None]], -1)
        unit = _ordinary(whole.view(shape), finite)
    if unit is None:
        unit = _unit(rows, finite, groups, shape)
    found = _iterated(unit, shape).flatten(1, 2)
    parts = (found[..., :width], None if bias is None else found[..., width])
    # On a GPU they are read once more, where they lie: they are not worth a copy.
    return _dense(*parts, weight.dtype) if on_host(weight) else Rows(*parts)


def newton_schulz(matrix: Tensor) -> Tensor:
    """``U V^T``, roughly, of ``U S V^T``, times ``sqrt(max(1, rows / columns))``.

    On a GPU products of float32 are in bfloat16, as Muon's are, and so is the result;
    on a CPU large products of nearly square matrices are, if it has units for that. All
    others are in the matrix's own dtype.

    Args:
        matrix: ``(..., rows, columns)``.
    """
    unit = _normalized(matrix, matrix.abs().amax((-2, -1)))
    return _iterated(unit, matrix.shape)


def _iterated(unit: Tensor, shape: Sequence[int]) -> Tensor:
    """The iterations on wide matrices of norm one; see `_normalized`."""
    rows, columns = shape[-2:]
    size = max(1, rows / columns) ** 0.5
    wide = unit.device.type == "cpu" and unit.dtype != torch.bfloat16 and _is_wide(unit)
    iterate = _through_gram if wide else _directly
    x = iterate(unit[0], size)[None] if len(unit) == 1 else iterate(unit, size)
    x = x[:, : min(rows, columns), : max(rows, columns)]
    return (x.mT if rows > columns else x).reshape(shape)


def _directly(x: Tensor, size: float) -> Tensor:
    """``X <- a X + (b X X^T + c (X X^T)^2) X``, at last times `size`."""
    a, b, c = QUINTIC
    for i in range(ITERATIONS):
        gram = times_transposed(x, x)
        polynomial = plus_product(gram, gram, gram, b, c)
        last = size if i + 1 == ITERATIONS else 1.0
        x = plus_product(x, polynomial, x, a * last, last)
    return x


def _through_gram(x: Tensor, size: float) -> Tensor:
    """The same in products as small as ``G = X X^T``, and one with X.

    With ``P = a + b G + c G^2`` it is ``X <- P X``, so ``G <- P G P``. What float32
    rounds off G moves a singular value by 1e-3 of the largest at most (measured, at
    full rank and far below it); bfloat16, in which Muon works, by 1e-1.
    """
    a, b, c = QUINTIC
    gram, whole = times_transposed(x, x), None
    for i in range(ITERATIONS):
        polynomial = plus_product(gram, gram, gram, b, c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        whole = polynomial if whole is None else times_transposed(polynomial, whole)
        if i + 1 < ITERATIONS:
            gram = times_transposed(times_transposed(polynomial, gram), polynomial)
    assert whole is not None
    return times_transposed(whole, x.mT).mul_(size)


def _is_wide(x: Tensor) -> bool:
    """Whether ``34 a^3 + 4 a^2 b`` operations are fewer than ``10 a^3 + 20 a^2 b``."""
    short, long = x.shape[-2:]
    return 2 * long > 3 * short


def _unit(
    rows: Rows, finite: Tensor, groups: int, shape: tuple[int, int, int, int]
) -> Tensor:
    """What `_normalized` returns, of rows that may not be finite.

    Args:
        rows: ``(L, R, D)``.
        finite: rows that are to move ``(L, R)``.
        groups: of the layers.
        shape: of the matrices, ``(L, groups, R / groups, columns)``.
    """
    parts = [] if rows.bias is None else [rows.bias.abs()]
    if rows.weight.shape[-1]:  # else all but a bias is frozen
        low, high = rows.weight.aminmax(dim=-1)
        parts.append(torch.maximum(-low, high))
    sizes = parts[0] if len(parts) == 1 else torch.maximum(*parts)
    kept = finite & (sizes < math.inf)
    sizes = torch.where(kept, sizes, 0).unflatten(1, (groups, -1)).amax(-1)
    divisor = _divisor(sizes.flatten())
    x, standing = _workspace(shape, rows.weight)
    written = [(rows.weight, standing[..., : rows.weight.shape[-1]])]
    if rows.bias is not None:
        written.append((rows.bias.unsqueeze(-1), standing[..., -1:]))
    for part, place in written:
        torch.div(part.reshape(place.shape), divisor, out=place)
    standing.masked_fill_(~kept.view(*standing.shape[:2], 1), 0)
    return x / _divisor(torch.linalg.matrix_norm(x))


def _ordinary(matrix: Tensor, finite: Tensor) -> Tensor | None:
    """What `_normalized` returns where nothing needs care, if the host can tell.

    Args:
        matrix: ``(L, groups, R / groups, D)``.
        finite: rows that are to move ``(L, R)``.
    """
    if not bool(finite.all()):
        return None
    norms: Tensor = torch.linalg.matrix_norm(matrix).view(-1, 1, 1)
    if not all(1 / FAR < norm < FAR for norm in norms.flatten().tolist()):
        return None
    x = _lying(matrix)
    unit: Tensor = (x / norms).to(_narrow_dtype(x, *x.shape[-2:]))
    return unit


def _normalized(matrix: Tensor, sizes: Tensor) -> Tensor:
    """Matrices of norm one, ``(count, short, long)``; zeros stay zeros.

    By the largest entry first: squares could overflow. Written as it is narrowed.

    Args:
        matrix: ``(..., rows, columns)``.
        sizes: the largest magnitude in each ``(...)``.
    """
    x, standing = _workspace(matrix.shape, matrix)
    flat = matrix.reshape(standing.shape)
    torch.div(flat, _divisor(sizes.reshape(-1)), out=standing)
    return x / _divisor(torch.linalg.matrix_norm(x))


def _lying(matrix: Tensor) -> Tensor:
    """Matrices ``(count, short, long)``."""
    rows, columns = matrix.shape[-2:]
    x = matrix.reshape(-1, rows, columns)
    return x.mT if rows > columns else x


def _narrow_dtype(x: Tensor, short: int, long: int) -> torch.dtype:
    """What products of matrices ``(short, long)`` are in.

    On a CPU bfloat16 pays where the units are kept busy, and where fewer operations in
    float32 (`_through_gram`) would not do as well: measured at 128 rows and above, and
    up to three times as many columns.
    """
    pays = x.device.type != "cpu" or (short >= 128 and long <= 3 * short)
    narrow = x.dtype == torch.float32 and pays and has_fast_bfloat16(x.device)
    return torch.bfloat16 if narrow else x.dtype


def _workspace(shape: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Room for matrices ``(count, short, long)``, and on a GPU zeros beside them.

    Matrix units take rows that begin at multiples of 16 bytes: with a bias as its last
    column a layer of GPT-2 has 769, for which an H200 falls back to products of another
    kind, seven times slower. Zeros add nothing to any product.

    Args:
        shape: of the matrices ``(..., rows, columns)``.
        like: what will be written there.

    Returns:
        The room, and the part of it that is written, ``(count, rows, columns)``.
    """
    rows, columns = shape[-2:]
    count, short, long = math.prod(shape[:-2]), min(rows, columns), max(rows, columns)
    dtype = _narrow_dtype(like, short, long)
    sides: tuple[int, ...] = (short, long)
    if like.device.type != "cpu" and dtype == torch.bfloat16:
        sides = tuple(-(-size // ALIGNMENT) * ALIGNMENT for size in sides)
    room = like.new_empty if sides == (short, long) else like.new_zeros
    x = room((count, *sides), dtype=dtype)
    part = x[:, :short, :long]
    return x, part.mT if rows > columns else part


def _divisor(sizes: Tensor) -> Tensor:
    """One for each matrix; zeros stay zeros."""
    return sizes.clamp(min=torch.finfo(sizes.dtype).tiny)[:, None, None]


def _dense(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Rows:
    made = weight.to(dtype).contiguous()
    return Rows(made, None if bias is None else bias.to(dtype).contiguous())
