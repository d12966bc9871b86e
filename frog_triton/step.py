"""What a layer brings to a step: rows of its parameters, and samples."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import ops, recent
from .layers import LinearMap, MatrixMap, RowAxes
from .linalg.rows import Rows, local, written_out
from .model.plan import Layer
from .ops.backend import Backend
from .solve.batch import Batch
from .solve.launches import MOST_PROBLEMS, PORTION, Bucket, in_portions, shape_of
from .solve.launches import together as in_launches
from .solve.together import may_join

if TYPE_CHECKING:
    from .capture.capture import SampleCapture
    from .distributed import World

Samples = tuple[LinearMap, Tensor]


@dataclass(frozen=True)
class LayerStep:
    """What one layer brings to a step.

    Attributes:
        layer: the layer.
        backend: serves its tensors.
        x: sampled activations.
        y: their output gradients ``(n, R, P)``.
        momentum: M, rows in front, otherwise in the parameters' own shapes; updated in
            place, as theta is.
        grads: G likewise; None if the momentum has them already.
        params: theta likewise.
        finite: without `grads`, rows whose gradient was finite.
        counted: which of the layer's counters are of these rows; None for all.
        homes: momentum and parameters whose rows lie apart in memory, with the copy
            that this step works on; see `write_back`.
    """

    layer: Layer
    backend: Backend
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

    @cached_property
    def joins(self) -> bool:
        """Whether layers of other sizes are solved with this one; see `together`."""
        return (
            not self.backend.GROUPS_LAYERS
            and isinstance(self.x, MatrixMap)
            and self.x.groups == 1
            and may_join(self.x.x, self.momentum.weight)
            and (self.finite is None or bool(self.finite.all()))
        )

    @property
    def joint_key(self) -> Hashable:
        """Layers with equal keys that join can be solved together."""
        return self.x.samples, self.momentum.weight.dtype, self.grads is None

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
            self.momentum.weight.shape[0],
            self.momentum.dim,
            *((_strides(r.weight), r.weight.dtype, r.weight.device) for r in rows),
            self.x.dtype,
            self.y.dtype,
        )


def layer_step(
    layer: Layer,
    state: Mapping[Any, dict[str, Any]],
    world: World,
    capture: SampleCapture,
    backend: str,
    sample_steps: int = 1,
) -> LayerStep:
    """Gather a layer's rows, those that lie on this rank, and samples.

    Args:
        layer: at least one of its parameters has a gradient.
        state: the optimizer's.
        world: knows the samples of all ranks.
        capture: holds those of this one.
        backend: one of `ops.BACKENDS`.
        sample_steps: how many steps' samples are solved together.

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
    momenta = (state[p].get("momentum_buffer") for p in layer.params)
    dtype = next(m.dtype for m in momenta if m is not None)
    with_bias = bias_grad is not None
    if sample_steps == 1:
        x, y = world.samples(layer, with_bias, dtype, capture)
    else:
        of_steps = recent.samples_of(layer, state[weight], capture, sample_steps)
        x, y = _as_map(of_steps, layer, with_bias, dtype)
    if weight.grad is not None:
        buffer = local(state[weight]["momentum_buffer"])
        momentum = Rows(_rows_of(axes, buffer, homes), momentum_bias)
        params = Rows(_rows_of(axes, local(weight), homes), params_bias)
        grad = _without_overlap(local(weight.grad))
        grads = Rows(_rows_of(axes, grad, []), bias_grad)
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


def buckets_of(steps: Iterable[LayerStep], group: dict[str, Any]) -> list[Bucket]:
    """Layers that share launches, as the tuner wants to know them.

    Args:
        steps: from `layer_step`.
        group: hyperparameters.
    """
    found = []
    for bucket in alike(step for step in steps if step.backend.GROUPS_LAYERS):
        first = bucket[0]
        shape = shape_of(Batch([first.x], [first.y], [first.momentum]))
        param, momentum = first.params.weight.dtype, first.momentum.weight.dtype
        dtypes = (first.x.dtype, param, momentum)
        named = replace(shape, name=first.layer.name)
        iters, nesterov = group["cg_iters"], group["nesterov"]
        found.append(Bucket(named, len(bucket), iters, nesterov, dtypes))
    return found


def alike(steps: Iterable[LayerStep]) -> list[list[LayerStep]]:
    """Those that can share launches together, as many as a launch can hold."""
    return in_launches(steps, lambda step: step.key, lambda step: step.x.groups)


def portions(buckets: Iterable[list[LayerStep]]) -> list[list[list[LayerStep]]]:
    """Layers of one geometry each, as many together as are solved at once."""

    def size(bucket: Sequence[LayerStep]) -> int:
        # A backend that shares no launches takes one after the other.
        weights = sum(step.momentum.weight.numel() for step in bucket)
        return weights if bucket[0].backend.GROUPS_LAYERS else PORTION + 1

    return in_portions(buckets, size)


def is_mixture(layer: Layer) -> bool:
    """Whether a layer's rows belong to experts, each with tokens of its own."""
    return len(layer.axes.rows) > 1 and layer.axes.split == 1


def untouched(step: LayerStep) -> Tensor:
    """Rows ``(R,)`` of experts whose gradient is zero: no token was sent to them."""
    assert step.grads is not None
    weight, bias = step.grads
    unit = step.layer.unit
    moved: Tensor = weight.unflatten(0, (-1, unit)).ne(0).any(2).any(1)
    if bias is not None:
        moved = moved | bias.unflatten(0, (-1, unit)).ne(0).any(1)
    return (~moved).repeat_interleave(unit)


def _strides(weight: Tensor) -> tuple[int, ...]:
    """Of rows, and of what has several entries in them."""
    first, *others = zip(weight.shape, weight.stride(), strict=True)
    return first[1], *(stride for size, stride in others if size != 1)


def _at_home(home: Tensor, rows: Tensor, homes: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Rows, noted with where they are to be copied back if they are a copy."""
    if rows.untyped_storage()._cdata != home.untyped_storage()._cdata:
        homes.append((home, rows))
    return rows


def _rows_of(
    axes: RowAxes, tensor: Tensor, homes: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """A tensor with its rows in front, in its own memory where there is a way."""
    view = axes.view(tensor)
    return _at_home(view, view.flatten(0, len(axes.rows) - 1), homes)


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


def _as_map(
    samples: recent.Pair | None, layer: Layer, bias: bool, dtype: torch.dtype
) -> Samples:
    if samples is None:
        return no_samples(layer, bias, dtype)
    x, y = samples
    groups = x.shape[1] // layer.geometry.dim  # 1 where all see the same inputs
    return MatrixMap(x, groups, bias), y.unsqueeze(-1)


def _without_overlap(grad: Tensor) -> Tensor:
    """The gradient; a copy if its entries share memory, or wait for their signs."""
    overlaps = any(
        size > 1 and stride == 0
        for size, stride in zip(grad.shape, grad.stride(), strict=True)
    )
    return grad.contiguous() if overlaps else grad.resolve_neg()


def narrow(rows: Rows, index: slice) -> Rows:
    """Some of a layer's rows."""
    return Rows(rows.weight[index], None if rows.bias is None else rows.bias[index])
