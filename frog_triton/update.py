"""Momentum, solve and update of the layers of a parameter group: Algorithm 1."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from . import ops
from .autotune.tuning import Tuning
from .linalg.numbers import Numbers
from .linalg.rows import Rows
from .model.plan import Layer
from .ops.backend import Backend
from .preconditioner import solve
from .scaling import Left, leaving
from .solve import Batch, Solution, together
from .solve.launches import Bucket
from .step import LayerStep, alike, buckets_of, is_mixture, portions, untouched

if TYPE_CHECKING:
    from .distributed import World


class Directions(Protocol):
    """Directions of layers of one geometry with all their rows."""

    @property
    def groups(self) -> int:
        """Of the layers."""

    @property
    def finite(self) -> Tensor:
        """Rows that may move ``(L, R)``."""

    def rows(self, narrow: bool = False) -> Rows:
        """The directions written out, ``(L, R, D)``.

        Args:
            narrow: they are for `Backend.orthogonalize`.
        """

    @property
    def backend(self) -> Backend:
        """Serves them."""

    def step_along_(self, rows: Rows, numbers: Numbers) -> None:
        """Equation (5) along other directions, in place.

        Args:
            rows: one for each of these, ``(L, R, D)``.
            numbers: of the group.
        """


class Solved(NamedTuple):
    """Layers of one geometry, solved together.

    Attributes:
        steps: theirs.
        solution: of all.
        counts: of each layer, int32 ``(2, R)``, dense: how often a row has met samples
            that are not finite, and how often it stayed because its momentum would not
            have been. None where there is nothing to count.
    """

    steps: Sequence[LayerStep]
    solution: Solution
    counts: Sequence[Tensor]

    @property
    def groups(self) -> int:
        """See `Directions`."""
        return self.steps[0].layer.geometry.groups

    @property
    def finite(self) -> Tensor:
        """See `Directions`."""
        return self.solution.finite

    @property
    def backend(self) -> Backend:
        """See `Directions`."""
        return self.steps[0].backend

    def rows(self, narrow: bool = False) -> Rows:
        """See `Directions`."""
        return self.solution.rows(narrow)

    def step_along_(self, rows: Rows, numbers: Numbers) -> None:
        """See `Directions`; counts anomalies, too."""
        params, solution = [step.params for step in self.steps], self.solution
        self.backend.direction_update_(
            params,
            rows,
            solution.status,
            solution.finite,
            self.counts,
            numbers,
        )

    def update_(self) -> None:
        """Equation (5) along the directions as they are; counts anomalies, too."""
        params = [step.params for step in self.steps]
        self.solution.update_(params, self.counts)


T = TypeVar("T")


def side_by_side(
    some: Sequence[Directions], jobs: Sequence[Callable[[], T]]
) -> list[T]:
    """See `Backend.side_by_side`."""
    return some[0].backend.side_by_side(jobs) if some else []


class Gathered(NamedTuple):
    """What a parameter group brings to a step.

    Attributes:
        group: hyperparameters.
        params: that are updated.
        steps: of the layers among them, all rows that this rank holds; none where
            the fallback updates.
    """

    group: dict[str, Any]
    params: Sequence[nn.Parameter]
    steps: Sequence[LayerStep]


def step_rows(
    world: World,
    steps: Sequence[LayerStep],
    group: dict[str, Any],
    formulation: str,
    counts: Mapping[str, Tensor],
    observe: Callable[..., None] | None = None,
    found_inf: Tensor | None = None,
) -> dict[str, str]:
    """`step_layers`, but that it leaves alone what is to be left alone.

    Experts that met no token stay as they are; where `found_inf` is not 0, everything.
    """
    numbers = numbers_of(group, found_inf)
    alone = [
        Left(
            step.grads,
            untouched(step),
            counts[step.layer.name],
            world.counted(step.layer),
        )
        for step in steps
        if is_mixture(step.layer)
    ]
    with leaving(alone):
        how = step_layers(world, steps, group, numbers, formulation, counts, observe)
    for step in steps:
        step.write_back()
    return how


def numbers_of(group: dict[str, Any], found_inf: Tensor | None = None) -> Numbers:
    """A group's numbers in this step.

    Args:
        group: hyperparameters.
        found_inf: not 0 where the step is to be skipped; None takes every step.
    """
    return Numbers(
        momentum=group["momentum"],
        damping=group["damping"],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        skipped=0.0 if found_inf is None else found_inf,
    )


def step_layers(
    world: World,
    steps: Sequence[LayerStep],
    group: dict[str, Any],
    numbers: Numbers,
    formulation: str,
    counts: Mapping[str, Tensor],
    observe: Callable[..., None] | None = None,
) -> dict[str, str]:
    """Momentum, solve and update of all layers, those of one geometry together.

    Args:
        world: the ranks that train together.
        steps: from `layer_step`, of all rows that this rank holds.
        group: hyperparameters.
        numbers: those of them that are numbers.
        formulation: ``"primal"``, ``"gram"`` or ``"auto"``.
        counts: of each layer by name, as in `Solved`; updated in place.
        observe: called with layers, solution and group between solve and update.

    Returns:
        How each layer was solved, in words.
    """
    how: dict[str, str] = {}
    here = world.own(steps, numbers, group["nesterov"])
    solved = solutions(here, group, numbers, formulation, counts, observe, how)
    if group["orthogonalize"]:
        for some in world.whole(steps, solved, numbers):
            jobs = [partial(_step_orthogonalized, each, numbers) for each in some]
            side_by_side(some, jobs)
    else:
        for portion in solved:
            side_by_side(portion, [each.update_ for each in portion])
        world.share_rows(steps)
    return how


def _step_orthogonalized(directions: Directions, numbers: Numbers) -> None:
    """Equation (5) along directions with singular values near one."""
    rows = directions.rows(narrow=True)
    finite, groups = directions.finite, directions.groups
    rows = directions.backend.orthogonalize(rows, finite, groups)
    directions.step_along_(rows, numbers)


def solutions(
    steps: Iterable[LayerStep],
    group: dict[str, Any],
    numbers: Numbers,
    formulation: str,
    counts: Mapping[str, Tensor],
    observe: Callable[..., None] | None,
    how: dict[str, str],
) -> Iterator[list[Solved]]:
    """Solve layers, those of one geometry together, a portion at a time.

    Args:
        steps: of the rows that are solved here.
        group: hyperparameters.
        numbers: those of them that are numbers.
        formulation: of the solver.
        counts: what is counted in `Solved.counts` until the next item arrives here.
        observe: called after each solve.
        how: is told how each layer was solved.
    """
    for portion in _solutions(steps, group, numbers, formulation):
        solved, counters = [], []
        for bucket, solution in portion:
            if observe is not None:
                observe(bucket, solution, group)
            for step in bucket:
                count = step.x.samples * step.x.positions
                how[step.layer.name] = f"{solution.formulation}, N = {count}"
            counted = bucket if solution.has_anomalies else []
            each = [_counter(counts[s.layer.name], s.counted) for s in counted]
            solved.append(Solved(bucket, solution, [counter for _, counter in each]))
            counters += each
        yield solved
        for part, counter in counters:
            if part is not counter:
                part += counter


def _solutions(
    steps: Iterable[LayerStep],
    group: dict[str, Any],
    numbers: Numbers,
    formulation: str,
) -> Iterator[list[tuple[list[LayerStep], Solution]]]:
    """Portions: layers of one geometry each, with their solution."""
    iters, nesterov = group["cg_iters"], group["nesterov"]
    joined: dict[Hashable, list[LayerStep]] = {}
    alone = []
    for step in steps:
        if step.joins:
            joined.setdefault(step.joint_key, []).append(step)
        else:
            alone.append(step)
    for some in joined.values():
        batch = _batch(some, numbers, nesterov, None)
        for i, solution in together.solve(batch, iters, formulation):
            if solution is None:
                alone.append(some[i])
            else:
                yield [([some[i]], solution)]

    def solved(bucket: Sequence[LayerStep]) -> Solution:
        finite = [step.finite for step in bucket if step.finite is not None]
        rows = torch.stack(finite) if finite else None
        batch = _batch(bucket, numbers, nesterov, rows)
        backend = bucket[0].backend
        return solve(backend, batch, cg_iters=iters, formulation=formulation)

    for portion in portions(alike(alone)):
        jobs = [partial(solved, bucket) for bucket in portion]
        backend = portion[0][0].backend
        yield list(zip(portion, backend.side_by_side(jobs), strict=True))


def _batch(
    steps: Sequence[LayerStep], numbers: Numbers, nesterov: bool, finite: Tensor | None
) -> Batch:
    """The systems of some layers."""
    grads = [step.grads for step in steps if step.grads is not None]
    return Batch(
        [step.x for step in steps],
        [step.y for step in steps],
        [step.momentum for step in steps],
        grads or None,
        numbers,
        nesterov,
        finite,
    )


def advance_momentum(
    steps: Iterable[LayerStep], numbers: Numbers, nesterov: bool
) -> list[LayerStep]:
    """``M <- beta M + G`` of all rows, before a solve of some of them.

    Args:
        steps: from `layer_step`.
        numbers: of the group.
        nesterov: see `Batch`.

    Returns:
        The steps, without gradients; their momentum is what to precondition.
    """

    def advance(bucket: Sequence[LayerStep]) -> list[LayerStep]:
        ms, _, finite = bucket[0].backend.momentum_(
            [step.momentum for step in bucket],
            [step.grads for step in bucket if step.grads is not None],
            numbers,
            nesterov,
        )
        return [
            replace(step, momentum=m, grads=None, finite=rows)
            for step, m, rows in zip(bucket, ms, finite, strict=True)
        ]

    advanced: list[LayerStep] = []
    for portion in portions(alike(steps)):
        jobs = [partial(advance, bucket) for bucket in portion]
        advanced += chain(*portion[0][0].backend.side_by_side(jobs))
    return advanced


def tuned(
    tuning: Tuning,
    layers: Iterable[Layer],
    backend: str,
    world: World,
    gathered: Sequence[Gathered],
) -> AbstractContextManager[None]:
    """A context in which launches use the tuning's table; see `Tuning.applied`.

    Args:
        tuning: the optimizer's.
        layers: all that are preconditioned, so that every rank decides alike.
        backend: one of `ops.BACKENDS`.
        world: knows what this rank solves.
        gathered: what it holds.
    """
    weight = next((layer.weight for layer in layers), None)
    if weight is None:
        return nullcontext()
    chosen = ops.resolve(backend, weight.device, torch.float32)
    if weight.is_cuda and not chosen.GROUPS_LAYERS:
        return nullcontext()  # torch has nothing to tune, nor need Triton be there

    def solved_here() -> list[Bucket]:
        return [
            bucket
            for group, _, steps in gathered
            for bucket in buckets_of(world.pieces(steps), group)
        ]

    return tuning.applied(weight.device, solved_here)


def _counter(counts: Tensor, rows: slice | None) -> tuple[Tensor, Tensor]:
    """The rows' counters, and a dense tensor to count in."""
    part = counts if rows is None else counts[:, rows]
    if part.shape == counts.shape:
        return counts, counts
    return part, torch.zeros_like(part, memory_format=torch.contiguous_format)
