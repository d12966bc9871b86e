"""How well a step went: computed on the device, read only when asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .linalg.rows import Rows
from .linalg.scales import row_scales, scaled
from .ops.fisher import FISHER, fisher_weights
from .solve import Solution
from .step import LayerStep

FIELDS = (
    "update_norm_mean",
    "update_norm_std",
    "cg_residual",
    "identity_rows",
    "skipped_rows",
    "effective_damping",
)


class Diagnostics:
    """What the latest step of each layer looked like; see `FROG.diagnose`.

    For each layer, over its rows:

    - ``update_norm_mean``, ``update_norm_std``: of ``lr |z_j| / sqrt(<z_j, m_j>)``, the
      distance that a row moves, decay left out (with `orthogonalize`: would move
      without it); the spread is the population's.
    - ``cg_residual``: mean of ``|m_j - A_j z_j| / |m_j|`` where CG stopped.
    - ``identity_rows``: how many rows took the identity Fisher.
    - ``skipped_rows``: how many rows stayed, as their momentum would not have been
      finite. A step that is skipped whole is not looked at; where only the device knows
      (on a GPU, or with `capturable`) all its rows count here.
    - ``effective_damping``: mean of ``damping trace_j / D``, in the units of the Fisher
      matrix before its normalization, equation (3).

    Residuals and damping are averages over the rows that took their Fisher matrix. On
    several ranks, rows are those that this rank solves.
    """

    def __init__(self) -> None:
        # A layer may be solved in pieces: the values of its rows by their first row.
        self._rows: dict[str, dict[int, Tensor]] = {}

    def read(self) -> dict[str, dict[str, float]]:
        """All values by layer and name; waits for the device."""
        return {
            name: dict(zip(FIELDS, _summary(rows.values()).tolist(), strict=True))
            for name, rows in self._rows.items()
        }

    def observe(
        self, steps: Iterable[LayerStep], solution: Solution, group: dict[str, Any]
    ) -> None:
        """Look at a solve, after it and before its update.

        Args:
            steps: of the layers that were solved together.
            solution: theirs.
            group: hyperparameters.
        """
        directions = solution.rows()
        for i, step in enumerate(steps):
            direction = directions.layer(i)
            first = 0 if step.counted is None else step.counted.start
            self._rows.setdefault(step.layer.name, {})[first] = _of_rows(
                step, direction, solution.status[i], solution.finite[i], group
            )


def _summary(rows: Iterable[Tensor]) -> Tensor:
    """`FIELDS` out of the values of all rows of a layer."""
    norm, relative, damping, fisher, solved, identity, skipped = torch.cat(
        list(rows), dim=1
    )
    values = [
        norm.mean(),
        norm.std(correction=0),
        _mean(relative, solved > 0),
        identity.sum(),
        skipped.sum(),
        _mean(damping, fisher > 0),
    ]
    return torch.stack(values)


def _of_rows(
    step: LayerStep,
    z: Rows,
    status: Tensor,
    finite: Tensor,
    group: Mapping[str, Any],
) -> Tensor:
    dtype = z.weight.dtype
    m = step.momentum.flat().to(dtype)
    if group["nesterov"] and step.grads is not None:
        m = step.grads.flat().to(dtype).clone().add_(m, finite * group["momentum"])
    (x,), y = scaled([step.x.to(dtype)], dtype), step.y.to(dtype)
    length = x.dim + x.bias
    norms = x.row_norms()
    weights, _ = fisher_weights([y], [norms], length)
    squares = y.square().unflatten(1, (norms.shape[1], -1))
    trace = (squares * norms.unsqueeze(2)).sum((0, 3)).flatten()
    fisher = (status == FISHER) & finite

    # The direction is z / sqrt(<z, m>), so its product with m is that root.
    m = m.times(row_scales(m))
    root = z.dot(m)
    product = x.apply_adjoint(weights[0] * x.apply(z))
    product = product.add_(z, torch.ones_like(root) * group["damping"])
    residual = m.clone().add_(product, -root)
    relative = (residual.dot(residual) / m.dot(m)).sqrt()

    norm = torch.where(finite, z.dot(z).sqrt(), 0) * group["lr"]
    values = [
        norm,
        relative,
        trace * (group["damping"] / length),
        fisher,
        fisher & (m.dot(m) > 0),
        status != FISHER,
        ~finite,
    ]
    return torch.stack([value.to(dtype) for value in values])


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """Mean of some of the values; 0 if there are none."""
    total = torch.where(where, values, 0).sum()
    return total / where.sum().clamp(min=1)


def memory_usage(
    state: Iterable[Tensor], samples: Iterable[Tensor], counters: Iterable[Tensor]
) -> dict[str, int]:
    """Bytes of each kind of tensor, and their sum."""
    kinds = {"state": state, "samples": samples, "counters": counters}
    usage = {
        kind: sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        for kind, tensors in kinds.items()
    }
    return usage | {"total": sum(usage.values())}
