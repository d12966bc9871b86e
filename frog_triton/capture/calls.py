"""Samples of calls, of which some are drawn, and all that are joined to be solved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..layers import Geometry, LayerAdapter, LinearMap, MatrixMap, pool_samples

Part = tuple[int, int] | None
"""Groups of rows, the first and one past the last; None for all of a layer."""


@dataclass
class Call:
    """Samples of one forward-backward pass through one module.

    Attributes:
        module: that was called.
        x: whole examples of its input, or rows of X.
        y: the output gradients that belong to them.
        adapter: of the module's kind, where `x` are whole examples; None for rows.
        part: groups of rows that the samples are of.
    """

    module: nn.Module
    x: Tensor
    y: Tensor
    adapter: LayerAdapter | None = None
    part: Part = None

    @property
    def size(self) -> int:
        """How many there are."""
        return self.x.shape[0]

    def thin(self, index: Tensor) -> None:
        """Keep those at `index` alone."""
        self.x, self.y = self.x[index], self.y[index]

    def blank(self, alive: Tensor) -> None:
        """Make all zero unless `alive`: such samples leave the Fisher as it is."""
        self.x = torch.where(alive, self.x, 0)
        self.y = torch.where(alive, self.y, 0)


Reservoirs = dict[Part, "Reservoir"]
"""Of the parts of a layer, each of which meets inputs of its own."""


@dataclass
class Reservoir:
    """Samples of some calls, each candidate of which is equally likely.

    Attributes:
        seen: how many candidates there were.
        calls: what was drawn of them.
    """

    seen: int = 0
    calls: list[Call] = field(default_factory=list)

    @property
    def size(self) -> int:
        """How many samples there are."""
        return sum(call.size for call in self.calls)


def joined(
    geometry: Geometry, calls: Sequence[Call], bias: bool
) -> tuple[LinearMap, Tensor]:
    """Samples of a layer's calls as one map, and their gradients ``(n, R, P)``.

    Args:
        geometry: of the layer.
        calls: at least one.
        bias: whether the bias takes part.
    """
    groups, dim = geometry.groups, geometry.dim
    if all(c.part is None and (groups == 1 or c.x.shape[1] != dim) for c in calls):
        maps: list[LinearMap] = [
            MatrixMap(c.x, groups, bias)
            if c.adapter is None
            else c.adapter.linear_map(c.module, c.x, bias, c.y.shape[2:])
            for c in calls
        ]
        ys = [
            c.y.unsqueeze(-1) if c.adapter is None else c.adapter.canonical(c.y)
            for c in calls
        ]
        return pool_samples(maps, ys)
    if all(c.part is None and c.x.shape[1] == dim for c in calls):
        # All groups meet the same inputs, as in self-attention.
        x, y = torch.cat([c.x for c in calls]), torch.cat([c.y for c in calls])
        return MatrixMap(x, 1, bias), y.unsqueeze(-1)
    x, y = _by_group(geometry, calls)
    return MatrixMap(x, groups, bias), y.unsqueeze(-1)


def _by_group(geometry: Geometry, calls: Sequence[Call]) -> tuple[Tensor, Tensor]:
    """Rows of X ``(N, groups * D)`` and Y ``(N, R)``; a zero where there is none.

    Zeros weigh nothing in the Fisher, so groups may have samples of different number.
    """
    groups, dim, rows = geometry.groups, geometry.dim, geometry.rows
    sizes = [0] * groups
    placed = []
    for call in calls:
        first, end = call.part or (0, groups)
        shared = call.x.shape[1] == dim
        x = call.x.view(call.size, -1, dim).expand(-1, end - first, -1)
        assert shared or call.x.shape[1] == (end - first) * dim
        y = call.y.unflatten(1, (end - first, -1))
        start = max(sizes[first:end])
        sizes[first:end] = [start + call.size] * (end - first)
        placed.append((slice(start, start + call.size), slice(first, end), x, y))
    xs = calls[0].x.new_zeros(max(sizes), groups, dim)
    ys = calls[0].y.new_zeros(max(sizes), groups, rows // groups)
    for at, part, x, y in placed:
        xs[at, part], ys[at, part] = x, y
    return xs.flatten(1), ys.flatten(1)
