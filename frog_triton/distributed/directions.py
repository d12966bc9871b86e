"""Whole directions on every rank, for what needs all rows of a layer at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.launch import settle
from ..linalg.numbers import Numbers
from ..linalg.rows import Rows, stack_rows
from ..ops.backend import Backend
from ..step import LayerStep, narrow
from ..update import Solved, side_by_side
from . import collectives
from .division import Division


class Direction(NamedTuple):
    """Some rows of a layer's direction, not orthogonalized.

    Attributes:
        rows: ``(R, D)``.
        finite: rows that may move ``(R,)``.
    """

    rows: Rows
    finite: Tensor


@dataclass(frozen=True)
class Whole:
    """A layer's whole direction; see `frog_triton.update.Directions`.

    Attributes:
        step: of the rows that this rank holds.
        direction: of all rows.
        held: which of them this rank holds.
    """

    step: LayerStep
    direction: Direction
    held: slice

    @property
    def backend(self) -> Backend:
        """See `frog_triton.update.Directions`."""
        return self.step.backend

    @property
    def groups(self) -> int:
        """Of the layer."""
        return self.step.layer.geometry.groups

    @property
    def finite(self) -> Tensor:
        """Rows that may move ``(1, R)``."""
        return self.direction.finite[None]

    def rows(self, narrow: bool = False) -> Rows:
        """The direction ``(1, R, D)``."""
        return stack_rows([self.direction.rows])

    def step_along_(self, rows: Rows, numbers: Numbers) -> None:
        """Update the rows held here; each rank has counted those that it solved."""
        settle()
        self.backend.step_along_(
            [self.step.params],
            stack_rows([narrow(rows.layer(0), self.held)]),
            self.finite[:, self.held],
            numbers,
        )


def collect(solved: Iterable[Sequence[Solved]]) -> dict[str, list[Direction]]:
    """Directions of each layer by name, in the order of its rows; counts anomalies.

    Args:
        solved: portions of pieces of layers. Those of a layer that share a geometry are
            solved together, out of order.
    """
    found: dict[str, dict[int, Direction]] = {}
    for portion in solved:
        written = side_by_side(portion, [each.rows for each in portion])
        for (steps, solution, counts), rows in zip(portion, written, strict=True):
            finite = solution.finite
            steps[0].backend.count_(counts, solution.status, finite, solution.numbers)
            for i, step in enumerate(steps):
                first = 0 if step.counted is None else step.counted.start
                pieces = found.setdefault(step.layer.name, {})
                pieces[first] = Direction(rows.layer(i), finite[i])
    return {name: [d[first] for first in sorted(d)] for name, d in found.items()}


def share(
    division: Division,
    steps: Sequence[LayerStep],
    found: Mapping[str, Sequence[Direction]],
) -> Iterator[list[tuple[LayerStep, Direction, int]]]:
    """Send each rank's rows of all directions to all ranks, a collective an item.

    Every rank must exhaust the iterator: it communicates on the way.

    Args:
        division: of the rows.
        steps: of all rows that this rank holds.
        found: directions of the rows that this rank solves, by layer.

    Returns:
        Steps, each with its layer's whole direction and the bytes sent for it.
    """
    for bucket in _buckets(steps):
        mine = [_joined(step, found.get(step.layer.name, ())) for step in bucket]
        specs = [
            [
                ((len(division.solved(step.layer, rank)), *t.shape[1:]), t.dtype)
                for step, parts in zip(bucket, mine, strict=True)
                for t in parts
            ]
            for rank in range(division.size)
        ]
        device = bucket[0].y.device
        received = collectives.all_gather(
            [t for parts in mine for t in parts],
            specs,
            division.group,
            collectives.collective_device(division.group, device),
        )
        at, sent = 0, []
        for step, parts in zip(bucket, mine, strict=True):
            starts = [
                division.solved(step.layer, r).start for r in range(division.size)
            ]
            order = sorted(range(division.size), key=starts.__getitem__)
            whole = [
                torch.cat([received[rank][at + i] for rank in order]).to(step.y.device)
                for i in range(len(parts))
            ]
            at += len(parts)
            bias = whole[1] if len(whole) == 3 else None
            direction = Direction(Rows(whole[0], bias), whole[-1])
            nbytes = sum(t.nbytes for t in parts) * (division.size - 1)
            sent.append((step, direction, nbytes))
        yield sent


def _buckets(steps: Iterable[LayerStep]) -> Iterator[list[LayerStep]]:
    """Steps whose directions travel together."""
    bucket: list[LayerStep] = []
    size = 0
    for step in steps:
        entries = step.layer.geometry.rows * (step.momentum.dim + 1)
        taken = 8 * entries  # float64 at most
        if bucket and size + taken > collectives.BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(step)
        size += taken
    if bucket:
        yield bucket


def _joined(step: LayerStep, pieces: Sequence[Direction]) -> list[Tensor]:
    """Weight, bias if there is one, and finite, of the rows solved here."""
    wide = torch.promote_types(step.momentum.weight.dtype, torch.float32)
    empty = Rows(
        step.momentum.weight[:0].flatten(1).to(wide),
        None if step.momentum.bias is None else step.momentum.bias[:0].to(wide),
    )
    none = step.y.new_empty(0, dtype=torch.bool)
    joined = [torch.cat([empty.weight, *(d.rows.weight for d in pieces)])]
    if empty.bias is not None:
        biases = [d.rows.bias for d in pieces if d.rows.bias is not None]
        joined.append(torch.cat([empty.bias, *biases]))
    return [*joined, torch.cat([none, *(d.finite for d in pieces)])]
