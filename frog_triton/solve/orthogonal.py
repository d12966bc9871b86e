"""Muon's orthogonalization, for directions of whole layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..linalg.rows import Rows

QUINTIC = (3.4445, -4.7750, 2.0315)
"""K. Jordan's polynomial (Muon, 2024): steep at zero, so that five iterations bring
singular values above 0.3 % of the largest to between about 0.7 and 1.2."""

ITERATIONS = 5

ALIGNMENT = 8
"""Numbers in bfloat16 that fill 16 bytes."""


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
        Rows in the same dtype, times ``sqrt(max(1, R / D))`` of the matrix, which is
        `torch.optim.Muon`'s own adjustment. Zeros stay zeros.
    """
    bias = rows.bias
    matrix = (
        rows.weight if bias is None else torch.cat([rows.weight, bias[..., None]], -1)
    )
    low, high = matrix.aminmax(dim=-1)
    sizes = torch.maximum(-low, high)
    kept = finite & (sizes < math.inf)
    matrix = torch.where(kept.unsqueeze(-1), matrix, 0).unflatten(1, (groups, -1))
    sizes = torch.where(kept, sizes, 0).unflatten(1, (groups, -1)).amax(-1)
    matrix = newton_schulz(matrix, sizes).flatten(1, 2)
    if bias is None:
        return Rows(_dense(matrix, rows.weight.dtype), None)
    parts = (matrix[..., :-1], matrix[..., -1])
    return Rows(*(_dense(part, rows.weight.dtype) for part in parts))


def newton_schulz(matrix: Tensor, sizes: Tensor | None = None) -> Tensor:
    """``U V^T``, roughly, of ``U S V^T``, times ``sqrt(max(1, rows / columns))``.

    On a GPU products of float32 are in bfloat16, as Muon's are, and so is the result;
    all others are in the matrix's own dtype.

    Args:
        matrix: ``(..., rows, columns)``.
        sizes: the largest magnitude in each matrix ``(...)``, if it is known.
    """
    if sizes is None:
        sizes = matrix.abs().amax((-2, -1))
    rows, columns = matrix.shape[-2:]
    x = matrix.reshape(-1, rows, columns)
    x = x.mT if rows > columns else x
    short, long = x.shape[-2:]
    # By the largest entry first: squares could overflow. Written as it is narrowed.
    scaled = _workspace(x)
    torch.div(x, _divisor(sizes.reshape(-1)), out=scaled[:, :short, :long])
    x = scaled / _divisor(torch.linalg.matrix_norm(scaled))
    a, b, c = QUINTIC
    for i in range(ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        size = max(1, rows / columns) ** 0.5 if i + 1 == ITERATIONS else 1.0
        x = torch.baddbmm(x, polynomial, x, beta=a * size, alpha=size)
    x = x[:, :short, :long]
    return (x.mT if rows > columns else x).reshape(matrix.shape)


def _workspace(x: Tensor) -> Tensor:
    """Room for the matrices, and on a GPU zeros beside them.

    Matrix units take rows that begin at multiples of 16 bytes: with a bias as its last
    column a layer of GPT-2 has 769, for which an H200 falls back to products of another
    kind, seven times slower. Zeros add nothing to any product.
    """
    if x.device.type == "cpu" or x.dtype == torch.float64:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    count, short, long = x.shape
    aligned = (-(-size // ALIGNMENT) * ALIGNMENT for size in (short, long))
    return torch.zeros((count, *aligned), dtype=torch.bfloat16, device=x.device)


def _divisor(sizes: Tensor) -> Tensor:
    """One for each matrix; zeros stay zeros."""
    return sizes.clamp(min=torch.finfo(sizes.dtype).tiny)[:, None, None]


def _dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype, memory_format=torch.contiguous_format).contiguous()
