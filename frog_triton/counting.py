"""A training step of layers whose tensors have no memory: what it launches is counted.

It is made of the very functions that FROG's step is made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .distributed.alone import Alone
from .eager import Launched, eager_operations
from .gradients import GradientWatch
from .kernels.launch import capturable, recording
from .kernels.work import Work, work
from .layers import ConvMap
from .layers.conv import ConvSpec
from .model.plan import Layer
from .model.routing import route
from .solve.launches import Bucket, DTypes, LayerShape, together, trial_step
from .step import LayerStep, Samples, layer_step
from .update import numbers_of, step_layers

META = torch.device("meta")


class _Alone(Alone):
    """One rank, whose samples have sizes and no memory."""

    def __init__(self, shapes: Mapping[str, LayerShape], dtype: torch.dtype) -> None:
        self._shapes = shapes
        self._dtype = dtype

    def samples(
        self, layer: Layer, bias: bool, dtype: torch.dtype, capture: Any
    ) -> Samples:
        bucket = Bucket(self._shapes[layer.name], dtypes=(self._dtype, dtype, dtype))
        batch = trial_step(bucket, "gram", _empty).batch
        return batch.xs[0], batch.ys[0]


class Member(NamedTuple):
    """A layer, and what it brings to a step."""

    shape: LayerShape
    step: LayerStep


class CountedStep:
    """A training step of layers whose tensors have no memory.

    Args:
        layers: with their shapes.
        dtypes: of samples, parameters and momentum.
        group: hyperparameters.
    """

    def __init__(
        self,
        layers: Sequence[tuple[LayerShape, Layer]],
        dtypes: DTypes,
        group: dict[str, Any],
    ) -> None:
        self._itemsize = dtypes[0].itemsize
        self._group = group
        named = {layer.name: shape for shape, layer in layers}
        self._world = _Alone(named, dtypes[0])
        params = [param for _, layer in layers for param in layer.params]
        self._grads = {str(i): p.grad for i, p in enumerate(params)}
        state = {
            p: {"momentum_buffer": torch.empty_like(p, dtype=dtypes[2])} for p in params
        }
        how: tuple[Any, ...] = (state, self._world, None, "triton")
        self._members = [Member(s, layer_step(x, *how)) for s, x in layers]
        self._counts = {
            layer.name: _empty((2, layer.geometry.rows), torch.int32)
            for _, layer in layers
        }
        self._numbers = numbers_of(group)

    def beside(self) -> dict[str, list[Launched]]:
        """What belongs to no geometry; to be called first."""
        from .kernels.tables import numbers_on  # Triton need not be there for torch's

        drawn = [n * self._itemsize for m in self._members for n in sampled(m.shape)]
        samples = [
            Launched("_draw_kernel", Work(bytes=2 * n, launches=1)) for n in drawn
        ]
        watch = GradientWatch()
        watch.expect(self._grads)

        def look() -> None:
            found_inf = watch.found_inf(self._grads, may_wait=True)
            watch.count_skipped(found_inf)
            self._numbers = numbers_of(self._group, found_inf)

        gradients = _counted(look)
        numbers = _counted(lambda: numbers_on(self._numbers, META))
        return {"samples": samples, "gradients": gradients, "numbers": numbers}

    def geometries(self) -> list[list[Member]]:
        """Layers that share launches."""
        return together(self._members, lambda m: m.step.key, lambda m: m.shape.groups)

    def solve(self, members: Sequence[Member], formulation: str) -> list[Launched]:
        """Momentum, solve and update of layers of one geometry."""
        steps = [member.step for member in members]

        def run() -> None:
            how = (self._group, self._numbers, formulation, self._counts)
            step_layers(self._world, steps, *how)
            for step in steps:
                step.write_back()

        return _counted(run)


@torch.no_grad()
def _counted(run: Callable[[], Any]) -> list[Launched]:
    """Launches of kernels and of torch's operations, nothing of which runs."""
    with capturable(False), recording(run=False) as launches:
        operations = eager_operations(run, META)
    return [*(Launched(made.name, work(made)) for made in launches), *operations]


def _empty(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device=META)


def without_memory(layer: Layer, dtype: torch.dtype) -> Layer:
    """A layer with parameters and gradients of the same sizes and strides."""

    def twin(param: nn.Parameter) -> nn.Parameter:
        like = torch.empty_strided(
            param.shape, param.stride(), dtype=dtype, device=META
        )
        made = nn.Parameter(like)
        made.grad = torch.empty_like(like)
        return made

    bias = None if layer.bias is None else twin(layer.bias)
    return replace(layer, weight=twin(layer.weight), bias=bias)


def stand_ins(shapes: Sequence[LayerShape]) -> list[Layer]:
    """Layers of such shapes, with parameters of their own."""
    with META:
        model = nn.ModuleList(_module(shape) for shape in shapes)
    params = dict.fromkeys(model.parameters(), 0)
    plan = route(model, params, exclude_output_layer=False)
    return list(plan.layers.values())


def _module(shape: LayerShape) -> nn.Module:
    if shape.conv is None and shape.groups == 1:
        return nn.Linear(shape.dim, shape.rows, shape.bias)
    spec = shape.conv or ConvSpec((1,), (1,), (0,), (1,), shape.groups)
    channels = shape.groups * shape.dim // math.prod(spec.kernel)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(spec.kernel) - 1]
    sizes: tuple[Any, ...] = (spec.kernel, spec.stride, spec.padding, spec.dilation)
    return kind(channels, shape.rows, *sizes, spec.groups, shape.bias)


def sampled(shape: LayerShape) -> tuple[int, int]:
    """Entries of the samples: activations, and output gradients."""
    x = shape.samples * shape.dim * shape.groups
    if shape.image is not None and shape.conv is not None:
        x = _images(shape)
    return x, shape.samples * shape.rows


def _images(shape: LayerShape) -> int:
    """Entries of the sampled images."""
    assert shape.image is not None and shape.conv is not None
    one = ConvMap(torch.empty(1, *shape.image, device="meta"), shape.conv, False)
    return shape.samples // one.positions * math.prod(shape.image)
