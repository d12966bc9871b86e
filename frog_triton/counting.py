"""A training step of layers whose tensors have no memory: what it launches is counted.

It is made of the very functions that FROG's step is made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from .distributed.alone import Alone
from .eager import FROM_HOST, Launched, eager_operations
from .gradients import GradientWatch
from .kernels.launch import recording
from .kernels.work import Work, work
from .layers import ConvMap, LinearMap
from .layers.conv import ConvSpec
from .linalg.numbers import Numbers
from .model.plan import Layer
from .model.routing import route
from .solve.launches import Bucket, DTypes, LayerShape, trial_step
from .step import LayerStep, Samples, alike, layer_step
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
        return cast(LinearMap, batch.xs[0]), batch.ys[0]


class CountedStep:
    """A training step of layers whose tensors have no memory.

    It is counted as it is once its launches are recorded (`Routine`): all addresses and
    numbers come from the host in one copy.

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
        from .kernels.tables import numbers_on  # Triton need not be there for torch's

        self._group = group
        self._shapes = {layer.name: shape for shape, layer in layers}
        self._world = _Alone(self._shapes, dtypes[0])
        self._itemsize = dtypes[0].itemsize
        self._counts = {
            layer.name: _empty((2, layer.geometry.rows), torch.int32)
            for _, layer in layers
        }
        params = [param for _, layer in layers for param in layer.params]
        momenta = (torch.empty_like(p, dtype=dtypes[2]) for p in params)
        state = {
            p: {"momentum_buffer": m} for p, m in zip(params, momenta, strict=True)
        }
        how: tuple[Any, ...] = (state, self._world, None, "triton")
        self._steps = [layer_step(layer, *how) for _, layer in layers]
        self._from_host = Work(launches=1)
        grads = {str(i): p.grad for i, p in enumerate(params) if p.grad is not None}
        self._numbers, self._gradients = self._look(grads)
        self._skip = self._counted(lambda: numbers_on(self._numbers, META))

    def _look(self, grads: Mapping[str, Tensor]) -> tuple[Numbers, list[Launched]]:
        """The look at gradients, and the numbers of a step that may be skipped."""
        watch, found = GradientWatch("triton"), []
        with torch.no_grad(), recording(run=False):
            watch.look(grads)  # makes what it keeps for the next time

        def look() -> None:
            found.append(watch.found_inf(grads, may_wait=True))
            watch.count_skipped(found[0])

        launched = self._counted(look)
        # What the kernel itself says is a bound: it takes chunks as whole.
        read = Work(bytes=sum(grad.nbytes for grad in grads.values()), launches=1)
        launched = [
            made._replace(work=read) if made.name == "_magnitudes_kernel" else made
            for made in launched
        ]
        return numbers_of(self._group, *found), launched

    def geometries(self) -> list[list[LayerStep]]:
        """Layers that share launches."""
        return alike(self._steps)

    def shape(self, step: LayerStep) -> LayerShape:
        """Of a layer."""
        return self._shapes[step.layer.name]

    def solve(
        self, steps: Sequence[LayerStep] | None, formulation: str
    ) -> list[Launched]:
        """Momentum, solve and update.

        Args:
            steps: layers; None for all.
            formulation: ``"primal"``, ``"gram"`` or ``"auto"``.
        """
        some = self._steps if steps is None else steps

        def run() -> None:
            how = (self._group, self._numbers, formulation, self._counts)
            step_layers(self._world, some, *how)
            for step in some:
                step.write_back()

        return self._counted(run)

    def beside(self) -> dict[str, list[Launched]]:
        """What belongs to no geometry; to be called when all are solved."""
        drawn = [n for shape in self._shapes.values() for n in sampled(shape)]
        samples = [
            Launched("_draw_kernel", Work(bytes=2 * n * self._itemsize, launches=1))
            for n in drawn
        ]
        numbers = [Launched(FROM_HOST, self._from_host), *self._skip]
        return {"samples": samples, "gradients": self._gradients, "numbers": numbers}

    @torch.no_grad()
    def _counted(self, run: Callable[[], Any]) -> list[Launched]:
        """Launches of kernels and of torch's operations, nothing of which runs.

        What comes from the host is put to the one copy.
        """
        with recording(run=False) as launches:
            operations = eager_operations(run, META)
        brought = [o.work.bytes for o in operations if o.name == FROM_HOST]
        self._from_host += Work(bytes=sum(brought) // 2)  # the host's is no traffic
        there = [o for o in operations if o.name != FROM_HOST]
        return [*(Launched(made.name, work(made)) for made in launches), *there]


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
    how: dict[str, Any] = {
        "stride": spec.stride,
        "padding": spec.padding,
        "dilation": spec.dilation,
        "groups": spec.groups,
        "bias": shape.bias,
    }
    return kind(channels, shape.rows, cast(Any, spec.kernel), **how)


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
