"""The launches of a step for given sizes; their tensors have no memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..kernels.launch import Launch, Launches, recording
from ..layers import ConvMap, LinearMap, MatrixMap
from ..layers.conv import ConvSpec
from ..linalg.numbers import Numbers
from ..linalg.rows import Rows
from ..ops.backend import Backend
from . import FORMULATIONS, Batch, prepared


@dataclass(frozen=True)
class LayerShape:
    """A layer as far as cost goes.

    Attributes:
        name: for the report; layers of one geometry are equal whatever their names.
        rows: R.
        dim: D, weights in a row.
        samples: N, all positions counted.
        groups: groups.
        bias: whether rows have a bias.
        image: shape of an example, ``(channels, *spatial)``, where the samples are
            whole images of a convolution; else None.
        conv: the convolution then.
    """

    name: str = field(compare=False)
    rows: int
    dim: int
    samples: int
    groups: int = 1
    bias: bool = True
    image: tuple[int, ...] | None = None
    conv: ConvSpec | None = None

    @property
    def row_length(self) -> int:
        """D of the paper, the bias included."""
        return self.dim + self.bias

    @property
    def volume(self) -> bool:
        """Whether the samples are whole images of three dimensions."""
        return self.conv is not None and len(self.conv.kernel) > 2


def shape_of(batch: Batch) -> LayerShape:
    """Sizes of the systems of a batch."""
    x, rows = batch.xs[0], batch.ms[0].weight.shape[0]
    n = x.samples * x.positions
    shape = LayerShape("", rows, x.dim, n, x.groups, x.bias)
    if isinstance(x, ConvMap):
        shape = replace(shape, image=tuple(x.x.shape[1:]), conv=x.spec)
    return shape


DTypes = tuple[torch.dtype, torch.dtype, torch.dtype]
"""Of samples, parameters and momentum."""

_SINGLE: DTypes = (torch.float32,) * 3


@dataclass(frozen=True)
class Bucket:
    """Layers of one geometry, which share launches.

    Attributes:
        shape: of each layer.
        count: how many.
        iters: k.
        nesterov: whether the momentum is Nesterov's.
        dtypes: of samples, parameters and momentum.
    """

    shape: LayerShape
    count: int = 1
    iters: int = 4
    nesterov: bool = False
    dtypes: DTypes = _SINGLE

    @property
    def weights(self) -> int:
        """Of all layers, without biases."""
        return self.count * self.shape.rows * self.shape.dim

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "dtypes": [str(d).split(".")[1] for d in self.dtypes]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Bucket:
        """What `to_json` gave."""
        shape = dict(values["shape"])
        if shape["conv"] is not None:
            conv: dict[str, Any] = {
                name: tuple(v) if isinstance(v, list) else v
                for name, v in shape["conv"].items()
            }
            shape["conv"] = ConvSpec(**conv)
            shape["image"] = tuple(shape["image"])
        samples, params, momentum = (getattr(torch, d) for d in values["dtypes"])
        return cls(
            LayerShape(**shape),
            values["count"],
            values["iters"],
            values["nesterov"],
            (samples, params, momentum),
        )


T = TypeVar("T")

MOST_PROBLEMS = 65535
"""Layers times groups that a launch can hold: CUDA's limit to a grid's second axis."""


def together(
    layers: Iterable[T], key: Callable[[T], Hashable], groups: Callable[[T], int]
) -> list[list[T]]:
    """Layers of one geometry, as many together as a launch can hold.

    Args:
        layers: of any geometries.
        key: equal for layers of one geometry.
        groups: how many a layer has.
    """
    alike: dict[Hashable, list[T]] = {}
    for layer in layers:
        alike.setdefault(key(layer), []).append(layer)
    found = []
    for some in alike.values():
        most = max(1, MOST_PROBLEMS // groups(some[0]))
        found += [some[i : i + most] for i in range(0, len(some), most)]
    return found


PORTION = 2**26
"""Weights of layers that are solved at once, whatever their sizes.

Small layers share launches so; large ones fill a GPU alone, and what a solve keeps
beside them, some times their size, serves the next portion."""


def in_portions(items: Iterable[T], size: Callable[[T], int]) -> list[list[T]]:
    """Items in their order, as many together as have `PORTION` weights, or one.

    Args:
        items: layers, or several.
        size: how many weights an item has.
    """
    found: list[list[T]] = []
    room = 0
    for item in items:
        if not found or size(item) > room:
            found.append([])
            room = PORTION
        found[-1].append(item)
        room -= size(item)
    return found


def buckets(
    shapes: Iterable[LayerShape],
    dtypes: DTypes = _SINGLE,
    iters: int = 4,
    nesterov: bool = False,
) -> list[Bucket]:
    """Layers by geometry, named after the first of each.

    Args:
        shapes: of the layers.
        dtypes: of samples, parameters and momentum.
        iters: k.
        nesterov: whether the momentum is Nesterov's.
    """
    found = together(shapes, lambda shape: shape, lambda shape: shape.groups)
    return [Bucket(some[0], len(some), iters, nesterov, dtypes) for some in found]


Make = Callable[[tuple[int, ...], torch.dtype], Tensor]


@dataclass(frozen=True)
class Trial:
    """A step of made-up tensors, to be counted, compiled or timed.

    Attributes:
        batch: samples, momentum and gradients.
        params: theta of each layer.
        counts: anomaly counters of each layer.
        formulation: ``"primal"`` or ``"gram"``.
        iters: k.
    """

    batch: Batch
    params: list[Rows]
    counts: list[Tensor]
    formulation: str
    iters: int

    def step(self, backend: Backend, orthogonalize: bool = False) -> None:
        """Momentum, solve and update, as `FROG.step` makes them."""
        numbers = Numbers(momentum=0.9, damping=1e-4, lr=2e-2, weight_decay=1e-2)
        batch = prepared(backend, replace(self.batch, numbers=numbers))
        solution = FORMULATIONS[self.formulation](backend, batch, self.iters)
        if orthogonalize:
            status, finite = solution.status, solution.finite
            rows = solution.rows(narrow=True)
            z = backend.orthogonalize(rows, finite, batch.xs[0].groups)
            how = (status, finite, self.counts, numbers)
            backend.direction_update_(self.params, z, *how)
        else:
            solution.update_(self.params, self.counts)


def trial_step(bucket: Bucket, formulation: str, make: Make) -> Trial:
    """A step for layers of one geometry.

    Args:
        bucket: the layers.
        formulation: ``"primal"`` or ``"gram"``.
        make: gives a tensor of a shape and dtype. Where values matter, they should be
            normally distributed, integers zero.
    """
    shape, count = bucket.shape, bucket.count
    sample_dtype, param_dtype, momentum_dtype = bucket.dtypes
    n, r, d, groups = shape.samples, shape.rows, shape.dim, shape.groups

    def rows(dtype: torch.dtype) -> list[Rows]:
        bias = [make((r,), dtype) if shape.bias else None for _ in range(count)]
        return [Rows(make((r, d), dtype), b) for b in bias]

    def samples(*size: int) -> list[Tensor]:
        return [make(size, sample_dtype) for _ in range(count)]

    xs: list[LinearMap]
    if shape.conv is None or shape.image is None:
        ys = samples(n, r, 1)
        xs = [MatrixMap(x, groups, shape.bias) for x in samples(n, groups * d)]
    else:
        meta = torch.empty(1, *shape.image, device="meta")
        one = ConvMap(meta, shape.conv, False)
        examples = n // one.positions
        ys = samples(examples, r, one.positions)
        images = samples(examples, *shape.image)
        if len(shape.image) == 3:  # as fast training has them
            images = [x.to(memory_format=torch.channels_last) for x in images]
        xs = [ConvMap(x, shape.conv, shape.bias) for x in images]
    momenta, grads = rows(momentum_dtype), rows(param_dtype)
    batch = Batch(xs, ys, momenta, grads, nesterov=bucket.nesterov)
    params = rows(param_dtype)
    counts = [make((2, r), torch.int32) for _ in range(count)]
    return Trial(batch, params, counts, formulation, bucket.iters)


def steps_launches(buckets: Sequence[Bucket], formulation: str) -> Launches:
    """The launches of a step for layers of several geometries, as they are shared.

    Args:
        buckets: the layers.
        formulation: ``"primal"`` or ``"gram"``, of all.
    """
    from ..ops import triton_ops  # as below

    trials = [trial_step(bucket, formulation, _without_memory) for bucket in buckets]
    with recording(run=False) as launches:
        triton_ops.side_by_side([partial(t.step, triton_ops) for t in trials])
    return launches


def _without_memory(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def step_launches(
    bucket: Bucket, formulation: str, orthogonalize: bool = False
) -> list[Launch]:
    """The launches of a step for layers of one geometry; their tensors have no memory.

    Args:
        bucket: the layers.
        formulation: ``"primal"`` or ``"gram"``.
        orthogonalize: as for `FROG`.
    """
    from ..ops import triton_ops  # Triton need not be installed for torch's backend

    trial = trial_step(bucket, formulation, _without_memory)
    with recording(run=False) as launches:
        trial.step(triton_ops, orthogonalize)
    return launches.parts
