"""Sampled-Fisher weights, equations (3) and (4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Status of a row. All but FISHER take the identity in place of their Fisher matrix.
FISHER, NO_GRADIENT, NON_FINITE = 0, 1, 2


def fisher_weights(
    ys: Sequence[Tensor], norms: Sequence[Tensor], row_length: int
) -> tuple[Tensor, Tensor]:
    """Normalized Fisher weights, equation (4): ``Y^2 / (trace / D)``.

    Args:
        ys: output gradients ``(n, R, P)`` of each layer; any common scale cancels.
        norms: ``|x|^2`` of each layer, ``(n, groups, P)``.
        row_length: D of the paper, the bias included.

    Returns:
        ``Lambda`` ``(L, n, R, P)``, zero in rows that take the identity Fisher, and
        the status of each row ``(L, R)``: `FISHER`, or why it takes the identity.
    """
    weights, statuses = [], []
    for y, norm in zip(ys, norms, strict=True):
        # Squares of a tiny Y underflow: each row is scaled by its largest entry.
        largest = y.abs().amax((0, 2), keepdim=True).to(norm.dtype)
        scaled = y.to(norm.dtype) / torch.where(largest == 0, 1, largest)
        squares = scaled.square()
        grouped = squares.unflatten(1, (norm.shape[1], -1))
        trace = (grouped * norm.unsqueeze(2)).sum((0, 3)).flatten()
        factor = row_length / trace
        status = torch.where(torch.isfinite(factor), FISHER, NO_GRADIENT)
        status = torch.where(torch.isfinite(trace), status, NON_FINITE)
        squares *= factor[:, None]
        weights.append(torch.where((status == FISHER)[:, None], squares, 0))
        statuses.append(status)
    return torch.stack(weights), torch.stack(statuses)
