"""The backend in plain torch: runs anywhere, and says what the kernels compute.

All functions take lists of layers of one geometry (a list of one is the usual case
here) and return tensors with a leading dimension L for the layer. Sums are in the
dtype of the momentum: float32, or float64 for float64 models.

More than 400 lines: every function that a backend has, to be read beside the paper.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from ..linalg.numbers import Number, Numbers
from ..linalg.products import on_host
from ..linalg.rows import (
    Reading,
    Rows,
    SampleMap,
    Window,
    as_array,
    as_tensor,
    numpy_serves,
    split_positions,
    stack_rows,
    written_out,
)
from ..linalg.scales import row_scales, scaled
from .backend import Backend
from .fisher import FISHER, NON_FINITE, fisher_weights
from .gram_space import cg_in_gram_space, normalizer
from .orthogonal import orthogonalize as orthogonalize  # one of its functions

T = TypeVar("T")

NAME = "torch_ops"
GROUPS_LAYERS = False  # one layer at a time: stacking would only copy


def side_by_side(jobs: Iterable[Callable[[], T]]) -> list[T]:
    """Do jobs that share no memory that any of them writes: here one by one."""
    return [job() for job in jobs]


def magnitudes(tensors: Sequence[Tensor], kept: dict[Hashable, Any]) -> Tensor:
    """Largest magnitude of each tensor, not finite if it holds such an entry.

    Args:
        tensors: dense, of any floating or complex dtypes, all on one device.
        kept: what a backend may keep for the next time.
    """
    tensors = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
    if tensors[0].is_cuda:
        norms = torch._foreach_norm(list(tensors), math.inf)
        dtypes = {n.dtype for n in norms}
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
        return torch.stack([n.to(wide) for n in norms])
    # On a CPU torch's largest norm takes fifteen times as long.
    ends = [end for tensor in tensors for end in torch.aminmax(tensor)]
    wide = max((end.dtype for end in ends), key=lambda dtype: dtype.itemsize)
    wide = torch.promote_types(wide, torch.float32)
    return torch.stack([end.to(wide) for end in ends]).abs().view(-1, 2).amax(1)


def prepare(
    xs: Sequence[SampleMap], ys: Sequence[Tensor], dtype: torch.dtype
) -> tuple[list[SampleMap], list[Tensor]]:
    """Samples in the form that the functions below take, scaled.

    Args:
        xs: activations of each layer as captured, of any floating dtype.
        ys: their output gradients ``(n, R, P)``.
        dtype: of the momentum, and of the products.
    """
    return scaled([x.to(dtype) for x in xs], dtype), list(ys)


def momentum_(
    momenta: Sequence[Rows],
    grads: Sequence[Rows] | None,
    numbers: Numbers,
    nesterov: bool,
) -> tuple[Sequence[Rows], Tensor, Tensor]:
    """``M <- beta M + G`` in place, but for rows that would not be finite.

    Args:
        momenta: M of each layer, updated in place, in whatever shape.
        grads: G of each layer, of the same shape, any floating dtype and strides; None
            leaves the momenta as they are.
        numbers: beta among them.
        nesterov: precondition ``G + beta M`` instead of ``M``.

    Returns:
        What to precondition ``(R, D)``, a layer each; what its rows are to be
        multiplied by ``(L, R)``, see `scales`; and which rows are finite ``(L, R)``.
        The others, of a gradient that is not finite or a sum that is too large, stay as
        they are; all do where the step is skipped.
    """
    if grads is None:
        shape = (len(momenta), momenta[0].weight.shape[0])
        finite = momenta[0].weight.new_ones(shape, dtype=torch.bool)
        dtype = torch.promote_types(momenta[0].weight.dtype, torch.float32)
        flat = [m.flat() for m in momenta]
        return flat, torch.stack([row_scales(m.to(dtype)) for m in flat]), finite
    effective, scales, finite_rows = [], [], []
    for m, g in zip(momenta, grads, strict=True):
        wide = torch.promote_types(m.weight.dtype, torch.float32)
        grad = g.to(wide)
        updated = _decayed(m.to(wide), numbers.momentum, grad).to(m.weight.dtype)
        v = updated.to(wide)
        if nesterov:
            v = _decayed(v, numbers.momentum, grad)
        finite = torch.isfinite(v.weight).flatten(1).all(1)
        if v.bias is not None:
            finite = finite & torch.isfinite(v.bias)
        finite = numbers.moving(finite)
        v = v.select(finite, m.to(wide)).flat()
        m.copy_(updated.select(finite, m))
        effective.append(v)
        scales.append(torch.where(finite, row_scales(v), 1))
        finite_rows.append(finite)
    return effective, torch.stack(scales), torch.stack(finite_rows)


def _decayed(m: Rows, momentum: Number, grad: Rows) -> Rows:
    """``beta M + G``."""
    if m.bias is None or grad.bias is None:
        return Rows(m.weight * momentum + grad.weight, None)
    return Rows(m.weight * momentum + grad.weight, m.bias * momentum + grad.bias)


def momentum_project_(
    xs: Sequence[SampleMap],
    momenta: Sequence[Rows],
    grads: Sequence[Rows] | None,
    numbers: Numbers,
    nesterov: bool,
) -> tuple[Sequence[Rows], Tensor, Tensor, Tensor, Tensor]:
    """`momentum_`, and the projection of its result, scaled, on the samples.

    Args:
        xs: samples of each layer.
        momenta: M of each layer, updated in place.
        grads: G of each layer; None leaves the momenta as they are.
        numbers: beta among them.
        nesterov: precondition ``G + beta M`` instead of ``M``.

    Returns:
        What to precondition, a layer each, and its scales ``(L, R)``: V below is their
        product; which rows are finite ``(L, R)``; ``C = X V^T``
        ``(L, groups, N, R / groups)``; and ``|v|^2`` ``(L, R)``.
    """
    ms, scales, finite = momentum_(momenta, grads, numbers, nesterov)
    vs = [m.times(scale) for m, scale in zip(ms, scales, strict=True)]
    c = [
        x.apply(v).view(x.samples, x.groups, -1).transpose(0, 1)
        for x, v in zip(xs, vs, strict=True)
    ]
    squares = torch.stack([v.dot(v) for v in vs])
    return ms, scales, finite, torch.stack(c), squares


def on_rows(xs: Sequence[SampleMap]) -> Backend:
    """The backend that solves on the rows with such samples."""
    return cast(Backend, sys.modules[__name__])


def write_out(
    xs: Sequence[SampleMap], ys: Sequence[Tensor]
) -> tuple[list[SampleMap], list[Tensor]]:
    """Samples as matrices, a row for each position of each example."""
    return [x.matrix() for x in xs], [written_out(y) for y in ys]


def row_weights(
    xs: Sequence[SampleMap], ys: Sequence[Tensor], row_length: int
) -> tuple[Tensor, Tensor]:
    """Lambda in the form that `cg_forward_` takes, and the rows' status.

    Args:
        xs: samples of each layer.
        ys: output gradients ``(n, R, P)`` of each layer.
        row_length: D of the paper, the bias included.
    """
    return fisher_weights(ys, [x.row_norms() for x in xs], row_length)


@dataclass
class CGState:
    """Vectors of conjugate gradients on the rows, ``(L, R, D)``, and their scalars.

    Attributes:
        m: right-hand sides.
        z: the iterate.
        r: the residual ``m - A z``.
        p: the search direction.
        rho: ``|r|^2`` ``(L, R)``.
        first: ``|m|^2``.
        alpha: length of the current step.
        active: rows that still move.
        status: of the rows, from `fisher_weights`.
        t: ``Lambda * (X p)`` of the current step.
    """

    m: Rows
    z: Rows
    r: Rows
    p: Rows
    rho: Tensor
    first: Tensor
    alpha: Tensor
    active: Tensor
    status: Tensor
    t: Tensor | None = None


def cg_start(
    xs: Sequence[SampleMap],
    ms: Sequence[Rows],
    scales: Tensor,
    status: Tensor,
    iters: int,
) -> CGState:
    """The state before the first iteration: ``z = 0``, ``p = r = m``.

    Args:
        xs: samples of each layer.
        ms: right-hand sides of each layer.
        scales: of their rows ``(L, R)``, from `momentum_`.
        status: of the rows, from `fisher_weights`.
        iters: how many iterations are to come.
    """
    pairs = zip(ms, scales, strict=True)
    m = stack_rows([m.flat().times(scale) for m, scale in pairs])
    rho = m.dot(m)
    return CGState(
        m,
        m.zeros_like(),
        m.clone(),
        m.clone(),
        rho,
        rho,
        torch.zeros_like(rho),
        rho > 0,
        status,
    )


def cg_forward_(
    xs: Sequence[SampleMap],
    weights: Tensor,
    state: CGState,
    numbers: Numbers,
    last: bool,
) -> None:
    """``T = Lambda * (X p)``; out of the same product ``p^T A p`` and ``z += alpha p``.

    A row whose ``p^T A p`` is not positive keeps its last iterate.

    Args:
        xs: samples of each layer.
        weights: Lambda ``(L, n, R, P)``.
        state: updated in place.
        numbers: tau among them.
        last: whether no `cg_adjoint_` follows.
    """
    p = state.p
    xp = _stack([x.apply(p.layer(i)) for i, x in enumerate(xs)])
    state.t = weights * xp
    pap = (state.t * xp).sum((1, 3)) + numbers.damping * p.dot(p)
    state.active = state.active & (pap > 0)
    state.alpha = torch.where(state.active, state.rho / pap, 0)
    state.z.add_(p, state.alpha)


def cg_adjoint_(xs: Sequence[SampleMap], state: CGState, numbers: Numbers) -> None:
    """``r -= alpha A p`` with ``A p = X^T T + tau p``, then ``p = r + beta p``.

    A row whose residual has come down to rounding keeps its last iterate.

    Args:
        xs: samples of each layer.
        state: updated in place.
        numbers: tau among them.
    """
    assert state.t is not None
    r, p = state.r, state.p
    for i, x in enumerate(xs):
        r.layer(i).add_(x.apply_adjoint(state.t[i]), -state.alpha[i])
    r.add_(p, -state.alpha * numbers.damping)
    rho = r.dot(r)
    # What is left of an exactly solved row is a few roundings of m.
    floor = state.first * (4 * torch.finfo(rho.dtype).eps) ** 2
    state.active = state.active & (rho > floor)
    beta = torch.where(state.active, rho / state.rho, 0)
    p.scale_(beta).add_(r, torch.ones_like(beta))
    state.rho = rho


def cg_rows(state: CGState, numbers: Numbers, moving: Tensor | None = None) -> Rows:
    """Directions ``z / sqrt(<z, m>)``, equation (2): rows ``(L, R, D)``.

    Args:
        state: after the last iteration.
        numbers: of the group.
        moving: if given, `orthogonalize` alone will read them. They may be no more
            precise than it is then, and zeros where these ``(L, R)`` are False.
    """
    z = state.m.select(state.status != FISHER, state.z)
    return z.scale_(normalizer(z.dot(state.m)))


def cg_update_(
    params: Sequence[Rows],
    state: CGState,
    finite: Tensor,
    counts: Sequence[Tensor],
    numbers: Numbers,
) -> None:
    """Equation (5) with the directions of `cg_rows`; see `gram_update_`."""
    count_(counts, state.status, finite, numbers)
    step_along_(params, cg_rows(state, numbers), finite, numbers)


def gram(xs: Sequence[SampleMap]) -> Tensor:
    """``K = X X^T``, one more everywhere with a bias: ``(L, groups, N, N)``."""
    ks = []
    for x in xs:
        grouped, one = x.matrix().grouped(), x.one(x.groups)
        k = torch.matmul(grouped, grouped.mT)
        if x.bias:
            k = k + (one if isinstance(one, float) else one[:, None, None]) ** 2
        ks.append(k)
    return torch.stack(ks)


def gram_cg(
    k: Tensor,
    c: Tensor,
    ys: Sequence[Tensor],
    m_squared: Tensor,
    row_length: int,
    numbers: Numbers,
    iters: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """CG in the coordinates ``v = s m + X^T u``; see `gram_space`.

    Args:
        k: ``X X^T`` ``(L, groups, N, N)``, as `gram` gives it.
        c: ``X M^T`` ``(L, groups, N, R / groups)``.
        ys: output gradients ``(n, R, P)`` of each layer, N of them in a row.
        m_squared: ``|m|^2`` ``(L, R)``.
        row_length: D of the paper, the bias included.
        numbers: tau among them.
        iters: k of the paper.

    Returns:
        ``s`` ``(L, R)`` and ``u`` (the shape of ``c``) of the normalized direction
        ``z / sqrt(<z, m>)``, equation (2); and the status of each row ``(L, R)``, see
        `fisher_weights`.
    """
    # The diagonal of K is the |x|^2 of the trace, equation (3).
    norms = k.diagonal(dim1=-2, dim2=-1).mT.unsqueeze(-1)
    flat = [written_out(y) for y in ys]
    weights, status = fisher_weights(flat, list(norms), row_length)
    weights = weights.view(*weights.shape[:2], c.shape[1], -1).transpose(1, 2)
    mm = m_squared.unflatten(1, (c.shape[1], -1))
    plain = (status != FISHER).unflatten(1, (c.shape[1], -1))
    rows, theirs = c.mT.contiguous(), weights.mT.contiguous()
    s, u = cg_in_gram_space(
        lambda u: torch.matmul(u, k), rows, theirs, mm, plain, numbers.damping, iters
    )
    return s.flatten(1), u.mT, status


def gram_rows(
    xs: Sequence[SampleMap],
    ms: Sequence[Rows],
    scales: Tensor,
    s: Tensor,
    u: Tensor,
    moving: Tensor | None = None,
) -> Rows:
    """Directions ``s m + X^T u`` written out: rows ``(L, R, D)``.

    Args:
        xs: samples of each layer.
        ms: right-hand sides of each layer.
        scales: of their rows ``(L, R)``, from `momentum_project_`.
        s: ``(L, R)``.
        u: ``(L, groups, N, R / groups)``.
        moving: see `cg_rows`.
    """
    layers = []
    for i, (x, m) in enumerate(zip(xs, ms, strict=True)):
        t = u[i].transpose(0, 1).reshape(x.samples * x.positions, -1, 1)
        z = x.matrix().apply_adjoint(t)
        # Rows with u = 0 must not see samples that are not finite.
        z = z.select((t != 0).any(0).squeeze(-1), z.zeros_like())
        layers.append(z.add_(m.times(scales[i]), s[i]))
    return stack_rows(layers)


def gram_update_(
    params: Sequence[Rows],
    xs: Sequence[SampleMap],
    ms: Sequence[Rows],
    scales: Tensor,
    s: Tensor,
    u: Tensor,
    status: Tensor,
    finite: Tensor,
    counts: Sequence[Tensor],
    numbers: Numbers,
) -> None:
    """Equation (5): ``theta <- (1 - rho eta) theta - eta z``, where rows are finite.

    Args:
        params: theta of each layer, in the parameter's own shape, updated in place.
        xs: samples of each layer.
        ms: right-hand sides of each layer.
        scales: of their rows ``(L, R)``, from `momentum_project_`.
        s: ``(L, R)``, from `gram_cg`.
        u: ``(L, groups, N, R / groups)``, from `gram_cg`.
        status: of the rows, from `fisher_weights`, ``(L, R)``.
        finite: rows to update ``(L, R)``; the others stay as they are.
        counts: of each layer, int32 ``(2, R)``: how often a row has met samples, and a
            gradient, that are not finite; updated in place.
        numbers: eta and rho among them.
    """
    count_(counts, status, finite, numbers)
    step_along_(params, gram_rows(xs, ms, scales, s, u), finite, numbers)


def step_along_(
    params: Sequence[Rows],
    direction: Rows,
    finite: Tensor,
    numbers: Numbers,
) -> None:
    """Equation (5): ``theta <- (1 - rho eta) theta - eta z``, where rows are finite.

    Args:
        params: theta of each layer, in the parameter's own shape, updated in place.
        direction: z ``(L, R, D)``.
        finite: rows to update ``(L, R)``; the others stay as they are.
        numbers: eta and rho among them.
    """
    lr = numbers.lr
    dtype = direction.weight.dtype
    dtype = torch.float32 if dtype == torch.bfloat16 else dtype
    finite = numbers.moving(finite)
    everywhere = on_host(finite) and bool(finite.all())
    if not everywhere:
        decay = _by_row(finite, 1 - lr * numbers.weight_decay, 1, dtype)
        step = _by_row(finite, -lr, 0, dtype)
    for i, param in enumerate(params):
        for theta, z in zip(param, direction.layer(i), strict=True):
            if theta is None or z is None:
                continue
            wide = theta.to(dtype)  # theta itself unless it is a 16-bit type
            z = z.reshape(theta.shape).to(dtype)
            if everywhere:
                if lr * numbers.weight_decay != 0:
                    wide.mul_(1 - lr * numbers.weight_decay)
                wide.sub_(z, alpha=float(lr))
            else:
                shape = (-1,) + (1,) * (theta.ndim - 1)
                wide.mul_(decay[i].view(shape))
                wide.addcmul_(
                    torch.where(finite[i].view(shape), z, 0), step[i].view(shape)
                )
            if wide is not theta:
                theta.copy_(wide)


def direction_update_(
    params: Sequence[Rows],
    direction: Rows,
    status: Tensor,
    finite: Tensor,
    counts: Sequence[Tensor],
    numbers: Numbers,
) -> None:
    """Equation (5) along directions that are written out; see `gram_update_`.

    Args:
        params: theta of each layer, updated in place.
        direction: z ``(L, R, D)``.
        status: of the rows, from `fisher_weights`, ``(L, R)``.
        finite: rows to update ``(L, R)``; the others stay as they are.
        counts: of each layer, int32 ``(2, R)``.
        numbers: eta and rho among them.
    """
    count_(counts, status, finite, numbers)
    step_along_(params, direction, finite, numbers)


def count_(
    counts: Sequence[Tensor], status: Tensor, finite: Tensor, numbers: Numbers
) -> None:
    """Count rows that were not finite; see `gram_update_`. None in a skipped step."""
    samples = numbers.moving(status == NON_FINITE)
    gradients = numbers.moving(~finite)
    for i, count in enumerate(counts):
        count[0] += samples[i]
        count[1] += gradients[i]


def gather_patches(
    x: Tensor, index: Tensor, output_shape: Sequence[int], window: Window
) -> Tensor:
    """Rows of ``X`` of a convolution at drawn positions, padding resolved.

    Args:
        x: activations ``(n, C, *spatial)`` of any strides.
        index: flat positions over ``(n, *output_shape)``, int64.
        output_shape: spatial shape of the output.
        window: the convolution's window.

    Returns:
        ``(N, C * kernel size)``, ordered channel first.
    """
    host = numpy_serves(index.device)  # where numpy costs less than torch
    positions = split_positions(
        as_array(index) if host else index, (x.shape[0], *output_shape)
    )
    count, spatial = len(positions[0]), len(output_shape)
    at: list[Any] = [positions[0].reshape([count] + [1] * spatial)]
    outside: Any = None
    for axis, where in enumerate(positions[1:]):
        size = window.kernel[axis]
        taps: Any = np.arange(size) if host else torch.arange(size, device=x.device)
        coordinate = (
            where[:, None] * window.stride[axis]
            + taps * window.dilation[axis]
            - window.pads[axis]
        )
        if window.upsample:
            factor = window.upsample[axis]
            # Between two input positions is a zero, as there is outside.
            inputs = coordinate // factor
            coordinate = inputs + (coordinate - inputs * factor != 0) * _FAR
        coordinate, beyond = _wrap(coordinate, x.shape[2 + axis], window.padding_mode)
        shape = [count] + [1] * spatial
        shape[1 + axis] = size
        at.append(coordinate.reshape(shape))
        if beyond is not None:
            beyond = beyond.reshape(shape)
            outside = beyond if outside is None else outside | beyond
    # The channel slice between index tensors puts the indexed shape in front.
    if host:
        flat = [as_tensor(each.reshape(-1)) for each in np.broadcast_arrays(*at)]
        where_all: Any = (flat[0], slice(None), *flat[1:])
        patches = x[where_all]
        if outside is not None and outside.any():
            patches.index_fill_(0, as_tensor(np.flatnonzero(outside)), 0)
    else:
        where_all = (at[0], slice(None), *at[1:])
        patches = x[where_all]
        if outside is not None:
            patches.masked_fill_(outside.unsqueeze(-1), 0)
    channels, taps = x.shape[1], math.prod(window.kernel)
    # No -1 in a shape: a rank may draw no position.
    by_channel = patches.view(count, taps, channels).transpose(1, 2)
    return by_channel.reshape(count, channels * taps)


def drawing(x: Tensor, reading: Reading | None, total: int, size: int) -> None:
    """Nothing: positions are drawn, then rows are taken at their index.

    Args:
        x: any tensor of a form.
        reading: how a row is read at a position; None for whole examples.
        total: positions, or examples.
        size: how many would be drawn.
    """


_FAR = 1 << 40
"""Outside of any map."""


def _wrap(coordinate: Any, size: int, mode: str) -> tuple[Any, Any]:
    """Bring padded coordinates into the map; second: which are not data, if any."""
    if mode == "circular":
        return coordinate % size, None
    if mode == "reflect":
        # The mirrors stand at the first position and at the last.
        return size - 1 - abs(size - 1 - abs(coordinate)), None
    inside = coordinate.clip(0, size - 1)
    return inside, None if mode == "replicate" else inside != coordinate


def _stack(layers: Sequence[Tensor]) -> Tensor:
    """``(L, ...)``; of one layer no copy."""
    return layers[0].unsqueeze(0) if len(layers) == 1 else torch.stack(list(layers))


def _by_row(
    condition: Tensor, value: Number, otherwise: float, dtype: torch.dtype
) -> Tensor:
    """One factor a row, exact in `dtype`, without asking the device anything."""
    return condition.to(dtype) * value + (~condition).to(dtype) * otherwise
