"""Layers of different sizes solved together on a CPU.

A small layer's vectors are so short that torch's calls take longer than their work. So
the rows of all layers lie on top of each other, ``(S, N)`` in Gram space and ``(S, D)``
without, and only products with samples are made layer by layer. A row's numbers do not
depend on which others there are.

Numbers are ordinary where squares neither overflow nor lose digits, which the squares
tell; else the same is done with scales. Layers with numbers that are not finite are
left to `torch_ops`, as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..linalg.numbers import Numbers
from ..linalg.products import on_host, times_transposed
from ..linalg.rows import Rows, SampleMap
from ..linalg.scales import REACH, power_of_two, row_scales
from ..ops import torch_ops
from ..ops.fisher import FISHER, NO_GRADIENT
from ..ops.gram_space import cg_in_gram_space
from .batch import Batch, Solution
from .formulation import cheaper

FAR = 2.0**60
"""Squared lengths up to this, and its reciprocal, are ordinary."""

ENTRIES = 2**18
"""Numbers in a vector of all rows: a handful of such vectors stay in a CPU's cache."""

SHARED = 1.5
"""How much dearer Gram space may be by count, where N samples are no more than D."""


@dataclass(frozen=True)
class LayerSolution:
    """Directions of one layer; none of its rows stays, none met bad samples.

    Attributes:
        direction: writes them out, ``(R, D)``, the bias as the last column.
        bias: whether there is one.
        status: how each row was solved ``(1, R)``; see `fisher.FISHER`.
        finite: rows whose gradient is finite ``(1, R)``: all.
        numbers: of the batch.
        formulation: ``"primal"`` or ``"gram"``.
        has_anomalies: no.
    """

    direction: Callable[[], Tensor]
    bias: bool
    status: Tensor
    finite: Tensor
    numbers: Numbers
    formulation: str
    has_anomalies: bool = False

    def rows(self, narrow: bool = False) -> Rows:
        """The directions, ``(1, R, D)``."""
        z = self.direction()[None]
        return Rows(z[..., :-1], z[..., -1]) if self.bias else Rows(z, None)

    def update_(self, params: Sequence[Rows], counts: Sequence[Tensor]) -> None:
        """Equation (5), in place, on all rows; nothing is to be counted."""
        torch_ops.step_along_(params, self.rows(), self.finite, self.numbers)


def may_join(x: Tensor, momentum: Tensor) -> bool:
    """Whether a layer with such samples and momentum can be solved with others.

    Args:
        x: its samples, a matrix without groups.
        momentum: of the same device.
    """
    wide = momentum.dtype in (torch.float32, torch.float64)
    return wide and on_host(x) and on_host(momentum) and x.shape[0] > 0


def solve(
    batch: Batch, iters: int, formulation: str = "auto"
) -> Iterator[tuple[int, Solution | None]]:
    """Directions ``z / sqrt(<z, m>)`` of layers after `iters` iterations from zero.

    Args:
        batch: layers of any sizes without groups, with equally many samples, matrices;
            gradients for all or for none. Momentum is advanced in place.
        iters: k.
        formulation: ``"primal"``, ``"gram"`` or ``"auto"``.

    Yields:
        Layers by their place in the batch, each with its solution; None for one whose
        numbers are not all finite, of which nothing has been changed, and for all where
        the step may be one to skip.
    """
    if isinstance(batch.numbers.skipped, Tensor) or batch.numbers.skipped:
        yield from ((i, None) for i in range(len(batch.xs)))
        return
    families: dict[tuple[str, int], list[int]] = {}
    for i, (x, m) in enumerate(zip(batch.xs, batch.ms, strict=True)):
        length, how = x.dim + x.bias, formulation
        if how == "auto":
            # All that go to Gram space share their calls, whatever their D.
            shared = SHARED if length >= x.samples else 1.0
            how = cheaper(x.samples, length, len(m.weight), iters, shared=shared)
        families.setdefault((how, length if how == "primal" else 0), []).append(i)
    for (how, _), members in families.items():
        for some in _portions(batch, members):
            yield from _solved(batch, some, iters, how)


def _solved(
    batch: Batch, members: list[int], iters: int, how: str
) -> Iterator[tuple[int, Solution | None]]:
    """`solve`, for layers that fit."""
    stack = _stacked(batch, members, how)
    if not stack.is_ordinary():
        stack = _stacked(batch, members, how, with_scales=True)
        good = stack.finite()
        if not all(good):
            marked = list(zip(members, good, strict=True))
            yield from ((i, None) for i, is_finite in marked if not is_finite)
            rest = [i for i, is_finite in marked if is_finite]
            if rest:
                yield from _solved(batch, rest, iters, how)
            return
    stack.advance_()
    solver = _in_gram_space if how == "gram" else _on_rows
    directions = solver(stack, batch.numbers, iters)
    finite = torch.ones_like(stack.status, dtype=torch.bool)[None]
    for i, at, direction in zip(members, stack.at, directions, strict=True):
        status, bias = stack.status[None, at], batch.xs[i].bias
        yield (
            i,
            LayerSolution(direction, bias, status, finite[:, at], batch.numbers, how),
        )


def _portions(batch: Batch, members: Sequence[int]) -> Iterator[list[int]]:
    """As many layers as have `ENTRIES`, or one."""
    some: list[int] = []
    rows = 0
    for i in members:
        more = batch.ms[i].weight.shape[0]
        if some and (rows + more) * batch.xs[i].samples > ENTRIES:
            yield some
            some, rows = [], 0
        some.append(i)
        rows += more
    yield some


@dataclass(frozen=True)
class _Stack:
    """Layers on top of each other.

    Attributes:
        at: rows of each layer.
        xs: samples of each ``(N, D)``, with a one for the bias.
        vs: what to precondition of each ``(R, D)``; of all ``(S, D)`` if D is one.
        advanced: momenta, and what they are to become.
        grams: ``X X^T`` of each, in Gram space.
        norms: ``|x|^2`` of each ``(L, N)``.
        weights: Lambda ``(S, N)``.
        status: of the rows ``(S,)``; see `fisher.FISHER`.
        mm: ``|v|^2`` ``(S,)``.
        mean: trace / D of equation (4) ``(S,)``.
    """

    at: list[slice]
    xs: list[Tensor]
    vs: list[Tensor]
    advanced: tuple[list[Tensor], list[Tensor]]
    grams: list[Tensor]
    norms: Tensor
    weights: Tensor
    status: Tensor
    mm: Tensor
    mean: Tensor

    def is_ordinary(self) -> bool:
        """Whether all is finite, and all squares are as accurate as without limits."""
        squares = torch.cat([self.mm, self.norms.amax(1)])
        low, high = (float(end) for end in squares.aminmax())
        return low > 1 / FAR and high < FAR and math.isfinite(self.mean.sum())

    def finite(self) -> list[bool]:
        """Whether gradients, momentum and samples of each layer are finite."""
        rows = torch.isfinite(self.mm + self.mean)
        parts = zip(self.at, self.norms, strict=True)
        return [bool(rows[at].all() & torch.isfinite(n).all()) for at, n in parts]

    def advance_(self) -> None:
        """Momentum, in its place."""
        if self.advanced[0]:
            torch._foreach_copy_(*self.advanced)


def _stacked(
    batch: Batch, members: Sequence[int], how: str, with_scales: bool = False
) -> _Stack:
    """Samples, Lambda and right-hand sides of some layers; nothing is changed.

    Args:
        batch: of all layers.
        members: which of them.
        how: ``"primal"`` or ``"gram"``.
        with_scales: whether samples and rows are brought to a size that squares can
            bear, as `linalg.scales` says; else they are taken as they are.
    """
    ms, n = [batch.ms[i] for i in members], batch.xs[0].samples
    like, ends = ms[0].weight, [0]
    for m in ms:
        ends.append(ends[-1] + m.weight.shape[0])
    at = [slice(a, b) for a, b in pairwise(ends)]
    xs = [_with_one(batch.xs[i], like.dtype) for i in members]
    if with_scales:
        largest = torch.stack([x.abs().amax() for x in xs])
        scales = power_of_two(largest, REACH)
        xs = [x * scale for x, scale in zip(xs, scales, strict=True)]
    vs, advanced = _advance(batch, members)
    if with_scales:
        vs = [v * row_scales(Rows(v, None)).unsqueeze(1) for v in vs]
    if how == "gram":
        grams = [times_transposed(x, x) for x in xs]
        norms = torch.stack([gram.diagonal() for gram in grams])
    else:  # all have one D
        grams, whole = [], torch.stack(xs)
        xs, norms = list(whole), torch.linalg.vecdot(whole, whole)
        vs = [torch.cat(vs)]
    mm = torch.cat([torch.linalg.vecdot(v, v) for v in vs])

    # Squares of a tiny Y underflow: each row is scaled by its largest entry.
    weights = like.new_empty(ends[-1], n)
    for i, rows in zip(members, at, strict=True):
        weights[rows].copy_(batch.ys[i].squeeze(2).mT)
    largest = weights.abs().amax(1, keepdim=True)
    weights.div_(torch.where(largest == 0, 1, largest)).square_()
    shares = norms / norms.new_tensor([[x.shape[1]] for x in xs])
    mean = torch.cat(
        [weights[rows].mv(each) for rows, each in zip(at, shares, strict=True)]
    )
    factor = mean.reciprocal()
    fisher = torch.isfinite(factor)
    weights.mul_(torch.where(fisher, factor, 0).unsqueeze(1))
    status = torch.where(fisher, FISHER, NO_GRADIENT)
    return _Stack(at, xs, vs, advanced, grams, norms, weights, status, mm, mean)


def _with_one(x: SampleMap, dtype: torch.dtype) -> Tensor:
    """Samples, and the homogeneous coordinate if there is one."""
    samples = x.x.to(dtype)
    return pad(samples, (0, 1), value=1.0) if x.bias else samples


def _advance(
    batch: Batch, members: Sequence[int]
) -> tuple[list[Tensor], tuple[list[Tensor], list[Tensor]]]:
    """``beta M + G``, or what Nesterov makes of it.

    Returns:
        What to precondition of each layer; momenta, and what they become.
    """
    beta = float(batch.numbers.momentum)
    vs: list[Tensor] = []
    momenta: list[Tensor] = []
    become: list[Tensor] = []
    for i in members:
        parts = [part for part in batch.ms[i] if part is not None]
        ready = parts
        if batch.grads is not None:
            wide = parts[0].dtype
            grads = [part.to(wide) for part in batch.grads[i] if part is not None]
            pairs = list(zip(grads, parts, strict=True))
            ready = after = [torch.add(g, m, alpha=beta) for g, m in pairs]
            if batch.nesterov:
                nexts = zip(grads, after, strict=True)
                ready = [torch.add(g, m, alpha=beta) for g, m in nexts]
            momenta += parts
            become += after
        weight, *bias = ready
        flat = [weight.flatten(1), *(b.unsqueeze(1) for b in bias)]
        vs.append(torch.cat(flat, 1) if bias else flat[0])
    return vs, (momenta, become)


def _in_gram_space(
    stack: _Stack, numbers: Numbers, iters: int
) -> list[Callable[[], Tensor]]:
    """Of each layer, what writes its directions ``s m + X^T u`` out."""

    def k_times(u: Tensor) -> Tensor:
        layers = zip(stack.at, stack.grams, strict=True)
        return torch.cat([times_transposed(u[at], k.mT) for at, k in layers])

    layers = list(zip(stack.at, stack.xs, stack.vs, strict=True))
    c = torch.cat([times_transposed(v, x) for _, x, v in layers])
    plain = stack.status != FISHER
    s, u = cg_in_gram_space(
        k_times, c, stack.weights, stack.mm, plain, numbers.damping, iters
    )

    def written(at: slice, x: Tensor, v: Tensor) -> Tensor:
        return times_transposed(u[at], x.mT).addcmul_(v, s[at].unsqueeze(1))

    return [partial(written, *layer) for layer in layers]


def _on_rows(stack: _Stack, numbers: Numbers, iters: int) -> list[Callable[[], Tensor]]:
    """Of each layer, what returns its directions, by iterations on all rows."""
    x: Any = _Samples(stack.at, stack.xs)
    status = stack.status[None]
    ones = torch.ones_like(stack.mm)[None]
    state = torch_ops.cg_start([x], [Rows(stack.vs[0], None)], ones, status, iters)
    weights = stack.weights.mT[None, :, :, None]
    for iteration in range(iters):
        last = iteration + 1 == iters
        torch_ops.cg_forward_([x], weights, state, numbers, last)
        if not last:
            torch_ops.cg_adjoint_([x], state, numbers)
    z = torch_ops.cg_rows(state, numbers).weight[0]
    return [partial(z.__getitem__, at) for at in stack.at]


@dataclass(frozen=True)
class _Samples:
    """Samples of layers of one D as one map of all their rows; see `SampleMap`."""

    at: list[slice]
    xs: list[Tensor]

    def apply(self, v: Rows) -> Tensor:
        """``X V``: ``(S, D)`` to ``(N, S, 1)``."""
        parts = zip(self.at, self.xs, strict=True)
        each = [times_transposed(v.weight[at], x) for at, x in parts]
        return torch.cat(each).mT.unsqueeze(-1)

    def apply_adjoint(self, t: Tensor) -> Rows:
        """``X^T T``: ``(N, S, 1)`` to ``(S, D)``."""
        t = t.squeeze(-1).mT
        parts = zip(self.at, self.xs, strict=True)
        each = [times_transposed(t[at], x.mT) for at, x in parts]
        return Rows(torch.cat(each), None)
