"""Muon's orthogonalisation, for directions of whole layers."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops.types import Rows

QUINTIC = (3.4445, -4.7750, 2.0315)
"""K. Jordan's polynomial (Muon, 2024): steep at zero, so that five iterations bring
singular values above 0.3 % of the largest to between about 0.7 and 1.2."""

ITERATIONS = 5


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
    kept = finite & torch.isfinite(matrix).all(-1)
    matrix = torch.where(kept.unsqueeze(-1), matrix, 0)
    matrix = newton_schulz(matrix.unflatten(1, (groups, -1)))
    matrix = matrix.flatten(1, 2).to(rows.weight.dtype)
    if bias is None:
        return Rows(matrix, None)
    return Rows(matrix[..., :-1], matrix[..., -1])


def newton_schulz(matrix: Tensor) -> Tensor:
    """``U V^T``, roughly, of ``U S V^T``, times ``sqrt(max(1, rows / columns))``.

    Products of float32 are in bfloat16 on a GPU, as Muon's are; all others in the
    matrix's own dtype.

    Args:
        matrix: ``(..., rows, columns)``.
    """
    rows, columns = matrix.shape[-2:]
    x = matrix.mT if rows > columns else matrix
    for norm in (_largest, torch.linalg.matrix_norm):  # squares could overflow
        size = norm(x)[..., None, None]
        x = x / torch.where(size > 0, size, 1)
    if x.is_cuda and x.dtype != torch.float64:
        x = x.to(torch.bfloat16)
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x * max(1, rows / columns) ** 0.5
    return x.mT if rows > columns else x


def _largest(x: Tensor) -> Tensor:
    return x.abs().amax((-2, -1))
