"""One step of Algorithm 1 for the layers of a parameter group."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .autotune.tuning import Tuning
from .launches import MOST_PROBLEMS, Bucket, portions, shape_of
from .layers import LinearMap, MatrixMap, RowAxes
from .ops.types import Rows, local, stack_rows, written_out
from .orthogonal import orthogonal_update_, orthogonalize
from .preconditioner import solve
from .routing import Layer
from .solvers import Batch, Solution

Samples = tuple[LinearMap, Tensor]


@dataclass(frozen=True)
class LayerStep:
    """What one layer brings to a step.

    Attributes:
        layer: the layer.
        backend: serves its tensors.
        x: sampled activations.
        y: their output gradients ``(n, R, P)``.
        momentum: M as rows, updated in place.
        grads: G as rows; None if the momentum has them already.
        params: theta in the parameters' own shapes, updated in place.
        finite: without `grads`, rows whose gradient was finite.
        counted: which of the layer's counters are of these rows; None for all.
        homes: momentum and parameters whose rows lie apart in memory, with the copy
            that this step works on; see `write_back`.
    """

    layer: Layer
    backend: ModuleType
    x: LinearMap
    y: Tensor
    momentum: Rows
    grads: Rows | None
    params: Rows
    finite: Tensor | None = None
    counted: slice | None = None
    homes: tuple[tuple[Tensor, Tensor], ...] = ()

    def write_back(self) -> None:
        """Bring home what the step has worked on a copy of."""
        for home, rows in self.homes:
            home.copy_(rows.view(home.shape))

    def narrow(self, rows: slice, counted: slice, x: LinearMap, y: Tensor) -> LayerStep:
        """Some rows alone, with the samples that belong to them."""
        return replace(
            self,
            x=x,
            y=y,
            momentum=narrow(self.momentum, rows),
            grads=None if self.grads is None else narrow(self.grads, rows),
            params=narrow(self.params, rows),
            finite=None if self.finite is None else self.finite[rows],
            counted=counted,
        )

    @property
    def key(self) -> Hashable:
        """Layers with equal keys can share launches."""
        if not self.backend.GROUPS_LAYERS:
            return self.layer.name, self.counted and self.counted.start
        rows = [r for r in (self.momentum, self.grads, self.params) if r is not None]
        return (
            self.x.key,
            self.x.samples,
            self.x.groups,
            self.x.bias,
            self.y.shape,
            self.momentum.weight.shape,
            *((r.weight.stride(), r.weight.dtype, r.weight.device) for r in rows),
            self.x.dtype,
            self.y.dtype,
        )


def layer_step(
    layer: Layer,
    state: Mapping[Any, dict[str, Any]],
    samples: Callable[[Layer, bool], Samples],
    backend: str,
) -> LayerStep:
    """Gather a layer's rows, those that lie on this rank, and samples.

    Args:
        layer: at least one of its parameters has a gradient.
        state: the optimizer's.
        samples: gives a layer's samples, with or without its bias.
        backend: one of `ops.BACKENDS`.

    Raises:
        ValueError: the layer has more groups than the backend can take.
    """
    weight, bias, axes = layer.weight, layer.bias, layer.axes
    homes: list[tuple[Tensor, Tensor]] = []

    def flat(tensor: Tensor, kept: bool = True) -> Tensor:
        """A bias as ``(R,)``."""
        return _at_home(tensor, tensor.flatten(), homes if kept else [])

    momentum_bias = params_bias = bias_grad = None
    if bias is not None and bias.grad is not None:
        momentum_bias = flat(local(state[bias]["momentum_buffer"]))
        params_bias = flat(local(bias))
        bias_grad = flat(_without_overlap(local(bias.grad)), kept=False)
    x, y = samples(layer, bias_grad is not None)
    if weight.grad is not None:
        buffer = local(state[weight]["momentum_buffer"])
        rows = axes.matrix(buffer)
        dense = ops.resolve(backend, weight.device, buffer.dtype).GROUPS_LAYERS
        rows = rows.contiguous() if dense else rows
        momentum = Rows(_at_home(axes.view(buffer), rows, homes), momentum_bias)
        params = Rows(_param_rows(axes, local(weight), homes), params_bias)
        grads = Rows(axes.matrix(_without_overlap(local(weight.grad))), bias_grad)
    else:  # frozen: the bias is the whole row
        assert momentum_bias is not None and params_bias is not None
        nothing = (params_bias.shape[0], 0)
        momentum = Rows(momentum_bias.new_empty(nothing), momentum_bias)
        grads = Rows(momentum.weight, bias_grad)
        params = Rows(params_bias.new_empty(nothing), params_bias)
        x = MatrixMap(y.new_empty(y.shape[0] * y.shape[2], 0), bias=True)
        y = written_out(y)
    chosen = ops.resolve(backend, weight.device, momentum.weight.dtype)
    if chosen.GROUPS_LAYERS and x.groups > MOST_PROBLEMS:
        raise ValueError(
            f"{layer.name}: {x.groups} groups are more than a launch can hold, "
            f"{MOST_PROBLEMS}; build FROG with backend='torch', or exclude the layer"
        )
    return LayerStep(layer, chosen, x, y, momentum, grads, params, homes=tuple(homes))


def is_mixture(layer: Layer) -> bool:
    """Whether a layer's rows belong to experts, each with tokens of its own."""
    return len(layer.axes.rows) > 1 and layer.axes.split == 1


def untouched(step: LayerStep) -> Tensor:
    """Rows ``(R,)`` of experts whose gradient is zero: no token was sent to them."""
    assert step.grads is not None
    weight, bias = step.grads
    unit = step.layer.unit
    moved = weight.unflatten(0, (-1, unit)).ne(0).any(2).any(1)
    if bias is not None:
        moved = moved | bias.unflatten(0, (-1, unit)).ne(0).any(1)
    return (~moved).repeat_interleave(unit)


def _at_home(home: Tensor, rows: Tensor, homes: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Rows, noted with where they are to be copied back if they are a copy."""
    if rows.untyped_storage()._cdata != home.untyped_storage()._cdata:
        homes.append((home, rows))
    return rows


def _param_rows(
    axes: RowAxes, weight: Tensor, homes: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """A parameter with its rows in front, in its own memory where there is a way."""
    view = axes.view(weight)
    if len(axes.rows) == 1:
        return view
    return _at_home(view, view.flatten(0, len(axes.rows) - 1), homes)


class Direction(NamedTuple):
    """Some rows of a layer's direction, not orthogonalized.

    Attributes:
        rows: ``(R, D)``.
        finite: rows that may move ``(R,)``.
    """

    rows: Rows
    finite: Tensor


def step_layers(
    steps: Iterable[LayerStep],
    group: dict[str, Any],
    formulation: str,
    counts: Mapping[str, Tensor],
    observe: Callable[..., None] | None = None,
) -> dict[str, str]:
    """Momentum, solve and update of all layers, those of one geometry together.

    Args:
        steps: from `layer_step`.
        group: hyperparameters.
        formulation: ``"primal"``, ``"gram"`` or ``"auto"``.
        counts: of each layer by name, int32 ``(2, R)``: how often a row has met
            samples that are not finite, and how often it stayed because its momentum
            would not have been; updated in place.
        observe: called with layers, solution and group between solve and update.

    Returns:
        How each layer was solved, in words.
    """
    solved: dict[str, str] = {}
    for bucket, solution in _solutions(steps, group, formulation, solved, observe):
        counters = [_counter(counts[step.layer.name], step.counted) for step in bucket]
        dense, params = [c for _, c in counters], [step.params for step in bucket]
        lr, weight_decay = group["lr"], group["weight_decay"]
        if group["orthogonalize"]:
            backend, groups = bucket[0].backend, bucket[0].layer.geometry.groups
            orthogonal_update_(
                backend, solution, groups, params, dense, lr, weight_decay
            )
        else:
            solution.update_(params, dense, lr, weight_decay)
        for part, counter in counters:
            if part is not counter:
                part += counter
    return solved


def directions(
    steps: Iterable[LayerStep],
    group: dict[str, Any],
    formulation: str,
    counts: Mapping[str, Tensor],
    observe: Callable[..., None] | None = None,
) -> tuple[dict[str, list[Direction]], dict[str, str]]:
    """Momentum and solve as in `step_layers`, but no update.

    Returns:
        The directions of each layer by name, in the order of its rows; and how each
        layer was solved, in words.
    """
    solved: dict[str, str] = {}
    found: dict[str, dict[int, Direction]] = {}
    for bucket, solution in _solutions(steps, group, formulation, solved, observe):
        rows = solution.rows()
        for i, step in enumerate(bucket):
            name, finite = step.layer.name, solution.finite[i]
            part, counter = _counter(counts[name], step.counted)
            step.backend.count_([counter], solution.status[i : i + 1], finite[None])
            if part is not counter:
                part += counter
            first = 0 if step.counted is None else step.counted.start
            found.setdefault(name, {})[first] = Direction(rows.layer(i), finite)
    # Pieces of a layer that share a geometry are solved together, out of order.
    ordered = {name: [d[first] for first in sorted(d)] for name, d in found.items()}
    return ordered, solved


def step_along(
    step: LayerStep, whole: Direction, rows: slice, group: dict[str, Any]
) -> None:
    """Orthogonalize a layer's whole direction and step along some rows of it.

    Args:
        step: of these rows.
        whole: all of the layer's rows.
        rows: which of them.
        group: hyperparameters.
    """
    finite, groups = whole.finite[None], step.layer.geometry.groups
    z = orthogonalize(stack_rows([whole.rows]), finite, groups)
    step.backend.step_along_(
        [step.params],
        stack_rows([narrow(z.layer(0), rows)]),
        finite[:, rows],
        group["lr"],
        group["weight_decay"],
    )


def _solutions(
    steps: Iterable[LayerStep],
    group: dict[str, Any],
    formulation: str,
    solved: dict[str, str],
    observe: Callable[..., None] | None,
) -> Iterator[tuple[list[LayerStep], Solution]]:
    """Layers of one geometry with their solution; notes how in `solved`."""
    for bucket in _buckets(steps):
        grads = [step.grads for step in bucket if step.grads is not None]
        finite = [step.finite for step in bucket if step.finite is not None]
        batch = Batch(
            [step.x for step in bucket],
            [step.y for step in bucket],
            [step.momentum for step in bucket],
            grads or None,
            group["momentum"],
            group["nesterov"],
            torch.stack(finite) if finite else None,
        )
        solution = solve(
            bucket[0].backend,
            batch,
            damping=group["damping"],
            cg_iters=group["cg_iters"],
            formulation=formulation,
        )
        if observe is not None:
            observe(bucket, solution, group)
        for step in bucket:
            count = step.x.samples * step.x.positions
            solved[step.layer.name] = f"{solution.formulation}, N = {count}"
        yield bucket, solution


def advance_momentum(
    steps: Iterable[LayerStep], group: dict[str, Any]
) -> list[LayerStep]:
    """``M <- beta M + G`` of all rows, before a solve of some of them.

    Args:
        steps: from `layer_step`.
        group: hyperparameters.

    Returns:
        The steps, without gradients; their momentum is what to precondition.
    """
    advanced = []
    for bucket in _buckets(steps):
        ms, _, finite = bucket[0].backend.momentum_(
            [step.momentum for step in bucket],
            [step.grads for step in bucket],
            group["momentum"],
            group["nesterov"],
        )
        advanced += [
            replace(step, momentum=m, grads=None, finite=rows)
            for step, m, rows in zip(bucket, ms, finite, strict=True)
        ]
    return advanced


Gathered = Sequence[tuple[dict[str, Any], Sequence["LayerStep"]]]
"""Parameter groups, each with what its layers bring to the step."""


def tuned(
    tuning: Tuning, layers: Iterable[Layer], backend: str, gathered: Gathered
) -> AbstractContextManager[None]:
    """A context in which launches use the tuning's table; see `Tuning.applied`.

    Args:
        tuning: the optimizer's.
        layers: all that are preconditioned, so that every rank decides alike.
        backend: one of `ops.BACKENDS`.
        gathered: what this rank solves.
    """
    weight = next((layer.weight for layer in layers), None)
    if weight is None:
        return nullcontext()
    chosen = ops.resolve(backend, weight.device, torch.float32)
    if weight.is_cuda and not chosen.GROUPS_LAYERS:
        return nullcontext()  # torch has nothing to tune, nor need Triton be there
    return tuning.applied(
        weight.device,
        lambda: [b for group, steps in gathered for b in buckets_of(steps, group)],
    )


def buckets_of(steps: Iterable[LayerStep], group: dict[str, Any]) -> list[Bucket]:
    """Layers that share launches, as the tuner wants to know them.

    Args:
        steps: from `layer_step`.
        group: hyperparameters.
    """
    found = []
    for bucket in _buckets(step for step in steps if step.backend.GROUPS_LAYERS):
        first = bucket[0]
        shape = shape_of(Batch([first.x], [first.y], [first.momentum]))
        param, momentum = first.params.weight.dtype, first.momentum.weight.dtype
        dtypes = (first.x.dtype, param, momentum)
        named = replace(shape, name=first.layer.name)
        iters, nesterov = group["cg_iters"], group["nesterov"]
        found.append(Bucket(named, len(bucket), iters, nesterov, dtypes))
    return found


def no_samples(
    layer: Layer, bias: bool, dtype: torch.dtype, rows: int | None = None
) -> Samples:
    """Samples of a layer that has none: a zero, hence the identity Fisher.

    Args:
        layer: whose.
        bias: whether its bias takes part.
        dtype: of the momentum.
        rows: how many are solved here; None for all.
    """
    geometry, weight = layer.geometry, local(layer.weight)
    rows = geometry.rows if rows is None else rows
    x = weight.new_zeros(1, geometry.groups * geometry.dim, dtype=dtype)
    y = weight.new_zeros(1, rows, 1, dtype=dtype)
    return MatrixMap(x, geometry.groups, bias), y


def _without_overlap(grad: Tensor) -> Tensor:
    """The gradient, or a copy of one whose entries share memory, as if expanded."""
    overlaps = any(
        size > 1 and stride == 0
        for size, stride in zip(grad.shape, grad.stride(), strict=True)
    )
    return grad.contiguous() if overlaps else grad


def _buckets(steps: Iterable[LayerStep]) -> list[list[LayerStep]]:
    """Those that can share launches together, as many as a launch can hold."""
    buckets: dict[Hashable, list[LayerStep]] = {}
    for step in steps:
        buckets.setdefault(step.key, []).append(step)
    return [
        some
        for bucket in buckets.values()
        for some in portions(bucket, bucket[0].x.groups)
    ]


def narrow(rows: Rows, index: slice) -> Rows:
    """Some of a layer's rows."""
    return Rows(rows.weight[index], None if rows.bias is None else rows.bias[index])


def _counter(counts: Tensor, rows: slice | None) -> tuple[Tensor, Tensor]:
    """The rows' counters, and a dense tensor to count in."""
    part = counts if rows is None else counts[:, rows]
    if part.shape == counts.shape:
        return counts, counts
    return part, torch.zeros_like(part, memory_format=torch.contiguous_format)
