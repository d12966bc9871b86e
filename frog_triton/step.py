"""One step of Algorithm 1 for the layers of a parameter group."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import ops
from .autotune.tuning import Tuning
from .launches import shape_of
from .layers import LinearMap, MatrixMap
from .ops.types import Rows
from .preconditioner import solve
from .routing import Layer
from .solvers import Batch

if TYPE_CHECKING:
    from .autotune.jobs import Geometry

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
        grads: G as rows.
        params: theta in the parameters' own shapes, updated in place.
    """

    layer: Layer
    backend: ModuleType
    x: LinearMap
    y: Tensor
    momentum: Rows
    grads: Rows
    params: Rows

    @property
    def key(self) -> Hashable:
        """Layers with equal keys can share launches."""
        if not self.backend.GROUPS_LAYERS:
            return self.layer.name
        grad = self.grads.weight
        return (
            self.x.key,
            self.x.samples,
            self.x.groups,
            self.x.bias,
            self.y.shape,
            self.momentum.weight.shape,
            grad.stride(),
            self.params.weight.stride(),
            *(
                (rows.weight.dtype, rows.weight.device)
                for rows in (self.momentum, self.grads, self.params)
            ),
            self.x.dtype,
            self.y.dtype,
        )


def layer_step(
    layer: Layer,
    state: Mapping[Any, dict[str, Any]],
    samples: Callable[[Layer, bool], Samples],
    backend: str,
) -> LayerStep:
    """Gather a layer's rows and samples.

    Args:
        layer: at least one of its parameters has a gradient.
        state: the optimizer's.
        samples: gives a layer's samples, with or without its bias.
        backend: one of `ops.BACKENDS`.
    """
    weight, bias = layer.weight, layer.bias
    if bias is not None and bias.grad is None:
        bias = None
    rows = layer.geometry.rows
    momentum = Rows(
        state[weight]["momentum_buffer"].view(rows, -1),
        None if bias is None else state[bias]["momentum_buffer"],
    )
    bias_grad = None if bias is None else bias.grad
    x, y = samples(layer, bias is not None)
    if weight.grad is not None:
        grads = Rows(weight.grad.reshape(rows, -1), bias_grad)
        params = Rows(weight, bias)
    else:  # frozen: the bias is the whole row
        momentum = Rows(momentum.weight[:, :0], momentum.bias)
        grads = Rows(momentum.weight, bias_grad)
        params = Rows(weight.new_empty(rows, 0), bias)
        x = MatrixMap(y.new_empty(y.shape[0] * y.shape[2], 0), bias=True)
        y = y.transpose(1, 2).reshape(-1, rows, 1)
    chosen = ops.resolve(backend, weight.device, momentum.weight.dtype)
    return LayerStep(layer, chosen, x, y, momentum, grads, params)


def step_layers(
    steps: Iterable[LayerStep],
    group: dict[str, Any],
    formulation: str,
    counts: Mapping[str, Tensor],
) -> dict[str, str]:
    """Momentum, solve and update of all layers, those of one geometry together.

    Args:
        steps: from `layer_step`.
        group: hyperparameters.
        formulation: ``"primal"``, ``"gram"`` or ``"auto"``.
        counts: of each layer by name, int32 ``(2, R)``: how often a row has met
            samples, and a gradient, that are not finite; updated in place.

    Returns:
        How each layer was solved, in words.
    """
    solved: dict[str, str] = {}
    buckets: dict[Hashable, list[LayerStep]] = {}
    for step in steps:
        buckets.setdefault(step.key, []).append(step)
    for bucket in buckets.values():
        batch = Batch(
            [step.x for step in bucket],
            [step.y for step in bucket],
            [step.momentum for step in bucket],
            [step.grads for step in bucket],
            group["momentum"],
            group["nesterov"],
        )
        solution = solve(
            bucket[0].backend,
            batch,
            damping=group["damping"],
            cg_iters=group["cg_iters"],
            formulation=formulation,
        )
        solution.update_(
            [step.params for step in bucket],
            [counts[step.layer.name] for step in bucket],
            group["lr"],
            group["weight_decay"],
        )
        for step in bucket:
            count = step.x.samples * step.x.positions
            solved[step.layer.name] = f"{solution.formulation}, N = {count}"
    return solved


Gathered = Sequence[tuple[dict[str, Any], Sequence["LayerStep"]]]
"""Parameter groups, each with what its layers bring to the step."""


def tuned(tuning: Tuning, gathered: Gathered) -> AbstractContextManager[None]:
    """A context in which launches use the tuning's table; see `Tuning.applied`."""
    devices = [step.params.weight.device for _, steps in gathered for step in steps]
    if not devices:
        return nullcontext()
    return tuning.applied(
        devices[0],
        lambda: [g for group, steps in gathered for g in geometries(steps, group)],
    )


def geometries(steps: Iterable[LayerStep], group: dict[str, Any]) -> list[Geometry]:
    """Layers that share launches, as the tuner wants to know them.

    Args:
        steps: from `layer_step`.
        group: hyperparameters.
    """
    from .autotune.jobs import Geometry

    buckets: dict[Hashable, list[LayerStep]] = {}
    for step in steps:
        if step.backend.GROUPS_LAYERS:
            buckets.setdefault(step.key, []).append(step)
    found = []
    for bucket in buckets.values():
        first = bucket[0]
        shape = shape_of(Batch([first.x], [first.y], [first.momentum]))
        rows = (first.params, first.momentum)
        dtypes = (first.x.dtype, *(r.weight.dtype for r in rows))
        named = replace(shape, name=first.layer.name)
        iters, nesterov = group["cg_iters"], group["nesterov"]
        found.append(Geometry(named, len(bucket), iters, nesterov, dtypes))
    return found


def no_samples(layer: Layer, bias: bool, dtype: torch.dtype) -> Samples:
    """Samples of a layer that has none: a zero, hence the identity Fisher."""
    geometry = layer.geometry
    x = layer.weight.new_zeros(1, geometry.groups * geometry.dim, dtype=dtype)
    y = layer.weight.new_zeros(1, geometry.rows, 1, dtype=dtype)
    return MatrixMap(x, geometry.groups, bias), y
